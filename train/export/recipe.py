"""What other libraries' own classes can express of a recipe, and the tensors that they have of it."""

from __future__ import annotations

import torch
from torch import Tensor

from train.export.source import Source
from train.model.names import timm_name


def stock_problems(source: Source) -> dict[str, bool]:
    """Fields of a recipe, with their values, and whether they keep a pair from any class of another library."""
    model = source.config.model
    return {
        f"model.image.name {model.image.name}": not timm_name(model.image.name),
        f"model.image.norm {model.image.norm}": model.image.norm == "group",
        "model.multiscale.fuse true": model.multiscale.enabled and model.multiscale.fuse,
        "model.text.projection mlp": model.text.projection == "mlp",
    }


def has_bias(source: Source, *towers: str) -> bool:
    """Whether the projection of one of these towers ends in a bias."""
    model = source.config.model
    return model.projection_bias and any(getattr(model, tower).projection != "none" for tower in towers)


def refuse(target: str, problems: dict[str, bool]) -> None:
    """Raises ValueError for the first problem that there is, which names a field and its value."""
    for field, there in problems.items():
        if there:
            raise ValueError(f"{field} cannot be expressed by the target {target}; the target torch takes any model")


def stock_tensors(source: Source) -> dict[str, Tensor]:
    """The pair's tensors, with the identity for a projection where there is none, which stock classes always have."""
    model, tensors = source.model, with_counters(source)
    for tower, width in (("image", model.image.width), ("text", model.text.width)):
        if not any(name.startswith(f"{tower}_projection.") for name in tensors):
            tensors[f"{tower}_projection.weight"] = torch.eye(width)
    return tensors


def with_counters(source: Source) -> dict[str, Tensor]:
    """The pair's tensors, with the count of batches that a norm has elsewhere, which a frozen one lacks."""
    tensors = dict(source.model.state_dict())
    for name in list(tensors):
        if name.startswith("image.") and name.endswith("running_mean"):
            tensors.setdefault(name.replace("running_mean", "num_batches_tracked"), torch.tensor(0))
    return tensors
