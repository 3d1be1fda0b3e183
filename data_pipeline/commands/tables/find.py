"""Which reader a path is for: the kind of a file, the layout of a folder, the splits in it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipeline.commands.tables.arrow import ArrowTable, ParquetTable
from data_pipeline.commands.tables.base import Record, Table
from data_pipeline.commands.tables.delimited import DelimitedTable
from data_pipeline.commands.tables.folder import IMAGE_SUFFIXES, FolderTable
from data_pipeline.commands.tables.objects import JsonlTable, JsonTable, read_object
from data_pipeline.samples.text import WHOLE
from data_pipeline.storage.files import files_below

KINDS = (
    "a folder of images with .txt or .json beside them, or with a metadata.csv or .jsonl; a table (.csv, .tsv, .txt), "
    ".jsonl, .json (a list, or COCO's captions) or .parquet; or a datasets directory"
)
SPLITS = re.compile(r"(train|training|test|testing|val|valid|validation|dev|eval)(?![a-z])", re.IGNORECASE)
TABLES = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "captions.txt", "captions.csv", "results.csv")
"""Tables that describe the images of the folder they are in (imagefolder of Hugging Face, Flickr8k, Flickr30k)."""


def open_table(path: str | Path, split: str = "", *, delimiter: str = "", caption_rule: str = WHOLE) -> Table:
    """The reader for `path`. caption_rule: of the texts beside images, WHOLE or LINES.

    Raises ValueError: nothing there, of no known kind, empty, or a split is needed or unknown.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"INPUT: {path} does not exist")
    if path.is_file():
        return _by_split(_open_file(path, delimiter), split)
    if (path / "dataset_dict.json").exists():
        splits = read_object(path / "dataset_dict.json").get("splits", [])
        return open_table(path / _chosen(path, split, splits))
    if (path / "state.json").exists():
        names = [entry["filename"] for entry in read_object(path / "state.json").get("_data_files", [])]
        return _by_split(ArrowTable([path / name for name in names], path), split)
    parquet = _parquet(path)
    if tars := sorted(tar.name for tar in path.glob("*.tar")):
        if parquet or not _holds_images(path):  # img2dataset writes a Parquet file beside each tar
            raise ValueError(f"INPUT: {path} holds tars, which need no packing: python -m data_pipeline index {path}")
        read = "only its images are read" if len(tars) == 1 else f"nor are {len(tars) - 1} more; only images are read"
        print(f"INPUT: {path / tars[0]} is not packed, {read}: python -m data_pipeline index", file=sys.stderr)
    if parquet:
        return _open_parquet(path, parquet, split, caption_rule)
    tables = [path / name for name in TABLES if (path / name).is_file()]
    if len(tables) == 1:
        return _by_split(_open_file(tables[0], delimiter), split)
    if len(tables) > 1:
        raise ValueError(f"INPUT: {path} holds {' and '.join(table.name for table in tables)}; give one of them")
    folders = sorted(part.name for part in path.iterdir() if part.is_dir() and SPLITS.match(part.name))
    if split or len(folders) > 1 or (folders and _is_all(path, folders[0])):
        split = split or (folders[0] if len(folders) == 1 else "")
        return open_table(path / _chosen(path, split, folders), delimiter=delimiter, caption_rule=caption_rule)
    return FolderTable(path, caption_rule)


def _holds_images(path: Path) -> bool:
    return any(file.name.lower().endswith(IMAGE_SUFFIXES) for file in files_below(path))


def _is_all(path: Path, split: str) -> bool:
    """Whether the table in the folder of a split describes all images below `path`."""
    others = (part for part in path.iterdir() if part.name != split and not part.name.startswith("."))
    return any((path / split / name).is_file() for name in TABLES) and not any(
        part.is_dir() or part.name.lower().endswith(IMAGE_SUFFIXES) for part in others
    )


def _open_file(path: Path, delimiter: str) -> Table:
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv", ".txt"):
        return DelimitedTable(path, delimiter)
    if suffix in (".jsonl", ".ndjson"):
        return JsonlTable(path)
    if suffix == ".json":
        return JsonTable(path)
    if suffix == ".parquet":
        return ParquetTable([path], path.parent)
    if suffix == ".tar":
        raise ValueError(f"INPUT: {path} is a tar, which needs no packing: python -m data_pipeline index {path}")
    raise ValueError(f"INPUT: {path} is of no known kind; pack reads {KINDS}")


def _parquet(path: Path) -> list[Path]:
    """The Parquet files in a folder or in its data/."""
    root, below = sorted(path.glob("*.parquet")), sorted(path.glob("data/*.parquet"))
    if root and below:
        raise ValueError(
            f"INPUT: {path} holds {len(root)} Parquet files, and {len(below)} more in {path / 'data'}: give one of "
            f"them, such as {path / 'data'} or {root[0]}"
        )
    return root or below


def _open_parquet(path: Path, parquet: list[Path], split: str, caption_rule: str) -> Table:
    if all((path / file.stem).is_dir() for file in parquet):  # img2dataset --output_format files
        statistics = {file.name for file in path.glob("*_stats.json")}
        return FolderTable(path, caption_rule, left_out=statistics)
    by_split: dict[str, list[Path]] = {}
    for file in parquet:
        stem = re.sub(r"-\d+-of-\d+(-[0-9a-f]+)?$", "", file.stem)
        found = SPLITS.match(stem)
        by_split.setdefault(found[1] if found else stem if stem != file.stem else "", []).append(file)
    if split in by_split and split:
        return ParquetTable(by_split[split], path)
    if len(by_split) > 1:
        by_split = {name or file[0].stem: file for name, file in by_split.items()}
        return ParquetTable(by_split[_chosen(path, split, list(by_split))], path)
    only = "".join(by_split)
    if split and only:
        _chosen(path, split, [only])
    return _by_split(ParquetTable(parquet, path), split)


def _chosen(path: Path, split: str, splits: Sequence[str]) -> str:
    if split in splits:
        return split
    if split:
        raise ValueError(f"--split {split!r} is not in {path}, which holds {', '.join(splits) or 'no splits'}")
    raise ValueError(f"INPUT: {path} holds the splits {', '.join(splits)}; choose one with --split")


def _by_split(table: Table, split: str) -> Table:
    """The rows of `split` where the table says in a column which one a row belongs to; all where it does not."""
    column = next((name for name in table.columns if name.strip().lower() == "split"), None)
    if column is None:
        if split:
            raise ValueError(f"--split {split!r}: {table.files[0]} holds no splits")
        return table
    splits = sorted({str(record.get(column)) for record, cause in table.read(0, [column]) if not cause})
    if len(splits) == 1 and not split:
        return table
    return SplitTable(table, column, _chosen(table.files[0], split, splits))


class SplitTable(Table):
    """The rows of a table whose `column` says `split`."""

    def __init__(self, table: Table, column: str, split: str) -> None:
        super().__init__(table.files, table.folder)
        self.table, self.column, self.split = table, column, split
        self.columns, self.probed = table.columns, table.probed

    def read(self, start: int = 0, columns: Sequence[str] | None = None) -> Iterator[Record]:
        names = [*columns, self.column] if columns else None
        for record, cause in self.table.read(0, names):
            if cause or str(record.get(self.column)) == self.split:
                if start <= 0:
                    yield record, cause
                start -= 1
