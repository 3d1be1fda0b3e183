"""Retrieval: the position of the right item among all others, in both directions.

Shape suffixes: N images, M texts, Q queries, T items of a tile, D embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from train.config import EvalTask
from train.distributed import all_reduce_sum, span
from train.evaluation.encode import Encoder
from train.evaluation.task import Evaluation, Task

RECALL_AT = (1, 5, 10)

# Cosines closer than this are equal: two encodings of one caption differ by about as much in float32.
TIE = 1e-6


class Retrieval(Task):
    """`retrieval_metrics` of a data set's images and captions, and `n_bad`, samples without caption or unreadable."""

    scores: ClassVar = {
        f"{side}_{name}": better
        for side in ("t2i", "i2t")
        for name, better in {
            **dict.fromkeys((f"R@{k}" for k in RECALL_AT), max),
            "median_rank": min,
            "mean_rank": min,
        }.items()
    }

    def __init__(self, given: EvalTask):
        super().__init__(given)
        statistics = self.manifest.statistics
        usable = self.manifest.nsamples - statistics.get("bad", {}).get("count", 0)
        if statistics.get("uncaptioned", 0) >= usable:
            raise ValueError(
                f"{self.manifest.path}: none of its {self.manifest.nsamples} samples has a caption, so there is no "
                "retrieval; data with classes are for an entry of eval.tasks with the task zeroshot, knn or probe"
            )

    def measure(self, encoder: Encoder) -> Evaluation:
        found = encoder.features(self.manifest).with_captions()
        chunk = encoder.config.eval.chunk
        metrics = retrieval_metrics(found.image_ND, found.text_MD, found.image_of_text_M, chunk)
        return Evaluation({**metrics, "n_bad": float(len(found.bad))}, found)

    @staticmethod
    def table(metrics: Mapping[str, float]) -> str:
        """Both directions, each beside chance."""
        lines = [f"{'held-out retrieval':20}{'text -> image':>15}{'chance':>9}{'image -> text':>17}{'chance':>9}"]
        rows = [(f"R@{k}", f"R@{k}", "%") for k in RECALL_AT] + [
            ("median rank", "median_rank", ""),
            ("mean rank", "mean_rank", ""),
        ]
        for label, name, unit in rows:
            cells = [metrics[f"{side}_{kind}{name}"] for side in ("t2i", "i2t") for kind in ("", "chance_")]
            texts = [f"{cell:.1f}{unit}" for cell in cells]
            lines.append(f"  {label:18}{texts[0]:>15}{texts[1]:>9}{texts[2]:>17}{texts[3]:>9}")
        bad = f", {metrics['n_bad']:.0f} unreadable" if metrics["n_bad"] else ""
        lines.append(f"  {metrics['n_images']:.0f} images, {metrics['n_texts']:.0f} texts{bad}")
        return "\n".join(lines)


def retrieval_metrics(
    image_features_ND: Tensor, text_features_MD: Tensor, image_of_text_M: Tensor, chunk: int = 1024
) -> dict[str, float]:
    """Recall, median and mean position of text -> image (`t2i_`) and image -> text (`i2t_`) retrieval, beside chance.

    A text has one right image; an image has one or more right texts, and the best placed one counts (the protocol of
    the Flickr30K and COCO captioning benchmarks). Ties count against the model, so constant features get the worst
    position. All processes pass the same features and return the same dict; each does its share of the queries.

    Args:
        image_features_ND: unit vectors.
        text_features_MD: unit vectors.
        image_of_text_M: int64; for each text the row of its image.
        chunk: rows and columns of the similarities that exist at once.

    Returns:
        `<direction>_R@1`, `_R@5`, `_R@10` in percent; `<direction>_median_rank`, `<direction>_mean_rank`, from 1; the
        same under `<direction>_chance_...` for a random order; `n_images`, `n_texts`.

    Raises:
        ValueError: features that are empty or not finite, or an image without a text.
    """
    n_images, n_texts = len(image_features_ND), len(text_features_MD)
    if not n_images or not n_texts:
        raise ValueError(f"retrieval needs images and texts, found {n_images} images and {n_texts} texts")
    check_finite("image", image_features_ND)
    check_finite("text", text_features_MD)
    texts_of_image_N = torch.bincount(image_of_text_M, minlength=n_images)
    if len(texts_of_image_N) != n_images or int(texts_of_image_N.min()) == 0:
        raise ValueError(f"every one of the {n_images} images needs at least one text, and every text one of them")

    right_M = (text_features_MD.double() * image_features_ND.double()[image_of_text_M]).sum(-1)
    best_N = torch.full((n_images,), -torch.inf, dtype=torch.float64, device=right_M.device)
    best_N = best_N.scatter_reduce(0, image_of_text_M, right_M, "amax")
    images_N = torch.arange(n_images, device=image_of_text_M.device)
    t2i_M = _positions(text_features_MD, image_of_text_M, right_M, image_features_ND, images_N, chunk)
    i2t_N = _positions(image_features_ND, images_N, best_N, text_features_MD, image_of_text_M, chunk)
    ones_M = np.ones(n_texts, dtype=np.int64)
    return {
        **_summary("t2i_", t2i_M.cpu().numpy(), ones_M, n_images),
        **_summary("i2t_", i2t_N.cpu().numpy(), texts_of_image_N.cpu().numpy(), n_texts),
        "n_images": float(n_images),
        "n_texts": float(n_texts),
    }


