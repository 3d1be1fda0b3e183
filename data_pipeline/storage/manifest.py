"""Which shards a data set has: samples, bytes and sha256 of each, in one JSON file.

The form is `wids-shard-index-v1`, the shard list of webdataset's indexed readers, with a sha256 per shard, totals, and
the data statistics added. It also says which addresses are remote, for every other part of the pipeline.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

FILE_NAME = "manifest.json"
KIND = "wids-shard-index-v1"
REMOTE = ("http", "https", "s3", "gs")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_BRACES = re.compile(r"\{(?:(-?\d+)\.\.(-?\d+)|([^{}]*,[^{}]*))\}")
_INSTALL = {"s3": "s3fs", "gs": "gcsfs", "http": "'fsspec[http]'", "https": "'fsspec[http]'"}


@dataclass(frozen=True)
class Shard:
    """One tar of the data set."""

    url: str
    """Absolute local path, or remote url."""
    nsamples: int
    """Samples in it."""
    filesize: int
    """Bytes of the tar."""
    sha256: str
    """SHA-256 of the tar, 64 hexadecimal digits."""


@dataclass(frozen=True)
class Manifest:
    """The shards of a data set, in order, and what is known about their samples."""

    shards: tuple[Shard, ...]
    statistics: dict[str, Any]
    path: str
    """Where it was loaded from: absolute local path, or remote url."""

    @property
    def nsamples(self) -> int:
        """Samples in all shards."""
        return sum(shard.nsamples for shard in self.shards)

    @property
    def hash(self) -> str:
        """Identity of the data: sha256 over (nsamples, filesize, sha256) of the shards in order, wherever they lie."""
        content = [[shard.nsamples, shard.filesize, shard.sha256] for shard in self.shards]
        return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


def is_remote(url: str) -> bool:
    """Whether `url` is on the allow-list of remote addresses (http, https, s3, gs); False for a local path.

    Raises ValueError for everything else that readers of urls may act upon: `pipe:` and other schemes, `::` chains.
    """
    if "::" in url:
        raise ValueError(f"{url}: several addresses joined by :: are not read; name each shard on its own")
    match = _SCHEME.match(url)
    if match is None:
        return False
    if match[1].lower() in REMOTE and url[match.end() :].startswith("//"):
        return True
    raise ValueError(
        f"{url}: nothing is read from {match[1]}: addresses; use a local path (./{url} if this is a file name) or one "
        f"of {', '.join(f'{scheme}://' for scheme in REMOTE)}"
    )


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec filesystem of a remote url and the path within it; a new one each time, so that forks may use it."""
    scheme = url.split(":", 1)[0].lower()
    try:
        import fsspec

        options: dict[str, Any] = {}
        if scheme.startswith("http"):
            import aiohttp

            # aiohttp's own limit is five minutes for a whole file, whatever its size: limit the silence instead.
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
            options["client_kwargs"] = {"timeout": timeout, "trust_env": True}
        return fsspec.core.url_to_fs(url, skip_instance_cache=True, **options)
    except ImportError as error:
        raise ValueError(f"{url}: reading {scheme}:// needs another package: pip install {_INSTALL[scheme]}") from error


def open_remote(url: str) -> IO[bytes]:
    """A remote file, to be read from front to back. Raises what its backend raises."""
    system, path = filesystem(url)
    # In one stream, where fsspec reads ranges: not every web server has them, python -m http.server has not.
    return system.open(path, "rb", **({"block_size": 0} if url.lower().startswith("http") else {}))


def load_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Load a manifest from a file, or from the directory that holds manifest.json; local or remote.

    Raises ValueError naming `path` where there is none, or where it is not one.
    """
    url = os.fspath(path)
    if is_remote(url):
        if not url.endswith(".json"):
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


def write_manifest(path: str | os.PathLike[str], shards: Sequence[Shard], statistics: dict[str, Any]) -> None:
    """Write the manifest of `shards` to the local file `path` (or manifest.json in that directory), atomically.

    Urls are relative to the manifest where shards lie beside or below it, so that the directory can be moved.
    """
    url = os.fspath(path)
    if is_remote(url):
        raise ValueError(f"{url}: a manifest is written to a local path; copy it beside the shards afterwards")
    local = Path(url).absolute()
    local = local / FILE_NAME if local.is_dir() else local
    content = {
        "__kind__": KIND,
        "wids_version": 1,
        "nsamples": sum(shard.nsamples for shard in shards),
        "filesize": sum(shard.filesize for shard in shards),
        "shardlist": [
            {
                "url": _relative(shard.url, local.parent),
                "nsamples": shard.nsamples,
                "filesize": shard.filesize,
                "sha256": shard.sha256,
            }
            for shard in shards
        ],
        "statistics": statistics,
    }
    _parse(content, str(local))
    write_atomically(local, (json.dumps(content, indent=1) + "\n").encode())


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that, whatever happens, `path` holds all of the old bytes or all of the new ones."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def expand(patterns: Sequence[str]) -> list[str]:
    """Shard addresses that patterns stand for: absolute local paths or remote urls, in order, each once.

    A pattern may hold braces (`{000..010}`, `{a,b}`) and globs (`*`, `?`, `[...]`), which are sorted; a local directory
    stands for its *.tar files. Raises ValueError for what matches nothing: any one address of a brace list, too.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        literal = not is_remote(pattern) and Path(pattern).expanduser().exists()
        for part in [pattern] if literal else _braces(pattern):
            matches = _matches(part, literal)
            if not matches:
                of = "" if part == pattern else f" (of {pattern})"
                raise ValueError(f"no shard matches {part}{of}; give .tar files, a directory of them, or a pattern")
            found.update(dict.fromkeys(matches))
    return list(found)


