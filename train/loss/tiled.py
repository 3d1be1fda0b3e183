"""The losses of train.loss a tile of logits at a time: neither B x B nor b x B numbers ever exist together.

softmax: an online log-sum-exp (Milakov and Gimelshein, arXiv 1805.02867); its maxima and sums are saved, and the
backward pass computes each tile again. One pass over the tiles of a rank's images with all texts does for both
directions, as ranks reduce their maxima and sums of the columns: three vectors [B].
sigmoid: a sum over pairs, so one pass yields the loss and its gradients.

b: rows of this rank, B: pairs of the global batch, D: features, r and c: rows and columns of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from train import distributed
from train.config import LossConfig
from train.loss.ids import Ids
from train.loss.products import are_three, exact_matmul, matmul_of_parts, parts


def tiled_softmax(
    image_BD: Tensor,
    text_BD: Tensor,
    scale: Tensor,
    own: slice,
    config: LossConfig,
    ids: Ids | None,
    collective: bool,
) -> Tensor:
    """The softmax loss of rows `own` in both directions; collective: as of `contrastive_loss`."""
    options, image_bD = _options(image_BD, own, config, ids), _own_rows(image_BD, own)
    if collective or len(image_bD) == len(text_BD):
        return _TiledSoftmax.apply(image_bD, text_BD, scale, options, True)
    from_image = _TiledSoftmax.apply(image_bD, text_BD, scale, options, False)
    from_text = _TiledSoftmax.apply(text_BD[own], image_BD, scale, options, False)
    return (from_image + from_text) / 2


def tiled_sigmoid(
    image_BD: Tensor, text_BD: Tensor, scale: Tensor, bias: Tensor, own: slice, config: LossConfig, ids: Ids | None
) -> Tensor:
    """The sigmoid loss of image rows `own` with all texts."""
    options = _options(image_BD, own, config, ids)
    return _TiledSigmoid.apply(_own_rows(image_BD, own), text_BD, scale, bias, options)


def tile_on(device_type: str, config: LossConfig) -> int:
    """Rows and columns of a tile: as configured, or what suits such a device (`cpu`, `cuda`)."""
    return config.tile or (1024 if device_type == "cpu" else 4096)


def _own_rows(image_BD: Tensor, own: slice) -> Tensor:
    """Rows `own` of the images of all ranks; images that are those rows alone, as they are."""
    return image_BD if len(image_BD) == own.stop - own.start else image_BD[own]


class _Options(NamedTuple):
    own: slice
    tile: int
    smoothing: float
    ids: Ids | None
    in_three: bool

    def even(self, features_BD: Tensor) -> Tensor:
        """[B], 1 / the number of pairs over which the label smoothing of a row spreads."""
        B = features_BD.shape[0]
        if self.ids is None or not self.smoothing:
            return 1 / features_BD.new_full((B,), B)
        return 1 / self.ids.kept().to(features_BD.dtype)


def _options(image_BD: Tensor, own: slice, config: LossConfig, ids: Ids | None) -> _Options:
    return _Options(own, tile_on(image_BD.device.type, config), config.label_smoothing, ids, are_three(image_BD))


class _Tile(NamedTuple):
    """Part of the logits: `rows` of the rank's b, `columns` of the B; elements [i, i + offset] are the true pairs."""

    rows: slice
    columns: slice
    offset: int
    logits_rc: Tensor
    scratch_rc: Tensor
    excluded_rc: Tensor | None

    def positives(self, tile_rc: Tensor) -> Tensor:
        """A view of a tile's elements that belong to true pairs; mostly empty."""
        if -tile_rc.shape[0] < self.offset < tile_rc.shape[1]:
            return tile_rc.diagonal(self.offset)
        return tile_rc[:0, 0]

    @property
    def positive_rows(self) -> slice:
        """Which of the rank's rows have their true pair in this tile."""
        first = self.rows.start + max(0, -self.offset)
        return slice(first, first + self.positives(self.logits_rc).shape[0])

    def add_gradients(
        self,
        grad_rc: Tensor,
        rows_bD: Tensor,
        columns_BD: Tensor,
        grad_rows_bD: Tensor,
        grad_columns_BD: Tensor,
        in_three: bool,
    ) -> None:
        """Adds what the gradient of the logits makes of those of rows and columns."""
        if not in_three:
            grad_rows_bD[self.rows].addmm_(grad_rc, columns_BD[self.columns])
            grad_columns_BD[self.columns].addmm_(grad_rc.T, rows_bD[self.rows])
            return
        large_rc, small_rc = parts(grad_rc)
        grad_rows_bD[self.rows] += matmul_of_parts((large_rc, small_rc), parts(columns_BD[self.columns]))
        grad_columns_BD[self.columns] += matmul_of_parts((large_rc.T, small_rc.T), parts(rows_bD[self.rows]))


