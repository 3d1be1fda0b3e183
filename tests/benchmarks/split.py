"""What taking a step's time apart costs: the same steps with and without, in pairs, by the process's CPU time.

    python -m tests.benchmarks.split [--pairs 30] [--json]

ResNet-18 at 64 pixels and a BERT of two layers, two micro-batches of 8, features cached. The cost is that of the marks,
whatever the towers, so larger ones pay a smaller share; steps on a busy machine differ by more than it, so it is also
measured by itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from tests.benchmarks.batches import random_batch
from tests.support.small import small_config
from train.engine.build import engine_of_run
from train.engine.start import start
from train.model.pair import build_model
from train.step import training_step
from train.timing import PARTS, StepClock, section

CALLS = 100_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=30, help="of steps (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        config = small_config(Path(directory))
        config.data.image_size, config.train.global_batch, config.train.micro_batch = 64, 16, 8
        accelerator = start()
        engine = engine_of_run(accelerator, build_model(config, (0.5,) * 3, (0.25,) * 3), config)
        batches = random_batch(config)
        for batch in batches:
            batch.ids_BL %= 100
        seconds: dict[bool, list[float]] = {False: [], True: []}
        split: dict[str, float] = {}
        with StepClock(engine.device) as clock:
            for number in range(2 * options.pairs + 4):
                measure = number % 4 in (1, 2)  # without, with, with, without
                began = time.process_time()
                clock.begin(measure)
                training_step(engine, batches, config)
                split = clock.end() or split
                if number >= 4:
                    seconds[measure].append(time.process_time() - began)
    ratio = statistics.median(b / a for a, b in zip(seconds[False], seconds[True], strict=True))
    result = {
        "step_ms": 1e3 * statistics.median(seconds[False]),
        "ratio": ratio,
        "idle_section_ns": section_ns(False),
        "measured_section_ns": section_ns(True),
        "split_ms": {part: round(1e3 * split[part], 2) for part in PARTS},
    }
    print(json.dumps(result) if options.json else "\n".join(f"{name:16} {value}" for name, value in result.items()))


def section_ns(measure: bool) -> float:
    """Nanoseconds of CPU time of a section, in a step that is measured or not."""
    part = section("other")
    with StepClock(torch.device("cpu")) as clock:
        clock.begin(measure)
        began = time.process_time()
        for _ in range(CALLS):
            with part:
                pass
        return (time.process_time() - began) / CALLS * 1e9


if __name__ == "__main__":
    main()
