"""Where in a tar shard its samples are: read from every header.

A sample is the members that share a key: the member's path up to the first dot of its file name; the rest is the
extension, in lower case (webdataset's convention). A tar that is damaged or cut short is refused by name: reading on
past a bad header, as tar readers do, would silently lose samples.
"""

from __future__ import annotations

import re
import tarfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, overload

BLOCK = 512
"""Bytes of a tar block: headers, and the unit that members are padded to."""
_PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip"}
"""How files begin that hold a tar, or the like, in another form."""
_TAR = "tar --sort=name --hard-dereference -h -cf NEW.tar -C FOLDER ."
"""GNU tar's command that makes a shard of the files in a folder."""
MOST_HEADER = 1 << 20
"""Bytes of a long name, or of the attributes of a member."""
_HEADERS = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")


class Entry(NamedTuple):
    """One sample of a shard."""

    key: str
    members: dict[str, tuple[int, int]]
    """Extension -> (offset of the content in the tar, size), both in bytes."""


class Index(Sequence[Entry]):
    """The samples of a tar, in order, in columns: about 130 bytes a sample, as a process keeps many shards open.

    keys, layouts: of each sample, its key and its number in `extensions`, the distinct lists of extensions.
    offsets, sizes: of each member, sample after sample.
    """

    def __init__(
        self,
        keys: list[str],
        layouts: Iterable[int],
        extensions: Iterable[Iterable[str]],
        offsets: Iterable[int],
        sizes: Iterable[int],
    ):
        self._keys, self._layouts = keys, array("L", layouts)
        self._extensions = [tuple(names) for names in extensions]
        self._offsets, self._sizes = array("Q", offsets), array("Q", sizes)
        counts = (len(self._extensions[layout]) for layout in self._layouts)
        self._firsts = array("Q", accumulate(counts, initial=0))

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> Index:
        """The index that holds `entries`."""
        numbers: dict[tuple[str, ...], int] = {}
        layouts = [numbers.setdefault(tuple(entry.members), len(numbers)) for entry in entries]
        places = [place for entry in entries for place in entry.members.values()]
        keys = [entry.key for entry in entries]
        return cls(keys, layouts, numbers, (offset for offset, _ in places), (size for _, size in places))

    def columns(self) -> list:
        """What the constructor takes, as JSON can hold it."""
        return [self._keys, list(self._layouts), self._extensions, list(self._offsets), list(self._sizes)]

    def fits(self, filesize: int) -> bool:
        """Whether all columns go together, and all members are within a tar of this size."""
        members = self._firsts[-1]
        return (
            isinstance(self._keys, list)
            and len(self._keys) == len(self._layouts)
            and all(isinstance(name, str) for names in (self._keys, *self._extensions) for name in names)
            and members == len(self._offsets) == len(self._sizes)
            and all(offset + size <= filesize for offset, size in zip(self._offsets, self._sizes, strict=True))
        )

    def __len__(self) -> int:
        return len(self._keys)

    @overload
    def __getitem__(self, index: int) -> Entry: ...
    @overload
    def __getitem__(self, index: slice) -> list[Entry]: ...
    def __getitem__(self, index: int | slice) -> Entry | list[Entry]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        key, first = self._keys[index], self._firsts[range(len(self))[index]]
        names = self._extensions[self._layouts[index]]
        members = {name: (self._offsets[first + i], self._sizes[first + i]) for i, name in enumerate(names)}
        return Entry(key, members)


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension of a member's path; None for a member that belongs to no sample (no extension, dot file)."""
    match = _NAME.fullmatch(name)
    if match is None or (name.startswith("__") and name.endswith("__")):
        return None
    return match[1], match[2].lower()


class BoundedHeader(tarfile.TarInfo):
    """A header that may be followed by a long name or by attributes, of at most MOST_HEADER bytes: tarfile reads them
    at once, whatever their size."""

    def _proc_member(self, archive):
        if self.type in _HEADERS and self.size > MOST_HEADER:
            raise tarfile.ReadError(f"a header of {self.size:,} bytes, the limit is {MOST_HEADER:,}")
        return super()._proc_member(archive)  # type: ignore[misc]


class EmptyTar(ValueError):
    """A whole tar without any member."""


def scan(path: Path) -> list[Entry]:
    """The samples of a tar, in order, from its headers.

    Raises ValueError naming the tar: cut short, a damaged header, a member past its end, anything after its end, a link
    or device, a repeated key, no samples.
    """
    filesize = path.stat().st_size
    entries: list[Entry] = []
    keys: set[str] = set()
    end = 0
    for member in _members(path):
        if not (member.isreg() or member.isdir()) or member.issparse():
            raise ValueError(
                f"{path}: member {member.name} is no plain file (a link, a device, a sparse file); write the tar "
                f"again, such as with: {_TAR}"
            )
        end = member.offset_data + -(-member.size // BLOCK) * BLOCK
        if end > filesize or member.size < 0:
            raise ValueError(f"{path}: member {member.name} reaches past the end of the tar: it was cut short")
        named = split_name(member.name) if member.isreg() else None
        if named is None:
            continue
        key, extension = named
        if not entries or entries[-1].key != key:
            if key in keys:
                raise ValueError(
                    f"{path}: key {key} is in it twice; the members of a sample must be "
                    f"neighbours: write the tar again with sorted names, such as with: {_TAR}"
                )
            keys.add(key)
            entries.append(Entry(key, {}))
        if extension in entries[-1].members:
            raise ValueError(f"{path}: key {key} has two members .{extension}; keys must be unique within a shard")
        entries[-1].members[extension] = (member.offset_data, member.size)
    _check_end(path, end, filesize)
    if not end:
        raise EmptyTar(f"{path} is an empty tar")
    if not entries:
        raise ValueError(f"{path} holds no samples (files named key.extension)")
    return entries


def _members(path: Path) -> Iterator[tarfile.TarInfo]:
    """The members that tarfile sees; it stops without a word at a damaged header, so check where it stopped."""
    with path.open("rb") as file:
        start = file.read(8)
    for magic, form in _PACKED.items():
        if start.startswith(magic):
            unpack = f"unzip OLD -d FOLDER; {_TAR}" if form == "zip" else f"{form} -dc OLD > NEW.tar"
            raise ValueError(
                f"{path} is compressed ({form}), so no sample in it can be read alone: unpack it to .tar, such as "
                f"with: {unpack}"
            )
    try:
        with tarfile.open(path, "r:", tarinfo=BoundedHeader) as tar:
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
