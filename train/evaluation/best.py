"""The best checkpoint of a run by a metric of its evaluations, and when to stop because it gets no better."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from train import checkpoint, distributed
from train.config import RunConfig
from train.evaluation import find_task
from train.evaluation.beside import completed
from train.evaluation.suite import given_tasks
from train.run.records import read_history
from train.saving.write import mark_best


class Best:
    """Follows `checkpoint.best` over the evaluations of a run, the same on every rank.

    Args:
        history: records of the steps before, of a run that is resumed, in order.
        kept: steps that have a checkpoint; an evaluation whose checkpoint is gone cannot be the best one.

    Without `checkpoint.best` nothing is ever better, and nothing stops the run.
    """

    def __init__(self, config: RunConfig, history: Iterable[Mapping[str, Any]] = (), kept: Iterable[int] = ()):
        self.metric, self.patience = config.checkpoint.best, config.train.patience
        self.better = score(config) if self.metric else max
        self.step: int | None = None
        """Step of the best evaluation; None before the first one."""
        self.value = 0.0
        self.waited = 0
        """Evaluations since then."""
        kept = set(kept)
        for record in history:
            if self.metric in record:
                value = record[self.metric]  # null where it was not finite
                self.update(record["step"], math.nan if value is None else value, record["step"] in kept)

    def update(self, step: int, value: float, kept: bool = True) -> bool:
        """Take in an evaluation; returns whether it is better than all before. Equal is not better; NaN never is."""
        if kept and value == value and (self.step is None or self.better(value, self.value) != self.value):
            self.step, self.value, self.waited = step, value, 0
            return True
        self.waited += 1
        return False

    @property
    def exhausted(self) -> bool:
        """Whether the run is to stop."""
        return 0 < self.patience <= self.waited


def score(config: RunConfig) -> Callable[..., Any]:
    """`max` or `min`: which values of `checkpoint.best` are better.

    Raises:
        ValueError: no evaluation of the run has such a metric.
    """
    scores = {
        f"{name}/{metric}": better
        for name, given in given_tasks(config).items()
        for metric, better in find_task(completed(given).task).scores.items()
    }
    if config.checkpoint.best not in scores:
        known = ", ".join(scores) or "none: give data.val, or eval.tasks"
        raise ValueError(f"checkpoint.best {config.checkpoint.best}: no evaluation has it; there are {known}")
    return scores[config.checkpoint.best]


def check_best(config: RunConfig) -> None:
    """Raises ValueError where the best checkpoint, or the end of patience, could never be found."""
    best, patience = config.checkpoint.best, config.train.patience
    if patience and not best:
        raise ValueError(f"train.patience {patience}: give checkpoint.best, the metric that is to get better")
    if best:
        score(config)
        every = given_tasks(config)[best.partition("/")[0]].every or config.eval.every
        if patience and not every:
            raise ValueError(f"train.patience {patience}: give eval.every, the steps between evaluations")


def follow(config: RunConfig, directory: Path, step: int) -> Best:
    """The best checkpoint so far of a run that is at this step; a collective."""
    known: tuple[list, list] = ([], [])
    if config.checkpoint.best and distributed.is_main():
        metric = config.checkpoint.best
        records = [one for one in read_history(directory) if one["step"] <= step and metric in one]
        kept = [saved for saved in checkpoint.steps(directory) if saved <= step]
        known = ([{"step": one["step"], metric: one[metric]} for one in records], kept)
    best = Best(config, *distributed.broadcast_object(known))
    if best.step is not None:  # a run that was stopped between the two has saved it and not named it
        mark_best(directory, best.step, config.checkpoint.keep)
    return best
