"""What a target of an export is, and how an export is written: complete and verified, or not at all."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from importlib import import_module
from pathlib import Path

import torch

from train.export import TARGETS
from train.export.pairs import Features, compare, make_pairs, reference
from train.export.source import Source


class Target(ABC):
    """A form of a model that another library reads.

    Args:
        python: interpreter that has the target's own library, where that is not this one.
    """

    def __init__(self, python: str = "") -> None:
        self.python = python

    @abstractmethod
    def check(self, source: Source) -> None:
        """Raises ValueError, naming the field of the recipe that this form cannot express."""

    @abstractmethod
    def write(self, source: Source, directory: Path) -> None:
        """All files, into a directory that is there and empty."""

    @abstractmethod
    def embed(self, source: Source, directory: Path, images: list[Path], captions: list[str]) -> dict[str, Features]:
        """Embeddings of image files and captions by the target's own runtime from the files alone, per precision."""

    def notes(self, source: Source) -> list[str]:
        """What whoever uses it has to know, in lines; none here."""
        del source
        return []

    def settle(self, directory: Path, final: Path) -> None:
        """Last changes before the directory is renamed to `final`; none here."""
        del directory, final


def find_target(name: str, python: str = "") -> Target:
    """The target of that name.

    Raises:
        ValueError: there is none, or a library that it needs is missing.
    """
    if name not in TARGETS:
        raise ValueError(f"to {name}: no such target; give one of {', '.join(TARGETS)}")
    module, _, kind = TARGETS[name].rpartition(".")
    return getattr(import_module(module), kind)(python)


def export(source: Source, target: Target, out: Path) -> list[str]:
    """Write the model to the new directory `out`, verified by the target's own runtime; what was measured, in lines.

    Raises:
        ValueError: `out` is there already, the target cannot express the model, or what it makes of 64 pairs of image
            files and captions differs; then nothing is left.
    """
    if out.exists():
        raise ValueError(f"{out} is there already: give a directory that is not")
    target.check(source)
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    pairs = out.with_name(f".{out.name}.pairs")
    shutil.rmtree(pairs, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        size = source.image_size
        images, captions = make_pairs(pairs, round(size / source.config.data.eval_crop), size)
        with torch.no_grad():
            target.write(source, part)
            wanted = reference(source, images, captions)
            found = target.embed(source, part, images, captions)
        lines = [compare(name, wanted, features) for name, features in found.items()] + target.notes(source)
        target.settle(part, out)
        part.rename(out)
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(pairs, ignore_errors=True)
    return lines
