"""Records of a table -> rows that become samples: which column holds what, several captions per image, keys."""

from __future__ import annotations

import hashlib
import math
import os
import re
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline.commands.tables import Table
from data_pipeline.samples.text import encodable

IMAGE_COLUMNS = ("image", "image_path", "filepath", "file_name", "filename", "path")
CAPTION_COLUMNS = ("caption", "captions", "text", "title")
LONGEST_KEY = 80
"""Characters of a key, so that a tar member's name fits its 100-byte field."""


@dataclass(frozen=True)
class Columns:
    """Which column holds what."""

    image: str
    captions: tuple[str, ...]
    key: str | None
    cls: str | None

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

    @property
    def source(self) -> str:
        return str(self.image) if isinstance(self.image, Path) else ""


def choose_columns(table: Table, image: str, captions: Sequence[str], key: str, cls: str) -> Columns:
    """The columns asked for, else the usual names. ValueError: no such column; it names the columns that exist."""

    def choose(flag: str, asked: str, usual: Sequence[str]) -> str:
        if asked and table.has(asked):
            return asked
        found = [] if asked else [name for name in usual if name in table.columns]
        if not found:
            lacking = (
                f"there is no column {asked!r}" if asked else f"none of the columns is called {' or '.join(usual)}"
            )
            raise ValueError(f"{flag}: {lacking} in {table.folder}; the columns are: {', '.join(table.columns)}")
        return found[0]

    return Columns(
        image=choose("--image-column", image, IMAGE_COLUMNS),
        captions=tuple(choose("--caption-column", name, CAPTION_COLUMNS) for name in captions or [""]),
        key=choose("--key-column", key, ()) if key else table.key,
        cls=choose("--class-column", cls, ()) if cls else None,
    )


def read_rows(table: Table, columns: Columns, start: int = 0) -> Iterator[Row]:
    """The rows of `table` from record `start` on; consecutive records of the same image and key become one row.

    `start` must be 0 or the `stop` of a row read before. A row whose key came earlier gets that as its cause.
    """
    seen = set(_keys_before(table, columns, start))
    pending: Row | None = None
    for number, (record, cause) in enumerate(table.read(start, columns.names), start):
        row = _row(table, columns, number, record, cause)
        if pending and _same_sample(pending, row, columns):
            captions = tuple(dict.fromkeys(pending.captions + row.captions))
            pending = replace(pending, stop=row.stop, captions=captions)
            continue
        if pending:
            yield _checked(pending, columns, seen)
        pending = row
    if pending:
        yield _checked(pending, columns, seen)


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
    if not row.captions:
        cause = cause or f"no caption in {', '.join(columns.captions)}"
    return replace(row, cause=cause)


def _row(table: Table, columns: Columns, number: int, record: dict[str, Any], cause: str) -> Row:
    image: Path | bytes | None = None
    captions: tuple[str, ...] = ()
    cls: str | None = None
    try:
        # Whatever else is wrong with the record, the list of skipped ones should say which image it was.
        image = _image(record.get(columns.image), table.folder)
        captions = tuple(dict.fromkeys(text for name in columns.captions for text in _texts(record.get(name))))
        cls = _class(record.get(columns.cls), columns.cls) if columns.cls else None
    except ValueError as error:
        cause = cause or str(error)
    key = _key(record.get(columns.key) if columns.key else None, number)
    return Row(number, number + 1, key, image, captions, cls, cause)


def _image(value: Any, folder: Path) -> Path | bytes:
    """A path (relative ones are relative to the table), or the bytes themselves."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if not isinstance(value, str) or not value.strip():
        raise ValueError("no image")
    if "://" in value:
        raise ValueError(f"the image is a url ({value}); pack reads local files")
    path = folder / value
    # White space around a cell's path is usually no part of it, but a file's name may well have some.
    return path if value == value.strip() or os.path.exists(path) else folder / value.strip()  # noqa: PTH110


def _texts(value: Any) -> list[str]:
    """Captions of a cell: a text, a number, or a list of them."""
    if _is_missing(value):
        return []
    if isinstance(value, list | tuple):
        return [text for item in value for text in _texts(item)]
    if isinstance(value, str | int | float):
        text = encodable(str(value)).strip()
        return [text] if text else []
    raise ValueError(f"the caption is a {type(value).__name__}, not a text")


def _is_missing(value: Any) -> bool:
    """Whether a cell is empty; pandas puts NaN there."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _class(value: Any, column: str) -> str:
    """WebDataset's `cls` is a whole number in decimal; pandas makes 3.0 of 3 where another cell is empty."""
    match = re.fullmatch(r"([+-]?\d+)(\.0+)?", str(value).strip())
    if match is None:
        raise ValueError(f"the class {value!r} in column {column!r} is not a whole number")
    return str(int(match[1]))


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
