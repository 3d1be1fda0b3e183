"""Files: written whole or not at all, hashed, locked, and found in folders that others keep."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import math
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

BLOCK = 1 << 20
"""Bytes that are read at a time."""


def measure(file: IO[bytes]) -> tuple[int, str]:
    """Bytes left in a file, and their sha256 in hexadecimal."""
    size, digest = 0, hashlib.sha256()
    while block := file.read(BLOCK):
        size += len(block)
        digest.update(block)
    return size, digest.hexdigest()


def sha256_of(path: Path) -> str:
    """The sha256 of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return measure(file)[1]


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file so that, whatever happens, `path` holds all of the old content or all of the new one.

    For one writer at a time, such as the holder of a lock: what a killed one leaves, the next one writes over.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        put_in_place(part, path)
    finally:
        part.unlink(missing_ok=True)


def put_in_place(part: Path, path: Path) -> None:
    """Have all of the file `part` on the disk, then give it the name `path`, whose old file is gone."""
    sync(part)
    part.replace(path)


def sync(path: Path) -> None:
    """Have the content of a file, or the names in a directory, on the disk before this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def take_lock(file: int | IO, seconds: float = math.inf, *, lock: Callable = fcntl.flock) -> bool:
    """Lock an open file or directory until it is closed; False where another process keeps it for `seconds`.

    lock: fcntl.flock, which processes forked from this one hold as well, or fcntl.lockf (POSIX), which they do not.
    Raises OSError on a file system without locks.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            lock(file, fcntl.LOCK_EX | (0 if seconds == math.inf else fcntl.LOCK_NB))
            return True
        except (BlockingIOError, PermissionError) as error:
            if error.errno == errno.EPERM:  # EACCES is how some systems say that another process has it
                raise
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.5)


@contextmanager
def alone_in(folder: Path, refusal: str) -> Iterator[None]:
    """Hold the lock on a folder. Raises ValueError with the message `refusal` where another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not take_lock(descriptor, 0):
            raise ValueError(refusal)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def own_lock(path: Path, seconds: float) -> Iterator[bool]:
    """Whether this process alone has the lock file at `path` while the block runs; waits for others for so long.

    On a file system without locks each process that asks has it.
    """
    with path.open("w") as file:
        try:
            # POSIX, so that it ends with the process: its loaders, which may outlive a killed one, do not inherit it.
            is_ours = take_lock(file, seconds, lock=fcntl.lockf)
        except OSError:
            is_ours = True
        yield is_ours


def files_below(folder: Path) -> Iterator[Path]:
    """Every file below a folder, hidden ones left out. Links are followed, but not to a directory that they are in.

    Raises ValueError naming a directory that cannot be read: passed over, it would be missing without a word.
    """

    def refuse(error: OSError) -> None:
        raise ValueError(f"INPUT: {error.filename} cannot be read: {error.strerror}; allow it, or move it away")

    for parent, names, leaves in os.walk(folder, followlinks=True, onerror=refuse):
        names[:] = [name for name in names if not name.startswith(".") and not _loops(folder, Path(parent, name))]
        yield from (Path(parent, leaf) for leaf in leaves if not leaf.startswith("."))


def _loops(folder: Path, path: Path) -> bool:
    """Whether `path`, below `folder`, is a link to a directory that it is in."""
    if not path.is_symlink():
        return False
    return any(path.samefile(parent) for parent in path.parents if parent == folder or folder in parent.parents)


def read_file(path: Path) -> bytes:
    """The content of a file. OSError, too, for a pipe, where reading would wait for a writer, and for a device."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(f"{path} is a pipe or a device")
    return path.read_bytes()
