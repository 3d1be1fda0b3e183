"""Which shards a data set has: samples, bytes and sha256 of each, in one JSON file.

The form is `wids-shard-index-v1`, the shard list of webdataset's indexed readers, with a sha256 per shard, totals, and
the data statistics added. A manifest of some samples of its shards is of another kind, since those readers would take
the first ones.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.storage.files import BLOCK, write_atomically
from data_pipeline.storage.redaction import address
from data_pipeline.storage.remote import described, expand, folder_of, is_remote, not_found, open_remote
from data_pipeline.storage.selection import Selection

FILE_NAME = "manifest.json"
KIND = "wids-shard-index-v1"
SELECTED_KIND = "duet-selected-samples-v1"
MOST_BYTES = 1 << 30
"""Of a remote manifest; a server may send without end."""


@dataclass(frozen=True)
class Shard:
    """One tar of the data set."""

    url: str
    """Absolute local path, or remote url."""
    nsamples: int
    """Samples of it that the data set has: all in the tar, or those of the selection."""
    filesize: int
    """Bytes of the tar."""
    sha256: str
    """SHA-256 of the tar, 64 hexadecimal digits."""
    selection: Selection | None = None
    """Which samples of the tar; None for all."""

    @property
    def samples_in_tar(self) -> int:
        """Samples in the tar, whether selected or not."""
        return self.selection.of if self.selection else self.nsamples

    def select(self, kept: np.ndarray) -> Shard:
        """The shard with those of its samples alone for which a bool array [nsamples] is true."""
        if self.selection is None and kept.all():
            return self
        in_tar = np.zeros(self.samples_in_tar, bool)
        in_tar[self.selection.indices[kept] if self.selection else kept] = True
        return replace(self, nsamples=int(kept.sum()), selection=Selection.where(in_tar))


@dataclass(frozen=True)
class Manifest:
    """The shards of a data set, in order, and what is known about their samples."""

    shards: tuple[Shard, ...]
    statistics: dict[str, Any]
    path: str
    """Where it was loaded from: absolute local path, or remote url."""
    captions: str = "whole"
    """How a text of several lines is read: `whole`, as one caption, or `lines`, each as a caption of its own."""

    @property
    def nsamples(self) -> int:
        """Samples in all shards."""
        return sum(shard.nsamples for shard in self.shards)

    @property
    def hash(self) -> str:
        """Identity of the data: sha256 over (nsamples, filesize, sha256) of the shards in order, wherever they are; and
        over which samples are selected and how captions are read, where that is not as usual."""
        content: list[Any] = [
            [shard.nsamples, shard.filesize, shard.sha256, *([shard.selection.to_json()] if shard.selection else [])]
            for shard in self.shards
        ]
        content += [self.captions] if self.captions != "whole" else []
        return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()

    def select(self, kept: np.ndarray) -> tuple[Shard, ...]:
        """The shards with those samples alone for which a bool array [nsamples] is true; without those that have none.

        No tar is rewritten: give the result to `write_manifest`.
        """
        assert kept.dtype == bool and len(kept) == self.nsamples, f"{kept.dtype} [{len(kept)}] of {self.nsamples}"
        bounds = np.cumsum([shard.nsamples for shard in self.shards])[:-1]
        selected = [shard.select(own) for shard, own in zip(self.shards, np.split(kept, bounds), strict=True)]
        return tuple(shard for shard in selected if shard.nsamples)


def load_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Load a manifest from a file, or from the directory that holds manifest.json; local or remote.

    A tar, or a pattern of tars, stands for the manifest beside it, where that lists exactly these.
    Raises ValueError naming `path` where there is none, or where it is not one.
    """
    url = os.fspath(path)
    if address(url).endswith(".tar"):
        return _beside(url)
    if is_remote(url):
        if not address(url).endswith(".json"):
            url = f"{url.rstrip('/')}/{FILE_NAME}"
    else:
        local = Path(url).expanduser().absolute()
        url = str(local / FILE_NAME if local.is_dir() else local)
    data = _read(url)
    try:
        content = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{url} is not a manifest ({error}); {_remedy(url)}") from error
    return _parse(content, url)


