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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from tqdm import tqdm

from data_pipeline.commands.flags import new_file, positive
from data_pipeline.commands.parallel import run_parallel
from data_pipeline.cores import cores
from data_pipeline.samples.text import LINES, READ_AS, WHOLE
from data_pipeline.statistics import merge_statistics, shard_statistics
from data_pipeline.storage.files import put_in_place, take_lock
from data_pipeline.storage.kept_index import read_hashed
from data_pipeline.storage.manifest import FILE_NAME, Manifest, Shard, load_manifest, manifest_path, write_manifest
from data_pipeline.storage.redaction import address, redact_urls
from data_pipeline.storage.remote import attempt, described, expand, fetch_file, filesystem, folder_of, is_remote
from data_pipeline.storage.tar_index import EmptyTar

EMPTY = ": an empty tar"
"""How the fault of a shard ends that has nothing in it to lose."""
REMOTE_VERSIONS = ("ETag", "etag", "LastModified", "updated", "mtime")
"""What remote stores call the thing that changes with a file's content."""


HELP = """\
A shard is a tar. Files in it that share a name up to its first dot are one sample: one image (jpg, jpeg, png, webp),
its captions (a txt, or a json with `caption` or a list `captions`) and, for evaluation by class, its class (a cls: a
number or a name). So write img2dataset and webdataset, and CLIP_benchmark, whose retrieval sets want --captions lines.

examples:
  python -m data_pipeline index data/train
  python -m data_pipeline index 'data/{00000..00127}.tar'
  python -m data_pipeline index s3://bucket/train/ --out train.json
  python -m data_pipeline index 'https://host/{000..127}.tar' --out train.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "shards",
        nargs="+",
        metavar="SHARDS",
        help="tars, directories, patterns such as 'data/{000..010}.tar' or 'data/*.tar', urls (http, https, s3, gs)",
    )
    parser.add_argument(
        "--out",
        type=new_file,
        help="the manifest (default: manifest.json beside the shards, or in the folder above all of theirs)",
    )
    add_caption_rule(parser)
    parser.add_argument(
        "--leave-out-unusable",
        action="store_true",
        help="index the other shards where some cannot be used; the manifest says which were left out, and why",
    )
    parser.add_argument("--workers", type=positive, default=cores(), help="processes (default: one per core)")


def add_caption_rule(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--captions",
        choices=(WHOLE, LINES),
        default=WHOLE,
        help="whether a text of several lines is one caption (whole, the default) or every line is one (lines)",
    )


def run(args: argparse.Namespace) -> int:
    """The command. Raises ValueError for patterns that match nothing and, naming each, for damaged shards."""
    urls = expand(args.shards)
    path = _manifest_path(urls, args.out, of_one_pattern=len(args.shards) == 1)
    manifest = index(urls, path, args.workers, caption_rule=args.captions, leave_out=args.leave_out_unusable)
    print(summary(manifest))
    return 0


def summary(manifest: Manifest) -> str:
    """What an index has found, and what of it would not be used, or otherwise than may be meant."""
    known = manifest.statistics
    size = sum(shard.filesize for shard in manifest.shards) / 1e6
    lines = [f"{manifest.nsamples:,} samples in {len(manifest.shards):,} shards ({size:,.1f} MB): {manifest.path}"]
    lines += [f"left out: {shard['cause']}" for shard in known["left_out"]]
    bad = known["bad"]
    if bad["count"]:
        lines.append(f"{bad['count']:,} of the samples are bad, and would be replaced in training:")
        lines += [f"  {number:,}: {cause}" for cause, number in bad["causes"].items()]
        lines.append(f"  each is in {bad_path(Path(manifest.path))}")
    if known["hopeless"]:
        lines.append(
            f"{known['hopeless']:,} shards have no sample to train with: those of the next shards would replace them"
        )
    if known["uncaptioned"]:
        lines.append(
            f"{known['uncaptioned']:,} samples have no caption: training replaces them like bad ones, retrieval leaves "
            f"them out, evaluation by class uses them"
        )
    if known["several_lines"]:
        lines.append(several_lines_note(known["several_lines"], manifest.captions))
    if known["unread"]:
        names = ", ".join(f"{number:,} .{extension}" for extension, number in known["unread"].items())
        lines.append(
            f"members that are not read: {names}; a sample has one image, its captions are in a txt or json, and its "
            f"key ends at the first dot of the file name, so rename files that have another dot in their name"
        )
    return "\n".join(lines)


def several_lines_note(count: int, rule: str) -> str:
    """That so many samples have a text whose captions depend on `rule`."""
    read, other = READ_AS[rule], LINES if rule == WHOLE else WHOLE
    return f"{count:,} samples have a text of several lines, read as {read} (--captions {other} reads it otherwise)"


def bad_path(manifest: Path) -> Path:
    """The file that lists every bad sample of a manifest, one JSON line each: shard, key, cause."""
    return manifest.with_name(f"{manifest.stem}.bad.jsonl")


def _manifest_path(urls: Sequence[str], out: Path | None, of_one_pattern: bool) -> Path:
    if out is not None:
        return manifest_path(out.expanduser())
    if any(is_remote(url) for url in urls):
        raise ValueError("--out: say where the manifest goes; it cannot be written beside remote shards")
    folders = sorted({str(Path(url).parent) for url in urls})
    if len(folders) > 1 and not of_one_pattern:
        raise ValueError(f"--out: say where the manifest goes; the shards are in {', '.join(folders)}")
    return Path(folder_of(urls)) / FILE_NAME


@dataclass
class Known:
    """A shard that is indexed: its line begins at byte `offset` of the partial file, and is valid while `stamp` is."""

    shard: Shard
    stamp: list[Any]
    offset: int


def index(
    urls: Sequence[str], path: Path, workers: int, *, caption_rule: str = WHOLE, leave_out: bool = False
) -> Manifest:
    """Index the shards at `urls`, in that order, into the manifest `path`.

    caption_rule: how a text of several lines is read, WHOLE or LINES. leave_out: leave out shards that cannot be used;
    empty ones are in any case.
    Raises ValueError that names every shard that is damaged; KeyboardInterrupt says what is kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    faults: dict[str, str] = {}
    with partial.open("a+b") as file:
        if not take_lock(file, 0):
            raise ValueError(f"--out: another index is writing {path}; wait for it")
        known = _load_partial(file, caption_rule)
        tasks = [(url, known[url].stamp if url in known else None) for url in urls]
        try:
            with (
                tempfile.TemporaryDirectory() as folder,
                contextlib.closing(
                    run_parallel(functools.partial(index_shard, folder, caption_rule), tasks, workers, in_order=False)
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
            kept = _load_partial(file, caption_rule).keys() & set(urls)
            raise KeyboardInterrupt(
                f"{len(kept):,} of {len(urls):,} shards are indexed, in {partial}; "
                "the same command continues from there"
            ) from None
        refused = [url for url in urls if url in faults and not (leave_out or faults[url].endswith(EMPTY))]
        used = [url for url in urls if url not in faults]
        if refused or not used:
            listed = "\n".join(f"  {faults[url]}" for url in refused or urls)
            raise ValueError(
                f"{len(refused or urls):,} of {len(urls):,} shards cannot be used, so no manifest was written; mend "
                f"them{', or leave them out with --leave-out-unusable' if used else ''}; what is indexed is kept, and "
                f"the same command continues from there:\n{listed}"
            )
        # Parts are read one at a time: the hashes in them can be larger than memory.
        with _bad_list(bad_path(path)) as keep:
            statistics = merge_statistics(keep(_read(file, known[url].offset)["statistics"]) for url in used)
        statistics["left_out"] = [
            {"shard": redact_urls(url), "cause": redact_urls(faults[url])} for url in urls if url in faults
        ]
        write_manifest(path, [known[url].shard for url in used], statistics, caption_rule)
        partial.unlink()
    return load_manifest(path)


@contextlib.contextmanager
def _bad_list(path: Path) -> Iterator[Callable[[dict[str, Any]], dict[str, Any]]]:
    """A function that writes the bad samples of a shard's statistics to the file and returns these."""
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as file:

        def keep(statistics: dict[str, Any]) -> dict[str, Any]:
            file.writelines(f"{json.dumps(record)}\n" for record in statistics["bad"])
            return statistics

        yield keep
    if part.stat().st_size:
        put_in_place(part, path)
    else:
        part.unlink()
        path.unlink(missing_ok=True)


def _load_partial(file: IO[bytes], caption_rule: str) -> dict[str, Known]:
    """What an interrupted index has left, by url; a last line that was cut short is removed."""
    known, offset = {}, 0
    file.seek(0)
    for line in file:
        try:
            record = json.loads(line)
            if record.get("captions") == caption_rule:
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


def index_shard(folder: str, caption_rule: str, task: tuple[str, list[Any] | None]) -> dict[str, Any] | str | None:
    """Of (url, stamp of an earlier index): its line of the partial file; None if that is still right; or the fault.

    folder: where a remote shard is put for the moment; the caller's, who can remove it when this process is ended.
    """
    url, earlier = task
    try:
        if not is_remote(url):
            stat = Path(url).stat()
            stamp: list[Any] = [stat.st_size, stat.st_mtime_ns]
            return None if stamp == earlier else _measured(url, url, stamp, caption_rule)
        system, remote = filesystem(url)
        info: dict[str, Any] = {}
        if fault := attempt(url, lambda: info.update(system.info(remote)) or ""):
            return f"{url}: cannot be read: {fault}"
        stamp = [info.get("size"), *(str(info[name]) for name in REMOTE_VERSIONS if name in info)]
        if stamp == earlier:
            return None
        with tempfile.TemporaryDirectory(dir=folder) as own:
            local = Path(own, PurePosixPath(address(url)).name)

            def fetch() -> str:
                fetch_file(system, remote, str(local), stamp[0])
                size = local.stat().st_size
                return "" if stamp[0] in (None, size) else f"{size} of its {stamp[0]} bytes came"

            if fault := attempt(url, fetch):
                return f"{url}: cannot be fetched: {fault}"
            return _measured(url, str(local), stamp, caption_rule)
    except EmptyTar:
        return f"{url}{EMPTY}"
    except ValueError as error:
        return str(error) if url in str(error) else f"{url}: {error}"
    except Exception as error:  # Each remote backend has exceptions of its own.
        return f"{url}: cannot be read ({described(url, error)})"


def _measured(url: str, path: str, stamp: list[Any], caption_rule: str) -> dict[str, Any]:
    entries, digest = read_hashed(path)
    return {
        "shard": {"url": url, "nsamples": len(entries), "filesize": Path(path).stat().st_size, "sha256": digest},
        "stamp": stamp,
        "captions": caption_rule,
        "statistics": shard_statistics(path, caption_rule=caption_rule),
    }
