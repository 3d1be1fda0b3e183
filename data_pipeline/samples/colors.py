"""Colour jitter and grayscale: drawn by the loader, sample by sample; applied to whole batches, wherever these are.

On a CPU they would take as long as all else that is done to an image. What they change is as in Pillow's ImageEnhance,
applied one after the other in the order that is drawn, but for this: neighbouring changes of brightness, contrast,
saturation and to grey, all linear in the pixels, are made in one go, so what they push beyond black or white comes back
with the next of them; and pixels are rounded and clipped once before the hue is turned, once after, and at the end.

Shape suffixes: B images, R those of them that change, C channels, H height, W width, P numbers that say a change.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from data_pipeline.batch import MicroBatch, Recoloring
from data_pipeline.samples.augment import Augmentation

GREY = np.array([0.299, 0.587, 0.114])
"""Luma of ITU-R BT.601, as Pillow's mode L."""
_EYE, _TO_GREY = np.eye(3), np.tile(GREY, (3, 1))
_NOTHING = np.concatenate([_EYE, np.zeros((3, 3))], 1)
_PARTS = (18, 1, 18)
"""How the P = 37 numbers of a change are laid out: a linear change, a turn of the hue, another linear change."""


def draw_change(augment: Augmentation, jitter: bool, grey: bool, rng: random.Random) -> np.ndarray | None:
    """How the colours of one image change, float32 [P]; None where they do not.

    jitter: change brightness, contrast, saturation and hue by up to `augment.jitter`, in random order.
    grey: take the colours away, after that.
    """
    *linear, hue = augment.jitter
    # A linear change of a pixel x of an image whose mean is m is P x + Q m, kept as one matrix [3, 6]: P beside Q.
    before, turn, after = _NOTHING, 0.0, _NOTHING
    steps: list[Callable[[np.ndarray], np.ndarray] | float] = []
    if jitter:
        for change, width in zip((_brightness, _contrast, _saturation), linear, strict=True):
            if width:
                steps.append(partial(change, rng.uniform(max(0.0, 1 - width), 1 + width)))
        if hue:
            steps.append(rng.uniform(-hue, hue))
        rng.shuffle(steps)
    if grey:
        steps.append(partial(_saturation, 0.0))
    if not steps:
        return None
    for step in steps:
        if isinstance(step, float):
            before, turn, after = after, step, _NOTHING
        else:
            after = step(after)
    return np.concatenate([before.ravel(), [turn], after.ravel()], dtype=np.float32)


def _brightness(factor: float, change: np.ndarray) -> np.ndarray:
    return factor * change


def _contrast(factor: float, change: np.ndarray) -> np.ndarray:
    """Away from, or towards, the mean grey of the image: that is GREY (P + Q) m."""
    mean = _TO_GREY @ (change[:, :3] + change[:, 3:])
    return factor * change + (1 - factor) * np.concatenate([np.zeros((3, 3)), mean], 1)


def _saturation(factor: float, change: np.ndarray) -> np.ndarray:
    return (factor * _EYE + (1 - factor) * _TO_GREY) @ change


def gathered(changes: Sequence[np.ndarray | None]) -> Recoloring | None:
    """The changes of a batch's images, one each or None; None where no image changes."""
    rows = [row for row, change in enumerate(changes) if change is not None]
    if not rows:
        return None
    kept = np.stack([change for change in changes if change is not None])
    return Recoloring(torch.tensor(rows), torch.from_numpy(kept), turns=bool(kept[:, _PARTS[0]].any()))


def recolored(batch: MicroBatch) -> MicroBatch:
    """The batch with the colours of its images changed as the loader has drawn it; on the device where it is.

    A batch whose colours are changed already, or never were to be, comes back as it is.
    """
    if batch.colors is not None:
        batch = replace(batch, images_BCHW=recolor(batch.images_BCHW, batch.colors), colors=None)
    if batch.views_BCHW is not None and batch.view_colors is not None:
        batch = replace(batch, views_BCHW=recolor(batch.views_BCHW, batch.view_colors), view_colors=None)
    return batch


def recolor(images_BCHW: Tensor, colors: Recoloring) -> Tensor:
    """uint8 images in channels_last memory with the colours of some changed; the same for any batch that they are in.

    Means are of sums of whole numbers, which are exact whatever the order in which a device adds.
    """
    images_BHWC = images_BCHW.permute(0, 2, 3, 1)
    # Planes of one colour each: [C, R, H, W].
    planes = images_BHWC.index_select(0, colors.rows_R).permute(3, 0, 1, 2).float().contiguous()
    before_RP, turn_R1, after_RP = colors.changes_RP.split(_PARTS, dim=1)
    if colors.turns:
        planes = _turn_hue(_linear(planes, before_RP), turn_R1[:, :, None])
    planes = _linear(planes, after_RP)
    changed_RHWC = planes.to(torch.uint8).permute(1, 2, 3, 0).contiguous()
    return images_BHWC.index_copy(0, colors.rows_R, changed_RHWC).permute(0, 3, 1, 2)


def _linear(planes: Tensor, change_RP: Tensor) -> Tensor:
    """Whole numbers from 0 to 255, float [C, R, H, W], changed linearly, and whole numbers from 0 to 255 again."""
    change_RC6 = change_RP.unflatten(1, (3, 6))
    sum_CR = planes.sum(3).sum(2, dtype=torch.float64)  # whole numbers below 2^24 in each row of pixels
    mean_RC = (sum_CR / planes[0, 0].numel()).T.float()
    results = []
    for channel in range(3):
        factors_R6 = change_RC6[:, channel]
        shift_R = (factors_R6[:, 3:] * mean_RC).sum(1)
        result = torch.addcmul(shift_R[:, None, None], planes[0], factors_R6[:, 0, None, None])
        for other in (1, 2):
            result.addcmul_(planes[other], factors_R6[:, other, None, None])
        results.append(result.round_().clamp_(0, 255))
    return torch.stack(results)


def _turn_hue(planes: Tensor, turn_R11: Tensor) -> Tensor:
    """Turn the hue of RGB planes by these parts of the circle; saturation and value (of HSV) stay."""
    red, green, blue = planes
    largest, smallest = planes.amax(0), planes.amin(0)
    spread = largest - smallest
    sixths = torch.where(
        largest == red,
        green - blue,
        torch.where(largest == green, torch.add(blue - red, spread, alpha=2), torch.add(red - green, spread, alpha=4)),
    )
    # The spread of whole numbers is 1 or more, but for greys, which have no hue.
    hue = sixths.div_(spread.clamp(min=1)).add_(6 * turn_R11)
    results = []
    for corner in (5, 3, 1):  # where the circle of six parts is without red, green, blue
        distance = hue + corner
        distance.sub_((distance / 6).floor_(), alpha=6)
        share = torch.minimum(distance, 4 - distance).clamp_(0, 1)
        results.append(torch.addcmul(largest, spread, share, value=-1).round_())
    return torch.stack(results)
