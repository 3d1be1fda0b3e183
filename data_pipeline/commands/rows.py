"""Records of a table -> rows that become samples: which column holds what, several captions per image, keys."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import re
import shlex
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_pipeline.commands.merging import Identified, Scattered
from data_pipeline.commands.tables import PROBED, SEVERAL_LINES, Table
from data_pipeline.samples.text import LINES, WHOLE, encodable, lines_of
from data_pipeline.storage.redaction import redact_urls

IMAGE_COLUMNS = (
    *("image", "image_path", "image_file", "image_name", "img"),
    *("filepath", "file_path", "file_name", "filename", "path", "jpg", "png", "webp"),
)
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "comment", "sentence", "description")
URL_COLUMNS = ("url", "image_url", "img_url", "link")
_URL = re.compile(r"\s*(?!file:)\w+://")
LONGEST_KEY = 80
"""Characters of a key, so that a tar member's name fits its 100-byte field."""


@dataclass(frozen=True)
class Columns:
    """Which column holds what, and how it is read."""

    image: str
    captions: tuple[str, ...]
    key: str | None
    cls: str | None
    root: Path
    """Folder that relative paths of images start from."""
    caption_rule: str = WHOLE
    """How a text of several lines is read: WHOLE or LINES."""

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(name for name in (self.image, *self.captions, self.key, self.cls) if name))


@dataclass(frozen=True)
class Row:
    """One image with everything said about it. `start`, `stop`: the rows of the table that it was made of."""

    start: int
    stop: int
    key: str
    image: Path | bytes | None
    captions: tuple[str, ...]
    cls: str | None
    cause: str
    """Why it cannot be a sample; empty where it can."""
    several_lines: bool = False
    """Whether its captions depend on how a text of several lines is read."""


def choose_columns(
    table: Table,
    image: str,
    captions: Sequence[str],
    key: str,
    cls: str,
    *,
    root: Path | None = None,
    caption_rule: str = WHOLE,
) -> Columns:
    """The columns asked for, else the usual names, in any case. ValueError: no such column; it names those there are.

    Where there is a class, captions are not needed.
    """
    usual_names = {_usual(name): name for name in reversed(table.columns)}

    def choose(flag: str, asked: str, usual: Sequence[str]) -> str:
        if asked and table.has(asked):
            return asked
        found = [usual_names[name] for name in ([_usual(asked)] if asked else usual) if name in usual_names]
        if not found and flag == "--image-column" and not asked:
            urls = [usual_names[name] for name in URL_COLUMNS if name in usual_names]
            if urls:
                raise ValueError(_fetch_first(table, urls[0], usual_names))
        if not found:
            lacking = (
                f"there is no column {asked!r}" if asked else f"none of the columns is called {' or '.join(usual)}"
            )
            columns = ", ".join(table.columns)
            raise ValueError(f"{flag}: {lacking} in {table.name}; the columns are: {columns}{table.hint}")
        return found[0]

    image = choose("--image-column", image, IMAGE_COLUMNS)
    if _holds_urls(table, image):
        raise ValueError(_fetch_first(table, image, usual_names))
    is_described = bool(captions) or not cls or any(name in usual_names for name in CAPTION_COLUMNS)
    return Columns(
        image=image,
        captions=tuple(choose("--caption-column", name, CAPTION_COLUMNS) for name in captions or [""] * is_described),
        key=choose("--key-column", key, ()) if key else table.key,
        cls=choose("--class-column", cls, ()) if cls else None,
        root=root or table.folder,
        caption_rule=caption_rule,
    )


def _usual(name: str) -> str:
    """A column's name as IMAGE_COLUMNS and the others have it."""
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def _holds_urls(table: Table, column: str) -> bool:
    """Whether the first records have nothing but remote addresses where images should be."""
    records = itertools.islice(table.read(0, [column]), PROBED)
    values = [record.get(column) for record, cause in records if not cause]
    return bool(values) and all(isinstance(value, str) and _URL.match(value) for value in values)


