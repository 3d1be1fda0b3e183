"""The engine of DeepSpeed ZeRO 1 to 3 (arXiv 1910.02054), with all that Duet knows about DeepSpeed 0.19.

Ranks hold parts: in every stage of the optimizer state and of the fp32 weights that it updates (the masters), in stage
2 of the gradients too, in stage 3 of the parameters too.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from train import distributed
from train.engine.base import MOMENTS, Engine
from train.engine.host import HostMemory

if TYPE_CHECKING:
    from accelerate import Accelerator

BUCKET_ELEMENTS = 2**25
"""Of DeepSpeed's buffers, which hold fp32."""
SAVED_ELEMENTS = 2**22
"""Of moments that are brought together in one collective; larger ones by themselves."""


def deepspeed_config(accelerator: Accelerator, micro_batch: int, clip_grad: float) -> None:
    """Fill in the DeepSpeed config, so that a step means what it means under DDP; before `prepare`.

    bf16 becomes autocast: parameters, gradients, their reduction and the optimizer state stay fp32.

    Args:
        micro_batch: rows of one micro-batch.
        clip_grad: largest norm of the gradient, 0 for any.

    Raises:
        ValueError: the DeepSpeed config has a part that the run's YAML owns, or a precision that is not supported.
    """
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise ValueError(f"the DeepSpeed config has `{section}`: remove it, `optim` of the run's YAML owns it")
    if config.get("fp16", {}).get("enabled") is True:
        raise ValueError("the DeepSpeed config has fp16 enabled: use mixed_precision bf16 or no")
    # The second of them where another engine was built with this config before.
    bf16 = any(config.get(section, {}).get("enabled") is True for section in ("bf16", "torch_autocast"))
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
    # DeepSpeed's own would wait for the GPU before every forward pass and after every step.
    config["timers"] = {"throughput": {"enabled": False}}


