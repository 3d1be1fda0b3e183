"""What a step does to each tower; `train.engine.balance` acts on it.

A tower here is its whole branch, projection included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from train import distributed
from train.config import TOWERS
from train.engine.precision import back, double

NORMS = ("grad", "weight", "update")
MEASURED = ("grad_norm/", "weight_norm/", "update_ratio/")
"""What the names of measured numbers begin with; the tower follows."""
CHUNK = 1 << 16  # elements: what a sum in fp32 adds up without loss, and what a CPU's cache holds


class TowerMeter:
    """The norms of gradient, weights and update of each tower, in those optimizer steps for which it was armed.

    Every engine ends in the `step` of torch's optimizer, whose hooks see what is applied, at the moment when it is:
    whole parameters, or this rank's part of a group. So sums of squares of parts and one all-reduce of six numbers do
    for all of them: nothing is gathered, no engine's own gradient buffers are read, and the update is what the weights
    really moved by. While it measures, it holds a copy of this rank's part.

    Args:
        optimizer: torch's; groups without a `tower` are not measured.
        sharded: whether its parameters are this rank's part of the model; else each rank measures its share of them.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, sharded: bool):
        self.own = slice(None) if sharded else slice(distributed.rank(), None, distributed.world_size())
        self.armed = False
        self.copies: list[tuple[str, list[Tensor], list[Tensor]]] = []
        self.sums: dict[tuple[str, str], list[Tensor]] = {}
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def arm(self) -> None:
        """Measure the next step."""
        self.armed, self.sums = True, {(tower, norm): [] for tower in TOWERS for norm in NORMS}

    def read(self, applied: Tensor, grad_norm: Tensor, clip: float) -> dict[str, Tensor]:
        """After the armed step: grad_norm/<tower>, before clipping; weight_norm/<tower>, before the update;
        update_ratio/<tower>, the norm of the update over that of the weights. A collective; nobody waits for it.

        Args:
            applied: whether there was an update; all is NaN where there was none.
            grad_norm: the gradient's global norm before clipping; clip: the largest one allowed, 0 for any.

        Returns:
            Scalars on the device of `grad_norm`.
        """
        self.armed = False
        device = grad_norm.device
        nothing = torch.zeros((), device=device)
        own = [double(torch.stack([nothing, *(x.to(device) for x in sums)])).sum() for sums in self.sums.values()]
        sums = distributed.all_reduce_sum(torch.stack(own))
        sums = torch.where(applied.to(sums.device), sums, math.nan)
        norms = dict(zip(self.sums, sums.sqrt(), strict=True))
        # As torch and DeepSpeed do it.
        clipped = ((double(grad_norm) + 1e-6) / clip).clamp(min=1) if clip else 1.0
        measured: dict[str, Tensor] = {}
        for tower in TOWERS:
            grad, weight, update = (norms[tower, norm] for norm in NORMS)
            numbers = (grad * clipped, weight, torch.where(weight == 0, 0, update / weight))
            measured |= {f"{name}{tower}": number for name, number in zip(MEASURED, numbers, strict=True)}
        return {name: back(value, device) for name, value in measured.items()}

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not self.armed:
            return
        for group in optimizer.param_groups:
            weights = [p.detach() for p in group["params"][self.own] if p.grad is not None]
            tower = group.get("tower")
            if tower not in TOWERS or not weights:
                continue
            gradients = [p.grad for p in group["params"][self.own] if p.grad is not None]
            self.sums[tower, "grad"].append(sum_of_squares(gradients))
            self.sums[tower, "weight"].append(sum_of_squares(weights))
            self.copies.append((tower, weights, [weight.clone() for weight in weights]))

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        for tower, weights, copies in self.copies:
            torch._foreach_sub_(copies, weights)
            self.sums[tower, "update"].append(sum_of_squares(copies))
        self.copies = []


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Of all elements, to fp32 accuracy whatever their number."""
    parts = [part for tensor in tensors for part in tensor.reshape(-1).split(CHUNK)]
    return torch.stack(torch._foreach_norm(parts)).square().sum()
