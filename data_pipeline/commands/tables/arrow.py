"""Parquet files, and the Arrow files of a saved Hugging Face dataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.commands.tables.base import Record, Table

BATCH = 64
"""Rows that are taken out of Arrow at once: a bound on memory where images are embedded."""


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
