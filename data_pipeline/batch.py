"""What the loader hands over: a micro-batch for training, a batch of images with all their captions for evaluation.

Shape suffixes: B images, M captions, L tokens, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class Batch:
    """All tensors of a dataclass at once."""

    def to(self, device: torch.device | str, non_blocking: bool = False):
        """The same batch with its tensors on `device`."""
        return self.mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def clone(self):
        """The same batch in memory of its own, not in that which a loader process shares."""
        return self.mapped(Tensor.clone)

    def pin_memory(self):
        """The same batch in page-locked memory; torch's DataLoader calls this."""
        return self.mapped(Tensor.pin_memory)

    def mapped(self, change: Callable[[Any], Any], kind: type = Tensor):
        """The same batch with `change` of every tensor in its place; or of all that is of another kind."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        moved = {name: change(value) for name, value in values.items() if isinstance(value, kind)}
        inner = {name: value.mapped(change, kind) for name, value in values.items() if isinstance(value, Batch)}
        return replace(self, **moved, **inner)


@dataclass
class Recoloring(Batch):
    """How the colours of some images of a batch are to change: samples.colors draws it, and applies it."""

    rows_R: Tensor
    """int64: which images change."""
    changes_RP: Tensor
    """float32: for each of them the numbers that say how."""
    turns: bool
    """Whether the hue of one of them is turned."""


@dataclass
class MicroBatch(Batch):
    """The unit of training: everything that depends on neighbours depends on these rows alone."""

    images_BCHW: Tensor
    """uint8, 0 to 255, RGB; without their colour jitter while `colors` is set: `recolored` applies it."""
    ids_BL: Tensor
    """int64 token ids, padded to the longest caption of these rows rounded up to 8."""
    mask_BL: Tensor
    """int64: 1 for a token, 0 for padding."""
    index: int
    """Which micro-batch of the global batch this is, 0 to global_batch / micro_batch - 1."""
    step: int
    """Optimizer step that it belongs to, from 0."""
    keys: list[str]
    """One per row: "shard name/sample key" of the sample that was consumed."""
    bad: list[dict] = field(default_factory=list)
    """Ledger records of replaced samples: step, row (of the global batch), shard, key, cause, replaced_by."""
    image_ids_B: Tensor | None = None
    """int64: equal numbers are the same sample. The loader always sets it, as the next two."""
    text_ids_B: Tensor | None = None
    """int64: equal numbers are the same caption tokens."""
    digest: int = 0
    """Summed over the global batch, modulo 2^64, it tells which sample was in which row, by name."""
    content: int = 0
    """As `digest`, by the content of the shards: other bytes under the same names make another number."""
    lengths: list[int] = field(default_factory=list)
    """One per row: tokens of its caption."""
    sources: list[int] = field(default_factory=list)
    """One per row: which source it comes from; 0 in a stream."""
    views_BCHW: Tensor | None = None
    """A second augmentation of the same images; where Extras ask for it."""
    masked_BL: Tensor | None = None
    """`ids_BL` with some words hidden; where Extras ask for it."""
    targets_BL: Tensor | None = None
    """int64: the hidden words, masking.UNMASKED elsewhere."""
    colors: Recoloring | None = None
    """Colour jitter and grayscale of `images_BCHW`, to be applied on the device by `recolored`; None for none."""
    view_colors: Recoloring | None = None
    """The same of `views_BCHW`."""


@dataclass
class EvalBatch(Batch):
    """Images with all their captions (some may have none), in the order of the manifest."""

    images_BCHW: Tensor
    """uint8, 0 to 255, RGB."""
    ids_ML: Tensor
    """int64 token ids of every caption of every image."""
    mask_ML: Tensor
    """int64: 1 for a token, 0 for padding."""
    caption_row: list[int]
    """For each caption, the row of its image in this batch."""
    captions: list[str]
    """The captions as text, one per row of `ids_ML`."""
    classes: list[str | None]
    """One per image: the content of its `cls` member, None where it has none."""
    keys: list[str]
    """One per image: "shard name/sample key"."""
    bad: list[dict] = field(default_factory=list)
    """Records of samples that could not be read and so are not among the images: shard, key, cause."""
    samples: list[int] = field(default_factory=list)
    """One per image: the number of its sample in the data set."""
