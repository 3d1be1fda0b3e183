"""How the embeddings of a step lie on the sphere.

b: rows of this rank, B: rows of the global batch, D: embedding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from train import distributed
from train.config import TOWERS

ROWS = 1024  # of the similarity matrix that exist at once


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
    """The sum of exp(-2 |x - y|^2) over this rank's rows x, which begin at row `start`, and all other rows y."""
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
