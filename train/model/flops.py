"""Floating-point operations of a pair, and what a device does at most: MFU is the share of the second that is used.

Model FLOPs: three times those of the forward pass (arXiv 2204.02311, appendix B), of captions without their padding.
What is computed again (cached features, tiles of the loss) does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from train.model.pair import PairModel

PEAKS = {
    "H100 PCIe": (756, 51),
    "H100": (989, 67),
    "H200": (989, 67),
    "A100": (312, 19.5),
    "L40S": (362, 91.6),
    "RTX 4090": (165, 82.6),
}
"""TFLOP/s by a part of the card's name, in bf16 (dense) and in fp32 (without TF32); from the makers' data sheets."""
LENGTHS = (8, 16, 32)


def peak_tflops(precision: str) -> float | None:
    """What this machine's GPU does at most in bf16 or fp32, in 1e12 per second; None for an unknown one."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    found = [peaks for part, peaks in PEAKS.items() if part in name]
    return found[0][precision != "bf16"] if found else None


class PairFlops:
    """Of this model's forward passes, counted: the text tower's are a quadratic function of the caption's length."""

    def __init__(self, model: PairModel) -> None:
        model.eval()
        device, size = model.mean.device, model.image_size
        images_BCHW = torch.zeros(2, 3, size, size, dtype=torch.uint8, device=device)
        self.image = _count(lambda: model.encode_image(images_BCHW)) / 2
        counts = []
        for length in LENGTHS:
            ids_BL = torch.zeros(2, length, dtype=torch.int64, device=device)
            counts.append(_count(lambda ids_BL=ids_BL: model.encode_text(ids_BL, torch.ones_like(ids_BL))) / 2)
        self.text = np.polynomial.Polynomial.fit(LENGTHS, counts, 2)
        model.train()

    def training(self, lengths: Sequence[int]) -> float:
        """Model FLOPs of a pair in training: the mean over captions of these lengths, in tokens."""
        return 3 * (self.image + float(np.mean(self.text(np.asarray(lengths)))))


@torch.no_grad()
def _count(run: Callable[[], Any]) -> int:
    # Not every kernel of attention is known to the counter of every version.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()
