"""A folder of images with their captions beside them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

from data_pipeline.commands.tables.base import PROBED, SEVERAL_LINES, Record, Table
from data_pipeline.commands.tables.objects import read_object
from data_pipeline.samples.image import BadSample
from data_pipeline.samples.text import CAPTIONS, captions, has_several_lines
from data_pipeline.storage.files import files_below, read_file

READABLE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp")
IMAGE_SUFFIXES = (*READABLE_SUFFIXES, ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic")
KEY = "__key__"
"""Column of a folder that holds the image's path without its suffix."""


class FolderTable(Table):
    """Images of a folder and all below it, each with its captions in a .txt or a .json beside it, as in a tar.

    Columns: `__key__`, `image` (path), `caption`, the other fields of the .json, `folder` (the name of the folder that
    the image is in) and SEVERAL_LINES. A side-car without an image is a record too, with that cause, and so is a second
    image of the same name.
    """

    key = KEY
    recursive = True
    probed = True

    def __init__(self, folder: Path, caption_rule: str, left_out: Collection[str] = ()) -> None:
        """left_out: names of files directly in `folder` that are no side-cars."""
        self.caption_rule = caption_rule
        self.stems: dict[str, list[str]] = {}
        suffixes = (*IMAGE_SUFFIXES, ".txt", ".json")
        files = [str(file.relative_to(folder)) for file in files_below(folder) if file.name.lower().endswith(suffixes)]
        files = [name for name in files if name not in left_out]
        # By stem first: an image and its side-cars are neighbours.
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
            raise ValueError(f"INPUT: no image in {folder}")
        probed = (record for record, _ in itertools.islice(self.read(), PROBED))
        self.columns = list(dict.fromkeys(name for record in probed for name in record))

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, start: int = 0, columns: Sequence[str] | None = None) -> Iterator[Record]:
        for stem, image, cause in self._rows[start:]:
            record: dict[str, Any] = {}
            raw: dict[str, Any] = {CAPTIONS: self.caption_rule}
            texts: list[str] = []
            try:
                for name in self.stems[stem] if columns != [KEY] else []:
                    if name.lower().endswith(".json"):
                        record = read_object(self.folder / name)
                    if name.lower().endswith((".txt", ".json")):
                        raw[name.rpartition(".")[2].lower()] = read_file(self.folder / name)
                texts = captions(raw)
                record[SEVERAL_LINES] = has_several_lines(raw)
            except BadSample as error:
                cause = cause or error.cause
            except (ValueError, OSError) as error:
                cause = cause or str(error)
            above = PurePath(stem).parent.name
            yield {**record, KEY: stem, "image": image, "caption": texts, "folder": above}, cause
