"""What numbers of a configuration have to be, where the type alone allows one that would spoil the run in silence."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

from train.config import RunConfig


def _at_least(least: float) -> Callable[[float], bool]:
    return lambda value: value >= least


def _above(bound: float) -> Callable[[float], bool]:
    return lambda value: value > bound


def _share(value: float) -> bool:
    return 0 <= value < 1


RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "checkpoint.every": (_at_least(0), "steps, 0 saves at the end alone"),
    "checkpoint.keep": (_at_least(0), "how many stay, 0 keeps all"),
    "eval.every": (_at_least(0), "steps, 0 is off"),
    "eval.batch": (_at_least(1), "at least 1"),
    "eval.chunk": (_at_least(1), "at least 1"),
    "loss.tile": (_at_least(1), "at least 1"),
    "loss.label_smoothing": (_share, "at least 0 and below 1"),
    "model.embed_dim": (_at_least(1), "at least 1"),
    "model.temperature": (_above(0), "above 0, such as 0.07"),
    "model.max_logit_scale": (_above(1), "above 1, such as 100"),
    "optim.lr": (_at_least(0), "0 or more"),
    "optim.weight_decay": (_at_least(0), "0 or more"),
    "optim.warmup_steps": (_at_least(0), "steps, 0 is none"),
    "optim.clip_grad": (_at_least(0), "the largest norm, 0 is off"),
    "optim.ema": (_share, "a decay below 1, 0 is off"),
    "tracking.log_every": (_at_least(1), "at least 1"),
    "tracking.diagnostics_every": (_at_least(0), "steps, 0 is off"),
    "train.resident": (_at_least(1), "at least 1"),
    "train.steps": (_at_least(0), "0: as many as --train.epochs are"),
    "train.epochs": (_above(0), "above 0"),
}
"""Field -> whether a value will do, and what to give instead."""


def check_ranges(config: RunConfig) -> None:
    """Raises ValueError for the first number that is out of its range, with what it has to be."""
    for name, (will_do, wanted) in RANGES.items():
        value = attrgetter(name)(config)
        if not will_do(value):
            raise ValueError(f"--{name} {value}: give {wanted}")
