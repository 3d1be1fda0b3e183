"""Wrong ways to spread a contrastive gradient over processes, each put into the real step, which tests must notice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from train import distributed, step
from train.loss import gradients

FEATURES = ("image", "text")


def _own_slice(parts: list[dict], world: int) -> list[dict]:
    """Gathered without gradient, the own slice put back, the loss over all rows: 1 / W of the towers' gradient."""
    return [part | {name: part[name] / world for name in FEATURES} for part in parts]


def _scalars_summed(parts: list[dict], world: int) -> list[dict]:
    """The temperature's gradient summed over ranks: W times too large."""
    return [part | {"logit_scale": part["logit_scale"] * world} for part in parts]


def _whole_loss_in_every_part(parts: list[dict], world: int) -> list[dict]:
    """The temperature's whole gradient in each of k accumulated parts: k times too large."""
    return [part | {"logit_scale": part["logit_scale"] * len(parts)} for part in parts]


def _one_tower_slightly_larger(parts: list[dict], world: int) -> list[dict]:
    """0.1% more of one tower's gradient: no scheme, but what a comparison of gradients has to see."""
    return [part | {"text": part["text"] * 1.001} for part in parts]


def _own_rows(grad_BD: Any) -> Any:
    rows = grad_BD.shape[0] // distributed.world_size()
    return grad_BD[distributed.rank() * rows :][:rows].clone()


def _replacing(**functions: Any) -> SimpleNamespace:
    """train.distributed with other functions."""
    return SimpleNamespace(**vars(distributed) | functions)


# A function changes each part's gradients, given the world size; a namespace replaces train.distributed.
SCHEMES = {
    "own slice, all rows": _own_slice,
    "own slice, own rows": _replacing(reduce_scatter_rows=_own_rows),
    "local batch only": _replacing(rank=lambda: 0, all_gather_rows=torch.clone, reduce_scatter_rows=torch.clone),
    "temperature summed": _scalars_summed,
    "whole loss in every part": _whole_loss_in_every_part,
    "one tower slightly larger": _one_tower_slightly_larger,
}


@contextmanager
def sabotaged(scheme: str) -> Iterator[None]:
    """Within it train.step.training_step makes this mistake; "" is none."""
    wrong = SCHEMES.get(scheme)
    right = step.loss_gradients

    def loss_gradients(*arguments: Any, **options: Any) -> tuple[dict, list[dict]]:
        losses, parts = right(*arguments, **options)
        return losses, wrong(parts, distributed.world_size())

    if wrong is None:
        yield
    elif isinstance(wrong, SimpleNamespace):
        with mock.patch.object(gradients, "distributed", wrong):
            yield
    else:
        with mock.patch.object(step, "loss_gradients", loss_gradients):
            yield
