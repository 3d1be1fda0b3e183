"""Addresses of shards: which are remote, the file system that reads them, and what patterns stand for."""

from __future__ import annotations

import glob
import logging
import os
import re
import shlex
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from data_pipeline.storage.redaction import address, check_whole

REMOTE = ("http", "https", "s3", "gs")
UNPACK = {
    ".tar.gz": "gzip -d",
    ".tgz": "gzip -d",
    ".tar.zst": "zstd -d --rm",
    ".tar.xz": "xz -d",
    ".tar.bz2": "bzip2 -d",
    ".tbz2": "bzip2 -d",
    ".tar.lz4": "lz4 -d --rm",
}
"""How names of compressed tars end -> the command that puts a .tar in their place."""
COMPRESSED = tuple(UNPACK)
SILENCE_SECONDS = 60
"""For which a web server may send nothing; Google's storage a quarter of it, as S3 by s3fs's own default: these two
packages try several times themselves."""
ANSWER = 300
"""Characters of what a backend says that are repeated: one that is confused quotes the shard itself."""
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_BRACES = re.compile(r"\{(?:(-?\d+)\.\.(-?\d+)|([^{}]*,[^{}]*))\}")
_DENIED = re.compile(r"credential|forbidden|denied|anonymous|unauthori[sz]ed|\b40[13]$", re.IGNORECASE)
_KEYS = {
    "s3": "give keys by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, by AWS_PROFILE, or in ~/.aws/credentials",
    "gs": "log in by: gcloud auth application-default login; or set GOOGLE_APPLICATION_CREDENTIALS to the path of a "
    "service account's key file",
}
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
        check_whole(url)
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
        if scheme != "s3":
            import aiohttp

            # aiohttp's own limit is five minutes for a whole file, whatever its size, and gcsfs has none: limit the
            # silence instead.
            silence = SILENCE_SECONDS if scheme.startswith("http") else SILENCE_SECONDS / 4
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=silence)
        if scheme.startswith("http"):
            options["client_kwargs"] = {"timeout": timeout, "trust_env": True}
        if scheme == "gs":
            logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints each error's traceback, and raises it
            options["requests_timeout"] = timeout
        return fsspec.core.url_to_fs(url, skip_instance_cache=True, **options)
    except ImportError as error:
        raise ValueError(f"{url}: reading {scheme}:// needs another package: pip install {_INSTALL[scheme]}") from error


def open_remote(url: str) -> IO[bytes]:
    """A remote file, to be read from front to back. Raises what its backend raises."""
    system, path = filesystem(url)
    # In one stream, where fsspec reads ranges: not every web server has them, python -m http.server has not.
    return system.open(path, "rb", **({"block_size": 0} if url.lower().startswith("http") else {}))


def fetch_file(system: Any, remote: str, path: str, most: int | None) -> None:
    """Copy a remote file to a local path. Raises what its backend raises, and ValueError once more than `most` bytes
    have come: a server may send without end."""
    from fsspec.callbacks import Callback

    class Bound(Callback):
        def call(self, *_: Any, **__: Any) -> None:
            if most is not None and self.value > most:
                raise ValueError(f"more than the {most:,} bytes that it should have")

    system.get_file(remote, path, callback=Bound())


def attempt(url: str, action: Callable[[], str], attempts: int = 5, backoff: float = 1.0) -> str:
    """Run `action` on a remote file, which returns what is wrong, until nothing is; returns the last fault, or "".

    attempts, backoff: most tries, and seconds before the second one, doubled before each further one. What is not
    there is not tried again.
    """
    fault = ""
    for number in range(attempts):
        if number:
            time.sleep(backoff * 2 ** (number - 1))
        try:
            fault = action()
        except Exception as error:  # Each backend has exceptions of its own.
            fault = described(url, error)
            if not_found(error):
                return fault
        if not fault:
            break
    return fault


def described(url: str, error: Exception) -> str:
    """What a backend raised for a url, with the remedy where it wants keys."""
    whole = " ".join(f"{type(error).__name__}: {error}".split())  # one line, whatever a server has answered
    text = textwrap.shorten(whole, ANSWER, placeholder=" ...")
    if getattr(error, "filename", None) is None and (isinstance(error, PermissionError) or _DENIED.search(whole)):
        return "; ".join(filter(None, [text, _KEYS.get(url.split(":", 1)[0].lower())]))
    return text


