"""What measuring the towers and balancing them costs, as a share of the step time.

    python -m tests.benchmarks.balance --json [--config train/configs/scratch.yaml] [--pairs 15] [--threads 1]

Real steps of a run's model at its batch size, precision bf16 on a GPU and where the CPU has it, random pixels and ids.
Steps with the measurement and steps without take turns, and each pair gives the difference; medians are reported. At
the configured interval a run pays that difference in every n-th step. Beside wall time is the process's CPU time,
which other work on the machine changes less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch

from tests.benchmarks.batches import random_batch
from train import cli
from train.config import RunConfig
from train.engine.balance import Balance
from train.engine.build import engine_of_run
from train.engine.optim import set_lrs
from train.engine.start import start
from train.model.pair import build_model
from train.step import training_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default="train/configs/scratch.yaml", help="default: %(default)s")
    parser.add_argument("--pairs", type=int, default=15, help="pairs of steps (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="threads (default: torch's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.pairs < 1:
        parser.error(f"--pairs {options.pairs}: at least 1")
    try:
        config = cli.load(options.config)
    except ValueError as error:
        parser.error(str(error))
    report = measure(config, options.pairs) | {"config": options.config}
    if options.json:
        print(json.dumps(report, indent=2))
        return
    for clock in ("wall", "cpu"):
        step, extra, share = (report[f"{clock}_{name}"] for name in ("step", "extra", "share"))
        print(f"{clock}: step {step:.3f} s, measured {1e3 * extra:.1f} ms more: {share:.2%} at {report['every']} steps")


def measure(config: RunConfig, pairs: int) -> dict[str, float]:
    """By wall clock and CPU clock: medians in seconds of a step and of what a measured one takes more, and the share
    that this is at the configured interval."""
    bf16 = torch.cuda.is_available() or " avx512_bf16" in _cpu_flags()
    os.environ.setdefault("ACCELERATE_MIXED_PRECISION", "bf16" if bf16 else "no")
    config.balance.kind, config.model.text.weights = "gradient", "scratch"
    if not Path(config.model.text.name).is_dir():
        config.model.text.name = "bert-base-uncased"
    engine = engine_of_run(start(), build_model(config, (0.5,) * 3, (0.25,) * 3), config)
    balance, every = Balance(config, {}), config.balance.every
    clocks = {"wall": time.perf_counter, "cpu": time.process_time}
    steps: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    for number in range(-2, 2 * pairs):
        # on, off, off, on: what drifts in one direction adds to both alike
        measured = number % 4 in (0, 3)
        step = every * (number + 3) - 1 if measured else every * (number + 3)
        batch = [one.to(engine.device) for one in random_batch(config, max(number, 0))]
        began = {name: clock() for name, clock in clocks.items()}
        set_lrs(engine.optimizer, number + 2, 2 * pairs + 2, config.optim, balance.multipliers())
        metrics = training_step(engine, batch, config, measured)
        balance.update(step, {name: float(value) for name, value in metrics.items()})
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if number >= 0:  # the first two load the libraries
            steps[measured].append({name: clock() - began[name] for name, clock in clocks.items()})
    report: dict[str, float] = {}
    for name in clocks:
        plain = statistics.median(step[name] for step in steps[False])
        extra = statistics.median(on[name] - off[name] for on, off in zip(steps[True], steps[False], strict=True))
        report |= {f"{name}_step": plain, f"{name}_extra": extra, f"{name}_share": extra / every / plain}
    return report | {
        "every": every,
        "pairs": pairs,
        "threads": torch.get_num_threads(),
        "device": str(engine.device),
        "bf16": bf16,
    }


def _cpu_flags() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.is_file() else ""


if __name__ == "__main__":
    main()