def _fetch_first(table: Table, url: str, usual_names: Mapping[str, str]) -> str:
    file = table.files[0]
    captions = [usual_names[name] for name in CAPTION_COLUMNS if name in usual_names]
    caption = f" --caption_col {captions[0]!r}" if captions else ""
    form = {".tsv": "tsv", ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
    delimiter = getattr(table, "delimiter", "")
    kind = {"\t": "tsv"}.get(delimiter) or form.get(file.suffix.lower(), "csv")
    comma = " (written with commas)" if delimiter in (";", "|") else ""
    given = shlex.quote(str(file if len(table.files) == 1 else file.parent))
    return (
        f"INPUT: {file} holds urls of images (column {url!r}), and pack reads local files: fetch them first, with: pip "
        f"install img2dataset; img2dataset --url_list {given}{comma} --input_format {kind} --url_col {url!r}{caption} "
        f"--output_format webdataset --output_folder SHARDS; then: python -m data_pipeline index SHARDS"
    )


def read_rows(table: Table, columns: Columns, start: int = 0) -> Iterator[Row]:
    """The rows of `table` from record `start` on; all records of the same image, class and key become one row, where
    the first of them is. Of images that are embedded, only neighbouring records are compared.

    `start` must be 0 or the `stop` of a row read before. A row whose key came earlier gets that as its cause.
    """
    seen = set(_keys_before(table, columns, start))
    with Scattered(lambda: _counted(_identified(table, columns))) as scattered:
        for row in _neighbours_joined(table, columns, start):
            texts = scattered.texts(_identity(row, columns), row.start)
            if texts is not None:  # None: it is part of an earlier row
                if texts:
                    row = replace(row, captions=tuple(dict.fromkeys([*row.captions, *texts])))
                yield _checked(row, columns, seen)


def _counted(records: Identified) -> Identified:
    """With a progress bar where it takes long."""
    return tqdm(records, desc="look for rows of one image", unit=" rows", delay=2, leave=False)


def _identified(table: Table, columns: Columns) -> Iterator[tuple[int, bytes | None, tuple[str, ...]]]:
    """Of each record: its number, what tells its sample from others (None: nothing does), its captions."""
    if table.key is None:
        for number, (record, cause) in enumerate(table.read(0, columns.names)):
            row = _row(columns, number, record, cause)
            if isinstance(row.image, bytes):
                return  # embedded images would have to be read all
            yield number, _identity(row, columns), row.captions


def _identity(row: Row, columns: Columns) -> bytes | None:
    if row.cause or not isinstance(row.image, Path):
        return None
    parts = (os.path.normpath(row.image), row.cls or "", row.key if columns.key else "")
    return hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _neighbours_joined(table: Table, columns: Columns, start: int) -> Iterator[Row]:
    pending: Row | None = None
    for number, (record, cause) in enumerate(table.read(start, columns.names), start):
        row = _row(columns, number, record, cause)
        if pending and _same_sample(pending, row, columns):
            captions = tuple(dict.fromkeys(pending.captions + row.captions))
            several = pending.several_lines or row.several_lines
            pending = replace(pending, stop=row.stop, captions=captions, several_lines=several)
            continue
        if pending:
            yield pending
        pending = row
    if pending:
        yield pending


def _keys_before(table: Table, columns: Columns, start: int) -> Iterator[str]:
    if columns.key and start:
        for number, (record, _) in zip(range(start), table.read(0, [columns.key]), strict=False):
            yield _key(record.get(columns.key), number)


def _same_sample(one: Row, other: Row, columns: Columns) -> bool:
    if one.cause or other.cause or one.image is None or one.cls != other.cls:
        return False
    return one.image == other.image and (columns.key is None or one.key == other.key)


def _checked(row: Row, columns: Columns, seen: set[str]) -> Row:
    cause = row.cause
    if columns.key:
        if row.key in seen:
            cause = cause or f"the key {row.key!r} is there more than once in column {columns.key!r}"
        seen.add(row.key)
    if not row.captions and row.cls is None:
        cause = cause or f"no caption in {', '.join(columns.captions)}"
    return row if cause == row.cause else replace(row, cause=cause)


def _row(columns: Columns, number: int, record: dict[str, Any], cause: str) -> Row:
    image: Path | bytes | None = None
    captions: tuple[str, ...] = ()
    cls: str | None = None
    several_lines = False
    try:
        # Whatever else is wrong with the record, the list of skipped ones should say which image it was.
        image = _image(record.get(columns.image), columns.root)
        values = [record.get(name) for name in columns.captions]
        by_rule = {rule: _texts(values, rule) for rule in (WHOLE, LINES)}
        captions = tuple(dict.fromkeys(by_rule[columns.caption_rule]))
        several_lines = record.get(SEVERAL_LINES, by_rule[WHOLE] != by_rule[LINES])
        cls = _class(record.get(columns.cls), columns.cls) if columns.cls else None
    except ValueError as error:
        cause = cause or str(error)
    key = _key(record.get(columns.key) if columns.key else None, number)
    return Row(number, number + 1, key, image, captions, cls, cause, several_lines)


def _image(value: Any, folder: Path) -> Path | bytes:
    """A path (relative ones are relative to the table), or the bytes themselves."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if not isinstance(value, str) or not value.strip():
        raise ValueError("no image")
    if _URL.match(value):
        raise ValueError(f"the image is a url, to be fetched first with img2dataset: {redact_urls(value)}")
    if value.startswith("file://"):
        value = urllib.parse.unquote(value.removeprefix("file://"))
    path = folder / value
    # White space around a cell's path is usually no part of it, but a file's name may well have some.
    return path if value == value.strip() or os.path.exists(path) else folder / value.strip()  # noqa: PTH110


def _texts(value: Any, caption_rule: str) -> list[str]:
    """Captions of a cell: a text (or its lines), a number, or a list of them."""
    if _is_missing(value):
        return []
    if isinstance(value, list | tuple):
        return [text for item in value for text in _texts(item, caption_rule)]
    if isinstance(value, str | int | float):
        lines = [line.strip() for line in lines_of(encodable(str(value)))]
        return lines if caption_rule == LINES else [" ".join(lines)] * bool(lines)
    raise ValueError(f"the caption is a {type(value).__name__}, not a text")


def _is_missing(value: Any) -> bool:
    """Whether a cell is empty; pandas puts NaN there."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _class(value: Any, column: str) -> str:
    """A class is a name or a whole number, which pandas turns into 3.0 where another cell is empty."""
    name = " ".join(encodable(str(value)).split())
    if _is_missing(value) or not name:
        raise ValueError(f"no class in column {column!r}")
    match = re.fullmatch(r"([+-]?\d+)(\.0+)?", name)
    if match is None and re.fullmatch(r"[+-]?\d*\.\d+", name):
        raise ValueError(f"the class {name} in column {column!r} is not a whole number")
    return str(int(match[1])) if match else name


def _key(value: Any, number: int) -> str:
    """A key that webdataset reads back as it is: everything but letters, digits, -, _ and / is percent-encoded."""
    # File names that are not UTF-8 have lone surrogates in Python.
    key = "" if _is_missing(value) else urllib.parse.quote(str(value), safe="/", errors="surrogatepass")
    key = key.replace(".", "%2E").replace("~", "%7E").strip("/")
    if not key:
        return f"{number:09d}"
    if len(key) <= LONGEST_KEY:
        return key
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return f"{key[: LONGEST_KEY - 17]}-{digest}"
