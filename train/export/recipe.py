"""What other libraries' own classes can express of a recipe, and under which names they know its tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from train.export.source import Source

TORCHVISION_IN_TIMM = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"),
)
"""torchvision models whose tensors have the same names in timm's model of the same name."""


def check_recipe(target: str, source: Source) -> None:
    """What no stock class has: raises ValueError with the first such field, for `target`."""
    model = source.config.model
    projections = (model.image.projection, model.text.projection)
    problems = {
        f"model.image.name {model.image.name}": not timm_name(model.image.name),
        f"model.image.norm {model.image.norm}": model.image.norm == "group",
        "model.multiscale.fuse true": model.multiscale.enabled and model.multiscale.fuse,
        "model.projection_bias true": model.projection_bias and projections != ("none", "none"),
        "model.text.projection mlp": model.text.projection == "mlp",
    }
    refuse(target, problems)


def refuse(target: str, problems: dict[str, bool]) -> None:
    """Raises ValueError for the first problem that there is, which names a field and its value."""
    for field, there in problems.items():
        if there:
            raise ValueError(f"{field} cannot be expressed by the target {target}; the target torch takes any model")


def timm_name(name: str) -> str:
    """The timm model with the same tensors under the same names as an image tower; empty where there is none."""
    if name.startswith("timm/"):
        return name.removeprefix("timm/")
    return name if name in TORCHVISION_IN_TIMM else ""


def image_tensors(source: Source, prefix: str) -> dict[str, Tensor]:
    """The image tower's tensors by timm's names; a frozen norm lacks the count of batches that others keep."""
    tensors = {f"{prefix}{name}": tensor for name, tensor in source.model.image.backbone.state_dict().items()}
    for name in list(tensors):
        if name.endswith("running_mean"):
            count = name.replace("running_mean", "num_batches_tracked")
            tensors.setdefault(count, torch.tensor(0))
    return tensors


def text_tensors(source: Source, prefix: str) -> dict[str, Tensor]:
    """The text encoder's tensors by transformers' names."""
    return {f"{prefix}{name}": tensor for name, tensor in source.model.text.encoder.state_dict().items()}


def projection(module: nn.Module, width: int) -> Tensor:
    """The matrix of a projection [D, width]; the identity where there is none."""
    return module.weight.detach() if isinstance(module, nn.Linear) else torch.eye(width)
