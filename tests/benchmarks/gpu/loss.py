"""The loss by tile and precision of its products: time, memory, and the error of its gradients against float64.

Measured is what one rank of many computes: its images with all texts, in both directions at once. Ranks would add up
the sums of the columns; here they are of these rows alone, in what is measured and in what it is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from tests.benchmarks.gpu.bench import Bench, Row
from tests.support.exactness import relative_error
from train.config import LossConfig
from train.loss import full, tiled
from train.loss.full import contrastive_loss
from train.loss.products import exact_matmul, matmul_of_parts, parts, three_products

SIZES, TINY = ((512, 4096), (4096, 32768)), ((16, 64),)
"""This rank's rows, and those of the global batch."""
D, SCALE = 768, 100.0
TILES = (1024, 2048, 4096, 8192)
NAMES = ("loss_error", "image_gradient_error", "text_gradient_error")

Context = Callable[[str], AbstractContextManager[None]]
Product = Callable[[Tensor, Tensor], Tensor]


class Case(NamedTuple):
    """A way to compute the loss of the own rows, of images and texts of the global batch."""

    name: str
    loss: Callable[[Tensor, Tensor, int], Tensor]
    context: Context


def run(bench: Bench) -> None:
    for rows, total in TINY if bench.tiny else SIZES:
        features, size = make_features(total, bench.device), f"{rows} of {total}"
        expected: list[Tensor] = []
        bench.row(f"{size}, float64", partial(reference, bench, features, rows, expected))
        for case in cases((16,) if bench.tiny else [tile for tile in TILES if tile <= total]):
            bench.row(f"{size}, {case.name}", partial(measure, bench, case, features, rows, expected))


def cases(tiles: Sequence[int]) -> list[Case]:
    """Duet's tiles and all own rows at once, with products of every precision."""
    contexts = {"fp32": exact_matmul, "TF32": tf32_matmul}
    in_three = {"three products in bf16": exact_matmul_of_three}
    found = [
        Case(f"tiles of {tile}, {name}", partial(in_tiles, tile), context)
        for name, context in (contexts | in_three).items()
        for tile in tiles
    ]
    for name, context in contexts.items():
        found.append(Case(f"whole rows, {name}", partial(of_own_rows, torch.mm), context))
    found.append(Case("whole rows, three products in bf16", partial(of_own_rows, in_three_products), exact_matmul))
    found.append(Case("whole rows, bf16", partial(of_own_rows, bf16_product), exact_matmul))
    return found


def make_features(total: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Unit vectors of pairs that are alike to a degree, as in the middle of a training."""
    generator = torch.Generator(device).manual_seed(0)
    image_BD, noise_BD = (torch.randn(total, D, device=device, generator=generator) for _ in range(2))
    return F.normalize(image_BD, dim=1), F.normalize(0.12 * image_BD + noise_BD, dim=1)


def reference(bench: Bench, features: tuple[Tensor, Tensor], rows: int, expected: list[Tensor]) -> Row:
    """In float64."""
    leaves = [one.double().requires_grad_() for one in features]
    loss = of_own_rows(torch.mm, *leaves, rows)
    expected += [loss.detach(), *torch.autograd.grad(loss, leaves)]
    return {"loss": expected[0].item(), "peak_gb": bench.peak_gb()}


def measure(bench: Bench, case: Case, features: tuple[Tensor, Tensor], rows: int, expected: list[Tensor]) -> Row:
    """Forward and backward."""

    def both() -> list[Tensor]:
        leaves = [one.clone().requires_grad_() for one in features]
        loss = case.loss(*leaves, rows)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    # Forward and backward passes look for it by its name.
    with mock.patch.object(tiled, "exact_matmul", case.context), mock.patch.object(full, "exact_matmul", case.context):
        seconds, spread = bench.time(both, budget=0.4)
        found = both()
    row: Row = {"ms": 1e3 * seconds, "spread": spread, "peak_gb": bench.peak_gb()}
    errors = [relative_error(one.double(), other) for one, other in zip(found, expected, strict=bool(expected))]
    return row | dict(zip(NAMES, errors, strict=False))


def in_tiles(tile: int, image_BD: Tensor, text_BD: Tensor, rows: int) -> Tensor:
    """Duet's loss, as on the first of several ranks that all have such rows."""
    scale = image_BD.new_full((1,), SCALE)
    with mock.patch.object(full.distributed, "span", lambda _: (0, rows)):
        return contrastive_loss(image_BD, text_BD, scale, config=LossConfig(tile=tile), stop=rows, collective=True)


def of_own_rows(product: Product, image_BD: Tensor, text_BD: Tensor, rows: int) -> Tensor:
    """The same by the textbook, but for its products: the loss of the own rows and columns, the gradient of all."""
    with full.exact_matmul(image_BD.device.type):
        logits_bB = _Products.apply(SCALE * image_BD[:rows], text_BD, product)
        positive_b, of_columns_B = logits_bB.diagonal(), logits_bB.logsumexp(0)
        of_own = logits_bB.logsumexp(1) + of_columns_B[:rows] - 2 * positive_b
        return (of_own.sum() + _gradient_alone(of_columns_B[rows:].sum())) / (2 * rows)


def _gradient_alone(value: Tensor) -> Tensor:
    """Zero, with this value's gradient."""
    return value - value.detach()


class _Products(Function):
    """rows_bD @ columns_BD.T, by the same kind of product in both directions."""

    @staticmethod
    def forward(ctx: Any, rows_bD: Tensor, columns_BD: Tensor, product: Product) -> Tensor:
        ctx.save_for_backward(rows_bD, columns_BD)
        ctx.product = product
        return product(rows_bD, columns_BD.T)

    @staticmethod
    def backward(ctx: Any, grad_bB: Tensor) -> tuple[Tensor, Tensor, None]:
        rows_bD, columns_BD = ctx.saved_tensors
        with full.exact_matmul(grad_bB.device.type):
            return ctx.product(grad_bB, columns_BD), ctx.product(grad_bB.T, rows_bD), None


def bf16_product(a: Tensor, b: Tensor) -> Tensor:
    """Of operands rounded to bf16, summed in fp32."""
    a, b = a.bfloat16(), b.bfloat16()
    # CPUs have no such product; bf16 times bf16 is exact in fp32.
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def in_three_products(a: Tensor, b: Tensor) -> Tensor:
    return matmul_of_parts(parts(a), parts(b))


@contextmanager
def exact_matmul_of_three(device_type: str) -> Iterator[None]:
    """In place of exact_matmul, as it is in runs in bf16."""
    with exact_matmul(device_type), three_products():
        yield


@contextmanager
def tf32_matmul(device_type: str) -> Iterator[None]:
    """In place of exact_matmul."""
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision("highest")
