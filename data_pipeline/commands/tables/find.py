"""Which reader a path is for: the kind of a file, the layout of a folder, the splits in it."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipeline.commands.tables.arrow import ArrowTable, ParquetTable
from data_pipeline.commands.tables.base import Record, Table
from data_pipeline.commands.tables.delimited import DelimitedTable, NumberedTable
from data_pipeline.commands.tables.folder import IMAGE_SUFFIXES, FolderTable
from data_pipeline.commands.tables.objects import JsonlTable, JsonTable, read_object
from data_pipeline.samples.text import WHOLE
from data_pipeline.storage.files import files_below

KINDS = (
    "a folder of images with .txt or .json beside them, or with a metadata.csv or .jsonl; a table (.csv, .tsv, .txt), "
    ".jsonl, .json (a list, COCO's captions, or Karpathy's) or .parquet; or a datasets directory"
)
_SPLIT = "(train|training|test|testing|val|valid|validation|dev|eval)"
SPLITS = re.compile(rf"{_SPLIT}(?![a-z])", re.IGNORECASE)
"""How a folder's name begins that holds a split."""
FILE_SPLITS = re.compile(rf"(?<![a-z]){_SPLIT}(?:set)?(?![a-z])", re.IGNORECASE)
"""What a file's name has in it that holds a split."""
TABLES = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "captions.txt", "captions.csv", "results.csv")
"""Tables that describe the images of the folder they are in (imagefolder of Hugging Face, Flickr8k, Flickr30k)."""
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")
PACKED = (".gz", ".tgz", ".zip", ".zst", ".xz", ".bz2", ".tbz2", ".lz4", ".7z", ".rar")


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
            raise ValueError(f"INPUT: {path} holds tars, which need no packing: {_index(path)}")
        read = "only its images are read" if len(tars) == 1 else f"nor are {len(tars) - 1} more; only images are read"
        print(f"INPUT: {path / tars[0]} is not packed, {read}: python -m data_pipeline index", file=sys.stderr)
    others = sorted(file for file in path.iterdir() if file.name.lower().endswith(TABLE_SUFFIXES))
    if parquet:
        _say_unread([*others, *sorted(file for file in path.glob("*/*.parquet") if file not in parquet)])
        return _open_parquet(path, parquet, split, caption_rule)
    folders = sorted(part.name for part in path.iterdir() if part.is_dir() and SPLITS.match(part.name))
    tables = [path / name for name in TABLES if (path / name).is_file()]
    by_split = {} if tables or folders else _files_by_split([file for file in others if SPLITS.fullmatch(file.stem)])
    if (split in by_split or len(by_split) > 1) and not _has_side_cars(path):
        tables, split = by_split[_chosen(path, split, list(by_split))], ""
    if len(tables) > 1:
        raise ValueError(f"INPUT: {path} holds {' and '.join(table.name for table in tables)}; give one of them")
    _say_unread([file for file in others if file not in tables])
    if tables:
        return _by_split(_open_file(tables[0], delimiter), split)
    if split or len(folders) > 1 or (folders and _is_all(path, folders[0])):
        split = split or (folders[0] if len(folders) == 1 else "")
        return open_table(path / _chosen(path, split, folders), delimiter=delimiter, caption_rule=caption_rule)
    if not _holds_images(path):
        raise ValueError(f"INPUT: no image in {path}{_what_else(path, others)}")
    return FolderTable(path, caption_rule)


def _say_unread(files: Sequence[Path]) -> None:
    """Say which tables in a folder are left out."""
    if files:
        more = f" nor are {len(files) - 1} more, such as {files[1]};" if len(files) > 1 else ""
        print(f"INPUT: {files[0]} is not read;{more} give what you mean as INPUT", file=sys.stderr)


def _what_else(path: Path, tables: Sequence[Path]) -> str:
    """What to give instead of a folder without images."""
    if tables:
        return f"; give a table as INPUT, such as {tables[0]}"
    below = sorted(path.glob("*/*.parquet")) or sorted(path.glob("*/*/*.parquet"))
    return f"; Parquet files are in folders below: give one of those, such as {below[0].parent}" if below else ""


def _has_side_cars(path: Path) -> bool:
    """Whether an image below a folder has its captions beside it."""
    images, texts = set[Path](), set[Path]()
    for file in files_below(path):
        if file.name.lower().endswith((*IMAGE_SUFFIXES, ".txt", ".json")):
            (images if file.name.lower().endswith(IMAGE_SUFFIXES) else texts).add(file.with_suffix(""))
    return bool(images & texts)


def _index(path: Path) -> str:
    return f"python -m data_pipeline index {shlex.quote(str(path))}"


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
    if suffix in (".csv", ".tsv", ".txt", ".token"):
        return NumberedTable(path) if NumberedTable.is_one(path) else DelimitedTable(path, delimiter)
    if suffix in (".jsonl", ".ndjson"):
        return JsonlTable(path)
    if suffix == ".json":
        return JsonTable(path)
    if suffix == ".parquet":
        return ParquetTable([path], path.parent)
    if suffix == ".tar":
        raise ValueError(f"INPUT: {path} is a tar, which needs no packing: {_index(path)}")
    if suffix in PACKED:
        raise ValueError(f"INPUT: {path} is compressed: unpack it, and give what was in it")
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
    by_split = _files_by_split(parquet)
    if len(by_split) > 1 or (split and split in by_split):
        return ParquetTable(by_split[_chosen(path, split, list(by_split))], path)
    only = "".join(by_split)
    if split and only:
        _chosen(path, split, [only])
    return _by_split(ParquetTable(parquet, path), split)


def _files_by_split(files: Sequence[Path]) -> dict[str, list[Path]]:
    """Files by the split that their names speak of; where some do, each other one by its own name; else all as ""."""
    by_split: dict[str, list[Path]] = {}
    for file in files:
        stem = re.sub(r"-\d+-of-\d+(-[0-9a-f]+)?$", "", file.stem)
        found = FILE_SPLITS.search(stem)
        by_split.setdefault(found[1] if found else stem if stem != file.stem else "", []).append(file)
    if len(by_split) > 1:
        by_split |= {file.stem: [file] for file in by_split.pop("", [])}
    return by_split


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
            raise ValueError(f"--split {split!r}: {table.files[0]} holds no splits: leave --split out")
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
