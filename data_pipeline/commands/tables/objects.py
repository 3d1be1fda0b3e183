"""JSON: one object per line, a list of objects, the annotations of COCO, or Karpathy's of COCO and Flickr."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.commands.tables.base import PROBED, Record, Table
from data_pipeline.storage.files import read_file


class JsonlTable(Table):
    """One JSON object per line, UTF-8; a record need not have every column."""

    probed = True

    def __init__(self, path: Path) -> None:
        super().__init__([path], path.parent)
        probed = itertools.islice(self.read(), PROBED)
        self.columns = list(dict.fromkeys(name for record, _ in probed for name in record))
        if not self.columns:
            raise ValueError(f"INPUT: {path}: none of its first {PROBED} lines is a JSON object")

    def read(self, start: int = 0, columns: Sequence[str] | None = None) -> Iterator[Record]:
        with self.files[0].open("rb") as file:
            lines = (line for line in file if line.strip())
            for line in itertools.islice(lines, start, None):
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield {}, f"the line is not JSON: {error}"
                    continue
                ok = isinstance(record, dict)
                yield (record, "") if ok else ({}, "the line is not a JSON object")


class JsonTable(Table):
    """A JSON file that is read into memory: a list of objects, or COCO's or Karpathy's captions, a record per image."""

    def __init__(self, path: Path) -> None:
        super().__init__([path], path.parent)
        content = read_json(path)
        if isinstance(content, dict) and isinstance(content.get("annotations"), list):
            content = _of_coco(content)
        elif isinstance(content, dict) and isinstance(content.get("images"), list):
            content = _of_karpathy(content)
        if not isinstance(content, list) or not content:
            raise ValueError(
                f"INPUT: {path} is neither a list of objects nor COCO's captions (images, annotations) nor Karpathy's "
                f'(images with sentences): write it as a list such as [{{"image": "a.jpg", "caption": "text"}}]'
            )
        self._records: list[Any] = content
        self.columns = list(dict.fromkeys(name for item in content if isinstance(item, dict) for name in item))

    def __len__(self) -> int:
        return len(self._records)

    def read(self, start: int = 0, columns: Sequence[str] | None = None) -> Iterator[Record]:
        for record in self._records[start:]:
            yield (record, "") if isinstance(record, dict) else ({}, "the entry is not a JSON object")


def _of_coco(content: dict) -> list[dict[str, Any]]:
    """One record per image: file_name, and caption, the list of its captions."""
    captions: dict[Any, list] = {}
    for annotation in content["annotations"]:
        if isinstance(annotation, dict) and "caption" in annotation:
            captions.setdefault(annotation.get("image_id"), []).append(annotation["caption"])
    images = [image for image in content.get("images") or [] if isinstance(image, dict)]
    return [{"file_name": image.get("file_name"), "caption": captions.get(image.get("id"), [])} for image in images]


def _of_karpathy(content: dict) -> list[dict[str, Any]]:
    """One record per image: file_name, caption, the list of its sentences, and split (dataset_coco.json and others)."""
    return [
        {
            "file_name": "/".join(str(image[name]) for name in ("filepath", "filename") if image.get(name)),
            "caption": [sentence.get("raw") for sentence in image["sentences"] if isinstance(sentence, dict)],
            "split": image.get("split"),
        }
        for image in content["images"]
        if isinstance(image, dict) and isinstance(image.get("sentences"), list)
    ]


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises ValueError naming it where it is not JSON."""
    try:
        return json.loads(read_file(path).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def read_object(path: Path) -> dict:
    """The object that a JSON file holds. Raises ValueError naming the file where it holds none."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value
