"""Contrastive losses as pure functions of the global batch's features.

softmax: symmetric cross-entropy over rows and columns of the similarity matrix (CLIP, arXiv 2103.00020, figure 3).
sigmoid: one binary decision per pair (SigLIP, arXiv 2303.15343, algorithm 1).

A rank owns rows [start, stop) of the global batch, and its loss is the mean over those rows. The mean of that over
ranks is the loss of the global batch, and the mean of the gradients over ranks is its gradient.

B: pairs of the global batch, b: pairs of this rank, D: features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from train import distributed
from train.config import TOWERS, LossConfig
from train.loss.ids import Ids
from train.loss.products import exact_matmul
from train.loss.tiled import tiled_sigmoid, tiled_softmax

CLIP = LossConfig()


def towers_gathered(config: LossConfig) -> tuple[str, ...]:
    """The towers of which `contrastive_loss`, where it is collective, needs all ranks' features, not its own alone."""
    return ("text",) if config.rows == "tiled" else TOWERS


def contrastive_loss(
    image_BD: Tensor,
    text_BD: Tensor,
    logit_scale: Tensor,
    *,
    config: LossConfig = CLIP,
    start: int = 0,
    stop: int | None = None,
    bias: Tensor | None = None,
    image_ids_B: Tensor | None = None,
    text_ids_B: Tensor | None = None,
    collective: bool = False,
) -> Tensor:
    """The contrastive loss of rows [start, stop) against the global batch; a scalar, fp32 inside.

    Differentiable in image_BD, text_BD, logit_scale and bias, once.

    Args:
        image_BD, text_BD: features of all ranks, L2-normalized; row i of one belongs to row i of the other. In tiles,
            where `collective`, the images may be those of rows [start, stop) alone.
        logit_scale: [1], what cosine similarities are multiplied by (exp already applied).
        config: which loss; by default CLIP's, in tiles.
        start, stop: this rank's rows; by default all rows.
        bias: [1], what is then added; sigmoid only, by default 0.
        image_ids_B, text_ids_B: integers, equal for equal images or captions; used where config.mask_duplicates is set.
        collective: whether every rank calls this at once with the same batch and its own rows, in rank order. In tiles,
            a pair's similarity is then computed on one rank only. The losses are the same; of the gradients only the
            sum over ranks is, and only where all ranks multiply their loss by the same number.

    Raises:
        ValueError: an argument does not fit the others.
    """
    B = text_BD.shape[0]
    stop = B if stop is None else stop
    b = stop - start
    images = b if collective and "image" not in towers_gathered(config) and len(image_BD) == b else B
    if text_BD.ndim != 2 or image_BD.shape != (images, text_BD.shape[1]):
        raise ValueError(
            f"image_BD has shape {list(image_BD.shape)} and text_BD {list(text_BD.shape)}: both must be [B, D], with "
            "the embeddings of one pair in the same row"
        )
    if not 0 <= start < stop <= B:
        raise ValueError(f"start {start} and stop {stop} must be a range of the {B} rows of text_BD")
    if collective and b < B and (start, stop) != distributed.span(B):
        has = "rows {} to {}".format(*distributed.span(B))
        raise ValueError(f"collective: rank {distributed.rank()} has {has} of {B}, not start {start} and stop {stop}")
    ids = None
    if config.mask_duplicates:
        if image_ids_B is None or text_ids_B is None or len(image_ids_B) != B or len(text_ids_B) != B:
            raise ValueError(
                f"config.mask_duplicates needs image_ids_B and text_ids_B, one number for each of the {B} rows"
            )
        ids = Ids(image_ids_B, text_ids_B)
    own = slice(start, stop)
    with exact_matmul(image_BD.device.type):
        dtype = torch.promote_types(image_BD.dtype, torch.float32)
        image_BD, text_BD, scale = image_BD.to(dtype), text_BD.to(dtype), logit_scale.to(dtype).reshape(())
        if config.kind == "sigmoid":
            bias = torch.zeros_like(scale) if bias is None else bias.to(dtype).reshape(())
            sigmoid = tiled_sigmoid if config.rows == "tiled" else _sigmoid
            return sigmoid(image_BD, text_BD, scale, bias, own, config, ids)
        if config.rows == "tiled":
            return tiled_softmax(image_BD, text_BD, scale, own, config, ids, collective)
        return _softmax(image_BD, text_BD, scale, own, config, ids)


class _Product(Function):
    """rows_bD @ columns_BD.T, exact in the backward pass, too, which runs outside the loss function."""

    @staticmethod
    def forward(ctx: Any, rows_bD: Tensor, columns_BD: Tensor) -> Tensor:
        ctx.save_for_backward(rows_bD, columns_BD)
        return rows_bD @ columns_BD.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_bB: Tensor) -> tuple[Tensor, Tensor]:
        rows_bD, columns_BD = ctx.saved_tensors
        with exact_matmul(grad_bB.device.type):
            return grad_bB @ columns_BD, grad_bB.T @ rows_bD


def _softmax(
    image_BD: Tensor, text_BD: Tensor, scale: Tensor, own: slice, config: LossConfig, ids: Ids | None
) -> Tensor:
    """rows: full computes the logits of all rows and keeps its own; local computes its own."""
    B = image_BD.shape[0]
    rows = slice(0, B) if config.rows == "full" else own
    logits_image = _Product.apply(scale * image_BD[rows], text_BD)
    logits_text = logits_image.T if config.rows == "full" else _Product.apply(scale * text_BD[rows], image_BD)
    excluded = None if ids is None else ids.duplicates(rows, slice(0, B))
    of_images, of_texts = (_cross_entropy(logits, rows, config, excluded) for logits in (logits_image, logits_text))
    losses = (of_images + of_texts) / 2
    return losses[own.start - rows.start : own.stop - rows.start].mean()


def _cross_entropy(logits: Tensor, rows: slice, config: LossConfig, excluded: Tensor | None) -> Tensor:
    """[rows, B] -> [rows]; the target of row i is column i, smoothed over the columns that are not excluded."""
    if excluded is not None:
        logits = logits.masked_fill(excluded, -torch.inf)
    log_shares = logits.log_softmax(1)
    losses = -(1 - config.label_smoothing) * log_shares.diagonal(rows.start)
    if config.label_smoothing:
        if excluded is None:
            mean = log_shares.mean(1)
        else:
            mean = log_shares.masked_fill(excluded, 0).sum(1) / (~excluded).sum(1)
        losses = losses - config.label_smoothing * mean
    return losses


def _sigmoid(
    image_BD: Tensor,
    text_BD: Tensor,
    scale: Tensor,
    bias: Tensor,
    own: slice,
    config: LossConfig,
    ids: Ids | None,
) -> Tensor:
    """Per row of images, the sum over texts of softplus(logit) - target * logit; excluded pairs weigh nothing."""
    B = image_BD.shape[0]
    rows = slice(0, B) if config.rows == "full" else own
    logits = _Product.apply(scale * image_BD[rows], text_BD) + bias
    positive = logits.diagonal(rows.start)
    costs = F.softplus(logits)
    if ids is None:
        mean = logits.mean(1)
    else:
        excluded = ids.duplicates(rows, slice(0, B))
        costs = costs.masked_fill(excluded, 0)
        mean = logits.masked_fill(excluded, 0).sum(1) / (~excluded).sum(1)
    losses = costs.sum(1) - (1 - config.label_smoothing) * positive - config.label_smoothing * mean
    return losses[own.start - rows.start : own.stop - rows.start].mean()
