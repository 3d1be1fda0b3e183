"""Raw sample -> decoded sample, bad ones replaced; then the stages that users add.

Between stages a sample is a dict, as everywhere in webdataset: "__key__", then "image" (uint8 tensor [3, H, W]),
"caption" (str), "cls" (str or None), "rng" (the sample's random.Random), and under SLOT its place in the batch.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass

from data_pipeline.config import DataConfig
from data_pipeline.samples.image import BadSample
from data_pipeline.samples.text import check_captions, pick_caption, split
from data_pipeline.samples.transforms import train_transform
from data_pipeline.seeds import view_seed
from data_pipeline.stages.readers import Readers
from data_pipeline.stages.slots import SLOT, Slot


@dataclass(frozen=True)
class Extras:
    """What self-supervision needs beside image and caption."""

    second_view: bool = False
    """Another augmentation of every image, in the sample's "view", which stages of the user see as well."""
    mask: float = 0.0
    """Share of the words that are hidden in another copy of every caption; 0: no copy."""


class Decode:
    """Raw sample -> decoded sample."""

    def __init__(self, config: DataConfig, extras: Extras):
        check_captions(config.caption)
        self.transform, self.caption, self.extras = train_transform(config), config.caption, extras

    def __call__(self, raw: dict, slot: Slot) -> dict:
        """The decoded sample, which takes the slot. Raises BadSample."""
        data, captions, label = split(raw)
        rng = random.Random(slot.seed)
        image = self.transform(data, rng)
        caption = pick_caption(captions, self.caption, rng)
        slot.take(raw)
        sample = {"__key__": raw["__key__"], SLOT: slot, "image": image, "caption": caption, "cls": label, "rng": rng}
        if self.extras.second_view:
            # A seed of its own: the first view and the caption are those of a run without.
            sample["view"] = self.transform(data, random.Random(view_seed(slot.seed)))
        return sample


class DecodeOrReplace:
    """Decode; a bad sample is replaced by the next good one of its shard, and recorded."""

    def __init__(self, decode: Decode, readers: Readers):
        self.decode, self.readers = decode, readers

    def __call__(self, sample: dict) -> dict:
        """Raises ValueError where a shard has no good sample at all."""
        slot = sample[SLOT]
        try:
            return self.decode(sample, slot)
        except BadSample as error:
            slot.refuse(sample, error.cause)
        size = self.readers.size(slot.place.source, slot.place.shard)
        for distance in range(1, size):
            raw = self.readers.raw(slot.place.source, slot.place.shard, (slot.place.index + distance) % size)
            # A bad neighbour is recorded in its own slot: each bad sample counts once.
            with contextlib.suppress(BadSample):
                decoded = self.decode(raw, slot)
                sample["__key__"] = raw["__key__"]  # webdataset.map gives its result the key of what went in
                return decoded
        raise ValueError(
            f"shard {sample['__shard__']}: not one of its {size} samples can be used; the first: {slot.bad[0]['cause']}"
        )


class UserStage:
    """A stage that somebody adds: a callable that changes a decoded sample."""

    def __init__(self, stage: Callable[[dict], dict]):
        self.stage = stage

    def __call__(self, sample: dict) -> dict:
        slot = sample[SLOT]
        changed = self.stage(sample)
        if not isinstance(changed, dict) or not {"image", "caption"} <= changed.keys():
            what = getattr(self.stage, "__name__", type(self.stage).__name__)
            raise ValueError(
                f"stage {what} gave back {type(changed).__name__} for {slot.name}: it must give back the sample, a "
                f"dict with image and caption (a stage cannot drop samples: micro-batches never shrink)"
            )
        return {**changed, SLOT: slot}
