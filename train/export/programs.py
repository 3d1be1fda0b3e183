"""Both encoders of a model, traced by torch.export: what the targets `torch` and `onnx` are made of.

Shapes: B images or captions, H height, W width, L tokens, D embedding.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from train.model.pair import PairModel


class ImageProgram(nn.Module):
    """uint8 images [B, 3, H, W] -> unit vectors [B, D]."""

    def __init__(self, model: PairModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.model.encode_image(images_BCHW)


class TextProgram(nn.Module):
    """Token ids and mask, int64 [B, L] -> unit vectors [B, D]."""

    def __init__(self, model: PairModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        return self.model.encode_text(ids_BL, mask_BL)


def programs(model: PairModel, image_size: int) -> dict[str, torch.export.ExportedProgram]:
    """Both encoders traced: images have that height and width; batches and, up to the model's, captions any length."""
    batch = torch.export.Dim("batch", min=1)
    length = torch.export.Dim("length", min=1, max=model.text.max_tokens)
    example = model.blank_micro_batch(rows=2, tokens=8)
    images_BCHW = torch.zeros(2, 3, image_size, image_size, dtype=torch.uint8)
    both = {0: batch, 1: length}
    traced = {
        "image": (ImageProgram(_without(model, "text")), (images_BCHW,), {"images_BCHW": {0: batch}}),
        "text": (
            TextProgram(_without(model, "image")),
            (example.ids_BL, example.mask_BL),
            {"ids_BL": both, "mask_BL": both},
        ),
    }
    return {
        name: torch.export.export(part, given, dynamic_shapes=sizes) for name, (part, given, sizes) in traced.items()
    }


def _without(model: PairModel, tower: str) -> PairModel:
    """A shallow copy without the other tower and its projection, which a program would carry along."""
    part = copy.copy(model)
    part._modules = {name: module for name, module in model._modules.items() if not name.startswith(tower)}
    return part
