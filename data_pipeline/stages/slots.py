"""Which rows of which micro-batches a rank makes, and where in a batch a sample is."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from data_pipeline.storage.redaction import shown

if TYPE_CHECKING:
    from data_pipeline.order import Position
    from data_pipeline.storage.manifest import Manifest

SLOT = "__slot__"
"""Key of a sample's Slot."""
NAME = "__name__"
"""Key of a raw sample: what its shard is called."""
SHA256 = "__sha256__"
"""Key of a raw sample: the sha256 that its shard has; not in a stream."""


@dataclass
class Slot:
    """Where in a batch a sample is, and what became of the one that was meant for that place."""

    step: int
    index: int
    """Which micro-batch of the global batch."""
    row: int
    """Row of the global batch."""
    seed: str
    """Of all randomness in this sample. It comes from the place alone, so a replacement or another rank keeps it."""
    place: Position | None = None
    """Where the sample was to be read; None in a stream."""
    name: str = ""
    """ "shard name/sample key" of the sample that was consumed."""
    content: str = ""
    """The same with the sha256 of the shard for its name, which is equal for equal bytes alone."""
    bad: list[dict] = field(default_factory=list)
    """Ledger records of the bad samples that this one replaces."""

    def refuse(self, raw: dict, cause: str) -> None:
        """Record that a sample is bad, until another takes its place."""
        shard, key = shard_name(raw), raw["__key__"]
        record = {"step": self.step, "row": self.row, "shard": shard, "key": key, "cause": cause, "replaced_by": ""}
        self.bad.append(record)

    def take(self, raw: dict) -> None:
        """Record which sample is consumed here."""
        self.name = sample_name(raw)
        self.content = f"{raw.get(SHA256, shard_name(raw))}/{raw['__key__']}"
        for record in self.bad:
            record["replaced_by"] = self.name


@dataclass(frozen=True)
class Share:
    """A rank's micro-batches: number [first, first + count) of every step in [start_step, stop_step)."""

    micro_batch: int
    """Rows of each."""
    first: int
    count: int
    start_step: int
    stop_step: int

    def lanes(self, global_batch: int, lanes: int) -> int:
        """How many of the lanes of a global batch have rows in this share."""
        rows = global_batch // lanes
        first, last = self.first * self.micro_batch, (self.first + self.count) * self.micro_batch - 1
        return last // rows - first // rows + 1

    def micro_batches(self) -> Iterator[tuple[int, int, range]]:
        """Step, micro-batch index and rows of the global batch, in order."""
        for step in range(self.start_step, self.stop_step):
            for index in range(self.first, self.first + self.count):
                yield step, index, range(index * self.micro_batch, (index + 1) * self.micro_batch)


def share_of(rank: int, world: int, global_batch: int, micro_batch: int, start_step: int, stop_step: int) -> Share:
    """Rank r of W makes micro-batches [r k, (r + 1) k), k = global_batch / (micro_batch W). Raises as check_batch."""
    check_batch(global_batch, micro_batch, world)
    count = global_batch // (micro_batch * world)
    return Share(micro_batch, rank * count, count, start_step, stop_step)


def check_batch(global_batch: int, micro_batch: int, world: int = 1, lanes: int = 1) -> None:
    """Raises ValueError where a global batch cannot be shared among processes in whole micro-batches, or by lanes."""
    share, lanes = max(micro_batch, 1) * world, max(lanes, 1)
    if global_batch < 1 or micro_batch < 1 or global_batch % share or global_batch % lanes:
        among = f"{world} processes x micro_batch {micro_batch}" if world > 1 else f"micro_batch {micro_batch}"
        if micro_batch > 0 and global_batch % share == 0:
            among = f"data.lanes {lanes}"
        unit = math.lcm(share, lanes)
        raise ValueError(
            f"global_batch {global_batch} is not divisible by {among}: give a multiple of {unit}, such as "
            f"{max(1, global_batch // unit) * unit}"
        )


def sample_name(raw: dict) -> str:
    """ "shard name/sample key" of a raw sample."""
    return f"{shard_name(raw)}/{raw['__key__']}"


def shard_name(raw: dict) -> str:
    """What a raw sample's shard is called in ledgers; without a manifest its base name."""
    return raw.get(NAME) or PurePosixPath(shown(raw["__shard__"])).name


def shard_names(manifests: Sequence[Manifest]) -> list[list[str]]:
    """Of each shard of each manifest the base name; where several have it, as much of the address as tells them apart.

    Shards with one address have one name, in several manifests too.
    """
    urls = [[shard.url for shard in manifest.shards] for manifest in manifests]
    parts = {url: shown(url).split("/") for url in itertools.chain(*urls)}
    names: dict[str, str] = {}
    unnamed, length = list(parts), 1
    while unnamed:
        short = {url: "/".join(parts[url][-length:]) for url in unnamed}
        count = Counter(short.values())
        done = [url for url in unnamed if count[short[url]] == 1 or length >= len(parts[url])]
        names |= {url: short[url] for url in done}
        unnamed = [url for url in unnamed if url not in names]
        length += 1
    return [[names[url] for url in listed] for listed in urls]
