"""Readers of image-text tables: a folder with side-car captions, CSV/TSV, JSONL, Parquet, a saved Hugging Face dataset.

A table is a sequence of records, dictionaries by column, in an order that never changes. Each reader gives
`columns` (names), `files` (what it reads, for noticing a change), `folder` (that image paths are relative to), `len()`,
and `read(start, columns)`: the records from row `start` on, each with "" or the cause why the row cannot be read.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.storage.files import files_below, read_file

Record = tuple[dict[str, Any], str]

KINDS = "a folder of images with .txt or .json beside them, .csv, .tsv, .jsonl, .parquet, or a datasets directory"
READABLE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp")
IMAGE_SUFFIXES = (*READABLE_SUFFIXES, ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic")
KEY = "__key__"
"""Column of a folder that holds the image's path without its suffix."""
BATCH = 64
"""Rows that are taken out of Arrow at once: a bound on memory where images are embedded."""
PROBED = 100
"""Records whose names make up the columns of a table that has no header."""


def open_table(path: str | Path, split: str = "") -> Table:
    """The reader for `path`. ValueError: nothing there, of no known kind, empty, or a split is needed or unknown."""
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"INPUT: {path} does not exist")
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix in (".csv", ".tsv"):
            return CsvTable(path)
        if suffix in (".jsonl", ".ndjson"):
            return JsonlTable(path)
        if suffix == ".parquet":
            return ParquetTable([path], path.parent)
        raise ValueError(f"INPUT: {path} is of no known kind; pack reads {KINDS}")
    if (path / "dataset_dict.json").exists():
        splits = _json(path / "dataset_dict.json").get("splits", [])
        if split not in splits:
            given = f"--split {split!r} is not in it" if split else "choose one with --split"
            raise ValueError(f"INPUT: {path} holds the splits {', '.join(splits)}; {given}")
        path, split = path / split, ""
    parquet = sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))
    by_split: dict[str, list[Path]] = {}
    for file in parquet:
        by_split.setdefault(re.sub(r"-\d+-of-\d+$", "", file.stem), []).append(file)
    if split and split in by_split:
        return ParquetTable(by_split[split], path)
    if split:
        raise ValueError(f"--split {split!r}: {path} holds {', '.join(by_split) or 'no splits'}")
    if len(by_split) > 1 and any("-of-" in file.stem for file in parquet):
        raise ValueError(f"INPUT: {path} holds the splits {', '.join(by_split)}; choose one with --split")
    if (path / "state.json").exists():
        names = [entry["filename"] for entry in _json(path / "state.json").get("_data_files", [])]
        return ArrowTable([path / name for name in names], path)
    if parquet:
        return ParquetTable(parquet, path)
    return FolderTable(path)


