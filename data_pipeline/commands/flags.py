"""Values of the commands' flags: each is checked before a command begins."""

from __future__ import annotations

import argparse
from pathlib import Path


def positive(text: str) -> int:
    """A flag's value: how many of something, at least one."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def new_file(text: str) -> Path:
    """A flag's value: a file to be written."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: give a path")
    return Path(text)


def new_folder(text: str) -> Path:
    """A flag's value: a directory to be written to."""
    if new_file(text).expanduser().is_file():
        raise argparse.ArgumentTypeError(f"{text} is a file: give a directory")
    return Path(text)
