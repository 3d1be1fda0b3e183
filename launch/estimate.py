"""How long a run will train on this machine, from a short trial of it: python -m launch.estimate TRIAL [run's fields]

TRIAL is the directory of a finished run of the same fields, but of a few steps. launch/quickstart.sh makes one.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from train import cli
from train.feed import Feed
from train.run.records import read_history

WARM = 3
"""First steps that say nothing: memory and libraries are warmed up, and the loader starts."""


def seconds_per_step(trial: Path, global_batch: int) -> float:
    """The median over the trial's steps after the first ones.

    Raises:
        ValueError: the trial has too few steps.
    """
    rates = [record["samples_per_second"] for record in read_history(trial) if "samples_per_second" in record]
    if len(rates) <= WARM:
        raise ValueError(f"{trial} has {len(rates)} steps: a trial needs at least {WARM + 1}")
    return statistics.median(global_batch / rate for rate in rates[WARM:])


def in_words(seconds: float) -> str:
    """40 -> "40 seconds", 400 -> "6.7 minutes", 40000 -> "11.1 hours"."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 90 * 60 else f"{seconds / 3600:.1f} hours"


def main(argv: list[str]) -> int:
    """Exit status: 0 done, 2 the user's mistake."""
    trial, *fields = argv
    return cli.exit_status(lambda: _estimate(Path(trial), fields))


def _estimate(trial: Path, fields: list[str]) -> None:
    config = cli.parse(fields)
    each, steps = seconds_per_step(trial, config.train.global_batch), Feed(config).steps
    length = f"About {in_words(steps * each)} of training"
    print(f"      {length}: {steps} steps of {each:.2f} s, as busy as this machine is now")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