def named_manifest(name: str, path: str) -> Manifest:
    """The manifest that a field or an option names. Raises as load_manifest, in words that begin with its name."""
    try:
        return load_manifest(path)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _beside(pattern: str) -> Manifest:
    """The manifest in the folder of the tars that a pattern stands for, or in the one that all of theirs are in."""
    urls = expand([pattern])
    manifest = load_manifest(folder_of(urls))
    listed = {address(shard.url) for shard in manifest.shards}
    if {address(url) for url in urls} != listed:
        raise ValueError(
            f"{pattern} is {len(urls)} tars, and the manifest beside, {manifest.path}, has {len(listed)}: give the "
            f"manifest, or one of these alone, made with: python -m data_pipeline index {pattern!r} --out NAME.json"
        )
    return manifest


def manifest_path(out: Path) -> Path:
    """The file that a manifest is written to: `out`, or manifest.json in that directory.

    Raises:
        ValueError: the file is there and is something else.
    """
    path = out.absolute() / FILE_NAME if out.is_dir() else out.absolute()
    if not may_be_replaced(path):
        raise ValueError(f"--out: {path} is there and is no manifest, so it stays: give another name")
    return path


def write_manifest(
    path: str | os.PathLike[str], shards: Sequence[Shard], statistics: dict[str, Any], captions: str = "whole"
) -> None:
    """Write the manifest of `shards` to the local file `path` (or manifest.json in that directory), atomically.

    captions: as in Manifest.
    Urls are relative to the manifest where shards are beside or below it, so that the directory can be moved.
    """
    url = os.fspath(path)
    if is_remote(url):
        raise ValueError(f"{url}: a manifest is written to a local path; copy it beside the shards afterwards")
    local = manifest_path(Path(url))
    content = {
        "__kind__": SELECTED_KIND if any(shard.selection for shard in shards) else KIND,
        "wids_version": 1,
        "nsamples": sum(shard.nsamples for shard in shards),
        "filesize": sum(shard.filesize for shard in shards),
        "captions": captions,
        "shardlist": [
            {
                "url": _relative(shard.url, local.parent),
                "nsamples": shard.nsamples,
                "filesize": shard.filesize,
                "sha256": shard.sha256,
                **({"selection": shard.selection.to_json()} if shard.selection else {}),
            }
            for shard in shards
        ],
        "statistics": statistics,
    }
    _parse(content, str(local))
    write_atomically(local, json.dumps(content, indent=1) + "\n")


def _read(url: str) -> bytes:
    try:
        if not is_remote(url):
            return Path(url).read_bytes()
        data = bytearray()
        with open_remote(url) as file:
            while block := file.read(BLOCK):
                data += block
                if len(data) > MOST_BYTES:
                    raise ValueError(f"{url} is not a manifest: it has more than {MOST_BYTES:,} bytes")
        return bytes(data)
    except ValueError:
        raise
    except FileNotFoundError as error:
        if not_found(error):
            raise ValueError(f"there is no manifest at {url}; {_made_by(_command(url))}") from error
        raise ValueError(f"the manifest {url} could not be read: {error.__cause__}") from error
    except Exception as error:  # Each remote backend has exceptions of its own.
        raise ValueError(f"the manifest {url} could not be read: {described(url, error)}") from error


def _relative(url: str, directory: Path) -> str:
    """`url` as the manifest in `directory` states it."""
    if is_remote(url):
        return url
    path = Path(url).absolute()
    if not path.is_relative_to(directory):
        return str(path)
    relative = path.relative_to(directory).as_posix()
    return f"./{relative}" if ":" in relative else relative


def _resolve(url: str, manifest: str) -> str:
    """The shard address that a manifest states, as an absolute path or a remote url."""
    if is_remote(url):
        return url
    base = address(manifest).rpartition("/")[0]
    if is_remote(manifest):
        return f"{base}/{url.removeprefix('./')}"
    return os.path.normpath(Path(base) / url)


