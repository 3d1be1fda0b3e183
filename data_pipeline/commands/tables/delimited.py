"""Tables of text with a header row: CSV, TSV, and others by their delimiter."""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipeline.commands.tables.base import Record, Table
from data_pipeline.commands.tables.folder import IMAGE_SUFFIXES

DELIMITERS = (",", "\t", ";", "|")
LONGEST = 1000
"""Most lines of a field between quotes."""


class DelimitedTable(Table):
    """Comma-, tab-, semicolon- or pipe-separated values with a header row, UTF-8.

    A field that begins with a quote ends with one, each quote inside is written as "", and line ends inside are part
    of it. Without commas or semicolons to protect, as in TSV, a quote is a letter unless it opens and closes the field.
    """

    def __init__(self, path: Path, delimiter: str = "") -> None:
        super().__init__([path], path.parent)
        # Captions may be longer than the csv module's default of 128 KiB.
        csv.field_size_limit(2**31 - 1)
        self._width = 0
        self.delimiter = delimiter or self._guess(path)
        header, cause = next(self._lines(), ([], ""))
        self.columns = [name.strip() for name in header]
        repeated = sorted({name for name in self.columns if self.columns.count(name) > 1})
        if not self.columns or cause:
            raise ValueError(
                f"INPUT: {path} is empty or unreadable; its first row must name the columns {cause}".strip()
            )
        if repeated:
            raise ValueError(f"INPUT: {path} names the column {repeated[0]!r} more than once")
        self._width = len(self.columns)
        self.hint = _named(self.columns, self.delimiter)

    def _guess(self, path: Path) -> str:
        """The delimiter that the header has most of; a .tsv has tabs."""
        if path.suffix.lower() == ".tsv":
            return "\t"
        header = next((line for line in text_lines(path) if line.strip()), "")
        return max(DELIMITERS, key=header.count)

    def _lines(self) -> Iterator[tuple[list[str], str]]:
        """Each row that is not blank: its fields, and the cause why they cannot be told; the header first."""
        lines = text_lines(self.files[0])
        ahead: list[str] = []
        number = 0
        while True:
            line = ahead.pop(0) if ahead else next(lines, None)
            if line is None:
                return
            number += 1
            if not line.strip("\r\n"):
                continue
            if '"' not in line:
                yield line.rstrip("\r\n").split(self.delimiter), ""
                continue
            fields, used = self._quoted(line, lines, ahead)
            if fields is not None:
                del ahead[:used]
                yield fields, ""
            elif self.delimiter in "\t|":
                yield line.rstrip("\r\n").split(self.delimiter), ""
            else:
                yield [], f'line {number} has an unbalanced quote: write each quote of a text as "", between quotes'
            number += used

    def _quoted(self, line: str, lines: Iterator[str], ahead: list[str]) -> tuple[list[str] | None, int]:
        """The fields of a row that begins with `line`, where its quotes open and close, and how many of the lines
        `ahead`, which `lines` fill, belong to it."""
        used, row = 0, line
        while used < LONGEST:
            if not used or '"' in ahead[used - 1]:
                try:
                    return next(csv.reader([row], delimiter=self.delimiter, strict=True)), used
                except csv.Error as error:
                    # Anything but an open quote at the end stays wrong whatever follows.
                    if "end of data" not in str(error):
                        return None, 0
            if used == len(ahead):
                if (following := next(lines, None)) is None:
                    return None, 0
                ahead.append(following)
            if self.delimiter in "\t|" and ahead[used].count(self.delimiter) + 1 == self._width:
                return None, 0  # a row of its own: the quote before it was a letter
            row += ahead[used]
            used += 1
        return None, 0

    def read(self, start: int = 0, columns: Sequence[str] | None = None) -> Iterator[Record]:
        width = len(self.columns)
        for line, cause in itertools.islice(self._lines(), start + 1, None):
            # A caption with an unquoted comma would lose its end, so such a row is not guessed at.
            if not cause and len(line) != width:
                cause = f"the row has {len(line)} fields, the header {width}"
            yield dict(zip(self.columns, line, strict=False)), cause


class NumberedTable(Table):
    """`name.jpg#0`, a tab and a caption on each line: Flickr8k.token.txt, Flickr30k's results_20130124.token."""

    def __init__(self, path: Path) -> None:
        super().__init__([path], path.parent)
        self.columns = ["image", "caption"]

    @staticmethod
    def is_one(path: Path) -> bool:
        """Whether the first line of a file is like this."""
        return any(_NUMBERED.fullmatch(line.rstrip("\r\n")) for line in itertools.islice(text_lines(path), 1))

    def read(self, start: int = 0, columns: Sequence[str] | None = None) -> Iterator[Record]:
        lines = (line.rstrip("\r\n") for line in text_lines(self.files[0]) if line.strip())
        for line in itertools.islice(lines, start, None):
            found = _NUMBERED.fullmatch(line)
            cause = "" if found else "the line is not the name of an image, # and a number, a tab and a caption"
            yield (dict(zip(self.columns, found.groups(), strict=True)) if found else {}), cause


_NUMBERED = re.compile(r"([^\t]+\.\w+)#\d+\t(.*)")


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a text in UTF-8, with their ends. Raises ValueError for one in another code."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from file
    except UnicodeDecodeError as error:
        with path.open("rb") as file:
            code = "UTF-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "LATIN1"
        raise ValueError(
            f"INPUT: {path} cannot be read as UTF-8 CSV: {error}; write it again, such as with: "
            f"iconv -f {code} -t UTF-8 {path} > NEW{path.suffix}"
        ) from None


def _named(header: Sequence[str], delimiter: str) -> str:
    """What to say of a header that seems to be a sample; empty where it does not."""
    kinds = ["url" if "://" in name else "image" if name.lower().endswith(IMAGE_SUFFIXES) else "" for name in header]
    if not any(kinds):
        return ""
    names = delimiter.join(kind or "caption" for kind in kinds)
    return f"; if its first row is a sample, put one with the names of the columns above it, such as: {names}"
