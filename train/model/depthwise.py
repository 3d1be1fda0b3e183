"""Depthwise convolutions that learn in bf16 on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LARGE = 4
"""Kernels of at least this size: for smaller ones oneDNN has what makes the gradient of the weight in bf16."""


class InFloat(nn.Conv2d):
    """In training under a CPU's autocast the convolution itself is fp32, between inputs and outputs in bf16.

    For the gradient of its weight oneDNN takes what is meant for dense convolutions: with 64 maps of an EfficientNet's
    5 x 5 convolutions 27 to 290 ms in bf16, a fifth of that in fp32.
    """

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if not (self.training and x_BCHW.device.type == "cpu" and torch.is_autocast_enabled("cpu")):
            return super().forward(x_BCHW)
        with torch.autocast("cpu", enabled=False):
            y_BCHW = super().forward(x_BCHW.float())
        return y_BCHW.to(torch.get_autocast_dtype("cpu"))


def convert(module: nn.Module) -> None:
    """Makes InFloat of the depthwise convolutions inside `module` that learn and have large kernels, in place."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d) and not isinstance(child, InFloat) and _is_slow(child):
            child.__class__ = _in_float(type(child))


def _is_slow(conv: nn.Conv2d) -> bool:
    depthwise = conv.groups == conv.in_channels > 1
    return depthwise and min(conv.kernel_size) >= LARGE and conv.weight.requires_grad


def _in_float(kind: type[nn.Conv2d]) -> type[InFloat]:
    """Of torch's class, or of timm's, which pads as TensorFlow does."""
    return _KINDS.setdefault(kind, type(f"{kind.__name__}InFloat", (InFloat, kind), {}))


_KINDS: dict[type[nn.Conv2d], type[InFloat]] = {}
