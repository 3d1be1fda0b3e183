"""`index`: shards -> manifest.json, with the sha256, the number of samples and the statistics of each, in parallel.

What is known of a shard is kept in `<manifest>.partial`, one JSON line each, until the manifest is written: an index
that was interrupted resumes with the shards that are missing there or have changed since.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from data_pipeline.commands.parallel import cores, positive, run_parallel
from data_pipeline.statistics import merge_statistics, shard_statistics
from data_pipeline.storage.files import measure, take_lock
from data_pipeline.storage.manifest import FILE_NAME, Manifest, Shard, load_manifest, write_manifest
from data_pipeline.storage.remote import expand, filesystem, is_remote
from data_pipeline.storage.shards import read_index

REMOTE_VERSIONS = ("ETag", "etag", "LastModified", "updated", "mtime")
"""What remote stores call the thing that changes with a file's content."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "shards",
        nargs="+",
        metavar="SHARDS",
        help="tars, directories, patterns such as 'data/{000..010}.tar' or 'data/*.tar'",
    )
    parser.add_argument("--out", type=Path, help="the manifest (default: manifest.json beside the shards)")
    parser.add_argument("--workers", type=positive, default=cores(), help="processes (default: one per core)")


def run(args: argparse.Namespace) -> int:
    """The command. Raises ValueError for patterns that match nothing and, naming each, for damaged shards."""
    urls = expand(args.shards)
    manifest = index(urls, _manifest_path(urls, args.out), args.workers)
    print(summary(manifest))
    return 0


def summary(manifest: Manifest) -> str:
    size = sum(shard.filesize for shard in manifest.shards) / 1e6
    lines = [f"{manifest.nsamples:,} samples in {len(manifest.shards):,} shards ({size:,.1f} MB): {manifest.path}"]
    bad = manifest.statistics["bad"]
    if bad["count"]:
        first = bad["examples"][0]
        lines.append(
            f"{bad['count']:,} of the samples are bad, and would be replaced in training; the first is "
            f"{first['shard']}/{first['key']}: {first['cause']}"
        )
    return "\n".join(lines)


def _manifest_path(urls: Sequence[str], out: Path | None) -> Path:
    if out is not None:
        out = out.expanduser().absolute()
        return out / FILE_NAME if out.is_dir() else out
    if any(is_remote(url) for url in urls):
        raise ValueError("--out: say where the manifest goes; it cannot be written beside remote shards")
    folders = sorted({str(Path(url).parent) for url in urls})
    if len(folders) > 1:
        raise ValueError(f"--out: say where the manifest goes; the shards lie in {', '.join(folders)}")
    return Path(folders[0]) / FILE_NAME


@dataclass
class Known:
    """A shard that is indexed: its line begins at byte `offset` of the partial file, and is valid while `stamp` is."""

    shard: Shard
    stamp: list[Any]
    offset: int


def index(urls: Sequence[str], path: Path, workers: int) -> Manifest:
    """Index the shards at `urls`, in that order, into the manifest `path`.

    Raises ValueError that names every shard that is damaged; KeyboardInterrupt says what is kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    faults: dict[str, str] = {}
    with partial.open("a+b") as file:
        if not take_lock(file, 0):
            raise ValueError(f"--out: another index is writing {path}; wait for it")
        known = _load_partial(file)
        tasks = [(url, known[url].stamp if url in known else None) for url in urls]
        try:
            with (
                tempfile.TemporaryDirectory() as folder,
                contextlib.closing(
                    run_parallel(functools.partial(index_shard, folder), tasks, workers, in_order=False)
                ) as results,
                tqdm(total=len(urls), desc="index", unit=" shards") as bar,
            ):
                for (url, _), result in results:
                    if isinstance(result, str):
                        faults[url] = result
                    elif result is not None:
                        known[url] = _append(file, result)
                    bar.update()
        except KeyboardInterrupt:
            # Counted in the file: the interrupt may have come between the writing of a line and what follows it.
            kept = _load_partial(file).keys() & set(urls)
            raise KeyboardInterrupt(
                f"{len(kept):,} of {len(urls):,} shards are indexed, in {partial}; "
                "the same command continues from there"
            ) from None
        if faults:
            listed = "\n".join(f"  {faults[url]}" for url in urls if url in faults)
            raise ValueError(
                f"{len(faults):,} of {len(urls):,} shards cannot be used, so no manifest was written; restore them "
                f"or leave them out:\n{listed}"
            )
        # Parts are read one at a time: the hashes in them can be larger than memory.
        statistics = merge_statistics(_read(file, known[url].offset)["statistics"] for url in urls)
        write_manifest(path, [known[url].shard for url in urls], statistics)
        partial.unlink()
    return load_manifest(path)


def _load_partial(file: IO[bytes]) -> dict[str, Known]:
    """What an interrupted index has left, by url; a last line that was cut short is removed."""
    known, offset = {}, 0
    file.seek(0)
    for line in file:
        try:
            record = json.loads(line)
            known[record["shard"]["url"]] = Known(Shard(**record["shard"]), record["stamp"], offset)
        except (ValueError, KeyError, TypeError):
            file.truncate(offset)
            break
        offset += len(line)
    return known


def _append(file: IO[bytes], record: dict[str, Any]) -> Known:
    offset = file.seek(0, os.SEEK_END)
    file.write(json.dumps(record).encode() + b"\n")
    file.flush()
    return Known(Shard(**record["shard"]), record["stamp"], offset)


def _read(file: IO[bytes], offset: int) -> dict[str, Any]:
    file.seek(offset)
    return json.loads(file.readline())


def index_shard(folder: str, task: tuple[str, list[Any] | None]) -> dict[str, Any] | str | None:
    """Of (url, stamp of an earlier index): {shard, stamp, statistics}; None if that stamp is still right; or the fault.

    folder: where a remote shard is put for the moment; the caller's, who can remove it when this process is ended.
    """
    url, earlier = task
    try:
        if not is_remote(url):
            stat = Path(url).stat()
            stamp: list[Any] = [stat.st_size, stat.st_mtime_ns]
            return None if stamp == earlier else _measured(url, url, stamp)
        system, remote = filesystem(url)
        info = system.info(remote)
        stamp = [info.get("size"), *(str(info[name]) for name in REMOTE_VERSIONS if name in info)]
        if stamp == earlier:
            return None
        with tempfile.TemporaryDirectory(dir=folder) as own:
            local = str(Path(own, url.rpartition("/")[2]))
            system.get_file(remote, local)
            return _measured(url, local, stamp)
    except ValueError as error:
        return str(error) if url in str(error) else f"{url}: {error}"
    except Exception as error:  # Each remote backend has exceptions of its own.
        return f"{url}: cannot be read ({type(error).__name__}: {error})"


def _measured(url: str, path: str, stamp: list[Any]) -> dict[str, Any]:
    samples = len(read_index(path))
    with open(path, "rb") as file:
        size, digest = measure(file)
    if stamp[0] not in (None, size):
        raise ValueError(f"{path}: {size} of its {stamp[0]} bytes came")
    return {
        "shard": {"url": url, "nsamples": samples, "filesize": size, "sha256": digest},
        "stamp": stamp,
        "statistics": shard_statistics(path),
    }
