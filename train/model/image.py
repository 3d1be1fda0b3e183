"""The image tower: a backbone of torchvision, timm or the user's own.

Shapes: B samples, H height, W width of an image; D features.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from train.config import ImageTowerConfig
from train.model import backbone_own, backbone_timm, backbone_torchvision
from train.model.backbone import Backbone
from train.model.layers import group_by_layer, lock, recompute_blocks

BACKBONES: dict[str, Callable[[str, ImageTowerConfig, int, bool], Backbone]] = {
    "torchvision": backbone_torchvision.build,
    "timm": backbone_timm.build,
}
"""Family -> what builds the model of a name: of the config, the image size, and whether pretrained weights go in."""


class ImageTower(nn.Module):
    """An image encoder without its classifier.

    Args:
        config: which one, its weights, what of it learns, checkpointing.
        image_size: height and width of the images, in pixels.
        pretrained: False gives fresh weights whatever the config says, for weights that are loaded afterwards.

    Attributes:
        width: length D of the features.
        blocks: names of the repeated blocks, bottom to top.
        stages: names of the groups of blocks within the backbone, bottom to top.
        channels_last: whether maps that its modules put out are [B, H, W, C].

    Raises:
        ValueError: the name or the weights are unknown, do not fit, or cannot be fetched.
    """

    def __init__(self, config: ImageTowerConfig, image_size: int, pretrained: bool = True) -> None:
        super().__init__()
        built = build_backbone(config, image_size, pretrained)
        self.backbone = built.module
        self.width, self.stages, self.channels_last = built.width, built.stages, built.channels_last
        self.blocks = [f"backbone.{name}" for name in built.blocks]
        lock(self.backbone, _locked(config, built))
        if config.checkpointing:
            if not self.blocks:
                raise ValueError(
                    f"model.image.checkpointing: {config.name} has no blocks to recompute; set it to false"
                )
            recompute_blocks(self, self.blocks)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Normalized images, float [B, 3, H, W] -> features [B, D]."""
        return self.backbone(images_BCHW)

    def layers(self) -> list[list[str]]:
        """Names of all parameters, grouped by layer (stem, then one per block), bottom to top."""
        return group_by_layer(self, self.blocks)


def build_backbone(config: ImageTowerConfig, image_size: int, pretrained: bool) -> Backbone:
    """The backbone that a name means: `<family>/<model>`, torchvision's `<model>`, or a class's dotted path."""
    family, slash, name = config.name.partition("/")
    if slash:
        if family not in BACKBONES:
            known = ", ".join(f"{other}/" for other in BACKBONES)
            raise ValueError(f"model.image.name {config.name}: {family}/ is no family of models: take {known}")
        return BACKBONES[family](name, config, image_size, pretrained)
    if "." in config.name:
        return backbone_own.build(config.name, config, image_size, pretrained)
    return BACKBONES["torchvision"](config.name, config, image_size, pretrained)


def adapted(
    config: ImageTowerConfig, image_size: int, module: nn.Module, state: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Tensors of the model that `name` means by the names of its backbone, with positions for images of this size."""
    family, slash, name = config.name.rpartition("/")
    if family == "timm":
        return backbone_timm.adapted(name, module, state)
    if "." in name and not slash:
        return backbone_own.adapted(module, state)
    return backbone_torchvision.adapted(name, image_size, state)


def _locked(config: ImageTowerConfig, built: Backbone) -> list[str]:
    """Names of the stages that never learn; of the blocks, where these do not form several stages."""
    units, what = (built.stages, "stages") if len(built.stages) > 1 else (built.blocks, "blocks")
    if config.locked_stages > len(units):
        raise ValueError(
            f"model.image.locked_stages {config.locked_stages}: {config.name} has {len(units)} {what}; "
            "give at most that, or model.image.locked_until -1 for a tower that never learns"
        )
    return units[: config.locked_stages]
