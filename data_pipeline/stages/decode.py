"""Raw samples by position, and the stages that make a decoded sample of them.

Between stages a sample is a dict, as everywhere in webdataset: "__key__", then "image" (uint8 tensor [3, H, W]),
"caption" (str), "cls" (str or None), "rng" (random.Random of this sample), and under SLOT where it stands in a batch.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, TypeVar

import torch
from torch.utils.data import get_worker_info

from data_pipeline.batch import MicroBatch
from data_pipeline.config import DataConfig
from data_pipeline.order import Mixture, Order, Position
from data_pipeline.samples.image import BadSample, split
from data_pipeline.samples.masking import Masking
from data_pipeline.samples.text import check_captions, pick_caption
from data_pipeline.samples.transforms import train_transform
from data_pipeline.storage.cache import open_store
from data_pipeline.storage.manifest import Manifest, Shard
from data_pipeline.storage.remote import is_remote
from data_pipeline.storage.shards import ShardReader
from data_pipeline.tokenizer import Tokenizer

T = TypeVar("T")
SLOT = "__slot__"
"""Key of a sample's Slot."""
OPENINGS = 10
"""Times that a remote shard is fetched while other processes push it out of the cache before it is open."""


@dataclass
class Slot:
    """Where a sample stands in a batch."""

    step: int
    index: int
    """Which micro-batch of the global batch."""
    row: int
    """Row of the global batch."""
    chance: str
    """Seed of all chance in this sample. Of its place alone: a replacement, another worker or rank changes nothing."""
    place: Position | None = None
    """Where it was to be read; None in a stream."""
    name: str = ""
    """ "shard basename/sample key" of the sample that was consumed."""
    bad: list[dict] = field(default_factory=list)
    """Ledger records of the samples that this one replaces."""


def sample_name(raw: dict) -> str:
    """ "shard basename/sample key" of a raw sample."""
    return f"{shard_name(raw['__shard__'])}/{raw['__key__']}"


def shard_name(url: str) -> str:
    """Base name of a shard."""
    return PurePosixPath(url.split("?")[0]).name


@dataclass(frozen=True)
class Share:
    """The micro-batches that one rank makes: micro-batches [rank k, (rank + 1) k) of steps [start_step, stop_step)."""

    micro_batch: int
    first: int
    """rank k"""
    count: int
    """k, the micro-batches of this rank in a step."""
    start_step: int
    stop_step: int

    def slots(self) -> Iterator[tuple[int, int]]:
        """(step, micro-batch index) of those that this loader process makes."""
        for number in dealt(range(self.start_step * self.count, self.stop_step * self.count)):
            step, offset = divmod(number, self.count)
            yield step, self.first + offset


def dealt(items: Sequence[T]) -> Sequence[T]:
    """This loader process's share: every n-th item, so that taking turns gives all of them back in order."""
    worker = get_worker_info()
    return items if worker is None else items[worker.id :: worker.num_workers]


class Readers:
    """Raw samples of several manifests by (source, shard, index); the shards read last stay open."""

    def __init__(self, manifests: Sequence[Manifest], config: DataConfig):
        self.manifests = manifests
        self._store = open_store(config)
        # As many as the groups that all lanes shuffle at a time, within what a process may open.
        self._limit = min(256, 2 * config.lanes * config.shuffle_shards * len(manifests))
        self._open: OrderedDict[tuple[int, int], ShardReader] = OrderedDict()

    def raw(self, source: int, shard: int, index: int) -> dict[str, Any]:
        """One raw sample. Raises ValueError naming a shard that is missing, damaged or not the manifest's."""
        return self._reader(source, shard).raw(index)

    def size(self, source: int, shard: int) -> int:
        """Samples of a shard."""
        return self.manifests[source].shards[shard].nsamples

    def _reader(self, source: int, shard: int) -> ShardReader:
        at = (source, shard)
        if at not in self._open:
            # What has left the cache must leave the disk too, or cache_gb would bound nothing.
            for gone in [key for key, reader in self._open.items() if is_remote(reader.url) and reader.deleted]:
                self._open.pop(gone).close()
            if len(self._open) >= self._limit:
                self._open.popitem(last=False)[1].close()
            self._open[at] = self._opened(self.manifests[source].shards[shard])
        self._open.move_to_end(at)
        return self._open[at]

    def _opened(self, shard: Shard) -> ShardReader:
        for _ in range(OPENINGS):
            try:
                return ShardReader(self._store.local(shard), shard)
            except (FileNotFoundError, ValueError) as error:
                is_missing = FileNotFoundError in (type(error), type(error.__cause__))
                if not (is_missing and is_remote(shard.url)):
                    raise
        raise ValueError(
            f"shard {shard.url} left the cache {OPENINGS} times before it could be opened: raise --data.cache_gb"
        )


class IndexedSource:
    """First stage: the raw samples of this process's micro-batches, in the exact order."""

    def __init__(self, readers: Readers, order: Order | Mixture, share: Share, seed: int):
        self.readers, self.order, self.share, self.seed = readers, order, share, seed

    def __call__(self) -> Iterator[dict]:
        for step, index in self.share.slots():
            start = index * self.share.micro_batch
            for row, place in enumerate(self.order.rows(step, start, start + self.share.micro_batch), start):
                raw = self.readers.raw(place.source, place.shard, place.index)
                chance = f"{self.seed}/{place.source}/{place.epoch}/{place.position}"
                yield {**raw, SLOT: Slot(step, index, row, chance, place)}


@dataclass(frozen=True)
class Extras:
    """What self-supervision needs beside image and caption."""

    second_view: bool = False
    """Another augmentation of every image, in the sample's "view". Stages of the user see it as the policy made it."""
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
        rng = random.Random(slot.chance)
        image = self.transform(data, rng)
        caption = pick_caption(captions, self.caption, rng)
        slot.name = sample_name(raw)
        for record in slot.bad:
            record["replaced_by"] = slot.name
        sample = {"__key__": raw["__key__"], SLOT: slot, "image": image, "caption": caption, "cls": label, "rng": rng}
        if self.extras.second_view:
            # Chance of its own: the first view and the caption are those of a run without.
            sample["view"] = self.transform(data, random.Random(f"{slot.chance}/view"))
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


class Collate:
    """Decoded samples -> MicroBatch."""

    def __init__(self, tokenizer: Tokenizer, extras: Extras):
        self.tokenizer, self.extras = tokenizer, extras
        self.masking = Masking(tokenizer, extras.mask) if extras.mask else None

    def __call__(self, samples: list[dict]) -> MicroBatch:
        ids_BL, mask_BL = self.tokenizer([sample["caption"] for sample in samples])
        slot = samples[0][SLOT]
        masked_BL = targets_BL = None
        if self.masking is not None:
            masked_BL, targets_BL = self.masking(ids_BL, [sample[SLOT].chance for sample in samples])
        return MicroBatch(
            images_BCHW=stacked([sample["image"] for sample in samples]),
            ids_BL=ids_BL,
            mask_BL=mask_BL,
            index=slot.index,
            step=slot.step,
            keys=[sample[SLOT].name for sample in samples],
            bad=[record for sample in samples for record in sample[SLOT].bad],
            views_BCHW=stacked([sample["view"] for sample in samples]) if self.extras.second_view else None,
            masked_BL=masked_BL,
            targets_BL=targets_BL,
        )


def stacked(images: Sequence[torch.Tensor]) -> torch.Tensor:
    """uint8 [B, 3, H, W] in channels_last memory: pixels are copied as they lie, and the image tower wants them so."""
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
