"""Raw sample -> decoded sample, bad ones replaced; then the stages that users add.

Between stages a sample is a dict, as everywhere in webdataset: "__key__", then "image" (uint8 tensor [3, H, W]),
"caption" (str), "cls" (str or None), "rng" (the sample's random.Random), "colors" (how the image's colours are changed
later, on the device, or None), and under SLOT its place in the batch.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from data_pipeline.config import DataConfig
from data_pipeline.order import Position
from data_pipeline.samples.image import BadSample
from data_pipeline.samples.text import check_captions, pick_caption, split
from data_pipeline.samples.transforms import train_transform
from data_pipeline.seeds import view_seed
from data_pipeline.stages.readers import Readers
from data_pipeline.stages.slots import SLOT, Slot

SHARDS_TRIED = 8
"""Shards in which a replacement is looked for: where so many have no good sample, something is wrong with the data."""


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
        image, colors = self.transform.drawn(data, rng)
        caption = pick_caption(captions, self.caption, rng)
        slot.take(raw)
        sample = {"__key__": raw["__key__"], SLOT: slot, "image": image, "caption": caption, "cls": label, "rng": rng}
        sample["colors"] = colors
        if self.extras.second_view:
            # A seed of its own: the first view and the caption are those of a run without.
            view_rng = random.Random(view_seed(slot.seed))
            sample["view"], sample["view_colors"] = self.transform.drawn(data, view_rng)
        return sample


class DecodeOrReplace:
    """Decode; a bad sample is replaced by the next good one of its shard or, where that has none, of the next shards,
    and recorded."""

    def __init__(self, decode: Decode, readers: Readers):
        self.decode, self.readers = decode, readers

    def __call__(self, sample: dict) -> dict:
        """Raises ValueError where SHARDS_TRIED shards have no good sample at all."""
        slot = sample[SLOT]
        try:
            return self.decode(sample, slot)
        except BadSample as error:
            slot.refuse(sample, error.cause)
        for raw in self._neighbours(slot.place):
            # A bad neighbour is recorded in its own slot: each bad sample counts once.
            with contextlib.suppress(BadSample):
                decoded = self.decode(raw, slot)
                sample["__key__"] = raw["__key__"]  # webdataset.map gives its result the key of what went in
                return decoded
        raise ValueError(
            f"shard {sample['__shard__']}: not one of its samples can be used, nor of the shards after it; the first: "
            f"{slot.bad[0]['cause']}"
        )

    def _neighbours(self, place: Position) -> Iterator[dict]:
        """The other samples of a shard, from the next one on, then those of the shards after it."""
        shards = len(self.readers.manifests[place.source].shards)
        for ahead in range(min(shards, SHARDS_TRIED)):
            shard = (place.shard + ahead) % shards
            size = self.readers.size(place.source, shard)
            for distance in range(0 if ahead else 1, size):
                yield self.readers.raw(place.source, shard, (distance if ahead else place.index + distance) % size)


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
        kept = {name: sample[name] for name in ("colors", "view_colors") if name in sample}
        return {**kept, **changed, SLOT: slot}
