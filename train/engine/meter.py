"""What a step does to each tower, and how its embeddings lie on the sphere; `train.engine.balance` acts on it.

A tower here is its whole branch, projection included. b: rows of this rank, B: rows of the global batch, D: embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from train import distributed

TOWERS = ("image", "text")
NORMS = ("grad", "weight", "update")
CHUNK = 1 << 16  # elements: what a sum in fp32 adds up without loss, and what a CPU's cache holds
ROWS = 1024  # of the similarity matrix that exist at once


class TowerMeter:
    """The norms of gradient, weights and update of each tower, in those optimizer steps for which it was armed.

    Every engine ends in the `step` of torch's AdamW, whose hooks see what is applied, at the moment when it is: whole
    parameters (plain, DDP), or this rank's part of a group (ZeRO 1 to 3, offloaded or not). So sums of squares of parts
    and one all-reduce of six numbers do for all of them: nothing is gathered, no engine's own gradient buffers are
    read, and the update is what the weights really moved by. While it measures, it holds a copy of this rank's part.

    Args:
        optimizer: torch's, with `tower` in its groups.
        sharded: whether its parameters are this rank's part of the model; else ranks deal the parameters among them.
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

    def read(self, applied: bool, grad_norm: float, clip: float) -> dict[str, float]:
        """After the armed step: grad_norm/<tower>, before clipping; weight_norm/<tower>, before the update;
        update_ratio/<tower>, the norm of the update over that of the weights. A collective.

        Args:
            applied: whether there was an update; empty where there was none.
            grad_norm: the gradient's global norm before clipping; clip: the largest one allowed, 0 for any.
        """
        self.armed = False
        if not applied:
            return {}
        own = [sum((float(value) for value in values), 0.0) for values in self.sums.values()]
        sums = distributed.all_reduce_sum(torch.tensor(own, dtype=torch.float64)).tolist()
        norms = {key: math.sqrt(value) for key, value in zip(self.sums, sums, strict=True)}
        clipped = max(1.0, (grad_norm + 1e-6) / clip) if clip else 1.0  # as torch and DeepSpeed do it
        measured = {}
        for tower in TOWERS:
            grad, weight, update = (norms[tower, norm] for norm in NORMS)
            measured[f"grad_norm/{tower}"] = grad * clipped
            measured[f"weight_norm/{tower}"] = weight
            measured[f"update_ratio/{tower}"] = update / weight if weight else 0.0
        return measured

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not self.armed:
            return
        for group in optimizer.param_groups:
            weights = [p.detach() for p in group["params"][self.own] if p.grad is not None]
            if group["tower"] not in TOWERS or not weights:
                continue
            gradients = [p.grad for p in group["params"][self.own] if p.grad is not None]
            self.sums[group["tower"], "grad"].append(sum_of_squares(gradients))
            self.sums[group["tower"], "weight"].append(sum_of_squares(weights))
            self.copies.append((group["tower"], weights, [weight.clone() for weight in weights]))

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


@torch.no_grad()
def embedding_metrics(image_bD: Tensor, text_bD: Tensor) -> dict[str, float]:
    """How the global batch's unit vectors lie; a collective, with the same result on every rank.

    Returns:
        alignment: mean squared distance of an image and its caption, 0 to 4, and uniformity/<tower>: log of the mean of
            exp(-2 squared distance) over pairs of different rows, -4 (even) to 0 (one point); Wang & Isola, ICML 2020.
        modality_gap: distance of the towers' mean vectors, 0 to 2; Liang et al., NeurIPS 2022.
        effective_rank/<tower>: exp of the entropy of the singular values as shares of their sum, 1 to D; Roy &
            Vetterli, EUSIPCO 2007.
    """
    own = {"image": image_bD.detach().float(), "text": text_bD.detach().float()}
    full = {tower: distributed.all_gather_rows(value) for tower, value in own.items()}
    size, world = len(full["image"]), distributed.world_size()
    start = len(image_bD) * distributed.rank()
    values = {"alignment": _double((own["image"] - own["text"]).square().sum()) / size}
    values["modality_gap"] = _double((full["image"].mean(0) - full["text"].mean(0)).norm()) / world
    for tower in TOWERS:
        values[f"potential/{tower}"] = _potential(own[tower], full[tower], start) / (size * max(1, size - 1))
        values[f"effective_rank/{tower}"] = effective_rank(full[tower]) / world
    # Sums over ranks of what each has of its own rows, means of what all of them have.
    sums = distributed.all_reduce_sum(torch.stack(list(values.values()))).tolist()
    metrics = dict(zip(values, sums, strict=True))
    for tower in TOWERS:
        potential = metrics.pop(f"potential/{tower}")
        metrics[f"uniformity/{tower}"] = math.log(potential) if potential > 0 else math.nan
    return metrics


def _potential(own_bD: Tensor, full_BD: Tensor, start: int) -> Tensor:
    """The sum of exp(-2 |x - y|^2) over this rank's rows x, of which the first is row `start`, and all other rows y."""
    total = _double(own_bD.new_zeros(()))
    for offset in range(0, len(own_bD), ROWS):
        scores_RB = own_bD[offset : offset + ROWS] @ full_BD.T
        scores_RB.diagonal(start + offset).fill_(-math.inf)  # a row and itself
        total += _double((4 * scores_RB - 4).exp_().sum(1)).sum()
    return total


def effective_rank(features_BD: Tensor) -> Tensor:
    """Of a matrix, from 1 to its rank; float64 [], NaN where a feature is not finite."""
    features_BD = _double(features_BD)  # roots of a Gram matrix in fp32 would drown small singular values
    rows, columns = features_BD.shape
    gram = features_BD.T @ features_BD if rows > columns else features_BD @ features_BD.T
    if not gram.isfinite().all():
        return gram.new_tensor(math.nan)
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    shares = singular / singular.sum()
    return torch.special.entr(shares).sum().exp()


def _double(tensor: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
