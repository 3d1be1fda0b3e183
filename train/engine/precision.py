"""Precision of a run, the same in every engine: weights, gradients and optimizer state are fp32, bf16 is autocast."""

from __future__ import annotations

import os

import torch
from torch import Tensor

PRECISIONS = ("no", "bf16")


def asked() -> str:
    """The precision that the launcher was asked for, one of PRECISIONS; raises ValueError for any other."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in PRECISIONS:
        raise ValueError(f"mixed_precision: {precision} is not supported; set it to one of {', '.join(PRECISIONS)}")
    return precision


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
