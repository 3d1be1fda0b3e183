"""The engine of one process, and of several under DDP: every rank holds the whole model and its optimizer state."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from train.engine.base import MOMENTS, Engine


class PlainEngine(Engine):
    """torch alone; in one process there is no wrapper."""

    sharded = False

    def _prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        accelerator = self.accelerator
        if accelerator.num_processes == 1:
            # "evaluation" leaves out DDP, which Accelerate would put around one process as well.
            return accelerator.prepare_model(model, evaluation_mode=True), accelerator.prepare_optimizer(optimizer)
        # Said of 1 x 1 convolutions, whose strides differ in name only.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
            wrapped, optimizer = accelerator.prepare(model, optimizer)
        settle_buckets(wrapped)
        return wrapped, optimizer

    @property
    def inner_optimizer(self) -> torch.optim.Optimizer:
        return self.optimizer.optimizer

    def announce_backward(self, last: bool) -> None:
        if self.wrapped is not self.module:
            self.wrapped.require_backward_grad_sync = last  # what DDP.no_sync sets, for forward and backward

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def _update(self) -> tuple[Tensor, Tensor]:
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        if self.clip_grad:
            nn.utils.clip_grads_with_norm_(parameters, self.clip_grad, norm)
        applied = norm.isfinite()
        if getattr(self.inner_optimizer, "_step_supports_amp_scaling", False):
            # What a GradScaler sets: torch's fused optimizers skip on the device, so that nobody waits for the norm.
            self.inner_optimizer.found_inf = (~applied).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif applied:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, applied

    @torch.no_grad()
    def _clamp(self, parameter: nn.Parameter, low: float, high: float) -> None:
        parameter.clamp_(low, high)

    def own_weights(self) -> list[Tensor]:
        return [parameter.data for _, parameter in self._trainable()]

    def weights_replaced(self) -> None:
        pass  # nothing is gathered

    def _moments(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._trainable():
            for key in MOMENTS:
                yield f"{name}.{key}", self.inner_optimizer.state[parameter][key]

    def _load_moments(self, moments: dict[str, Tensor], updates: int) -> None:
        optimizer = self.inner_optimizer
        names = {id(parameter): name for name, parameter in self._trainable()}
        ordered = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
        state = {
            index: {"step": torch.tensor(float(updates)), **{key: moments[f"{name}.{key}"] for key in MOMENTS}}
            for index, name in enumerate(ordered)
        }
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def settle_buckets(ddp: nn.parallel.DistributedDataParallel) -> None:
    """Have DDP lay out its buckets for good, by a first backward pass of zeros; a collective.

    Else it does so after the first step of each start, by the order in which gradients came. With three ranks and more
    the layout says in which order they are added up, so a run that resumes would not end in the bytes of one that was
    not stopped. Here gradients come last parameter first, as nearly so in a step.
    """
    parameters = [parameter for parameter in ddp.parameters() if parameter.requires_grad]
    zero = torch.stack([parameter.sum() * 0 for parameter in parameters]).sum()
    ddp.reducer.prepare_for_backward([])
    zero.backward()
    ddp.reducer._rebuild_buckets()
    ddp.zero_grad(set_to_none=True)
