"""Tar shards: an index of their members, reading samples by that index, writing them.

A sample is the members that share a key: the member's path up to the first dot of its file name; the rest is the
extension, in lower case (webdataset's convention). A tar that is damaged or cut short is refused by name: reading on
past a bad header, as tar readers do, would silently lose samples.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.manifest import Shard

BLOCK = 512
"""Bytes of a tar block: headers, and the unit that members are padded to."""
RECORD = 20 * BLOCK
"""Bytes of a tar record, the unit that the whole archive is padded to."""
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")
_INDEX_VERSION = 1


class Entry(NamedTuple):
    """One sample of a shard."""

    key: str
    members: dict[str, tuple[int, int]]
    """Extension -> (offset of the content in the tar, size), both in bytes."""


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension of a member's path; None for a member that belongs to no sample (no extension, dot file)."""
    match = _NAME.fullmatch(name)
    if match is None or (name.startswith("__") and name.endswith("__")):
        return None
    return match[1], match[2].lower()


def read_index(path: str | os.PathLike[str], *, padded: bool = True) -> list[Entry]:
    """The samples of a tar, in order; the index is kept beside it (`.idx`) where that can be written.

    padded: the tar must end on a whole record of 10,240 bytes, as those of webdataset, img2dataset, Python and GNU tar
    do; without that, and without a manifest that states its size, a tar cut inside its final padding looks whole.
    Raises ValueError naming the tar: cut short, a damaged header, a member past its end, anything after its end, a link
    or device, a repeated key, no samples.
    """
    path = Path(path)
    try:
        stat = path.stat()
    except FileNotFoundError as error:
        raise ValueError(f"there is no shard at {path}") from error
    if padded and stat.st_size % RECORD:
        raise ValueError(
            f"{path}: {stat.st_size} bytes are no whole number of {RECORD}-byte records: the tar was cut short, or "
            f"written without padding (then write it again, with webdataset or GNU tar)"
        )
    index_path = path.with_name(f"{path.name}.idx")
    stamp = [_INDEX_VERSION, stat.st_size, stat.st_mtime_ns]
    entries = _load_index(index_path, stamp)
    if entries is None:
        entries = _scan(path, stat.st_size)
        lines = json.dumps(entries, separators=(",", ":"))
        header = json.dumps([*stamp, zlib.crc32(lines.encode())])
        with contextlib.suppress(OSError):  # Its checksum tells readers of a half-written one.
            index_path.write_text(f"{header}\n{lines}\n", encoding="utf-8")
    return entries


def _load_index(path: Path, stamp: list[int]) -> list[Entry] | None:
    """The kept index, if there is one, it is whole, and it was made of the tar with this size and time."""
    try:
        header, lines, _ = path.read_text(encoding="utf-8").split("\n")
        if json.loads(header) != [*stamp, zlib.crc32(lines.encode())]:
            return None
        return [
            Entry(key, {extension: (offset, size) for extension, (offset, size) in members.items()})
            for key, members in json.loads(lines)
        ]
    except (OSError, ValueError):
        return None


def _scan(path: Path, filesize: int) -> list[Entry]:
    """Read every header of a tar."""
    entries: list[Entry] = []
    keys: set[str] = set()
    end = 0
    for member in _members(path):
        if not (member.isreg() or member.isdir()) or member.issparse():
            raise ValueError(f"{path}: member {member.name} is no plain file (a link, a device, a sparse file)")
        end = member.offset_data + -(-member.size // BLOCK) * BLOCK
        if end > filesize or member.size < 0:
            raise ValueError(f"{path}: member {member.name} reaches past the end of the tar: it was cut short")
        named = split_name(member.name) if member.isreg() else None
        if named is None:
            continue
        key, extension = named
        if not entries or entries[-1].key != key:
            if key in keys:
                raise ValueError(f"{path}: key {key} stands in it twice; the members of a sample must be neighbours")
            keys.add(key)
            entries.append(Entry(key, {}))
        if extension in entries[-1].members:
            raise ValueError(f"{path}: key {key} has two members .{extension}; keys must be unique within a shard")
        entries[-1].members[extension] = (member.offset_data, member.size)
    _check_end(path, end, filesize)
    if not entries:
        raise ValueError(f"{path} holds no samples (files named key.extension)")
    return entries


def _members(path: Path) -> Iterator[tarfile.TarInfo]:
    """The members that tarfile sees; it stops without a word at a damaged header, so check where it stopped."""
    try:
        with tarfile.open(path, "r:") as tar:
            yield from tar
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} is no whole tar: {error}") from error


def _check_end(path: Path, end: int, filesize: int) -> None:
    """After the last member there must be two blocks of zeros or more, and nothing else."""
    with path.open("rb") as file:
        file.seek(end)
        while block := file.read(1 << 20):
            if block.strip(b"\0"):
                raise ValueError(f"{path}: damaged header at byte {end}, or another tar was appended there")
    if filesize - end < 2 * BLOCK:
        raise ValueError(f"{path}: no end-of-archive blocks at byte {end}: the tar was cut short")