class ZeroEngine(Engine):
    """DeepSpeed's engine; `stage` is 1, 2 or 3."""

    sharded = True

    def _prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        plugin = self.accelerator.state.deepspeed_plugin
        self.stage = plugin.zero_stage
        deepspeed_config(self.accelerator, self.micro_batch, self.clip_grad)
        self.precision = "bf16" if plugin.deepspeed_config["torch_autocast"]["enabled"] else "no"
        wrapped, optimizer = self.accelerator.prepare(model, optimizer)
        if self.stage == 3:
            _clear_padding(wrapped.optimizer)
        return wrapped, optimizer

    @property
    def inner_optimizer(self) -> torch.optim.Optimizer:
        return self.wrapped.optimizer.optimizer

    @property
    def repeats_with_graph(self) -> bool:
        # Stage 3 gathers weights for a backward pass that would not come.
        return self.stage < 3 and super().repeats_with_graph

    def announce_backward(self, last: bool) -> None:
        # Stages 2 and 3 keep no full gradients: they reduce in every backward pass and have no `no_sync`. They are
        # told where the step ends instead.
        self.wrapped.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor) -> None:
        self.wrapped.backward(loss)

    def _update(self) -> tuple[Tensor, Tensor]:
        self.wrapped.step()
        applied = not self.wrapped.optimizer.overflow
        norm = float(self.wrapped.get_global_grad_norm()) if applied else math.inf
        read = torch.tensor([norm, applied], dtype=torch.float64, device=self.device)  # by DeepSpeed, already
        return read[0], read[1] > 0

    def _clamp(self, parameter: nn.Parameter, low: float, high: float) -> None:
        before = self.full_parameter(parameter)
        value = before.clamp(low, high)
        if not torch.equal(value, before):
            self._set_parameter(parameter, value)
            self._set_master(parameter, value)

    def full_parameter(self, parameter: nn.Parameter) -> Tensor:
        if self.stage < 3:
            return parameter.detach()
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    @torch.no_grad()
    def _set_parameter(self, parameter: nn.Parameter, value: Tensor) -> None:
        if self.stage < 3:
            parameter.copy_(value)
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if distributed.is_main():
                parameter.copy_(value)

    def _set_master(self, parameter: nn.Parameter, value: Tensor, key: str | None = None) -> None:
        """Put a whole value into a parameter's master, or into a moment of it."""
        from deepspeed import utils

        if self.stage == 3:
            # Cut into parts here: DeepSpeed fails to where a parameter does not divide by the world size.
            size = parameter.partition_numel()  # type: ignore[attr-defined]
            parts = nn.functional.pad(value.flatten(), (0, size * distributed.world_size() - value.numel())).split(size)
            part = parts[distributed.rank()]
            if key is None:
                utils.safe_set_local_fp32_param(parameter, part)
            else:
                utils.safe_set_local_optimizer_state(parameter, part, key)
        elif key is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, key)

    def own_weights(self) -> list[Tensor]:
        name = "ds_tensor" if self.stage == 3 else "data"
        return [getattr(parameter, name).data for _, parameter in self._trainable()]

    def weights_replaced(self) -> None:
        # Stage 3 keeps small parameters whole beside their part, and others after a pass: have them gathered again.
        for parameter in self.module.parameters() if self.stage == 3 else ():
            if parameter.data.numel() == parameter.ds_numel:
                parameter.partition()

    def moments(self, memory: HostMemory | None = None) -> dict[str, Tensor]:
        self._link_moments()
        return super().moments(memory)

    def _moments(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        wanted = [(name, parameter, key) for name, parameter in self._trainable() for key in MOMENTS]
        if self.stage == 3:
            for name, parameter, key in wanted:
                yield f"{name}.{key}", safe_get_full_optimizer_state(parameter, key)
            return
        # The same function would take a collective of all ranks for each of them.
        while wanted:
            sizes = list(accumulate(parameter.numel() for _, parameter, _ in wanted))
            count = max(1, bisect_right(sizes, SAVED_ELEMENTS))
            bucket, wanted = wanted[:count], wanted[count:]
            flat = torch.zeros(sizes[count - 1], device=self.device)
            places = flat.split([parameter.numel() for _, parameter, _ in bucket])
            for place, (_, parameter, key) in zip(places, bucket, strict=True):
                if (part := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]
                    here = part.lp_fragment_address
                    place.narrow(0, here.start, here.numel).copy_(part.get_hp_fragment(key))
            distributed.sum_on_main(flat)
            for place, (name, parameter, key) in zip(places, bucket, strict=True):
                yield f"{name}.{key}", place.view(parameter.shape)

    def _load_moments(self, moments: dict[str, Tensor], updates: int) -> None:
        self._create_moments()
        self._link_moments()
        for name, parameter in self._trainable():
            for key in MOMENTS:
                self._set_master(parameter, moments[f"{name}.{key}"].to(self.device), key)
        for state in self.inner_optimizer.state.values():
            state["step"] = torch.full_like(torch.as_tensor(state["step"]), float(updates))

    def _create_moments(self) -> None:
        """Make DeepSpeed allocate its optimizer state: one update with zero gradients, learning rate and decay."""
        groups = self.optimizer.param_groups
        saved = [(group["lr"], group["weight_decay"]) for group in groups]
        for group in groups:
            group["lr"] = group["weight_decay"] = 0.0
        blank = self.blank().to(self.device)
        self.announce_backward(last=True)
        outputs = self.forward([blank], [0])
        self.backward(0.0 * torch.stack([value.float().sum() for value in outputs.values()]).sum())
        self.wrapped.step()
        for group, (lr, decay) in zip(groups, saved, strict=True):
            group["lr"], group["weight_decay"] = lr, decay

    def _link_moments(self) -> None:
        """Tell the parameters of stages 1 and 2 where their moments are, where there are any.

        DeepSpeed does so after the update of the first parameter group, when the others have no moments yet.
        """
        if self.stage < 3 and self.updates():
            from deepspeed.utils import lazy_init_hp_params_optimizer_state

            zero = self.wrapped.optimizer
            for parameters, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
                lazy_init_hp_params_optimizer_state(parameters, flat, zero.optimizer.state)


def _clear_padding(zero: Any) -> None:
    """Zero what fills up the ranks' parts of parameters that do not divide: stage 3 leaves it uninitialized."""
    for parameters, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        start = 0
        for parameter in parameters:
            stop = start + parameter.partition_numel()
            used = parameter.ds_numel - distributed.rank() * parameter.partition_numel()
            flat.data[start + min(max(used, 0), stop - start) : stop].zero_()
            start = stop
