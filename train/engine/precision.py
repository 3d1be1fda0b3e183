"""Precision of a run, the same in every engine: weights, gradients and optimizer state are fp32, bf16 is autocast."""

from __future__ import annotations

import torch
from torch import Tensor

PRECISIONS = ("no", "bf16")


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of a forward pass of the bare module, outside of an engine's wrapper.

    Args:
        precision: one of PRECISIONS; of an Accelerator before an engine is built, its `mixed_precision`.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def double(tensor: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def back(tensor: Tensor, device: torch.device) -> Tensor:
    """What `double` made, on this device; in float32 where it has no float64."""
    return tensor.to(device, torch.float32 if device.type == "mps" else tensor.dtype)
