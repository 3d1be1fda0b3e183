"""A file at a url: fetched with a progress bar, resumed where it was cut off, and checked by its hash."""

from __future__ import annotations

import sys
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from data_pipeline.storage.files import BLOCK, put_in_place, sha256_of, take_lock

TIMEOUT_SECONDS = 20


def download(url: str, path: Path, sha256: str = "") -> None:
    """Have the file at `path`, which is there complete or not at all; what was fetched of it before is kept.

    Processes of a host fetch one after the other, so that all but the first find it.

    Args:
        sha256: its first hexadecimal digits.

    Raises:
        OSError: it cannot be fetched; the next call resumes.
        ValueError: it does not have its hash, and is removed.
    """
    from tqdm import tqdm

    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with part.open("ab") as file:
        take_lock(file)
        if path.is_file():
            part.unlink(missing_ok=True)
            return
        try:
            answer = _open(url, file.tell())
        except HTTPError as error:
            if error.code != 416 or not file.tell():  # all of it is there, and was not put in place
                raise
            answer = None
        if answer is not None:
            with answer:
                if answer.status != 206:  # from the start, whatever was asked
                    file.truncate(0)
                total = file.tell() + int(answer.headers.get("Content-Length", 0)) or None
                quiet = not sys.stderr.isatty()
                bar = tqdm(total=total, initial=file.tell(), unit="B", unit_scale=True, desc=path.name, disable=quiet)
                with bar:
                    while block := answer.read(BLOCK):
                        file.write(block)
                        bar.update(len(block))
                if total and file.tell() < total:
                    raise OSError(f"{url}: the connection was cut after {file.tell():,} of {total:,} bytes")
        file.flush()
        if not sha256_of(part).startswith(sha256):
            part.unlink()
            raise ValueError(f"{url}: what came does not have the sha256 {sha256} and was removed: try again")
        put_in_place(part, path)


def _open(url: str, start: int):
    headers = {"User-Agent": "duet"} | ({"Range": f"bytes={start}-"} if start else {})
    return urlopen(Request(url, headers=headers), timeout=TIMEOUT_SECONDS)
