"""The names by which other libraries know the tensors of a pair: one table for each form, read both ways.

train/export writes by them, train/init reads by them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

Table = tuple[tuple[str, str], ...]
"""(what a tensor's name begins with in a pair, what it begins with there); the first row that fits counts."""

OPEN_CLIP: Table = (
    ("image.backbone.", "visual.trunk."),
    ("image_projection.fc1.", "visual.head.mlp.fc1."),
    ("image_projection.fc2.", "visual.head.mlp.fc2."),
    ("image_projection.", "visual.head.proj."),
    ("text.encoder.", "text.transformer."),
    ("text_projection.", "text.proj."),
    ("log_scale", "logit_scale"),
    ("logit_bias", "logit_bias"),
)
"""open_clip's pair of one of timm's image towers and one of transformers' text towers."""

DUAL_ENCODER: Table = (
    ("image.backbone.", "vision_model.timm_model."),
    ("image_projection.", "visual_projection."),
    ("text.encoder.", "text_model."),
    ("text_projection.", "text_projection."),
    ("log_scale", "logit_scale"),
)
"""transformers' VisionTextDualEncoderModel with one of timm's image towers."""

OWN_CODE: Table = (
    ("image.backbone.", "image_model."),
    ("image_projection.", "image_projection."),
    ("text.encoder.", "text_model."),
    ("text_projection.", "text_projection."),
    ("log_scale", "logit_scale"),
    ("logit_bias", "logit_bias"),
)
"""The class that train/export writes beside a pair for which transformers has no class."""

FLAT = 2.0**-12
"""transformers pools a text by tanh(W x). Where a pair takes x itself, W is the identity times this, where tanh is
straight to seven digits, and the projection makes up for it."""

TORCHVISION_IN_TIMM = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"),
)
"""torchvision models whose tensors have the same names in timm's model of the same name."""


def timm_name(name: str) -> str:
    """The timm model with the same tensors under the same names as an image tower; empty where there is none."""
    if name.startswith("timm/"):
        return name.removeprefix("timm/")
    return name if name in TORCHVISION_IN_TIMM else ""


def names_of_timm(model: str) -> tuple[str, ...]:
    """What `model.image.name` may be for a model of timm's, the shortest first."""
    return (*([model] if model in TORCHVISION_IN_TIMM else []), f"timm/{model}")


def some(names: Sequence[str]) -> str:
    """The first three, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def outward(tensors: Mapping[str, Tensor], table: Table) -> dict[str, Tensor]:
    """Tensors of a pair by their names there; scalars, of shape [1] in a pair, without dimensions. Others are left."""
    named = {}
    for name, tensor in tensors.items():
        here, there = next((row for row in table if _is_under(name, row[0])), ("", ""))
        if there:
            named[there + name.removeprefix(here)] = tensor[0] if name == here else tensor
    return named


def inward(tensors: Mapping[str, Tensor], table: Table) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors from there by their names in a pair, and the names of those that have none."""
    named, left = {}, []
    for name, tensor in tensors.items():
        here, there = next((row for row in table if _is_under(name, row[1])), ("", ""))
        if there:
            named[here + name.removeprefix(there)] = tensor.reshape(1) if name == there else tensor
        else:
            left.append(name)
    return named, left


def _is_under(name: str, start: str) -> bool:
    return name.startswith(start) if start.endswith(".") else name == start
