"""Real file systems that get full, read-only or fail; they have to be mounted, which root alone may do."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

MIB = 1 << 20
EXT4_IOC_SHUTDOWN = 0x8004587D


def command(*words: object) -> None:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(map(str, words))}: {done.stderr}")


def fill(path: Path) -> None:
    """Write a file until there is no room, whatever else is written at the time."""
    with suppress(OSError), path.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(MIB))
    with suppress(OSError), path.open("ab", buffering=0) as file:
        while True:
            file.write(b"!")


class Disk:
    """A small file system at a path."""

    def __init__(self, path: Path):
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self.mount()

    def mount(self) -> None:
        command("mount", "-t", "tmpfs", "-o", f"size={64 * MIB}", "duet-test", self.path)

    def unmount(self) -> None:
        command("umount", "-l", self.path)

    def fail(self) -> None:
        """From now on it cannot be written."""
        raise NotImplementedError

    def mend(self) -> None:
        raise NotImplementedError


class Full(Disk):
    """Has no room for another byte."""

    def fail(self) -> None:
        fill(self.path / "filler")

    def mend(self) -> None:
        (self.path / "filler").unlink()


class ReadOnly(Disk):
    """As a file system becomes that has found an error in itself."""

    def fail(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                return command("mount", "-o", "remount,ro", self.path)
            except OSError:  # while a file is open for writing
                if time.monotonic() > deadline:
                    raise

    def mend(self) -> None:
        command("mount", "-o", "remount,rw", self.path)


class Failing(Disk):
    """An ext4 whose device is lost: all that is asked of it is answered by EIO."""

    def mount(self) -> None:
        image = self.path.with_name(f"{self.path.name}.image")
        if not image.exists():
            with image.open("wb") as file:
                file.truncate(128 * MIB)
            command("mkfs.ext4", "-q", "-F", image)
        command("mount", "-o", "loop", image, self.path)

    def fail(self) -> None:
        descriptor = os.open(self.path, os.O_RDONLY)
        fcntl.ioctl(descriptor, EXT4_IOC_SHUTDOWN, struct.pack("I", 0))  # after all that is written is on the disk
        os.close(descriptor)

    def mend(self) -> None:
        self.unmount()
        self.mount()


@contextmanager
def mounted(kind: type[Disk], path: Path) -> Iterator[Disk]:
    """A disk of this kind at the path; skips the test where it cannot be made."""
    try:
        disk = kind(path)
    except OSError as error:
        pytest.skip(f"no file system of its own: {error}")
    try:
        yield disk
    finally:
        disk.unmount()
