"""Means of the weights of several checkpoints (model soups, arXiv 2203.05482), all of them or those that help."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def mean_weights(models: Sequence[Weights]) -> Weights:
    """The mean of each tensor over several models; of counts the last model's.

    Raises:
        ValueError: they do not have the same tensors.
    """
    last = models[-1]
    for model in models:
        if {name: tensor.shape for name, tensor in model.items()} != {n: tensor.shape for n, tensor in last.items()}:
            raise ValueError("soup: the checkpoints hold different models, which have no mean")
    means = {}
    for name, tensor in last.items():
        if tensor.is_floating_point():
            tensor = torch.stack([model[name].double() for model in models]).mean(0).to(tensor.dtype)
        means[name] = tensor
    return means


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
    best, kept, tried = alone[first], [first], [Tried(first, alone[first], True)]
    for step in ranked[1:]:
        found = score(mean_weights([load(one) for one in [*kept, step]]))
        if found >= best:
            best, kept = found, [*kept, step]
        tried.append(Tried(step, found, step in kept))
    return tried


def in_words(tried: Sequence[Tried]) -> list[str]:
    """One line for each checkpoint that was tried."""
    if not tried:
        return []
    first, *others = tried
    return [f"soup: step {first.step} alone has a mean recall of {first.score:.2f} %: kept"] + [
        f"soup: with step {one.step} it is {one.score:.2f} %: {'kept' if one.kept else 'left out'}" for one in others
    ]
