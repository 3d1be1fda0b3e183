"""Tar shards: reading their samples by number, writing them."""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.storage.files import put_in_place
from data_pipeline.storage.kept_index import read_hashed, read_index
from data_pipeline.storage.manifest import Shard
from data_pipeline.storage.remote import is_remote
from data_pipeline.storage.tar_index import split_name

RESTORE = "restore it, or make the manifest again, with the same options: python -m data_pipeline index"


class ShardReader:
    """Samples of one local tar by number.

    path: the tar. shard: what its manifest says of it; another size, number of samples or sha256 is a ValueError. Where
    it selects samples, only these count.
    limits: extension -> the largest member, in bytes, that is read; members of other extensions are not. None: all are.
    """

    def __init__(
        self, path: str | os.PathLike[str], shard: Shard | None = None, limits: Mapping[str, int] | None = None
    ):
        self.url, self.limits = shard.url if shard else os.fspath(path), limits
        if shard:
            self._check("bytes", _filesize(path), shard.filesize)
            # A tar in the cache may have lost its content with the machine's power, whatever the index beside it says.
            self._entries, sha256 = read_hashed(path, this_boot=is_remote(shard.url))
            self._check("samples", len(self._entries), shard.samples_in_tar)
            self._check("as its sha256", sha256, shard.sha256)
        else:
            self._entries = read_index(path)
        self._selected = shard.selection.indices if shard and shard.selection else range(len(self._entries))
        self._file = open(path, "rb")  # noqa: SIM115 - closed by close()
        self._opened = self._stamp()

    def __len__(self) -> int:
        return len(self._selected)

    def raw(self, index: int) -> dict[str, Any]:
        """Sample `index`: "__key__" and "__shard__" (str), and the bytes of each member under its extension; of a
        member that is not read its size, an int. Raises ValueError where the tar was changed since it was opened."""
        key, members = self._entries[int(self._selected[index])]
        if self._stamp() != self._opened:
            raise ValueError(f"shard {self.url}: it ends early or was changed while in use: {RESTORE}")
        sample: dict[str, Any] = {}
        for extension, (offset, size) in members.items():
            if self.limits is not None and size > self.limits.get(extension, -1):
                sample[extension] = size
                continue
            # pread leaves no file position behind, so forked processes may share the reader.
            data = os.pread(self._file.fileno(), size, offset)
            if len(data) != size:
                raise ValueError(f"shard {self.url}: {key}.{extension} ends early: the tar was changed while in use")
            sample[extension] = data
        # Last, since a member may have such an extension.
        return sample | {"__key__": key, "__shard__": self.url}

    def key(self, index: int) -> str:
        """The key of sample `index`, of which nothing is read."""
        return self._entries[int(self._selected[index])].key

    @property
    def deleted(self) -> bool:
        """Whether the tar was deleted since: it can be read, and fills the disk, until it is closed."""
        return os.fstat(self._file.fileno()).st_nlink == 0

    def close(self) -> None:
        self._file.close()

    def _stamp(self) -> tuple[int, int]:
        stat = os.fstat(self._file.fileno())
        return stat.st_size, stat.st_mtime_ns

    def _check(self, what: str, found: int | str, stated: int | str) -> None:
        if found != stated:
            raise ValueError(
                f"shard {self.url} has {found} {what}, its manifest says {stated}: it is damaged or was replaced; "
                f"{RESTORE}"
            )


def _filesize(path: str | os.PathLike[str]) -> int:
    try:
        return Path(path).stat().st_size
    except FileNotFoundError as error:
        raise ValueError(f"shard {os.fspath(path)} of the manifest does not exist; {RESTORE}") from error


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
            raise ValueError(f"sample {key!r} is twice in shard {self._path.name}; keys must be unique")
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
            self._file.close()
            put_in_place(self._part, self._path)
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
