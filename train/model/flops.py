"""Floating-point operations of a pair, and what a device does at most: MFU is the share of the second that is used.

Model FLOPs: three times those of the forward pass (arXiv 2204.02311, appendix B), of captions without their padding.
What is computed again (cached features, checkpointing, tiles of the loss) does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from train.model.pair import PairModel

if TYPE_CHECKING:
    from data_pipeline.batch import MicroBatch

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
    """Of this model's forward passes, counted: the text tower's are a quadratic function of the caption's length.

    A tower that never learns counts once, since nothing goes back through it; layers of another one count three times
    whether they learn or not. Heads of further terms of the loss do not count.
    """

    def __init__(self, model: PairModel) -> None:
        was_training = model.training
        model.eval()
        device, size = model.mean.device, model.image_size
        images_BCHW = torch.zeros(2, 3, size, size, dtype=torch.uint8, device=device)
        self.image = _count(lambda: model.encode_image(images_BCHW)) / 2
        counts = []
        for length in LENGTHS:
            ids_BL = torch.zeros(2, length, dtype=torch.int64, device=device)
            counts.append(_count(partial(model.encode_text, ids_BL, torch.ones_like(ids_BL))) / 2)
        self.text = [float(value) for value in np.polynomial.Polynomial.fit(LENGTHS, counts, 2).convert().coef]
        self.passes = [_passes(tower) for tower in (model.image, model.text)]
        model.train(was_training)

    def training(self, lengths: Sequence[int]) -> float:
        """Model FLOPs of a pair in training: the mean over captions of these lengths, in tokens."""
        return float(np.mean(self._pair(np.asarray(lengths, dtype=np.float64))))

    def of(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Model FLOPs of a step over these micro-batches, float64 on their device: nobody waits for it."""
        lengths_b = torch.cat([batch.mask_BL.sum(1) for batch in micro_batches]).double()
        return self._pair(lengths_b).sum()

    def _pair(self, lengths: Any) -> Any:
        """Model FLOPs of pairs whose captions have these lengths, an array or a tensor."""
        constant, linear, square = self.text
        image, text = self.passes
        return image * self.image + text * (constant + linear * lengths + square * lengths**2)


def _passes(tower: nn.Module) -> int:
    return 3 if any(parameter.requires_grad for parameter in tower.parameters()) else 1


@torch.no_grad()
def _count(run: Callable[[], Any]) -> int:
    # Not every kernel of attention is known to the counter of every version.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()
