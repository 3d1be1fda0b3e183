"""What can be embedded: samples of shards, images of a folder, or the lines of a text file."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.config import DataConfig
from data_pipeline.order import Position, sequential
from data_pipeline.samples.limits import IMAGE_EXTENSIONS, OTHER_IMAGES
from data_pipeline.samples.text import WHOLE
from data_pipeline.stages.readers import RawReader, Readers
from data_pipeline.storage.files import files_below, read_file, sha256_of
from data_pipeline.storage.kept_index import read_hashed
from data_pipeline.storage.manifest import FILE_NAME, Manifest, Shard, load_manifest
from data_pipeline.storage.remote import expand, is_remote


class Input(ABC):
    """Something to embed.

    path: absolute, or a remote url. identity: a hash of what it holds. samples: how many. note: what of it is left out.
    """

    path: str
    identity: str
    samples: int
    note: str = ""

    @abstractmethod
    def kind(self) -> str:
        """`shards`, `folder` or `texts`."""

    def positions(self) -> list[Position]:
        """Where each sample is, in order."""
        return sequential([self.samples])

    @abstractmethod
    def readers(self, config: DataConfig) -> RawReader:
        """Opens the samples; their number in the input is the `position` of a Position."""

    def opener(self, config: DataConfig) -> Callable[[int], dict[str, Any]]:
        """Reads one sample by its number: what RawReader.raw gives."""
        positions, readers = self.positions(), self.readers(config)

        def raw(sample: int) -> dict[str, Any]:
            place = positions[sample]
            return readers.raw(place.source, place.shard, place.index)

        return raw

    def about(self) -> dict[str, Any]:
        """What the index keeps of it."""
        return {"kind": self.kind(), "path": self.path, "identity": self.identity, "samples": self.samples}


class ShardInput(Input):
    """All samples of a manifest."""

    def __init__(self, manifest: Manifest):
        if not manifest.nsamples:
            raise ValueError(f"INPUT {manifest.path} has no samples")
        self.manifest = manifest
        self.path, self.identity, self.samples = manifest.path, manifest.hash, manifest.nsamples

    def kind(self) -> str:
        return "shards"

    def positions(self) -> list[Position]:
        return sequential([shard.nsamples for shard in self.manifest.shards])

    def readers(self, config: DataConfig) -> RawReader:
        return Readers([self.manifest], config, lanes=1)


class FolderInput(Input):
    """Every image below a folder, in the order of their paths, which are their keys."""

    def __init__(self, folder: Path):
        self.folder = folder.absolute()
        below = sorted(files_below(self.folder))
        files = [path for path in below if path.suffix[1:].lower() in IMAGE_EXTENSIONS]
        if others := [path for path in below if path.suffix[1:].lower() in OTHER_IMAGES]:
            self.note = (
                f"{len(others):,} images are left out, such as {others[0]}: rename or convert them to "
                f"{', '.join(IMAGE_EXTENSIONS)}"
            )
        if not files:
            raise ValueError(
                f"INPUT {folder}: neither {FILE_NAME}, nor tars, nor images ({', '.join(IMAGE_EXTENSIONS)})"
            )
        self.names = [path.relative_to(self.folder).as_posix() for path in files]
        stats = [path.stat() for path in files]
        content = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in zip(self.names, stats, strict=True)]
        self.path, self.samples = str(self.folder), len(files)
        self.identity = hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def kind(self) -> str:
        return "folder"

    def readers(self, config: DataConfig) -> RawReader:
        return _FolderReader(self.folder, self.names)


@dataclass(frozen=True)
class _FolderReader:
    folder: Path
    names: list[str]

    def raw(self, source: int, shard: int, index: int) -> dict[str, Any]:
        """The image alone. One that is gone, or not allowed, is a sample that cannot be used, like a damaged one."""
        path = self.folder / self.names[index]
        try:
            data = read_file(path)
        except OSError:
            data = b""
        return {"__key__": self.names[index], "__shard__": str(self.folder), path.suffix[1:].lower(): data}


class TextInput(Input):
    """The lines of a text file that are not empty; the number of a line in the file, from 1, is its key."""

    def __init__(self, path: Path):
        self.path, self.identity = str(path.absolute()), sha256_of(path)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"INPUT {path} is not a text in UTF-8: {error}") from error
        self.lines = [(str(number), line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
        self.samples = len(self.lines)
        if not self.lines:
            raise ValueError(f"INPUT {path} holds no texts: give one per line")

    def kind(self) -> str:
        return "texts"

    def readers(self, config: DataConfig) -> RawReader:
        raise AssertionError("texts have no images")


def find_input(given: str) -> Input:
    """What a path, a url or a pattern of tars stands for.

    Raises:
        ValueError: there is no such thing, or nothing in it that can be embedded.
    """
    if not given:
        raise ValueError("INPUT is empty: give shards, a folder of images, or a .txt file with one text per line")
    path = Path(given).expanduser()
    if is_remote(given) or given.endswith((".tar", ".json")):
        return ShardInput(_manifest_of(given))
    if path.is_dir():
        if (path / FILE_NAME).is_file() or any(path.glob("*.tar")):
            return ShardInput(_manifest_of(given))
        return FolderInput(path)
    if path.is_file():
        if path.suffix.lower() in (".txt", ""):
            return TextInput(path)
        raise ValueError(f"INPUT {given}: give shards, a folder of images, or a .txt file with one text per line")
    return ShardInput(_manifest_of(given))


def open_input(about: dict[str, Any]) -> Input:
    """The input that an index was made of.

    Raises:
        ValueError: it is gone, or no longer what it was.
    """
    found = find_input(about["path"])
    if found.identity != about["identity"]:
        raise ValueError(f"{about['path']} has changed since it was embedded: embed it again")
    return found


def _manifest_of(given: str) -> Manifest:
    """The manifest given, or that of the tars given: taken from the one beside them, or made up now."""
    if given.endswith(".json") or is_remote(given) or (Path(given).expanduser() / FILE_NAME).is_file():
        return load_manifest(given)
    urls = expand([given])
    folder = Path(urls[0]).parent
    beside = load_manifest(folder) if (folder / FILE_NAME).is_file() else None
    known = {shard.url: shard for shard in beside.shards} if beside else {}
    shards = tuple(known.get(url) or _measured(url) for url in urls)
    path = str(Path(given).expanduser().absolute())
    return Manifest(shards, {}, path, beside.captions if beside else WHOLE)


def _measured(url: str) -> Shard:
    entries, digest = read_hashed(url)
    return Shard(url, len(entries), Path(url).stat().st_size, digest)
