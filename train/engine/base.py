"""One way to run backward passes and optimizer steps under one process, DDP, and DeepSpeed ZeRO 1 to 3.

Parameters, gradients and optimizer state are fp32 in every engine; bf16 is autocast. Gradients are means over ranks.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from data_pipeline.loader import MicroBatch
from train import distributed
from train.config import RunConfig
from train.engine import optim, precision
from train.engine.meter import TowerMeter
from train.model.pair import PairModel

MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine:
    """The model and its optimizer, prepared by Accelerate for the engine that its config names.

    Args:
        accelerator: from `distributed.start`.
        model: the PairModel, with its weights already in place (ZeRO copies them when it starts).
        config: the run's configuration.
    """

    def __init__(self, accelerator, model: PairModel, config: RunConfig):
        self.accelerator = accelerator
        self.device = accelerator.device
        self.config = config
        plugin = getattr(accelerator.state, "deepspeed_plugin", None)
        self.zero_stage = plugin.zero_stage if plugin is not None else None
        if self.zero_stage == 0:
            raise ValueError("zero_stage 0 is DDP through DeepSpeed: take launch/accelerate/ddp.yaml, or stage 1 to 3")
        optimizer = optim.build_optimizer(model, config)
        if self.zero_stage:
            precision.deepspeed_config(accelerator, config.train.micro_batch, config.optim.clip_grad)
        if self.zero_stage or accelerator.num_processes > 1:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
                self.wrapped, self.optimizer = accelerator.prepare(model, optimizer)
            # Said of 1 x 1 convolutions, whose strides differ in name only.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        else:  # "evaluation" leaves out DDP, which Accelerate would put around one process as well
            self.wrapped = accelerator.prepare_model(model, evaluation_mode=True)
            self.optimizer = accelerator.prepare_optimizer(optimizer)
        self.module = accelerator.unwrap_model(self.wrapped)
        if self.zero_stage == 3:
            self._clear_padding()
        self.meter = TowerMeter(self._inner(), sharded=bool(self.zero_stage))

    def forward(self, micro_batches: Sequence[MicroBatch], seeds: Sequence[int]) -> dict[str, Tensor]:
        """Features of the micro-batches with their graph."""
        return self.wrapped(micro_batches, seeds)

    @torch.no_grad()
    def features(self, micro_batches: Sequence[MicroBatch], seeds: Sequence[int]) -> dict[str, Tensor]:
        """The same features without a graph."""
        with self.autocast():
            return self.module(micro_batches, seeds)

    def autocast(self) -> AbstractContextManager:
        """The run's precision for forward passes of the bare module, in evaluation too."""
        return precision.autocast(self.accelerator)

    def exchange(self, now: bool) -> None:
        """Before a forward: whether ranks exchange gradients in its backward, as they do in the last one of a step.

        ZeRO-2 and 3 reduce in every backward (they keep no full gradients), so they have no `no_sync`; they are told
        where the step ends instead.
        """
        if self.zero_stage:
            self.wrapped.set_gradient_accumulation_boundary(now)
        elif self.wrapped is not self.module:
            self.wrapped.require_backward_grad_sync = now  # what DDP.no_sync sets, for forward and backward

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, a scalar of which the mean over ranks is meant."""
        if self.zero_stage:
            self.wrapped.backward(loss)
        else:
            loss.backward()

    def step(self) -> tuple[float, bool]:
        """Clip, update, clamp the temperature, clear the gradients.

        Returns:
            The gradient's global norm before clipping, and whether the update was made: one decision on all ranks,
            which is no where the norm is not finite.
        """
        norm, applied = self._zero_step() if self.zero_stage else self._plain_step()
        if applied:
            for parameter in self.module.log_scales():
                self._clamp(parameter, *self.module.log_scale_range)
        return norm, applied

    def _plain_step(self) -> tuple[float, bool]:
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        limit = self.config.optim.clip_grad or math.inf
        norm = float(nn.utils.clip_grad_norm_(parameters, limit))
        applied = math.isfinite(norm)
        if applied:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, applied

    def _zero_step(self) -> tuple[float, bool]:
        self.wrapped.step()
        applied = not self.wrapped.optimizer.overflow
        norm = float(self.wrapped.get_global_grad_norm()) if applied else math.inf
        return norm, applied

    def _clamp(self, parameter: nn.Parameter, low: float, high: float) -> None:
        """Keep a parameter in [low, high]; under ZeRO its fp32 master too, which overwrites the parameter."""
        before = self.full_parameter(parameter)
        value = before.clamp(low, high)
        if torch.equal(value, before):
            return
        self._set_parameter(parameter, value)
        if self.zero_stage:
            self._set_master(parameter, value)

    def set_lrs(self, step: int, total: int, multipliers: Mapping[str, float] | None = None) -> dict[str, float]:
        """Set every group's learning rate for this step; returns the rate of each tower."""
        return optim.set_lrs(self.optimizer, step, total, self.config.optim, multipliers)

    def full_parameter(self, parameter: nn.Parameter) -> Tensor:
        """The whole fp32 value of one parameter; under ZeRO a collective."""
        if self.zero_stage == 3:
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                return parameter.detach().clone()
        return parameter.detach()

    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers by name, on the CPU; a collective. Complete on rank 0, empty elsewhere."""
        keep = distributed.is_main()
        weights = {}
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            value = self.full_parameter(tensor) if isinstance(tensor, nn.Parameter) else tensor
            if keep:
                weights[name] = value.detach().to("cpu", copy=True).contiguous()
        return weights

    @torch.no_grad()
    def set_weights(self, weights: dict[str, Tensor]) -> None:
        """Put whole values into the prepared model's parameters, not into the optimizer's copies; a collective."""
        for name, parameter in self.module.named_parameters():
            self._set_parameter(parameter, weights[name].to(self.device))

    def moments(self) -> dict[str, Tensor]:
        """AdamW's moments as "<parameter>.exp_avg" and "<parameter>.exp_avg_sq", on the CPU; a collective.

        Complete on rank 0, empty elsewhere, and before the first update.
        """
        if self.updates() == 0:
            return {}
        self._link_zero_state()
        keep = distributed.is_main()
        moments = {}
        for name, parameter in self._trainable():
            for key in MOMENTS:
                value = self._moment(parameter, key)
                if keep:
                    moments[f"{name}.{key}"] = value.detach().to("cpu", copy=True).contiguous()
        return moments

    def updates(self) -> int:
        """Updates that AdamW has made: its step count for the bias correction, the same for every parameter."""
        counts = {int(state["step"]) for state in self._inner().state.values() if "step" in state}
        assert len(counts) <= 1, f"parameters with different step counts: {sorted(counts)}"
        return counts.pop() if counts else 0

    def load_moments(self, moments: dict[str, Tensor], updates: int) -> None:
        """Put saved moments and the step count back, whatever engine and world size they were saved from."""
        if updates == 0:
            return
        if self.zero_stage:
            self._create_zero_state()
            self._link_zero_state()
            for name, parameter in self._trainable():
                for key in MOMENTS:
                    self._set_master(parameter, moments[f"{name}.{key}"].to(self.device), key)
            for state in self._inner().state.values():
                state["step"] = torch.full_like(torch.as_tensor(state["step"]), float(updates))
            return
        optimizer = self._inner()
        names = {id(parameter): name for name, parameter in self._trainable()}
        ordered = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
        state = {
            index: {"step": torch.tensor(float(updates)), **{key: moments[f"{name}.{key}"] for key in MOMENTS}}
            for index, name in enumerate(ordered)
        }
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

    def _create_zero_state(self) -> None:
        """Make DeepSpeed allocate its optimizer state: one update with zero gradients, learning rate and decay."""
        groups = self.optimizer.param_groups
        saved = [(group["lr"], group["weight_decay"]) for group in groups]
        for group in groups:
            group["lr"] = group["weight_decay"] = 0.0
        blank = self.module.blank_micro_batch().to(self.device)
        self.exchange(now=True)
        outputs = self.forward([blank], [0])
        self.backward(0.0 * torch.stack([value.float().sum() for value in outputs.values()]).sum())
        self.wrapped.step()
        for group, (lr, decay) in zip(groups, saved, strict=True):
            group["lr"], group["weight_decay"] = lr, decay

    def _clear_padding(self) -> None:
        """Zero what fills up the ranks' parts of parameters that do not divide: ZeRO-3 leaves it uninitialized."""
        zero = self.wrapped.optimizer
        for parameters, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
            start = 0
            for parameter in parameters:
                stop = start + parameter.partition_numel()
                used = parameter.ds_numel - distributed.rank() * parameter.partition_numel()
                flat.data[start + min(max(used, 0), stop - start) : stop].zero_()
                start = stop

    def _link_zero_state(self) -> None:
        """Tell ZeRO-1 and 2's parameters where their moments are.

        DeepSpeed 0.19 does so after the update of the first parameter group, when the others have no moments yet.
        """
        if self.zero_stage in (1, 2):
            from deepspeed.utils import lazy_init_hp_params_optimizer_state

            zero = self.wrapped.optimizer
            for parameters, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
                lazy_init_hp_params_optimizer_state(parameters, flat, zero.optimizer.state)

    @torch.no_grad()
    def _set_parameter(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Put a whole value into the module's parameter, which is not the copy that ZeRO's optimizer updates."""
        if self.zero_stage == 3:
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if distributed.is_main():
                    parameter.copy_(value)
        else:
            parameter.copy_(value)

    def _set_master(self, parameter: nn.Parameter, value: Tensor, key: str | None = None) -> None:
        """Put a whole value into the weight that ZeRO's optimizer updates, or into a moment of it."""
        from deepspeed import utils

        if self.zero_stage == 3:
            # Cut into parts here: DeepSpeed 0.19 fails to where a parameter does not divide by the world size.
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

    def _trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]

    def _inner(self) -> torch.optim.Optimizer:
        """The torch optimizer inside Accelerate's and DeepSpeed's."""
        return self.wrapped.optimizer.optimizer if self.zero_stage else self.optimizer.optimizer

    def _moment(self, parameter: nn.Parameter, key: str) -> Tensor:
        if self.zero_stage:
            from deepspeed.utils import safe_get_full_optimizer_state

            return safe_get_full_optimizer_state(parameter, key)
        return self._inner().state[parameter][key]
