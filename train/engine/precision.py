"""Precision in every engine: weights, gradients and optimizer state are fp32, bf16 is autocast; under DeepSpeed too."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

PRECISIONS = ("no", "bf16")
BUCKET_ELEMENTS = 2**25
"""Of DeepSpeed's buffers, which hold fp32."""


def deepspeed_config(accelerator: Accelerator, micro_batch: int, clip_grad: float) -> None:
    """Fills in the DeepSpeed config, if there is one, so that a step means what it means under DDP; before `prepare`.

    micro_batch: pairs per forward pass of a rank. clip_grad: largest gradient norm, 0 is off.
    bf16 becomes autocast: parameters, gradients, their reduction and the optimizer state stay fp32.
    Raises ValueError where the DeepSpeed config has a part that the run's YAML owns.
    """
    if accelerator.state.deepspeed_plugin is None:
        return
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise ValueError(f"the DeepSpeed config has `{section}`: remove it, `optim` of the run's YAML owns it")
    if config.get("fp16", {}).get("enabled") is True:
        raise ValueError("the DeepSpeed config has fp16 enabled: use mixed_precision bf16 or no")
    bf16 = config.pop("bf16", {}).get("enabled") is True
    config["bf16"] = {"enabled": False}
    # No module is listed as safe for bf16 communication, so gradients are reduced in fp32.
    config["torch_autocast"] = {"enabled": bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    config["gradient_accumulation_steps"] = 1
    config["gradient_clipping"] = float(clip_grad)
    config["train_micro_batch_size_per_gpu"] = int(micro_batch)
    config["train_batch_size"] = int(micro_batch) * accelerator.num_processes
    # DeepSpeed's own default is 5e8: two gigabytes of buffer on every rank, more than ZeRO saves on these towers.
    zero = config.setdefault("zero_optimization", {})
    for name in ("reduce_bucket_size", "allgather_bucket_size"):
        zero.setdefault(name, BUCKET_ELEMENTS)
    # Offloaded optimizer states are stepped by the same AdamW as everywhere, which needs no compiler.
    config["zero_force_ds_cpu_optimizer"] = False


def autocast(accelerator: Accelerator) -> AbstractContextManager:
    """The run's precision for a forward pass of the bare module, which DeepSpeed casts in its own wrapper only."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None:
        return accelerator.autocast()
    # The second is what stands there before `deepspeed_config`, which evaluation by hand has no use for.
    sections = (plugin.deepspeed_config.get(name, {}) for name in ("torch_autocast", "bf16"))
    enabled = any(section.get("enabled") is True for section in sections)
    return torch.autocast(accelerator.device.type, torch.bfloat16, enabled=enabled)
