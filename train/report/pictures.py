"""The images of a page: read again from their shards, each whole, in one picture with many squares."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from data_pipeline.config import DataConfig
from data_pipeline.order import sequential
from data_pipeline.samples.image import decode_square
from data_pipeline.samples.text import split
from data_pipeline.stages.readers import Readers
from data_pipeline.storage.manifest import Manifest
from train.evaluation.encode import Features

COLUMNS = 40
QUALITY = 82


class Pictures:
    """The image of a row of the features, read again from its shard.

    Raises:
        ValueError: a shard is gone or damaged.
    """

    def __init__(self, features: Features, manifest: Manifest, config: DataConfig):
        self.features, self.manifest, self.config = features, manifest, config
        self.readers = Readers([manifest], config)
        self.positions = sequential([shard.nsamples for shard in manifest.shards])
        self.left_out: list[tuple[int, int]] = [(0, 0)]
        """Rows that were found, sorted, and how many samples before each are not among the rows."""

    def square(self, row: int, side: int) -> Image.Image:
        """The whole image, on the background, in a square of `side` pixels."""
        data, _, _ = split(self._raw(row), needs_caption=False)
        return decode_square(data, side, max_pixels=self.config.max_pixels, background=self.config.background)

    def _raw(self, row: int) -> dict:
        # Rows leave out the samples that were bad or had no caption: a row's sample is at its number or later, by no
        # fewer places than that of a row before it.
        before = self.left_out[bisect.bisect_right(self.left_out, (row, len(self.positions))) - 1][1]
        for left_out in range(before, len(self.features.bad) + 1):
            place = self.positions[row + left_out]
            if self.readers.name(place.source, place.shard, place.index) == self.features.keys[row]:
                bisect.insort(self.left_out, (row, left_out))
                return self.readers.raw(place.source, place.shard, place.index)
        raise ValueError(f"sample {self.features.keys[row]} is no longer in {self.manifest.path}")


def write_sheet(squares: Iterable[Image.Image], count: int, side: int, path: Path) -> dict[str, Any]:
    """Write `count` squares as one WebP, COLUMNS a row; returns its file name, columns and rows for the page."""
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * side, rows * side), "white")
    for place, square in enumerate(squares):
        sheet.paste(square, (place % columns * side, place // columns * side))
    sheet.save(path, "WEBP", quality=QUALITY)
    return {"file": path.name, "columns": columns, "rows": rows}
