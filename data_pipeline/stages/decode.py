"""Raw sample -> decoded sample, bad ones replaced; then the stages that users add.

Between stages a sample is a dict, as everywhere in webdataset: "__key__", then "image" (uint8 tensor [3, H, W]),
"caption" (str), "cls" (str or None), "rng" (the sample's random.Random), and under SLOT its place in the batch.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from data_pipeline.config import DataConfig
from data_pipeline.samples.image import BadSample
from data_pipeline.samples.text import check_captions, pick_caption, split
from data_pipeline.samples.transforms import train_transform
from data_pipeline.seeds import view_seed
from data_pipeline.stages.readers import Readers
from data_pipeline.stages.slots import SLOT, Slot, sample_name, shard_name


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
        """Raises BadSample."""
        data, captions, label = split(raw)
        rng = random.Random(slot.seed)
        image = self.transform(data, rng)
        caption = pick_caption(captions, self.caption, rng)
        slot.name = sample_name(raw)
        for record in slot.bad:
            record["replaced_by"] = slot.name
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
        slot, raw = sample[SLOT], sample
        place = slot.place
        size = self.readers.size(place.source, place.shard)
        for distance in range(size):
            if distance:
                raw = self.readers.raw(place.source, place.shard, (place.index + distance) % size)
            try:
                decoded = self.decode(raw, slot)
            except BadSample as error:
                if not distance:  # Bad neighbours are recorded at their own places: each bad sample counts once.
                    slot.bad.append(bad_record(slot, raw, error))
                continue
            sample["__key__"] = raw["__key__"]  # webdataset.map gives its result the key of what went in
            return decoded
        raise ValueError(
            f"shard {raw['__shard__']}: not one of its {size} samples can be used; the first: {slot.bad[0]['cause']}"
        )


def bad_record(slot: Slot, raw: dict, error: BadSample) -> dict:
    """A line of the ledger."""
    return {
        "step": slot.step,
        "row": slot.row,
        "shard": shard_name(raw["__shard__"]),
        "key": raw["__key__"],
        "cause": error.cause,
        "replaced_by": "",
    }


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
