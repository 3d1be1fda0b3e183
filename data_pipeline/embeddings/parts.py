"""How an index is written: in parts, each atomically, so that any process may make any of them; then put together.

A part holds what comes of a fixed range of samples, so that neither the number of processes nor an interruption changes
a byte of the result.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import write_array_header_2_0

from data_pipeline.embeddings.index import IMAGES, TEXTS
from data_pipeline.storage.files import put_in_place, sync, write_atomically

PARTS = "parts"
BAD = "bad.jsonl"


@dataclass
class Part:
    """What comes of a range of samples. N images, M texts, D dimensions."""

    image_ND: np.ndarray
    """float32."""
    text_MD: np.ndarray
    image_samples: list[int] = field(default_factory=list)
    """Number of the sample in the input, per image."""
    image_keys: list[str] = field(default_factory=list)
    text_samples: list[int] = field(default_factory=list)
    text_keys: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    bad: list[dict[str, Any]] = field(default_factory=list)
    """Records of samples that could not be read."""

    _ROWS = ("image_samples", "image_keys", "text_samples", "text_keys", "texts", "bad")

    def vectors(self, kind: str) -> np.ndarray:
        return self.image_ND if kind == IMAGES else self.text_MD

    def columns(self, kind: str) -> dict[str, list]:
        """The columns of a kind's rows."""
        if kind == IMAGES:
            return {"sample": self.image_samples, "key": self.image_keys}
        return {"sample": self.text_samples, "key": self.text_keys, "text": self.texts}


def write_part(directory: Path, number: int, part: Part) -> None:
    """Write a part of the index in `directory`, complete or not at all."""
    from safetensors.numpy import save

    assert len(part.image_ND) == len(part.image_keys) and len(part.text_MD) == len(part.texts)
    rows = json.dumps({name: getattr(part, name) for name in Part._ROWS})
    write_atomically(_path(directory, number), save({IMAGES: part.image_ND, TEXTS: part.text_MD}, {"rows": rows}))


def read_part(directory: Path, number: int) -> Part:
    """A part that was written."""
    from safetensors import safe_open

    with safe_open(_path(directory, number), framework="numpy") as file:
        return Part(file.get_tensor(IMAGES), file.get_tensor(TEXTS), **json.loads(file.metadata()["rows"]))


def parts_there(directory: Path) -> set[int]:
    """Numbers of the parts that are written."""
    return {int(path.stem) for path in (directory / PARTS).glob("*.safetensors")}


def assemble(directory: Path, count: int) -> dict[str, int]:
    """Put parts 0 to count - 1 together and remove them; returns how many images, texts and bad samples they have.

    Interrupted and called again, it makes the same files again.
    """
    import pyarrow
    import pyarrow.parquet

    def parts() -> Iterator[Part]:
        return (read_part(directory, number) for number in range(count))

    found = {IMAGES: 0, TEXTS: 0, "bad": 0}
    with (directory / f"{BAD}.part").open("w", encoding="utf-8") as file:
        for part in parts():
            found[IMAGES], found[TEXTS] = found[IMAGES] + len(part.image_ND), found[TEXTS] + len(part.text_MD)
            found["bad"] += len(part.bad)
            file.writelines(f"{json.dumps(record)}\n" for record in part.bad)
            dims = part.image_ND.shape[1]
    put_in_place(directory / f"{BAD}.part", directory / BAD)
    string = {"key": pyarrow.string(), "text": pyarrow.string()}
    for kind in (IMAGES, TEXTS):
        with ExitStack() as stack:
            vectors = stack.enter_context((directory / f"{kind}.npy.part").open("wb"))
            header = {"descr": "<f4", "fortran_order": False, "shape": (found[kind], dims)}
            write_array_header_2_0(vectors, header)
            names = ("sample", "key") if kind == IMAGES else ("sample", "key", "text")
            schema = pyarrow.schema([(name, string.get(name, pyarrow.int64())) for name in names])
            path = str(directory / f"{kind}.parquet.part")
            rows = stack.enter_context(pyarrow.parquet.ParquetWriter(path, schema, compression="zstd"))
            for part in parts():
                vectors.write(np.ascontiguousarray(part.vectors(kind), "<f4").tobytes())
                rows.write_table(pyarrow.table(part.columns(kind), schema=schema))
        for ending in ("npy", "parquet"):
            put_in_place(directory / f"{kind}.{ending}.part", directory / f"{kind}.{ending}")
    sync(directory)
    return found


def remove_parts(directory: Path) -> None:
    """Remove what is not needed any more once the index is complete."""
    shutil.rmtree(directory / PARTS, ignore_errors=True)


def _path(directory: Path, number: int) -> Path:
    return directory / PARTS / f"{number:08d}.safetensors"


def ranges(samples: int, size: int, numbers: Iterable[int]) -> Iterator[range]:
    """The samples of each of these parts, of `size` samples each but the last one."""
    return (range(number * size, min((number + 1) * size, samples)) for number in numbers)
