"""Where the bytes of a shard come from: a local path, or a bounded local cache of remote ones."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from data_pipeline.config import DataConfig
from data_pipeline.storage.files import put_in_place, sha256_of, take_lock
from data_pipeline.storage.manifest import Shard
from data_pipeline.storage.remote import attempt, fetch_file, filesystem, is_remote
from data_pipeline.storage.shards import ShardReader

# What may be deleted: the directory may hold files of others.
_TAR = re.compile(r"[0-9a-f]{64}\.tar")
_PART = re.compile(r"[0-9a-f]{64}\.[0-9]+\.part")
OPENINGS = 10
"""Times that a remote shard is fetched while it leaves the cache, or is damaged there, before it is open."""


class Store:
    """Gives every shard a local path, fetching remote ones (http, https, s3, gs) once per node.

    cache_dir: directory shared by the processes of a node. cache_bytes: bound on the shards in it; the least recently
    used leave first. One that leaves while a process has it open stays readable to that process.
    attempts, backoff: tries per fetch, and seconds before the second one, doubled before each further one.
    """

    def __init__(self, cache_dir: str | os.PathLike[str], cache_bytes: int, *, attempts: int = 5, backoff: float = 1.0):
        self.cache_dir, self.cache_bytes = Path(cache_dir).expanduser().absolute(), int(cache_bytes)
        self.attempts, self.backoff = attempts, backoff

    def open(self, shard: Shard, limits: Mapping[str, int] | None = None) -> ShardReader:
        """A reader of a shard; what was damaged in the cache is fetched again. Raises as `local` and ShardReader."""
        for _ in range(OPENINGS):
            path = self.local(shard)
            try:
                return ShardReader(path, shard, limits)
            except (FileNotFoundError, ValueError):
                if not is_remote(shard.url):
                    raise
                with suppress(FileNotFoundError):  # another process has made room for another shard
                    if not _fault(Path(path), shard):
                        raise
                _drop(Path(path))
        raise ValueError(
            f"shard {shard.url} left the cache in {self.cache_dir}, or was damaged there, {OPENINGS} times before it "
            f"could be opened: raise data.cache_gb, or see whether that disk is sound"
        )

    def local(self, shard: Shard) -> str:
        """Path of a local file with the shard's bytes: size and sha256 of what was fetched are the manifest's.

        Raises ValueError for an address off the allow-list, a shard larger than the cache, and a fetch that failed.
        """
        if not is_remote(shard.url):
            return shard.url
        if shard.filesize > self.cache_bytes:
            raise ValueError(
                f"shard {shard.url} has {shard.filesize} bytes, the cache {self.cache_bytes}: raise data.cache_gb"
            )
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        # Named by content: another manifest with the same shard finds it, a changed shard cannot be mistaken for it.
        path = self.cache_dir / f"{shard.sha256}.tar"
        part = self.cache_dir / f"{shard.sha256}.{shard.filesize}.part"
        while not _touch(path, shard.filesize):
            with _locked(part) as is_ours:
                if is_ours:
                    self._fetch(shard, part)
                    put_in_place(part, path)
        return str(path)

    def _fetch(self, shard: Shard, part: Path) -> None:
        """Fetch into `part`, which this process holds locked, and verify; `part` is gone if that fails."""
        try:
            system, remote = filesystem(shard.url)

            def fetch() -> str:
                self._make_room()
                fetch_file(system, remote, str(part), shard.filesize)
                return _fault(part, shard)

            if fault := attempt(shard.url, fetch, self.attempts, self.backoff):
                raise ValueError(f"shard {shard.url} could not be fetched in {self.attempts} tries: {fault}")
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def _make_room(self) -> None:
        """Delete what killed processes left, then the least recently used shards until all that is fetched fits."""
        with (self.cache_dir / "lock").open("a") as lock:
            take_lock(lock)
            # A part's name says how large it will be: fetches at the same time count each other in full.
            excess = sum(_final_size(part) for part in self._files(_PART) if not _is_stale(part))
            kept = sorted((_last_use(path), path) for path in self._files(_TAR))
            excess += sum(path.stat().st_size for _, path in kept) - self.cache_bytes
            for _, path in kept:
                if excess <= 0:
                    break
                excess -= path.stat().st_size
                _drop(path)

    def _files(self, name: re.Pattern[str]) -> list[Path]:
        return [path for path in self.cache_dir.iterdir() if name.fullmatch(path.name)]


def open_store(config: DataConfig) -> Store:
    """The store of a run's shards, with the cache where the configuration puts it."""
    return Store(config.cache_dir or "~/.cache/duet", int(config.cache_gb * 1e9))


def _final_size(part: Path) -> int:
    """Bytes that a part will have, from its name <sha256>.<bytes>.part."""
    return int(part.suffixes[-2][1:])


def _touch(path: Path, filesize: int) -> bool:
    """Whether the cache holds the whole shard; marks it as just used."""
    try:
        if path.stat().st_size != filesize:
            return False
    except FileNotFoundError:
        return False
    # On the index beside it, which holds while the tar's own times stay. Finer than the clock that the system itself
    # stamps files with.
    with suppress(FileNotFoundError):
        index = _index(path)
        os.utime(index, ns=(time.time_ns(), index.stat().st_mtime_ns))
    return True


def _last_use(path: Path) -> int:
    """When a shard of the cache was asked for last, in ns; when it came, where it has not been opened yet."""
    with suppress(FileNotFoundError):
        return _index(path).stat().st_atime_ns
    return path.stat().st_mtime_ns


def _drop(path: Path) -> None:
    """Delete a shard of the cache, and its index."""
    path.unlink(missing_ok=True)
    _index(path).unlink(missing_ok=True)


def _index(path: Path) -> Path:
    return path.with_name(f"{path.name}.idx")


@contextmanager
def _locked(part: Path) -> Iterator[bool]:
    """Wait for the lock on `part`; True if it is ours to write, False if another process has finished or removed it."""
    with part.open("ab") as file:
        take_lock(file)
        yield _is_at(part, file.fileno())


def _is_stale(part: Path) -> bool:
    """Whether `part` is what a killed process left, as nobody holds the lock on it; then it is deleted."""
    try:
        with part.open("rb") as file:
            is_ours = take_lock(file, 0)
            if is_ours and _is_at(part, file.fileno()):
                part.unlink()
            return is_ours
    except FileNotFoundError:
        return True


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether `path` still names the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _fault(path: Path, shard: Shard) -> str:
    """What is wrong with the bytes fetched for a shard; empty if nothing is."""
    size = path.stat().st_size
    if size != shard.filesize:
        return f"{size} bytes came, the manifest says {shard.filesize}"
    digest = sha256_of(path)
    return "" if digest == shard.sha256 else f"the sha256 of what came is {digest}, the manifest says {shard.sha256}"
