"""Means of the weights of several checkpoints (model soups, arXiv 2203.05482), all of them or those that help."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

Weights = dict[str, Tensor]


class Sum(NamedTuple):
    """Of the weights of several models, in float64; of counts the last model's."""

    weights: Weights
    models: int

    def plus(self, model: Weights) -> Sum:
        """The sum with one more. Raises ValueError where it does not have the same tensors."""
        if {name: tensor.shape for name, tensor in model.items()} != {n: t.shape for n, t in self.weights.items()}:
            raise ValueError("soup: the checkpoints hold different models, which have no mean")
        return Sum({name: _plus(self.weights[name], tensor) for name, tensor in model.items()}, self.models + 1)

    def mean(self, like: Weights) -> Weights:
        """Each tensor's mean, in the precision that it has in `like`."""
        return {
            name: (tensor / self.models).to(like[name].dtype) if tensor.is_floating_point() else tensor
            for name, tensor in self.weights.items()
        }


def _plus(total: Tensor, tensor: Tensor) -> Tensor:
    return total + tensor.double() if tensor.is_floating_point() else tensor


def sum_of(model: Weights) -> Sum:
    """The sum of one model."""
    return Sum({name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in model.items()}, 1)


def mean_weights(models: Iterable[Weights]) -> Weights:
    """The mean of each tensor over several models, of which one at a time is in memory.

    Raises:
        ValueError: they do not have the same tensors.
    """
    total, model = None, {}
    for model in models:
        total = total.plus(model) if total else sum_of(model)
    assert total is not None
    return total.mean(like=model)


class Tried(NamedTuple):
    """A checkpoint that was tried in the mean."""

    step: int
    score: float
    """Of the mean with it; of the first one its own."""
    kept: bool


def greedy(load: Callable[[int], Weights], steps: Sequence[int], score: Callable[[Weights], float]) -> list[Tried]:
    """Which checkpoints belong into the mean: from the best one on, each with which the mean is at least as good.

    Args:
        load: the weights of a step.
        score: of a model with these weights; more is better, NaN is never kept.

    Raises:
        ValueError: not one checkpoint has a score.
    """
    alone = {step: score(load(step)) for step in steps}
    ranked = sorted((step for step in steps if not math.isnan(alone[step])), key=lambda step: (-alone[step], -step))
    if not ranked:
        raise ValueError("soup: not one of the checkpoints gives finite features")
    first = ranked[0]
    best, total, tried = alone[first], sum_of(load(first)), [Tried(first, alone[first], True)]
    for step in ranked[1:]:
        model = load(step)
        with_it = total.plus(model)
        found = score(with_it.mean(like=model))
        is_kept = found >= best
        if is_kept:
            best, total = found, with_it
        tried.append(Tried(step, found, is_kept))
    return tried


def in_words(tried: Sequence[Tried]) -> list[str]:
    """One line for each checkpoint that was tried."""
    if not tried:
        return []
    first, *others = tried
    return [f"soup: step {first.step} alone has a mean recall of {first.score:.2f} %: kept"] + [
        f"soup: with step {one.step} it is {one.score:.2f} %: {'kept' if one.kept else 'left out'}" for one in others
    ]
