"""The image tower: any torchvision classification backbone.

Shapes: B samples, H height, W width of an image; D features.
"""

from __future__ import annotations

import difflib

import torchvision
from torch import Tensor, nn
from torchvision.models.vision_transformer import interpolate_embeddings

from train.config import ImageTowerConfig
from train.model.layers import find_blocks, find_stages, group_by_layer, recompute_blocks
from train.model.pretrained import read_image_weights

HEADS = ("fc", "classifier", "head", "heads")


class ImageTower(nn.Module):
    """A torchvision classification backbone without its last linear layer.

    Args:
        config: name, weights, checkpointing.
        image_size: height and width of the images, in pixels.
        pretrained: False gives fresh weights whatever the config says, for weights that are loaded afterwards.

    Attributes:
        width: length D of the features.
        blocks: names of the repeated blocks, bottom to top.
        stages: names of the groups of blocks, bottom to top.

    Raises:
        ValueError: the name or the weights are unknown, do not fit, or cannot be had.
    """

    def __init__(self, config: ImageTowerConfig, image_size: int, pretrained: bool = True) -> None:
        super().__init__()
        self.backbone = _build_backbone(config.name, image_size)
        self.width, head = _remove_head(self.backbone, config.name)
        if pretrained and config.weights != "scratch":
            _load_image_weights(self.backbone, config, head, image_size)
        self.blocks = [f"backbone.{name}" for name in find_blocks(self.backbone)]
        self.stages = find_stages(self.backbone, [name.removeprefix("backbone.") for name in self.blocks])
        if config.checkpointing:
            if not self.blocks:
                raise ValueError(
                    f"--model.image.checkpointing: {config.name} has no blocks to recompute; set it to false"
                )
            recompute_blocks(self, self.blocks)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Normalized images, float [B, 3, H, W] -> features [B, D]."""
        return self.backbone(images_BCHW)

    def layers(self) -> list[list[str]]:
        """Names of all parameters, grouped by layer (stem, then one per block), bottom to top."""
        return group_by_layer(self, self.blocks)


def image_tower_names() -> list[str]:
    """The torchvision classification models."""
    return torchvision.models.list_models(module=torchvision.models)


def _build_backbone(name: str, image_size: int) -> nn.Module:
    known = image_tower_names()
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, n=5, cutoff=0.4) or known
        raise ValueError(f"--model.image.name {name} is not a torchvision model; the nearest are {', '.join(near)}")
    options: dict = {}
    if name.startswith("vit_"):
        patch = _patch_size(name)
        if image_size % patch:
            raise ValueError(f"--data.image_size {image_size} is not a multiple of {patch}, the patch size of {name}")
        options["image_size"] = image_size
    elif name.startswith("maxvit"):
        options["input_size"] = (image_size, image_size)
    elif name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True}
    try:
        return torchvision.models.get_model(name, weights=None, **options)
    except ValueError as error:
        raise ValueError(f"--data.image_size {image_size} does not fit --model.image.name {name}: {error}") from error


def _patch_size(vit: str) -> int:
    return int(vit.rpartition("_")[2])


def _remove_head(backbone: nn.Module, name: str) -> tuple[int, str]:
    """Replaces the last linear layer by the identity; returns its input width and its name."""
    for attribute in HEADS:
        head = getattr(backbone, attribute, None)
        if isinstance(head, nn.Linear):
            setattr(backbone, attribute, nn.Identity())
            return head.in_features, attribute
        if isinstance(head, nn.Sequential):
            last, linear = list(head.named_children())[-1]
            if isinstance(linear, nn.Linear):
                setattr(head, last, nn.Identity())
                return linear.in_features, f"{attribute}.{last}"
    raise ValueError(f"--model.image.name {name} does not end in a linear layer; use another, such as resnet50")


def _load_image_weights(backbone: nn.Module, config: ImageTowerConfig, head: str, image_size: int) -> None:
    flag = f"--model.image.weights {config.weights}"
    state = read_image_weights(config.name, config.weights)
    state = {name: value for name, value in state.items() if not name.startswith((f"{head}.", "AuxLogits.", "aux"))}
    if config.name.startswith("vit_"):
        # Position embeddings of another image size are interpolated (arXiv 2010.11929, section 3.2).
        try:
            state = interpolate_embeddings(image_size, _patch_size(config.name), state)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{flag} are not weights of {config.name}: {error!r}") from error
    own = backbone.state_dict()
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    wrong = [name for name in own if name in state and own[name].shape != state[name].shape]
    extra = [name for name in state if name not in own]
    if missing or wrong or extra:
        parts = {"missing": missing, "of another shape": wrong, "not in the model": extra}
        counts = "; ".join(f"{len(names)} {what} ({names[0]} ...)" for what, names in parts.items() if names)
        raise ValueError(f"{flag} are not weights of {config.name}: {counts}")
    backbone.load_state_dict(state, strict=False)
