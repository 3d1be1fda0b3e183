"""The matrix products of the losses: exact, or, for runs in bf16, of three products in bf16 each.

A GPU multiplies fp32 matrices without its tensor cores. A number is the sum of two of bf16 to 16 bits; of the four
products of such parts that of the small ones is left out, the others are added up in fp32. Gradients are then off by
4e-5 of themselves, where operands rounded to bf16 make it 1e-2 and fp32 3e-6.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_in_three = False


@contextmanager
def exact_matmul(device_type: str) -> Iterator[None]:
    """Matrix products in the precision of their arguments: no autocast, no TF32 or bf16 inside."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # set for a backend by itself, which torch's older functions may not be asked about
        precision = None
    # The older function, because it sets both: torch refuses to multiply where the two differ.
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        if precision is not None:
            torch.set_float32_matmul_precision(precision)
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value


@contextmanager
def three_products(enabled: bool = True) -> Iterator[None]:
    """Inside it losses of fp32 features in tiles, and their gradients, take three products in bf16 for one in fp32."""
    global _in_three
    before, _in_three = _in_three, enabled
    try:
        yield
    finally:
        _in_three = before


def are_three(features: Tensor) -> bool:
    """Whether losses of such features take three products now; a backward pass may run in another thread, later."""
    return _in_three and features.dtype == torch.float32


def parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two matrices of bf16 whose sum is x, to 16 bits."""
    large = x.bfloat16()
    return large, (x - large).bfloat16()


def matmul_of_parts(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    """a @ b in fp32, of matrices as `parts` has them."""
    return _mm(a[0], b[0]) + _mm(a[0], b[1]).add_(_mm(a[1], b[0]))


def _mm(a: Tensor, b: Tensor) -> Tensor:
    # CPUs have no such product; bf16 times bf16 is exact in fp32.
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()
