"""What training needs of an engine: forward and backward passes, optimizer steps, and whole weights to save and load.

Parameters, gradients and optimizer state are fp32 in every engine; bf16 is autocast. Gradients are means over ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from train import distributed
from train.engine import precision
from train.engine.host import HostMemory
from train.engine.meter import TowerMeter
from train.engine.start import bound_groups

if TYPE_CHECKING:
    from accelerate import Accelerator

    from data_pipeline.batch import MicroBatch

Clamped = tuple[nn.Parameter, float, float]
MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine(ABC):
    """A model and its optimizer, prepared by Accelerate. `build_engine` picks the subclass.

    Args:
        accelerator: from `train.engine.start`.
        model: maps micro-batches and their seeds to a dictionary of tensors. Its weights are in place: ZeRO copies
            them here.
        optimizer: over those parameters of the model that learn; each learning one has a gradient in every step.
        blank: makes the smallest batch that goes through the model, to be moved with `.to(device)`.
        clamped: parameters that stay in a range, with its ends.
        clip_grad: largest norm of the gradient, 0 for any.
        micro_batch: rows of one micro-batch.

    device: where micro-batches have to be.
    module: the model without any wrapper, to be called in evaluation.
    optimizer: has the parameter groups whose learning rates the caller sets.
    meter: measures what a step does to each tower.
    sharded: whether the optimizer's parameters are this rank's part of the model, else all of it.
    stage: of ZeRO; 0 without.
    """

    sharded: bool
    stage = 0

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        blank: Callable[[], Any],
        clamped: Sequence[Clamped] = (),
        clip_grad: float = 0.0,
        micro_batch: int = 1,
    ) -> None:
        self.accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.precision: str = accelerator.mixed_precision
        self.blank, self.clamped = blank, clamped
        self.clip_grad, self.micro_batch = clip_grad, micro_batch
        self.wrapped, self.optimizer = self._prepare(model, optimizer)
        bound_groups()
        # Without torch.compile's wrapper, which would put its prefix before every name in a checkpoint.
        self.module = accelerator.unwrap_model(self.wrapped, keep_torch_compile=False)
        self.meter = TowerMeter(self.inner_optimizer, sharded=self.sharded)

    @abstractmethod
    def _prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """Model and optimizer as Accelerate wraps them."""

    @property
    @abstractmethod
    def inner_optimizer(self) -> torch.optim.Optimizer:
        """torch's optimizer inside of what Accelerate made of it."""

    def forward(self, micro_batches: Sequence[MicroBatch], seeds: Sequence[int]) -> dict[str, Tensor]:
        """The model's outputs for these micro-batches, with their graph."""
        return self.wrapped(micro_batches, seeds)

    def features(self, micro_batches: Sequence[MicroBatch], seeds: Sequence[int]) -> dict[str, Tensor]:
        """The same outputs without a graph, to the last bit."""
        with torch.set_grad_enabled(self.repeats_with_graph), self.autocast():
            outputs = self.module(micro_batches, seeds)
        return {name: value.detach() for name, value in outputs.items()}

    @property
    def repeats_with_graph(self) -> bool:
        """Whether only a pass that makes a graph is sure to repeat one: without, GPUs choose among other kernels of
        attention, and a compiled tower is another program. On a CPU the memory of the graph would cost time."""
        return self.device.type == "cuda" or bool(getattr(self.module, "compiled", False))

    def autocast(self) -> AbstractContextManager:
        """The run's precision for forward passes of the bare module, in evaluation too."""
        return precision.autocast(self.device, self.precision)

    @abstractmethod
    def announce_backward(self, last: bool) -> None:
        """Before a forward pass: whether its backward is the last of this step, which averages gradients over ranks."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, a scalar; what is minimized is its mean over ranks."""

    def step(self) -> tuple[Tensor, Tensor]:
        """Clip the gradient, update the weights, clamp, clear the gradient.

        Returns:
            The gradient's global norm before clipping, and whether the update was made: it is not, on any rank, where
            the norm is not finite. Scalars on the device; whoever reads them waits for it.
        """
        norm, applied = self._update()
        for parameter, low, high in self.clamped:
            self._clamp(parameter, low, high)
        return norm, applied

    @abstractmethod
    def _update(self) -> tuple[Tensor, Tensor]:
        """What `step` does, without the clamping."""

    @abstractmethod
    def _clamp(self, parameter: nn.Parameter, low: float, high: float) -> None:
        """Keep the values of a parameter, and what the next update starts from, between `low` and `high`."""

    def full_parameter(self, parameter: nn.Parameter) -> Tensor:
        """The whole fp32 value of one parameter; a collective where ranks hold parts."""
        return parameter.detach()

    @torch.no_grad()
    def _set_parameter(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Put a whole value into the model's parameter; the next update may start from another copy."""
        parameter.copy_(value)

    def weights(self, memory: HostMemory | None = None) -> dict[str, Tensor]:
        """Parameters and buffers by name, on the CPU; a collective. Complete on rank 0, empty elsewhere.

        memory: what they are copied into, over what was copied there before; None: memory of their own.
        """
        state = self.module.state_dict(keep_vars=True).items()
        whole = ((name, self.full_parameter(t) if isinstance(t, nn.Parameter) else t) for name, t in state)
        return _on_rank_0(whole, memory)

    def set_weights(self, weights: dict[str, Tensor]) -> None:
        """Put whole values into the model's parameters, not into the optimizer's copies; a collective."""
        for name, parameter in self.module.named_parameters():
            self._set_parameter(parameter, weights[name].to(self.device))

    @abstractmethod
    def own_weights(self) -> list[Tensor]:
        """What this rank holds of each parameter that learns, in order; call weights_replaced after writing into it."""

    @abstractmethod
    def weights_replaced(self) -> None:
        """After writing into own_weights: forget what was gathered of the weights before."""

    def updates(self) -> int:
        """Updates that AdamW has made: its step count for the bias correction, the same for every parameter."""
        steps = [torch.as_tensor(state["step"]) for state in self.inner_optimizer.state.values() if "step" in state]
        counts = {int(count) for count in torch.stack(steps).tolist()} if steps else {0}  # a GPU is read once for all
        assert len(counts) == 1, f"parameters with different step counts: {sorted(counts)}"
        return counts.pop()

    def moments(self, memory: HostMemory | None = None) -> dict[str, Tensor]:
        """AdamW's moments as "<parameter>.exp_avg" and "<parameter>.exp_avg_sq", on the CPU; a collective.

        Complete on rank 0, empty elsewhere, and before the first update. memory: as of `weights`.
        """
        if self.updates() == 0:
            return {}
        return _on_rank_0(self._moments(), memory)

    def saved_bytes(self, copies: int) -> int:
        """Of both moments and of so many copies of the weights."""
        size = sum(_numel(tensor) * tensor.element_size() for tensor in self.module.state_dict(keep_vars=True).values())
        return copies * size + sum(len(MOMENTS) * 4 * _numel(parameter) for _, parameter in self._trainable())

    @abstractmethod
    def _moments(self) -> Iterator[tuple[str, Tensor]]:
        """Names and whole moments, which hold until the next one comes; a collective. Elsewhere than on rank 0 they may
        have any values."""

    def load_moments(self, moments: dict[str, Tensor], updates: int) -> None:
        """Put saved moments and the step count back, whatever engine and world size they were saved from."""
        if updates:
            self._load_moments(moments, updates)

    @abstractmethod
    def _load_moments(self, moments: dict[str, Tensor], updates: int) -> None:
        """What load_moments does where there has been an update."""

    def _trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]


def _on_rank_0(tensors: Iterator[tuple[str, Tensor]], memory: HostMemory | None) -> dict[str, Tensor]:
    """Copies on the CPU, one at a time. All ranks go through the iterator, which may gather; only rank 0 keeps."""
    keep, copy = distributed.is_main(), memory.copy if memory else _copy
    return {name: copy(name, value.detach()) for name, value in tensors if keep}


def _copy(_: str, tensor: Tensor) -> Tensor:
    return tensor.to("cpu", copy=True).contiguous()


def _numel(tensor: Tensor) -> int:
    """Of the whole tensor, where ZeRO-3 has left a part of it here."""
    return getattr(tensor, "ds_numel", tensor.numel())
