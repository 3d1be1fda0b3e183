"""launch.price beside what it predicts: steps of 1, 2 and 4 real processes, by CPU time.

    python -m tests.benchmarks.price [--json] [--engines ddp zero1 zero2 zero3]

ResNet-18 at 64 pixels and a BERT of two layers, 32 pairs in micro-batches of 8, one thread a process, gloo. CPU time of
a process is what a step takes where each has a core of its own, however busy the machine is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from launch.links import Links, measure_links
from launch.price import Calibration, calibrate, predict
from tests.support.distributed import run_distributed
from tests.support.exactness import engine_environment
from tests.support.running import prepare
from train import cli, distributed
from train.config import RunConfig

PROCESSES = {"ddp": (1, 2, 4), "zero1": (1, 2), "zero2": (1, 2), "zero3": (1, 2)}
STEPS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object per number of processes")
    parser.add_argument("--engines", nargs="+", choices=PROCESSES, default=list(PROCESSES))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        config = prepare(Path(directory), steps=10_000)
        links = run_distributed(links_of, 2)[0]
        for engine in options.engines:
            for row in compared(config, directory, engine, links):
                print(json.dumps(row) if options.json else row, flush=True)


def compared(config: RunConfig, directory: str, engine: str, links: Links) -> list[dict]:
    """Per number of processes, predicted and measured CPU seconds of a step."""
    environment = engine_environment(engine, directory)
    path = Path(directory) / "config.yaml"
    path.write_text(cli.to_yaml(config))
    (found,) = run_distributed(calibration_of, 1, str(path), links, environment=environment)
    rows = []
    for processes in PROCESSES[engine]:
        parts = predict(found, config, processes)
        measured = statistics.mean(run_distributed(step_of, processes, str(path), environment=environment))
        shown = {part: round(value, 4) for part, value in parts.items()}
        rows.append({"engine": engine, "processes": processes, "measured": round(measured, 4), **shown})
        rows[-1]["error"] = round(parts["step"] / measured - 1, 3)
    return rows


def links_of() -> Links:
    from train.engine.start import start

    start()
    return measure_links(time.process_time)


def calibration_of(path: str, links: Links) -> Calibration:
    from train.engine.build import engine_of_run
    from train.engine.start import start
    from train.feed import Feed
    from train.model.pair import build_model

    config, accelerator = cli.load(path), start()
    feed = Feed(config)
    engine = engine_of_run(accelerator, build_model(config, feed.mean, feed.std), config)
    return calibrate(config, engine, links, 20, feed, time.process_time)


def step_of(path: str) -> float:
    """The median CPU seconds of this rank's steps."""
    from data_pipeline.loader import FOR_EVER
    from data_pipeline.tokenizer import Tokenizer
    from train.engine.build import engine_of_run
    from train.engine.optim import set_lrs
    from train.engine.start import start
    from train.feed import Feed
    from train.model.pair import build_model
    from train.step import training_step

    config, accelerator = cli.load(path), start()
    feed = Feed(config)
    engine = engine_of_run(accelerator, build_model(config, feed.mean, feed.std), config)
    set_lrs(engine.optimizer, 0, 10_000, config.optim)
    batches = iter(feed.batches(Tokenizer(config.model.text.name, config.data.max_tokens), 0, FOR_EVER))
    share = config.train.global_batch // (config.train.micro_batch * distributed.world_size())
    took = []
    for _ in range(STEPS):
        began = time.process_time()
        own = [replace(next(batches)) for _ in range(share)]
        training_step(engine, own, config)
        took.append(time.process_time() - began)
    return statistics.median(took[2:])


if __name__ == "__main__":
    main()