class ShardReader:
    """Samples of one local tar by number.

    path: the tar. shard: what its manifest says of it; a different size or number of samples is a ValueError.
    """

    def __init__(self, path: str | os.PathLike[str], shard: Shard | None = None):
        self.url = shard.url if shard else os.fspath(path)
        if shard:
            self._check("bytes", _filesize(path), shard.filesize)
        self._entries = read_index(path, padded=shard is None)
        if shard:
            self._check("samples", len(self._entries), shard.nsamples)
        self._file = open(path, "rb")  # noqa: SIM115 - closed by close()

    def __len__(self) -> int:
        return len(self._entries)

    def raw(self, index: int) -> dict[str, Any]:
        """Sample `index`: "__key__" and "__shard__" (str), and the bytes of each member under its extension."""
        key, members = self._entries[index]
        sample: dict[str, Any] = {"__key__": key, "__shard__": self.url}
        for extension, (offset, size) in members.items():
            # pread leaves no file position behind, so forked processes may share the reader.
            data = os.pread(self._file.fileno(), size, offset)
            if len(data) != size:
                raise ValueError(f"shard {self.url}: {key}.{extension} ends early: the tar was changed while in use")
            sample[extension] = data
        return sample

    def close(self) -> None:
        self._file.close()

    def _check(self, what: str, found: int, stated: int) -> None:
        if found != stated:
            raise ValueError(
                f"shard {self.url} has {found} {what}, its manifest says {stated}: it is damaged or was replaced; "
                f"restore it, or make the manifest anew with: python -m data_pipeline index"
            )


def _filesize(path: str | os.PathLike[str]) -> int:
    try:
        return Path(path).stat().st_size
    except FileNotFoundError as error:
        raise ValueError(f"shard {os.fspath(path)} of the manifest does not exist") from error


class ShardWriter:
    """Write samples to `directory`/`prefix`-000000.tar and on; the same samples make the same bytes.

    A shard has a name ending in .part until it is complete and on the disk. A new one begins before max_samples, or
    max_bytes of content, would be passed. first: number of the first shard. paths: the complete shards so far.
    Used in a `with` block; when that is left by an exception, the shard begun last is discarded.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        prefix: str,
        *,
        max_samples: int = 10_000,
        max_bytes: int = 1_000_000_000,
        first: int = 0,
    ):
        self.directory, self.prefix = Path(directory), prefix
        self.max_samples, self.max_bytes = max_samples, max_bytes
        self.paths: list[str] = []
        self._number = first
        self._tar: tarfile.TarFile | None = None
        self._keys: set[str] = set()
        self._bytes = 0
        self.directory.mkdir(parents=True, exist_ok=True)

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append one sample: extension -> content.

        Raises ValueError for a key that readers would not give back (a dot in its file name), or one written before.
        """
        size = sum(len(data) for data in members.values())
        if self._keys and (len(self._keys) >= self.max_samples or self._bytes + size > self.max_bytes):
            self.finish()
        if not members:
            raise ValueError(f"sample {key!r} has no members")
        for extension in members:
            if split_name(f"{key}.{extension}") != (key, extension) or "\0" in key + extension or key.startswith("/"):
                raise ValueError(f"sample {key!r}: {key}.{extension} would not be read back as that key and extension")
        if key in self._keys:
            raise ValueError(f"sample {key!r} stands twice in shard {self._path.name}; keys must be unique")
        if self._tar is None:
            self._file = open(self._part, "wb")  # noqa: SIM115 - closed by finish() and discard()
            self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        for extension in sorted(members):
            member = tarfile.TarInfo(f"{key}.{extension}")
            member.size = len(members[extension])
            self._tar.addfile(member, io.BytesIO(members[extension]))
        self._keys.add(key)
        self._bytes += size

    def finish(self) -> None:
        """Complete the shard begun, if there is one: all of it on the disk, then under its name."""
        if self._tar is None:
            return
        try:
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._part.replace(self._path)
        except BaseException:
            self.discard()
            raise
        self.paths.append(str(self._path))
        self._number += 1
        self._reset()

    def discard(self) -> None:
        """Drop the shard begun, if there is one."""
        if self._tar is not None:
            with contextlib.suppress(OSError):  # A full disk fails again here, writing what was buffered.
                self._file.close()
            self._part.unlink(missing_ok=True)
            self._reset()

    def _reset(self) -> None:
        self._tar, self._keys, self._bytes = None, set(), 0

    @property
    def _path(self) -> Path:
        return self.directory / f"{self.prefix}-{self._number:06d}.tar"

    @property
    def _part(self) -> Path:
        return self._path.with_name(f"{self._path.name}.part")

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            self.finish()
        else:
            self.discard()