def _tiles(rows_bD: Tensor, columns_BD: Tensor, scale: Tensor, options: _Options) -> Iterator[_Tile]:
    """Walks over scale * rows_bD @ columns_BD.T. All tiles share the same memory: each lasts until the next."""
    scaled_bD = rows_bD * scale
    b, B, start = rows_bD.shape[0], columns_BD.shape[0], options.own.start
    buffers = [rows_bD.new_empty(min(options.tile, b) * min(options.tile, B)) for _ in range(2)]
    for i in range(0, b, options.tile):
        rows = slice(i, min(i + options.tile, b))
        in_batch = slice(start + rows.start, start + rows.stop)
        for j in range(0, B, options.tile):
            columns = slice(j, min(j + options.tile, B))
            shape = rows.stop - rows.start, columns.stop - columns.start
            logits_rc, scratch_rc = (buffer[: shape[0] * shape[1]].view(shape) for buffer in buffers)
            if options.in_three:
                logits_rc.copy_(matmul_of_parts(parts(scaled_bD[rows]), parts(columns_BD[columns].T)))
            else:
                torch.mm(scaled_bD[rows], columns_BD[columns].T, out=logits_rc)
            excluded_rc = None if options.ids is None else options.ids.duplicates(in_batch, columns)
            yield _Tile(rows, columns, in_batch.start - columns.start, logits_rc, scratch_rc, excluded_rc)


class _CrossEntropy:
    """One direction of the softmax loss: running maximum, sum of exponentials relative to it, and mean of n rows.

    dim: 1 for the rows of the logits, 0 for their columns. even_n: 1 / the number of pairs kept in each.
    """

    def __init__(self, even_n: Tensor, dim: int):
        self.even_n, self.dim = even_n, dim
        # Finite, so that a first tile in which all of a row is excluded makes no NaN.
        self.max_n = torch.full_like(even_n, torch.finfo(even_n.dtype).min)
        self.sum_n, self.mean_n = torch.zeros_like(even_n), torch.zeros_like(even_n)

    def update(self, tile: _Tile, smoothing: float) -> None:
        """Takes in a tile; excluded logits are -inf."""
        where = tile.rows if self.dim == 1 else tile.columns
        if smoothing:
            kept_rc = tile.logits_rc
            if tile.excluded_rc is not None:
                kept_rc = torch.where(tile.excluded_rc, 0, kept_rc)
            self.mean_n[where] += kept_rc.sum(self.dim) * self.even_n[where]
        old_max = self.max_n[where]
        new_max = torch.maximum(old_max, tile.logits_rc.amax(self.dim))
        powers_rc = torch.sub(tile.logits_rc, new_max.unsqueeze(self.dim), out=tile.scratch_rc).exp_()
        self.sum_n[where] = self.sum_n[where] * (old_max - new_max).exp() + powers_rc.sum(self.dim)
        self.max_n[where] = new_max

    def add_ranks(self) -> None:
        """Takes in the tiles of all other ranks; a collective."""
        own_max = self.max_n
        self.max_n = distributed.all_reduce_max(own_max)
        own = torch.stack([self.sum_n * (own_max - self.max_n).exp(), self.mean_n])
        self.sum_n, self.mean_n = distributed.all_reduce_sum(own)

    def loss(self, where: slice, positive_r: Tensor, smoothing: float) -> Tensor:
        """The mean over the r rows `where` of log-sum-exp - (1 - smoothing) * positive - smoothing * mean."""
        losses_r = (self.max_n[where] - positive_r) + self.sum_n[where].log()
        if smoothing:
            losses_r += smoothing * (positive_r - self.mean_n[where])
        return losses_r.mean()


