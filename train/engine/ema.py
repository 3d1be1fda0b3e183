"""The exponential moving average of the weights, which is what is evaluated and exported where `optim.ema` is set.

Every rank averages what it holds itself, whole parameters or its part of them. So an update exchanges nothing, and only
a checkpoint gathers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from train.engine.base import Engine
from train.engine.host import HostMemory


class WeightAverage:
    """average <- decay * average + (1 - decay) * weights, after every step; starts at the current weights.

    Args:
        decay: in [0, 1); 0 averages nothing, and every method leaves the weights as they are.
    """

    def __init__(self, engine: Engine, decay: float):
        self.engine, self.decay = engine, decay
        self.average = [tensor.clone() for tensor in engine.own_weights()] if decay else []

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step."""
        if self.decay:
            torch._foreach_lerp_(self.average, self.engine.own_weights(), 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the model has the averaged weights; no step may be made there."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state(self, memory: HostMemory | None = None) -> dict[str, Tensor]:
        """The averaged weights by name, as `Engine.weights` gives the others; empty without EMA. A collective."""
        if not self.decay:
            return {}
        with self.applied():
            return self.engine.weights(memory)

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Put saved averages back, whatever engine and world size they were saved from; a collective."""
        if not self.decay:
            return
        before = [tensor.clone() for tensor in self.engine.own_weights()]
        self.engine.set_weights(weights)
        for average, weight in zip(self.average, self.engine.own_weights(), strict=True):
            average.copy_(weight)
        for weight, kept in zip(self.engine.own_weights(), before, strict=True):
            weight.copy_(kept)
        self.engine.weights_replaced()

    @torch.no_grad()
    def _swap(self) -> None:
        if not self.decay:
            return
        for average, weight in zip(self.average, self.engine.own_weights(), strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
        self.engine.weights_replaced()
