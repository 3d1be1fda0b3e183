"""What every reader of an image-text table is.

A table is a sequence of records, dictionaries by column, in an order that never changes. Each reader gives
`columns` (names), `files` (what it reads, for noticing a change), `folder` (that image paths are relative to), `len()`,
and `read(start, columns)`: the records from row `start` on, each with "" or the cause why the row cannot be read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Record = tuple[dict[str, Any], str]

PROBED = 100
"""Records whose names make up the columns of a table that has no header."""
SEVERAL_LINES = "__several_lines__"
"""Column of a folder: whether the captions depend on how a text of several lines is read."""


class Table:
    """What the readers share."""

    columns: list[str]
    recursive = False
    """Whether all that is below `folder` is part of the table."""
    key: str | None = None
    """The column that names the samples where the user gives none."""
    probed = False
    """Whether `columns` are those of the first records only."""
    hint = ""
    """What else to say where a column is not found."""

    def __init__(self, files: Sequence[Path], folder: Path) -> None:
        self.files, self.folder = list(files), folder

    @property
    def name(self) -> Path:
        """What a message calls it: its file, or where it has several their folder."""
        return self.files[0] if len(self.files) == 1 else self.folder

    def read(self, start: int = 0, columns: Sequence[str] | None = None) -> Iterator[Record]:
        raise NotImplementedError

    def has(self, column: str) -> bool:
        """Whether any record has this column."""
        return column in self.columns or (self.probed and any(column in record for record, _ in self.read()))

    def __len__(self) -> int:
        return sum(1 for _ in self.read())