def _matches(part: str, literal: bool) -> list[str]:
    """What one pattern without braces stands for."""
    has_glob = not literal and glob.has_magic(part)
    if is_remote(part):
        if not has_glob:
            return [part]
        system, path = filesystem(part)
        try:
            return sorted(system.unstrip_protocol(name) for name in system.glob(path))
        except Exception as error:  # Each remote backend has exceptions of its own.
            raise ValueError(f"{part} could not be listed: {type(error).__name__}: {error}") from error
    path = str(Path(part).expanduser().absolute())
    if has_glob:
        return sorted(glob.glob(path, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
    if Path(path).is_dir():
        return sorted(str(tar) for tar in Path(path).glob("*.tar"))
    return [path] if Path(path).exists() else []


def _braces(pattern: str) -> list[str]:
    """Expand the first pair of braces, then those in what comes of it; zero padding is kept."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    first, last, choices = match.groups()
    if choices is not None:
        parts = choices.split(",")
    else:
        low, high = int(first), int(last)
        padded = any(len(number) > 1 and number.lstrip("-").startswith("0") for number in (first, last))
        width = max(len(first), len(last)) if padded else 0
        step = 1 if high >= low else -1
        parts = [f"{number:0{width}d}" for number in range(low, high + step, step)]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [whole for part in parts for whole in _braces(head + part + tail)]


def _read(url: str) -> bytes:
    try:
        if not is_remote(url):
            return Path(url).read_bytes()
        system, path = filesystem(url)
        return system.cat_file(path)
    except ValueError:
        raise
    except FileNotFoundError as error:
        command = f"python -m data_pipeline index {url.rpartition('/')[0]}"
        raise ValueError(f"there is no manifest at {url}; make it with: {command}") from error
    except Exception as error:  # Each remote backend has exceptions of its own.
        raise ValueError(f"the manifest {url} could not be read: {type(error).__name__}: {error}") from error


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
    base = manifest.rpartition("/")[0]
    if is_remote(manifest):
        return f"{base}/{url.removeprefix('./')}"
    return os.path.normpath(Path(base) / url)


def _remedy(url: str) -> str:
    return f"make it anew with: python -m data_pipeline index {url.rpartition('/')[0]}"


def _parse(content: Any, url: str) -> Manifest:
    """A manifest from its JSON; every fault is a ValueError that names the file, the entry and the field."""
    if not isinstance(content, dict) or content.get("__kind__") != KIND:
        raise ValueError(f"{url} is not a manifest (its __kind__ is not {KIND}); {_remedy(url)}")
    entries = content.get("shardlist")
    statistics = content.get("statistics", {})
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{url}: its shardlist holds no shards; {_remedy(url)}")
    if not isinstance(statistics, dict):
        raise ValueError(f"{url}: its statistics are not an object; {_remedy(url)}")
    shards = tuple(_parse_shard(entry, f"{url}: shardlist[{index}]", url) for index, entry in enumerate(entries))
    url_of_most, times = Counter(shard.url for shard in shards).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{url}: shard {url_of_most} stands in it {times} times; {_remedy(url)}")
    return Manifest(shards, statistics, url)


def _parse_shard(entry: Any, where: str, manifest: str) -> Shard:
    valid = {
        "url": lambda value: isinstance(value, str) and value != "",
        "nsamples": lambda value: type(value) is int and value >= 0,
        "filesize": lambda value: type(value) is int and value > 0,
        "sha256": lambda value: isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None,
    }
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is not an object; {_remedy(manifest)}")
    for field, is_valid in valid.items():
        if not is_valid(entry.get(field)):
            raise ValueError(f"{where}.{field} is {entry.get(field)!r}; {_remedy(manifest)}")
    url = _resolve(entry["url"], manifest)
    return Shard(url, entry["nsamples"], entry["filesize"], entry["sha256"])
