"""The last stage: decoded samples -> a MicroBatch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from data_pipeline.batch import MicroBatch
from data_pipeline.samples.colors import gathered
from data_pipeline.samples.masking import Masking
from data_pipeline.seeds import hash63
from data_pipeline.stages.decode import Extras
from data_pipeline.stages.slots import SLOT
from data_pipeline.tokenizer import Tokenizer


class Collate:
    """Decoded samples -> MicroBatch."""

    def __init__(self, tokenizer: Tokenizer, extras: Extras):
        self.tokenizer, self.extras = tokenizer, extras
        self.masking = Masking(tokenizer, extras.mask) if extras.mask else None

    def __call__(self, samples: list[dict]) -> MicroBatch:
        ids_BL, mask_BL = self.tokenizer([sample["caption"] for sample in samples])
        slots = [sample[SLOT] for sample in samples]
        keys = [slot.name for slot in slots]
        masked_BL = targets_BL = None
        if self.masking is not None:
            masked_BL, targets_BL = self.masking(ids_BL, [slot.seed for slot in slots])
        return MicroBatch(
            images_BCHW=stacked([sample["image"] for sample in samples]),
            ids_BL=ids_BL,
            mask_BL=mask_BL,
            index=slots[0].index,
            step=slots[0].step,
            keys=keys,
            bad=[record for slot in slots for record in slot.bad],
            image_ids_B=image_ids(keys),
            text_ids_B=text_ids(ids_BL, mask_BL),
            digest=order_digest([slot.row for slot in slots], keys),
            content=order_digest([slot.row for slot in slots], [slot.content for slot in slots]),
            lengths=mask_BL.sum(1).tolist(),
            sources=[slot.place.source if slot.place else 0 for slot in slots],
            views_BCHW=stacked([sample["view"] for sample in samples]) if self.extras.second_view else None,
            masked_BL=masked_BL,
            targets_BL=targets_BL,
            colors=gathered([sample["colors"] for sample in samples]),
            view_colors=gathered([sample["view_colors"] for sample in samples]) if self.extras.second_view else None,
        )


def stacked(images: Sequence[torch.Tensor]) -> torch.Tensor:
    """uint8 [B, 3, H, W] in channels_last memory: pixels are copied as they lie, and the image tower wants them so."""
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


def image_ids(keys: Sequence[str]) -> torch.Tensor:
    """int64 [B]: equal for rows with the same sample key."""
    return torch.tensor([hash63(key) for key in keys], dtype=torch.int64)


def text_ids(ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
    """int64 [B]: equal for rows with the same caption tokens, whatever their padding."""
    rows = zip(ids_BL.tolist(), mask_BL.sum(1).tolist(), strict=True)
    return torch.tensor([hash63(repr(ids[:length])) for ids, length in rows], dtype=torch.int64)


def order_digest(rows: Sequence[int], keys: Sequence[str]) -> int:
    """A signed 64-bit number; summed over a global batch, modulo 2^64, it tells which sample was in which row."""
    total = sum(hash63(f"{row} {key}") for row, key in zip(rows, keys, strict=True))
    return (total + 2**63) % 2**64 - 2**63
