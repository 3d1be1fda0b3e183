"""Files of a folder that others keep: links in circles, links that lead nowhere, pipes, what may not be read."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path


def files_below(folder: Path) -> Iterator[Path]:
    """Every file below a folder, hidden ones left out. Links are followed, but not to a directory that they lie in.

    Raises ValueError naming a directory that cannot be read: passed over, it would be missing without a word.
    """

    def refuse(error: OSError) -> None:
        raise ValueError(f"INPUT: {error.filename} cannot be read: {error.strerror}; allow it, or move it away")

    for parent, names, leaves in os.walk(folder, followlinks=True, onerror=refuse):
        names[:] = [name for name in names if not name.startswith(".") and not _loops(folder, Path(parent, name))]
        yield from (Path(parent, leaf) for leaf in leaves if not leaf.startswith("."))


def _loops(folder: Path, path: Path) -> bool:
    """Whether `path`, below `folder`, is a link to a directory that it lies in."""
    if not path.is_symlink():
        return False
    return any(path.samefile(parent) for parent in path.parents if parent == folder or folder in parent.parents)


def read_file(path: Path) -> bytes:
    """The content of a file. OSError, too, for a pipe, where reading would wait for a writer, and for a device."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(f"{path} is a pipe or a device")
    return path.read_bytes()
