"""Precision of a run, the same in every engine: weights, gradients and optimizer state are fp32, bf16 is autocast."""

from __future__ import annotations

import torch

PRECISIONS = ("no", "bf16")


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of a forward pass of the bare module, outside of an engine's wrapper.

    Args:
        precision: one of PRECISIONS; of an Accelerator before an engine is built, its `mixed_precision`.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
