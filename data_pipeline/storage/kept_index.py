"""The index of a tar, kept beside it in `.idx` with the sha256 that the tar had.

With them are its size and the times of its last changes. One of these is the inode's, which nothing sets but the
kernel's clock: a tar that is replaced by one of the same size, with the old time put back, is read again. So a shard is
hashed once (1.6 GB/s on a core with SHA instructions), not at every start, by one process of a node while the others
wait. Where nothing can be written beside it, every process that reads it hashes it once.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_pipeline.storage.files import sha256_of, take_lock
from data_pipeline.storage.tar_index import Index, scan

_VERSION = 3
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Kept(NamedTuple):
    """What was read of a tar."""

    entries: Index
    sha256: str
    """Of all its bytes; empty where they were not hashed."""
    boot: str
    """Since which start of which machine that is known."""


_unwritten: dict[str, tuple[list[int], Kept]] = {}
"""What this process knows of tars beside which nothing can be written, by path, with the stamp of each."""


def read_index(path: str | os.PathLike[str]) -> Index:
    """The samples of a tar, in order; the index is kept beside it where that can be written.

    A whole tar ends with two blocks of zeros or more, whatever multiple of bytes its writer pads it to.
    Raises ValueError naming the tar: cut short, a damaged header, a member past its end, anything after its end, a link
    or device, a repeated key, no samples.
    """
    return _read(Path(path), hashed=False).entries


def read_hashed(path: str | os.PathLike[str], *, this_boot: bool = False) -> tuple[Index, str]:
    """The samples of a tar, and its sha256; as read_index, reading all of it where the hash is not known yet.

    this_boot: the hash must be of after the machine's last start; for files that a power loss may have emptied.
    """
    kept = _read(Path(path), hashed=True, boot=_boot() if this_boot else "")
    return kept.entries, kept.sha256


def _read(path: Path, *, hashed: bool, boot: str = "") -> Kept:
    def enough(kept: Kept | None) -> bool:
        return kept is not None and (not hashed or (kept.sha256 != "" and boot in ("", kept.boot)))

    stamp = _stamp(path)
    kept = _load(path, stamp)
    if kept is not None and enough(kept):
        return kept
    with _alone_with(path):
        kept = _load(path, stamp)  # another process has read it in the meantime
        if kept is None or not enough(kept):
            index = Index.of(scan(path))
            kept = Kept(index, sha256_of(path) if hashed else "", _boot())
            if _stamp(path) != stamp:
                raise ValueError(f"{path} was changed while it was read: start again when it is complete")
            _keep(path, stamp, kept)
    return kept


def _stamp(path: Path) -> list[int]:
    try:
        stat = path.stat()
    except FileNotFoundError as error:
        raise ValueError(f"there is no shard at {path}") from error
    return [_VERSION, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _index_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.idx")


def _load(path: Path, stamp: list[int]) -> Kept | None:
    """What is kept, if it is whole and of the tar with this stamp."""
    known = _unwritten.get(str(path))
    if known is not None and known[0] == stamp:
        return known[1]
    try:
        header, columns, _ = _index_path(path).read_text(encoding="utf-8").split("\n")
        *found, sha256, boot, checksum = json.loads(header)
        if found != stamp or checksum != zlib.crc32(columns.encode()):
            return None
        index = Index(*json.loads(columns))
        return Kept(index, str(sha256), str(boot)) if index.fits(stamp[1]) else None
    # What somebody else has written may be anything.
    except (OSError, ValueError, TypeError, IndexError, OverflowError):
        return None


def _keep(path: Path, stamp: list[int], kept: Kept) -> None:
    columns = json.dumps(kept.entries.columns(), separators=(",", ":"))
    header = json.dumps([*stamp, kept.sha256, kept.boot, zlib.crc32(columns.encode())])
    try:  # Its checksum tells readers of a half-written one.
        _index_path(path).write_text(f"{header}\n{columns}\n", encoding="utf-8")
    except OSError:
        _unwritten[str(path)] = stamp, kept


@contextlib.contextmanager
def _alone_with(path: Path) -> Iterator[None]:
    """One process of this user and node at a time, so that the others find what it has read; or at once, where a
    lock cannot be had."""
    lock: int | None = None
    try:
        # One file for all shards: each has a byte of its own, which need not exist to be locked.
        lock_path = Path(tempfile.gettempdir(), f"duet-{os.getuid()}.lock")
        lock = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        byte = zlib.crc32(os.fsencode(path.absolute()))
        take_lock(lock, lock=lambda file, how: fcntl.lockf(file, how, 1, byte))
    except OSError:
        pass
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _boot() -> str:
    """Which start of which machine this is; empty where the system does not say."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return ""