def _json(path: Path) -> dict:
    try:
        value = json.loads(read_file(path).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


class Table:
    """What the readers share."""

    columns: list[str]
    recursive = False
    """Whether all that lies below `folder` is part of the table."""
    key: str | None = None
    """The column that names the samples where the user gives none."""
    probed = False
    """Whether `columns` are those of the first records only."""

    def __init__(self, files: Sequence[Path], folder: Path) -> None:
        self.files, self.folder = list(files), folder

    def read(self, start: int = 0, columns: Sequence[str] | None = None) -> Iterator[Record]:
        raise NotImplementedError

    def has(self, column: str) -> bool:
        """Whether any record has this column."""
        return column in self.columns or (self.probed and any(column in record for record, _ in self.read()))

    def __len__(self) -> int:
        return sum(1 for _ in self.read())


class CsvTable(Table):
    """Comma- or tab-separated values with a header row, UTF-8."""

    def __init__(self, path: Path) -> None:
        super().__init__([path], path.parent)
        self.delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        self.columns = next(self._lines(), [])
        repeated = sorted({name for name in self.columns if self.columns.count(name) > 1})
        if not self.columns:
            raise ValueError(f"INPUT: {path} is empty; its first row must name the columns")
        if repeated:
            raise ValueError(f"INPUT: {path} names the column {repeated[0]!r} more than once")

    def _lines(self) -> Iterator[list[str]]:
        # Captions may be longer than the csv module's default of 128 KiB.
        csv.field_size_limit(2**31 - 1)
        begin = 1
        try:
            with self.files[0].open(encoding="utf-8-sig", newline="") as file:
                # Not strict, it would take all rows up to the next quote for one field.
                reader = csv.reader(file, delimiter=self.delimiter, strict=True)
                for line in reader:
                    begin = reader.line_num + 1
                    if line:
                        yield line
        except UnicodeDecodeError as error:
            raise ValueError(f"INPUT: {self.files[0]} cannot be read as UTF-8 CSV: {error}") from None
        except csv.Error as error:
            raise ValueError(
                f"INPUT: {self.files[0]}: the row that begins in line {begin} has an unbalanced quote ({error}); put "
                f'the field between quotes and write each quote of its text as ""'
            ) from None

    def read(self, start: int = 0, columns: Sequence[str] | None = None) -> Iterator[Record]:
        width = len(self.columns)
        for line in itertools.islice(self._lines(), start + 1, None):
            # A caption with an unquoted comma would lose its end, so such a row is not guessed at.
            cause = "" if len(line) == width else f"the row has {len(line)} fields, the header {width}"
            yield dict(zip(self.columns, line, strict=False)), cause


class JsonlTable(Table):
    """One JSON object per line, UTF-8; a record need not have every column."""

    probed = True

    def __init__(self, path: Path) -> None:
        super().__init__([path], path.parent)
        probed = itertools.islice(self.read(), PROBED)
        self.columns = list(dict.fromkeys(name for record, _ in probed for name in record))
        if not self.columns:
            raise ValueError(f"INPUT: {path}: none of its first {PROBED} lines is a JSON object")

    def read(self, start: int = 0, columns: Sequence[str] | None = None) -> Iterator[Record]:
        with self.files[0].open("rb") as file:
            lines = (line for line in file if line.strip())
            for line in itertools.islice(lines, start, None):
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield {}, f"the line is not JSON: {error}"
                    continue
                ok = isinstance(record, dict)
                yield (record, "") if ok else ({}, "the line is not a JSON object")


class ParquetTable(Table):
    """Parquet files, one after the other; a file need not have every column."""

    def __init__(self, files: Sequence[Path], folder: Path) -> None:
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        super().__init__(files, folder)
        self._open, self._damage = parquet.ParquetFile, arrow.ArrowException
        try:
            metadata = [parquet.read_metadata(file) for file in self.files]
        except (arrow.ArrowException, OSError) as error:
            raise ValueError(f"INPUT: a Parquet file of {folder} cannot be read: {error}") from None
        self.columns = list(dict.fromkeys(name for part in metadata for name in part.schema.to_arrow_schema().names))
        self.sizes = [[part.row_group(i).num_rows for i in range(part.num_row_groups)] for part in metadata]

    def __len__(self) -> int:
        return sum(map(sum, self.sizes))

    def read(self, start: int = 0, columns: Sequence[str] | None = None) -> Iterator[Record]:
        for file, groups in zip(self.files, self.sizes, strict=True):
            try:
                with self._open(file) as opened:
                    for group, rows in enumerate(groups):
                        if start < rows:
                            batches = opened.iter_batches(BATCH, row_groups=[group], columns=columns)
                            yield from _records(batches, start, columns)
                        start = max(0, start - rows)
            except (self._damage, OSError) as error:
                raise ValueError(f"INPUT: {file} cannot be read: {error}") from None


class ArrowTable(Table):
    """The Arrow files of a directory written by `datasets.Dataset.save_to_disk`."""

    def __init__(self, files: Sequence[Path], folder: Path) -> None:
        super().__init__(files, folder)
        if not files:
            raise ValueError(f"INPUT: {folder}/state.json names no data files")
        missing = [str(file) for file in files if not file.is_file()]
        if missing:
            raise ValueError(f"INPUT: {missing[0]} is missing")
        self.columns = []
        for _, batch in zip(range(1), self._batches(), strict=False):
            self.columns = list(batch.schema.names)

    def _batches(self) -> Iterator[Any]:
        import pyarrow as arrow

        for file in self.files:
            try:
                with arrow.memory_map(str(file)) as mapped, arrow.ipc.open_stream(mapped) as stream:
                    yield from stream
            except (arrow.ArrowException, OSError) as error:
                raise ValueError(f"INPUT: {file} cannot be read: {error}") from None

    def __len__(self) -> int:
        return sum(batch.num_rows for batch in self._batches())

    def read(self, start: int = 0, columns: Sequence[str] | None = None) -> Iterator[Record]:
        return _records(self._batches(), start, columns)


def _records(batches: Iterator[Any], start: int, columns: Sequence[str] | None) -> Iterator[Record]:
    """The rows of Arrow record batches from row `start` on."""
    for batch in batches:
        rows = batch.num_rows
        for first in range(start, rows, BATCH):
            part = batch.slice(first, BATCH)
            known = [name for name in columns or part.schema.names if name in part.schema.names]
            yield from ((record, "") for record in part.select(known).to_pylist())
        start = max(0, start - rows)


class FolderTable(Table):
    """Images of a folder and all below it, each with its captions in a .txt (one per line) or a .json beside it.

    Columns: `__key__`, `image` (path), `caption` (the lines of the .txt and `caption`/`captions` of the .json), and
    the other fields of the .json. A side-car without an image is a record too, with that cause, and so is a second
    image of the same name.
    """

    key = KEY
    recursive = True
    probed = True

    def __init__(self, folder: Path) -> None:
        self.stems: dict[str, list[str]] = {}
        suffixes = (*IMAGE_SUFFIXES, ".txt", ".json")
        files = [str(file.relative_to(folder)) for file in files_below(folder) if file.name.lower().endswith(suffixes)]
        # By stem first: an image and its side-cars stand together.
        for name in sorted(files, key=os.path.splitext):
            self.stems.setdefault(os.path.splitext(name)[0], []).append(name)  # noqa: PTH122
        super().__init__([folder / name for name in sorted(files)], folder)
        self._rows: list[tuple[str, str, str]] = []
        for stem, names in self.stems.items():
            images = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
            # The one that can be read comes first: the others of its name are left out.
            images.sort(key=lambda name: not name.lower().endswith(READABLE_SUFFIXES))
            self._rows.append((stem, images[0], "") if images else (stem, "", f"no image beside {', '.join(names)}"))
            self._rows += [(stem, image, f"{images[0]} has the same name") for image in images[1:]]
        if not any(image for _, image, _ in self._rows):
            raise ValueError(f"INPUT: no image in {folder}; pack reads {KINDS}")
        probed = (record for record, _ in itertools.islice(self.read(), PROBED))
        self.columns = list(dict.fromkeys(name for record in probed for name in record))

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, start: int = 0, columns: Sequence[str] | None = None) -> Iterator[Record]:
        for stem, image, cause in self._rows[start:]:
            record: dict[str, Any] = {}
            captions: list[Any] = []
            try:
                for name in self.stems[stem] if columns != [KEY] else []:
                    if name.lower().endswith(".txt"):
                        captions += read_file(self.folder / name).decode("utf-8-sig").splitlines()
                    elif name.lower().endswith(".json"):
                        record = _json(self.folder / name)
                        captions += [record.pop("caption", None), record.pop("captions", None)]
            except (ValueError, OSError) as error:
                cause = cause or str(error)
            yield {**record, KEY: stem, "image": image, "caption": captions}, cause