def not_found(error: Exception) -> bool:
    """Whether a remote file is not there; fsspec says so of every answer of a web server but the file, and keeps what
    it was as the cause."""
    return isinstance(error, FileNotFoundError) and getattr(error.__cause__, "status", 404) == 404


def expand(patterns: Sequence[str]) -> list[str]:
    """Shard addresses that patterns stand for: absolute local paths or remote urls, in order, each once.

    A pattern may hold braces (`{000..010}`, `{a,b}`) and globs (`*`, `?`, `[...]`), which are sorted; a directory (or a
    url that ends in /) stands for its *.tar files. Raises ValueError for what matches nothing, any one address of a
    brace list, too, and for a directory that holds other tars as well, compressed or in folders of their own.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        literal = not is_remote(pattern) and Path(pattern).expanduser().exists()
        for part in [pattern] if literal else _braces(pattern):
            matches = _matches(part, literal)
            if not matches:
                of = "" if part == pattern else f" (of {pattern})"
                raise ValueError(f"no shard matches {part}{of}; {_what_else(part)}")
            found.update(dict.fromkeys(matches))
    return list(found)


def folder_of(urls: Sequence[str]) -> str:
    """The folder that local shards are in, or the nearest one that all of theirs are in; of remote ones the first's."""
    if any(is_remote(url) for url in urls):
        return address(urls[0]).rpartition("/")[0]
    return os.path.commonpath([os.path.dirname(url) for url in urls])  # noqa: PTH120 - as it is, links and all


def _matches(part: str, literal: bool) -> list[str]:
    """What one pattern without braces stands for."""
    has_glob = not literal and glob.has_magic(part)
    if is_remote(part):
        part = f"{part}*.tar" if part.endswith("/") else part
        # In a web address, ? begins the query, which a signature may be.
        has_glob = glob.has_magic(part.partition("?")[0] if part.lower().startswith("http") else part)
        if not has_glob:
            return [part]
        system, path = filesystem(part)
        try:
            return sorted(system.unstrip_protocol(name) for name in system.glob(path))
        except Exception as error:  # Each remote backend has exceptions of its own.
            raise ValueError(
                f"{part} could not be listed: {described(part, error)}; or give the names of its shards, such as "
                f"{{000..127}}.tar"
            ) from error
    path = str(Path(part).expanduser().absolute())
    if has_glob:
        return sorted(glob.glob(path, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
    if Path(path).is_dir():
        tars = sorted(str(tar) for tar in Path(path).iterdir() if tar.name.lower().endswith(".tar") and _is_seen(tar))
        if tars and (others := _other_tars(Path(path))):
            raise ValueError(
                f"{path} holds {len(tars):,} tars and {len(others):,} that it does not stand for, such as {others[0]}: "
                f"give a pattern for those that you mean, such as '{path}/*.tar' or '{path}/**/*.tar' (compressed ones "
                f"have to be unpacked to .tar first)"
            )
        return tars
    return [path] if Path(path).exists() else []


def _is_seen(path: Path) -> bool:
    """Whether it is a file of the user's: macOS puts a ._a.tar beside a.tar on some disks."""
    return not path.name.startswith(".")


def _other_tars(folder: Path) -> list[Path]:
    """Compressed tars in a folder, and tars in the folders below it."""
    found = [path for path in folder.glob("*") if path.name.lower().endswith(COMPRESSED)]
    for path in folder.glob("*/**/*"):
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not is_hidden and path.name.lower().endswith((".tar", *COMPRESSED)):
            found.append(path)
    return sorted(found)


def _what_else(part: str) -> str:
    """What to give instead of a path that stands for no shard."""
    if not is_remote(part) and (folder := Path(part).expanduser()).is_dir():
        others = _other_tars(folder)
        if any(other.suffix == ".tar" for other in others):
            return f"its tars are in folders below: give '{part}/**/*.tar' for all of them, or one of those folders"
        if others:
            end = next(end for end in COMPRESSED if others[0].name.lower().endswith(end))
            command = f"{UNPACK[end]} {shlex.quote(str(others[0]))}"
            return f"its tars are compressed: unpack them to .tar first, such as: {command}"
        return "it holds no .tar files; images or tables are packed with: python -m data_pipeline pack"
    return "give .tar files, a directory of them, or a pattern"


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
