"""data.mode stream: webdataset's way to read tars, over shard urls, for data that cannot be indexed; inexact.

Only bytes are read: nothing is unpickled, and shards are opened by path or through fsspec, never by webdataset's
opener, which runs a shell for some urls. Of a member no more is read than is used, within its limit: webdataset's own
reader takes all of it into memory, however large its header says it is.
"""

from __future__ import annotations

import itertools
import random
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from typing import IO

from webdataset import shuffle
from webdataset.tariterators import group_by_keys

from data_pipeline.samples.image import BadSample
from data_pipeline.samples.limits import MOST_BYTES
from data_pipeline.seeds import stream_epoch_seed, stream_sample_seed
from data_pipeline.stages.decode import Decode
from data_pipeline.stages.slots import Share, Slot
from data_pipeline.stages.workers import at, of_this_worker
from data_pipeline.storage.redaction import shown
from data_pipeline.storage.remote import is_remote, open_remote
from data_pipeline.storage.tar_index import BoundedHeader, split_name

BUFFER = 1000
"""Raw samples among which the next one is drawn."""
MOST_BAD = 10_000
"""Bad samples in a row after which a stream, which has no end, is given up."""


class StreamSource:
    """First stage: raw samples of this process's shards, epoch after epoch without end."""

    def __init__(self, urls: Sequence[str], seed: str, rank: int, world: int):
        self.urls, self.seed, self.rank, self.world = list(urls), seed, rank, world

    def __call__(self) -> Iterator[dict]:
        for epoch in itertools.count():
            rng = random.Random(stream_epoch_seed(self.seed, epoch))
            urls = rng.sample(self.urls, len(self.urls))
            samples = _read(of_this_worker(urls[self.rank :: self.world]))
            found = False
            for sample in shuffle(BUFFER, initial=BUFFER // 10, rng=rng)(samples):
                found = True
                yield sample
            if not found:
                raise ValueError(f"data.train: no samples in {', '.join(self.urls[:3])} and the other shards")


def _read(urls: Iterable[str]) -> Iterator[dict]:
    for url in urls:
        at(f"shard {shown(url)}")
        try:
            with open_remote(url) if is_remote(url) else open(url, "rb") as file:
                for sample in group_by_keys(_members(file, url)):
                    at(f"shard {shown(url)}, sample {sample['__key__']}")
                    yield {**sample, "__shard__": url}
        except Exception as error:  # damage, and what the remote backends have of their own
            raise ValueError(f"shard {url} could not be read: {error.args[0] if error.args else error}") from error


def _members(file: IO[bytes], url: str) -> Iterator[dict]:
    """The members of a tar as webdataset hands them on; of one that is not used, or too large, its size alone."""
    with tarfile.open(fileobj=file, mode="r|*", tarinfo=BoundedHeader) as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # tarfile keeps them all, for getmembers()
            named = split_name(member.name) if member.isreg() else None
            if named is None or named[1].startswith("__"):
                continue
            if member.issparse():
                raise ValueError(f"member {member.name} is a sparse file; write the tar again without --sparse")
            data: bytes | int = member.size
            content = tar.extractfile(member) if member.size <= MOST_BYTES.get(named[1], -1) else None
            if content is not None:
                data = content.read()
            yield {"fname": member.name, "data": data, "__url__": url}


class StreamDecode:
    """Decode stage: as many samples as this loader process's micro-batches take; bad ones are left out and recorded."""

    def __init__(self, decode: Decode, share: Share, seed: str):
        self.decode, self.share, self.seed = decode, share, seed

    def __call__(self, raws: Iterator[dict]) -> Iterator[dict]:
        raws = iter(raws)
        for step, index, rows in of_this_worker(self.share.micro_batches()):
            for row in rows:
                yield self._next(raws, Slot(step, index, row, stream_sample_seed(self.seed, step, row)))

    def _next(self, raws: Iterator[dict], slot: Slot) -> dict:
        for raw in raws:
            try:
                return self.decode(raw, slot)
            except BadSample as error:
                slot.refuse(raw, error.cause)
                if len(slot.bad) == MOST_BAD:
                    raise ValueError(
                        f"data.train: {MOST_BAD:,} bad samples in a row; the last: {error.cause}"
                    ) from error
        raise AssertionError("the source has no end")