class _TiledSoftmax(Function):
    """Mean cross-entropy of rows_bD against all columns; with `both`, averaged with that of the columns that belong to
    them against the rows of all ranks."""

    @staticmethod
    def forward(ctx: Any, rows_bD: Tensor, columns_BD: Tensor, scale: Tensor, options: _Options, both: bool) -> Tensor:
        even_B = options.even(columns_BD)
        row = _CrossEntropy(even_B[options.own], 1)
        directions = [row, _CrossEntropy(even_B, 0)] if both else [row]
        positive_b = torch.empty_like(row.max_n)
        for tile in _tiles(rows_bD, columns_BD, scale, options):
            positive_b[tile.positive_rows] = tile.positives(tile.logits_rc)
            if tile.excluded_rc is not None:
                tile.logits_rc.masked_fill_(tile.excluded_rc, -torch.inf)
            for direction in directions:
                direction.update(tile, options.smoothing)
        if both and len(rows_bD) < len(columns_BD):
            directions[1].add_ranks()
        owned = (slice(None), options.own)
        losses = [d.loss(where, positive_b, options.smoothing) for d, where in zip(directions, owned, strict=False)]
        ctx.options, ctx.both = options, both
        ctx.save_for_backward(rows_bD, columns_BD, scale, even_B, *(t for d in directions for t in (d.max_n, d.sum_n)))
        return torch.stack(losses).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows_bD, columns_BD, scale, even_B, max_b, sum_b, *column = ctx.saved_tensors
        own, smoothing = ctx.options.own, ctx.options.smoothing
        directions = 2 if ctx.both else 1
        weight = grad / (directions * rows_bD.shape[0])
        share_b = weight / sum_b
        grad_rows_bD, grad_columns_BD = torch.zeros_like(rows_bD), torch.zeros_like(columns_BD)
        with exact_matmul(rows_bD.device.type):
            for tile in _tiles(rows_bD, columns_BD, scale, ctx.options):
                grad_rc = torch.sub(tile.logits_rc, max_b[tile.rows, None], out=tile.scratch_rc).exp_()
                grad_rc.mul_(share_b[tile.rows, None])
                if smoothing:
                    grad_rc.sub_((smoothing * weight * even_B[own][tile.rows])[:, None])
                if ctx.both:
                    max_B, sum_B = (value_B[tile.columns] for value_B in column)
                    grad_rc.addcmul_(tile.logits_rc.sub_(max_B).exp_(), weight / sum_B)
                    if smoothing:
                        grad_rc.sub_(smoothing * weight * even_B[tile.columns])
                if tile.excluded_rc is not None:
                    grad_rc.masked_fill_(tile.excluded_rc, 0)
                tile.positives(grad_rc).sub_(directions * (1 - smoothing) * weight)
                tile.add_gradients(grad_rc, rows_bD, columns_BD, grad_rows_bD, grad_columns_BD, ctx.options.in_three)
        grad_scale = (grad_rows_bD * rows_bD).sum()
        return grad_rows_bD.mul_(scale), grad_columns_BD.mul_(scale), grad_scale, None, None


class _TiledSigmoid(Function):
    """Mean over rows_bD of the binary cross-entropies with all columns, summed."""

    @staticmethod
    def forward(
        ctx: Any, rows_bD: Tensor, columns_BD: Tensor, scale: Tensor, bias: Tensor, options: _Options
    ) -> Tensor:
        smoothing, even_b = options.smoothing, options.even(columns_BD)[options.own]
        losses_b = torch.zeros_like(even_b)
        grad_rows_bD, grad_columns_BD = torch.zeros_like(rows_bD), torch.zeros_like(columns_BD)
        grad_bias = torch.zeros_like(bias)
        for tile in _tiles(rows_bD, columns_BD, scale, options):
            logits_rc = tile.logits_rc.add_(bias)
            targets_r = smoothing * even_b[tile.rows]
            grad_rc = torch.sigmoid(logits_rc, out=tile.scratch_rc).sub_(targets_r[:, None])
            costs_rc = F.logsigmoid(-logits_rc).neg_().sub_(logits_rc * targets_r[:, None])
            if tile.excluded_rc is not None:
                grad_rc.masked_fill_(tile.excluded_rc, 0)
                costs_rc.masked_fill_(tile.excluded_rc, 0)
            tile.positives(grad_rc).sub_(1 - smoothing)
            tile.positives(costs_rc).sub_((1 - smoothing) * tile.positives(logits_rc))
            losses_b[tile.rows] += costs_rc.sum(1)
            grad_bias += grad_rc.sum()
            tile.add_gradients(grad_rc, rows_bD, columns_BD, grad_rows_bD, grad_columns_BD, options.in_three)
        grad_scale = (grad_rows_bD * rows_bD).sum()
        ctx.save_for_backward(grad_rows_bD.mul_(scale), grad_columns_BD.mul_(scale), grad_scale, grad_bias)
        return losses_b.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight = grad / ctx.saved_tensors[0].shape[0]
        return *(weight * saved for saved in ctx.saved_tensors), None
