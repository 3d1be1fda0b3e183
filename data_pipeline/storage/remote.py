"""Addresses of shards: which are remote, the file system that reads them, and what patterns stand for."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

REMOTE = ("http", "https", "s3", "gs")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_BRACES = re.compile(r"\{(?:(-?\d+)\.\.(-?\d+)|([^{}]*,[^{}]*))\}")
_INSTALL = {"s3": "s3fs", "gs": "gcsfs", "http": "'fsspec[http]'", "https": "'fsspec[http]'"}


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
