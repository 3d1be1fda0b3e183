"""Raw samples by position: bytes as they are in the shards."""

from __future__ import annotations

import resource
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Protocol

from data_pipeline.config import DataConfig
from data_pipeline.samples.limits import MOST_BYTES
from data_pipeline.samples.text import CAPTIONS
from data_pipeline.stages.slots import NAME, SHA256, shard_names
from data_pipeline.stages.workers import at
from data_pipeline.storage.cache import open_store
from data_pipeline.storage.manifest import Manifest
from data_pipeline.storage.redaction import shown
from data_pipeline.storage.remote import is_remote
from data_pipeline.storage.shards import ShardReader


class RawReader(Protocol):
    """Gives raw samples by position."""

    def raw(self, source: int, shard: int, index: int) -> dict[str, Any]: ...


def most_open(lanes: int, shuffle_shards: int, sources: int) -> int:
    """Shards that stay open: a group of each lane and source, within what a process may open.

    A lane may begin within a shard, so a group may have a part of one shard more.
    """
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    groups = lanes * (shuffle_shards + 1) * sources
    return groups if allowed == resource.RLIM_INFINITY else min(groups, allowed // 2)


class Readers:
    """Raw samples of several manifests by (source, shard, index); the shards read last stay open.

    lanes: how many of an order's lanes are read, which bounds how many shards stay open; all of them by default.
    """

    def __init__(self, manifests: Sequence[Manifest], config: DataConfig, lanes: int | None = None):
        self.manifests, self._names = manifests, shard_names(manifests)
        self._store = open_store(config)
        self.most_open = most_open(lanes or config.lanes, config.shuffle_shards, len(manifests))
        self._open: OrderedDict[tuple[int, int], ShardReader] = OrderedDict()

    def raw(self, source: int, shard: int, index: int) -> dict[str, Any]:
        """One raw sample. Raises ValueError naming a shard that is missing, damaged or not the manifest's."""
        at(f"shard {shown(self.manifests[source].shards[shard].url)}, sample {index}")
        raw = self._reader(source, shard).raw(index)
        at(f"shard {shown(raw['__shard__'])}, sample {index} ({raw['__key__']})")
        of_shard = {NAME: self._names[source][shard], SHA256: self.manifests[source].shards[shard].sha256}
        return raw | {CAPTIONS: self.manifests[source].captions} | of_shard

    def name(self, source: int, shard: int, index: int) -> str:
        """What `sample_name` of the raw sample is; nothing of it is read. Raises as `raw`."""
        return f"{self._names[source][shard]}/{self._reader(source, shard).key(index)}"

    @property
    def cache_bytes(self) -> int:
        """Size of the cache of remote shards."""
        return self._store.cache_bytes

    def fetch(self, source: int, shard: int) -> None:
        """Have a remote shard in the cache. Raises as `Store.local`."""
        if is_remote(self.manifests[source].shards[shard].url):
            self._store.local(self.manifests[source].shards[shard])

    def size(self, source: int, shard: int) -> int:
        """Samples of a shard."""
        return self.manifests[source].shards[shard].nsamples

    def _reader(self, source: int, shard: int) -> ShardReader:
        at = (source, shard)
        if at not in self._open:
            # What has left the cache must leave the disk too, or cache_gb would bound nothing.
            for gone in [key for key, reader in self._open.items() if is_remote(reader.url) and reader.deleted]:
                self._open.pop(gone).close()
            if len(self._open) >= self.most_open:
                self._open.popitem(last=False)[1].close()
            self._open[at] = self._store.open(self.manifests[source].shards[shard], MOST_BYTES)
        self._open.move_to_end(at)
        return self._open[at]