def _positions(
    queries_QD: Tensor, owner_Q: Tensor, right_Q: Tensor, items_ID: Tensor, owner_I: Tensor, chunk: int
) -> Tensor:
    """1 + the number of items of another owner that score at least as high as the query's best own item."""
    positions_Q = torch.zeros_like(owner_Q)
    first, last = span(len(queries_QD))
    for start in range(first, last, chunk):
        rows = slice(start, min(start + chunk, last))
        count_Q = torch.ones_like(owner_Q[rows])
        for left in range(0, len(items_ID), chunk):
            columns = slice(left, left + chunk)
            # float64: the order of summation, which depends on the tile's shape, must not decide between two items.
            scores_QT = queries_QD[rows].double() @ items_ID[columns].double().T
            above_QT = scores_QT >= right_Q[rows, None] - TIE
            count_Q += (above_QT & (owner_I[None, columns] != owner_Q[rows, None])).sum(-1)
        positions_Q[rows] = count_Q
    return all_reduce_sum(positions_Q)


def _summary(prefix: str, positions_Q: np.ndarray, right_Q: np.ndarray, total: int) -> dict[str, float]:
    """Metrics of `positions_Q`, and their averages when `total` items, `right_Q` of them right, are shuffled."""
    metrics = {f"{prefix}R@{k}": 100.0 * float(np.mean(positions_Q <= k)) for k in RECALL_AT}
    metrics[f"{prefix}median_rank"] = float(np.median(positions_Q))
    metrics[f"{prefix}mean_rank"] = float(np.mean(positions_Q))
    for k in RECALL_AT:
        metrics[f"{prefix}chance_R@{k}"] = 100.0 * chance(k, right_Q, total)
    metrics[f"{prefix}chance_median_rank"] = float(chance_median(right_Q, total))
    metrics[f"{prefix}chance_mean_rank"] = float(np.mean((total + 1) / (right_Q + 1)))
    return metrics


def chance(k: int, right_Q: np.ndarray, total: int) -> float:
    """Probability that a random order has a right item among its first k: 1 - C(total - right, k) / C(total, k)."""
    rights, queries = np.unique(right_Q, return_counts=True)
    drawn = np.arange(min(k, total))
    none_RK = np.clip(total - rights[:, None] - drawn, 0, None) / (total - drawn)
    return float(np.average(1 - none_RK.prod(-1), weights=queries))


def chance_median(right_Q: np.ndarray, total: int) -> int:
    """Smallest k at which a random order has a right item among its first k at least half of the time."""
    low, high = 1, total
    while low < high:
        middle = (low + high) // 2
        if chance(middle, right_Q, total) >= 0.5 - 1e-9:  # a half, whatever rounding makes of it
            high = middle
        else:
            low = middle + 1
    return low


def check_finite(tower: str, features_ND: Tensor) -> None:
    """Refuse features with NaN or infinity, which would sort anywhere.

    Raises:
        ValueError: naming the tower and how many rows are affected.
    """
    bad = int((~torch.isfinite(features_ND)).any(-1).sum())
    if bad:
        raise ValueError(
            f"{bad} of {len(features_ND)} {tower} features are not finite: the weights have diverged; start from an "
            "earlier checkpoint, by parent.run and parent.step, with a smaller optim.lr"
        )
