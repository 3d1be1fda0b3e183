"""An index of embeddings: unit vectors of images and texts with their keys, a directory that `train.embed` makes.

    index.json        which model and input it is of, how many vectors of how many dimensions; `complete` at the end
    images.npy        float32 [N, D], one unit vector per image
    images.parquet    of each of its rows: `sample`, the number in the input, and `key`, "shard name/sample key"
    texts.npy, texts.parquet    the same of all captions; `text` is the caption
    bad.jsonl         samples that could not be read: shard, key, cause
    parts/            while it is being made

Shape suffixes: N images or texts, D embedding.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.storage.files import write_atomically

if TYPE_CHECKING:
    import pyarrow

ABOUT = "index.json"
FORMAT = 1
IMAGES, TEXTS = "images", "texts"
KINDS = (IMAGES, TEXTS)


@dataclass(frozen=True)
class Index:
    """A complete index; vectors are mapped from the disk when they are used."""

    directory: Path
    about: dict[str, Any]
    """The content of index.json."""

    @property
    def kinds(self) -> list[str]:
        """`images`, `texts` or both: of which there are vectors."""
        return [kind for kind in KINDS if self.about[kind]]

    @cached_property
    def image_ND(self) -> np.ndarray:
        """Unit vectors of the images, float32."""
        return self.vectors(IMAGES)

    @cached_property
    def sample_N(self) -> np.ndarray:
        """int64, ascending: of each image its number in the input."""
        return self.rows(IMAGES)["sample"].to_numpy()

    def vectors(self, kind: str) -> np.ndarray:
        """Unit vectors float32 [N, D] of `images` or `texts`."""
        vectors_ND = np.load(self.directory / f"{kind}.npy", mmap_mode="r")
        if vectors_ND.shape != (self.about[kind], self.about["dims"]):
            raise ValueError(
                f"{self.directory / kind}.npy holds {vectors_ND.shape}, {ABOUT} says {self.about[kind]} vectors of "
                f"{self.about['dims']}: remove the directory and embed again"
            )
        return vectors_ND

    def rows(self, kind: str, samples: Sequence[int] | None = None) -> pyarrow.Table:
        """What the rows of a kind are, or those of some samples: columns sample, key and, of texts, text."""
        import pyarrow.parquet

        wanted = None if samples is None else [("sample", "in", list(samples))]
        return pyarrow.parquet.read_table(self.directory / f"{kind}.parquet", filters=wanted)


def open_index(path: str | Path) -> Index:
    """The index in a directory.

    Raises:
        ValueError: there is none, it is not complete, or it holds no vectors.
    """
    directory = Path(path).expanduser()
    about = read_about(directory)
    if about is None:
        command = f"python -m train.embed --model RUN INPUT {path}"
        raise ValueError(f"index {path}: there is no {ABOUT} in it; make it with: {command}")
    if not about["complete"]:
        raise ValueError(f"index {path} is not complete: the command that began it, given again, resumes it")
    if not any(about[kind] for kind in KINDS):
        raise ValueError(f"index {path} is empty: not one sample of {about['input']['path']} could be read")
    return Index(directory, about)


def read_about(directory: Path) -> dict[str, Any] | None:
    """The content of index.json; None where there is none.

    Raises:
        ValueError: it is not of an index, or of a format that is not known.
    """
    path = directory / ABOUT
    if not path.is_file():
        return None
    try:
        about = json.loads(path.read_bytes())
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']}, not {FORMAT}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"index {directory}: {path} is not of an index of embeddings ({error})") from error
    return about


def write_about(directory: Path, about: dict[str, Any]) -> None:
    """Write index.json, atomically."""
    write_atomically(directory / ABOUT, json.dumps({"format": FORMAT, **about}, indent=2) + "\n")