def _remedy(url: str, content: Any = None) -> str:
    """content: what of the manifest can be read."""
    if not is_remote(url) and not may_be_replaced(Path(url)):
        return _made_by("python -m data_pipeline index SHARDS --out NAME.json")
    rule = " --captions lines" if isinstance(content, dict) and content.get("captions") == "lines" else ""
    return f"make it again with: {_command(url)}{rule}"


def may_be_replaced(path: Path) -> bool:
    """Whether a manifest may be written there: over nothing, another manifest, whatever is called manifest.json, or a
    .json file that is damaged."""
    if path.name == FILE_NAME or not path.is_file() or path.stat().st_size == 0:
        return True
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        return path.suffix == ".json"
    return isinstance(content, dict) and not content.keys().isdisjoint(("__kind__", "shardlist"))


def _made_by(command: str) -> str:
    """What makes a manifest; of what is in no shards yet, too, where the command does not name the shards."""
    if "SHARDS" not in command:
        return f"make it with: {command}"
    return f"`python -m data_pipeline pack` makes one of images or a table, and of tars: {command}"


def _command(url: str) -> str:
    """What makes the manifest at an address, where its shards are beside it; else with SHARDS for what they are."""
    folder, _, name = address(url).rpartition("/")
    if is_remote(url):
        return f"python -m data_pipeline index {folder}/ --out {name} (and copy that beside them)"
    if not name.endswith(".json") and not Path(url).exists():  # a directory is meant
        return f"python -m data_pipeline index SHARDS --out {shlex.quote(f'{url}/{FILE_NAME}')}"
    try:
        expand([folder])
    except ValueError:
        return f"python -m data_pipeline index SHARDS --out {shlex.quote(url)}"
    out = f" --out {shlex.quote(url)}" if name != FILE_NAME else ""
    return f"python -m data_pipeline index {shlex.quote(folder)}{out}"


def _parse(content: Any, url: str) -> Manifest:
    """A manifest from its JSON; every fault is a ValueError that names the file, the entry and the field."""
    remedy = _remedy(url, content)
    if not isinstance(content, dict) or content.get("__kind__") not in (KIND, SELECTED_KIND):
        raise ValueError(f"{url} is not a manifest (its __kind__ is not {KIND}); {remedy}")
    entries = content.get("shardlist")
    statistics = content.get("statistics", {})
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{url}: its shardlist holds no shards; {remedy}")
    if not isinstance(statistics, dict):
        raise ValueError(f"{url}: its statistics are not an object; {remedy}")
    shards = tuple(
        _parse_shard(entry, f"{url}: shardlist[{index}]", url, remedy) for index, entry in enumerate(entries)
    )
    captions = content.get("captions", "whole")
    if captions not in ("whole", "lines"):
        raise ValueError(f"{url}: its captions are {captions!r}, not whole or lines; {remedy}")
    url_of_most, times = Counter(shard.url for shard in shards).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{url}: shard {url_of_most} is in it {times} times; {remedy}")
    return Manifest(shards, statistics, url, captions)


def _parse_shard(entry: Any, where: str, manifest: str, remedy: str) -> Shard:
    valid = {
        "url": lambda value: isinstance(value, str) and value != "",
        "nsamples": lambda value: type(value) is int and value >= 0,
        "filesize": lambda value: type(value) is int and value > 0,
        "sha256": lambda value: isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None,
    }
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is not an object; {remedy}")
    for field, is_valid in valid.items():
        if not is_valid(entry.get(field)):
            raise ValueError(f"{where}.{field} is {entry.get(field)!r}; {remedy}")
    url = _resolve(entry["url"], manifest)
    shard = Shard(url, entry["nsamples"], entry["filesize"], entry["sha256"])
    return replace(shard, selection=_parse_selection(entry, where)) if "selection" in entry else shard


def _parse_selection(entry: dict[str, Any], where: str) -> Selection:
    try:
        selection = Selection.from_json(entry["selection"])
        if len(selection.indices) != entry["nsamples"]:
            raise ValueError(f"it selects {len(selection.indices)} samples, nsamples is {entry['nsamples']}")
    except ValueError as error:
        raise ValueError(f"{where}.selection: {error}; make it again with: python -m train.curate") from error
    return selection
