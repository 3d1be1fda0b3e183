"""Records of one image that are not neighbours in a table: their captions, found in bounded memory."""

from __future__ import annotations

import json
import sqlite3
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

Identified = Iterable[tuple[int, bytes | None, tuple[str, ...]]]
"""Of each record: its number, 8 bytes that are the same for those of one sample (None: it is of none), its texts."""


class Scattered:
    """The texts of samples whose records have others between them, as in COCO's annotations.

    A first pass over the table keeps 8 bytes a record; where samples are scattered, a second one puts their texts into
    a temporary database, so that a table may be larger than memory. Used in a `with` block.

    identified: gives the table's records, again at every call.
    """

    def __init__(self, identified: Callable[[], Identified]):
        # A record that is of no sample is between its neighbours as well: 0.
        hashes = np.fromiter((_number(identity) if identity else 0 for _, identity, _ in identified()), dtype=np.uint64)
        begins = hashes != 0
        begins[1:] &= hashes[1:] != hashes[:-1]
        found, counts = np.unique(hashes[begins], return_counts=True)
        self._scattered = found[counts > 1]
        self._folder: tempfile.TemporaryDirectory | None = None
        if len(self._scattered):
            self._folder = tempfile.TemporaryDirectory()
            self._database = sqlite3.connect(Path(self._folder.name, "texts"))
            self._database.execute("CREATE TABLE texts (identity BLOB, record INTEGER, texts TEXT)")
            rows = (
                (identity, number, json.dumps(texts))
                for number, identity, texts in identified()
                if identity and self._has(identity)
            )
            self._database.executemany("INSERT INTO texts VALUES (?, ?, ?)", rows)
            self._database.execute("CREATE INDEX by_identity ON texts (identity, record)")

    def texts(self, identity: bytes | None, record: int) -> list[str] | None:
        """All texts of the sample whose record this is; none to add where it is not scattered; None where it began
        with an earlier record."""
        if identity is None or not self._has(identity):
            return []
        query = "SELECT record, texts FROM texts WHERE identity = ? ORDER BY record"
        found = self._database.execute(query, (identity,)).fetchall()
        return [text for _, texts in found for text in json.loads(texts)] if found[0][0] == record else None

    def __len__(self) -> int:
        """How many samples are scattered."""
        return len(self._scattered)

    def _has(self, identity: bytes) -> bool:
        number = _number(identity)
        at = int(np.searchsorted(self._scattered, np.uint64(number)))
        return at < len(self._scattered) and int(self._scattered[at]) == number

    def __enter__(self) -> Scattered:
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            self._database.close()
            self._folder.cleanup()


def _number(identity: bytes) -> int:
    return int.from_bytes(identity, "big")
