"""How the embeddings of a step lie on the sphere.

b: rows of this rank, B: rows of the global batch, D: embedding, n: the smaller of B and D.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from train import distributed
from train.config import TOWERS
from train.engine.precision import back, double

ROWS = 1024  # of the similarity matrix that exist at once


@torch.no_grad()
def embedding_metrics(image_bD: Tensor, text_bD: Tensor) -> dict[str, Tensor]:
    """How the global batch's unit vectors lie; a collective, with the same result on every rank.

    Only the eigenvalues behind effective_rank make the host wait: image's on rank 0, text's on rank 1, if there is one.

    Returns:
        alignment: mean squared distance of an image and its caption, 0 to 4, and uniformity/<tower>: log of the mean of
            exp(-2 squared distance) over pairs of different rows, -4 (even) to 0 (one point); Wang & Isola, ICML 2020.
        modality_gap: distance of the towers' mean vectors, 0 to 2; Liang et al., NeurIPS 2022.
        effective_rank/<tower>: exp of the entropy of the singular values as shares of their sum, 1 to D; Roy &
            Vetterli, EUSIPCO 2007. NaN where a feature is not finite.

        Scalars on the device.
    """
    own = {"image": image_bD.detach().float(), "text": text_bD.detach().float()}
    full = {tower: distributed.all_gather_rows(value) for tower, value in own.items()}
    size, world = len(full["image"]), distributed.world_size()
    start = len(image_bD) * distributed.rank()
    values = {"alignment": double((own["image"] - own["text"]).square().sum()) / size}
    values["modality_gap"] = double((full["image"].mean(0) - full["text"].mean(0)).norm()) / world
    for tower in TOWERS:
        values[f"uniformity/{tower}"] = _potential(own[tower], full[tower], start) / (size * max(1, size - 1))
    values |= {f"effective_rank/{tower}": rank for tower, rank in _effective_ranks(own, full).items()}
    # Sums over ranks of what each has of its own rows, means of what all of them have.
    metrics = dict(zip(values, distributed.all_reduce_sum(torch.stack(list(values.values()))), strict=True))
    for name in (f"uniformity/{tower}" for tower in TOWERS):
        metrics[name] = torch.where(metrics[name] > 0, metrics[name].log(), math.nan)
    return {name: back(value, image_bD.device) for name, value in metrics.items()}


def _potential(own_bD: Tensor, full_BD: Tensor, start: int) -> Tensor:
    """The sum of exp(-2 |x - y|^2) over this rank's rows x, which begin at row `start`, and all other rows y."""
    total = double(own_bD.new_zeros(()))
    for offset in range(0, len(own_bD), ROWS):
        scores_RB = own_bD[offset : offset + ROWS] @ full_BD.T
        scores_RB.diagonal(start + offset).fill_(-math.inf)  # a row and itself
        total += double((4 * scores_RB - 4).exp_().sum(1)).sum()
    return total


def _effective_ranks(own: Mapping[str, Tensor], full: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of each tower's features on one rank, 0 on the others, so that their sum over ranks has both; float64 [].

    Gram matrices are in float64: roots of one in float32 drown small singular values (RESULTS.md: 5 % of a rank of 6).
    """
    rows, columns = full["image"].shape
    world, rank = distributed.world_size(), distributed.rank()
    mine = [tower for number, tower in enumerate(TOWERS) if number % world == rank]
    if rows > columns:
        parts_tDD = torch.stack([double(own[tower]).T @ double(own[tower]) for tower in TOWERS])
        grams = dict(zip(TOWERS, distributed.all_reduce_sum(parts_tDD), strict=True))
    else:
        grams = {tower: double(full[tower]) @ double(full[tower]).T for tower in mine}
    ranks = dict.fromkeys(TOWERS, double(full["image"].new_zeros(())))
    if mine:
        ranks |= zip(mine, effective_rank(torch.stack([grams[tower] for tower in mine])), strict=True)
    return ranks


def effective_rank(grams_tnn: Tensor) -> Tensor:
    """[t], of matrices that have these Gram matrices, from 1 to their rank; NaN for one that is not finite."""
    finite_t = grams_tnn.isfinite().all(-1).all(-1)
    identity_nn = torch.eye(grams_tnn.shape[-1], dtype=grams_tnn.dtype, device=grams_tnn.device)
    # All at once, because the host waits for each call to know whether it has converged.
    values_tn = torch.linalg.eigvalsh(torch.where(finite_t[:, None, None], grams_tnn, identity_nn))
    singular_tn = values_tn.clamp(min=0).sqrt()
    shares_tn = singular_tn / singular_tn.sum(1, keepdim=True)
    return torch.where(finite_t, torch.special.entr(shares_tn).sum(1).exp(), math.nan)
