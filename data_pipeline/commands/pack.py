"""`pack`: an image-text table -> tar shards and manifest; the same bytes for any number of workers and restarts.

Rows are read in order by this process, images are checked (and re-encoded, where asked) by workers, and samples are
written in order. Whenever a shard is complete, `pack.json` says which row comes next: that is all a restart needs.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import hashlib
import itertools
import json
import os
import re
import sys
from collections.abc import Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_pipeline.commands import index as indexing
from data_pipeline.commands.encoding import EXTENSIONS, Encoding, encode_rows
from data_pipeline.commands.flags import new_folder, positive
from data_pipeline.commands.parallel import interrupts_held, run_parallel
from data_pipeline.commands.rows import CAPTION_COLUMNS, IMAGE_COLUMNS, Columns, Row, choose_columns, read_rows
from data_pipeline.commands.tables import KINDS, Table, open_table
from data_pipeline.cores import cores
from data_pipeline.samples.image import MAX_PIXELS
from data_pipeline.samples.text import encodable, name_bytes
from data_pipeline.storage.files import alone_in, write_atomically
from data_pipeline.storage.manifest import FILE_NAME, load_manifest
from data_pipeline.storage.shards import ShardWriter

PREFIX = "shard"
STATE = "pack.json"
SKIPPED = "skipped.jsonl"
CHUNK = 16
"""Rows that a worker gets at a time."""


@dataclass(frozen=True)
class State:
    """How far a pack is. Saved whenever a shard is complete."""

    options: dict[str, Any]
    """All that the shards are a function of, by flag."""
    rows: int = 0
    """Rows of the table that are packed or skipped for good."""
    shards: int = 0
    samples: int = 0
    several_lines: int = 0
    """Samples whose captions depend on how a text of several lines is read."""
    skipped: int = 0
    skipped_bytes: int = 0
    """Length of skipped.jsonl."""
    complete: bool = False


HELP = f"""\
Columns are found by name, in any case:
  image    {" ".join(IMAGE_COLUMNS)}
  captions {" ".join(CAPTION_COLUMNS)}
Rows of one image become one sample with all their captions.

examples:
  python -m data_pipeline pack captions.csv data/train --image-column file --caption-column title,alt
  python -m data_pipeline pack pictures data/train --captions lines       (a.jpg beside a.txt, a caption per line)
  python -m data_pipeline pack captions_train2017.json data/train --image-root train2017     (COCO)
  python -m data_pipeline pack hub_dataset data/train --split train       (Parquet, or save_to_disk)
  python -m data_pipeline pack imagenet/val data/val --class-column folder     (a folder per class)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("input", metavar="INPUT", help=KINDS)
    add("out", metavar="OUT", type=new_folder, help="directory for the shards, manifest.json and skipped.jsonl")
    add("--image-column", default="", metavar="NAME", help="paths relative to the table, or the images' bytes")
    add(
        "--caption-column",
        action="append",
        default=[],
        metavar="NAME[,NAME]",
        help="texts or lists of texts; repeatable",
    )
    add("--key-column", default="", metavar="NAME", help="names of the samples (default: the row's number)")
    add(
        "--class-column",
        default="",
        metavar="NAME",
        help="numbers or names, written as cls; `folder` is the one that an image is in. Captions are not needed then",
    )
    add("--split", default="", metavar="NAME", help="split of a dataset: a folder, files, or a column called split")
    add("--image-root", type=Path, metavar="DIR", help="folder that images' paths start from (default: the table's)")
    add(
        "--delimiter",
        default="",
        metavar="CHARACTER",
        help="of a text table (default: , tab ; or |, as found)",
    )
    indexing.add_caption_rule(parser)
    add(
        "--resize",
        type=positive,
        default=0,
        metavar="PIXELS",
        help="reduce larger images to this shorter side, over white",
    )
    add(
        "--format",
        choices=["keep", *(name.lower() for name in EXTENSIONS)],
        default="keep",
        help="re-encode every other format, also GIF, BMP, TIFF and AVIF, over white",
    )
    add("--quality", type=_percent, default=90, help="of re-encoded JPEG and WebP, 1 to 100 (default: 90)")
    add("--max-pixels", type=positive, default=MAX_PIXELS, help=f"skip larger images (default: {MAX_PIXELS:,})")
    add("--shard-size", type=positive, default=10_000, metavar="SAMPLES", help="most samples of a shard (10,000)")
    add("--max-bytes", type=positive, default=10**9, metavar="BYTES", help="most bytes of a shard (1e9)")
    add("--workers", type=positive, default=cores(), help="processes (default: one per core)")


def _percent(text: str) -> int:
    if positive(text) > 100:
        raise argparse.ArgumentTypeError(f"{text!r} is over 100")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """The command. ValueError: bad input; OSError: the disk is full; KeyboardInterrupt: says what is kept."""
    delimiter = args.delimiter.replace("\\t", "\t")
    if len(delimiter) > 1:
        raise ValueError(f"--delimiter {args.delimiter!r}: give one character, or \\t for a tab")
    table = open_table(args.input, args.split, delimiter=delimiter, caption_rule=args.captions)
    captions = [name.strip() for names in args.caption_column for name in names.split(",") if name.strip()]
    root = args.image_root.expanduser().absolute() if args.image_root else None
    columns = choose_columns(
        table,
        args.image_column,
        captions,
        args.key_column,
        args.class_column,
        root=root,
        caption_rule=args.captions,
    )
    encoding = Encoding(args.resize, args.format.upper(), args.quality, args.max_pixels)
    out = args.out.expanduser().absolute()
    if table.recursive and out.resolve().is_relative_to(table.folder.resolve()):
        raise ValueError(f"OUT: {out} is inside INPUT {table.folder}; choose a directory outside of it")
    out.mkdir(parents=True, exist_ok=True)
    # Two packs into one directory would overwrite each other's shards.
    with alone_in(out, f"OUT: another pack is writing to {out}; wait for it or choose another directory"):
        state = _load_state(out, _options(table, columns, encoding, args))
        try:
            _save(out, state)
            if state.shards and not (out / FILE_NAME).exists():
                print(f"continuing: {_kept(out, state)}", file=sys.stderr)
            if not state.complete:
                with contextlib.closing(_shards(table, columns, encoding, out, state, args)) as states:
                    for reached in states:
                        with interrupts_held():
                            _save(out, reached)
                            state = reached
            return _finish(out, state, args, columns)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{_kept(out, state)}; the same command continues from there") from None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OSError(
                f"the disk is full: {out} could not be written; {_kept(out, state)}; "
                "make room and give the same command again: it continues from there"
            ) from None
        finally:
            # A full disk can keep the writer from removing what it had begun; kill -9 always does.
            for part in out.glob("*.part"):
                part.unlink(missing_ok=True)


def _kept(out: Path, state: State) -> str:
    return f"{state.shards:,} complete shards with {state.samples:,} samples are kept in {out}"


def _options(table: Table, columns: Columns, encoding: Encoding, args: argparse.Namespace) -> dict[str, Any]:
    """All that the shards are a function of, by flag; the input by a digest of its files' names, sizes and times."""
    files = hashlib.sha256()
    for file in table.files:
        try:
            stat = file.stat()
        except OSError:  # a link that leads nowhere
            stat = file.lstat()
        files.update(name_bytes(f"{file.relative_to(table.folder)} {stat.st_size} {stat.st_mtime_ns}\n"))
    return {
        "INPUT": f"{len(table.files)} files, {files.hexdigest()[:16]}",
        "--split": args.split,
        "--image-column": columns.image,
        "--caption-column": ",".join(columns.captions),
        "--key-column": columns.key or "",
        "--class-column": columns.cls or "",
        "--image-root": str(columns.root) if args.image_root else "",
        "--delimiter": args.delimiter,
        "--captions": args.captions,
        "--resize": encoding.resize,
        "--format": args.format,
        "--quality": encoding.quality,
        "--max-pixels": encoding.max_pixels,
        "--shard-size": args.shard_size,
        "--max-bytes": args.max_bytes,
    }


def _load_state(out: Path, options: dict[str, Any]) -> State:
    """The state to continue from. ValueError when OUT holds shards of anything else."""
    path = out / STATE
    try:
        state = State(**json.loads(path.read_text())) if path.exists() else State(options)
        if state.shards and state.options.keys() != options.keys():
            raise ValueError
    except (ValueError, TypeError):
        raise ValueError(f"OUT: {path} is no state of this version's pack; delete {out} to pack again") from None
    tars = [tar.name for tar in out.glob("*.tar")]
    if (not path.exists() and tars) or not all(name.startswith(f"{PREFIX}-") for name in tars):
        raise ValueError(f"OUT: {out} holds shards that this command did not write; choose another directory")
    differing = [flag for flag in options if state.options.get(flag) != options[flag]]
    if differing and state.shards:
        diff = "; ".join(f"{flag}: {state.options.get(flag)!r} there, {options[flag]!r} here" for flag in differing)
        raise ValueError(f"OUT: {out} holds shards packed otherwise ({diff}); choose another directory or delete it")
    if differing:
        return State(options)
    names = [f"{PREFIX}-{number:06d}.tar" for number in range(state.shards)]
    changed = [name for name in names if not (out / name).exists()]
    if state.skipped and (not (out / SKIPPED).exists() or (out / SKIPPED).stat().st_size < state.skipped_bytes):
        changed.append(SKIPPED)
    if changed:
        raise ValueError(f"OUT: {out / changed[0]} is not as it was left; delete {out} to pack again")
    return state


def _save(out: Path, state: State) -> None:
    write_atomically(out / STATE, json.dumps(asdict(state), indent=1) + "\n")


def _shards(
    table: Table, columns: Columns, encoding: Encoding, out: Path, state: State, args: argparse.Namespace
) -> Generator[State]:
    """Pack what `state` says is left; after every complete shard yield the state to continue from."""
    rows = read_rows(table, columns, state.rows)
    chunks = iter(lambda: list(itertools.islice(rows, CHUNK)), [])
    results = run_parallel(functools.partial(encode_rows, encoding=encoding), chunks, args.workers)
    writer = ShardWriter(out, PREFIX, max_samples=args.shard_size, max_bytes=args.max_bytes, first=state.shards)
    rows_done, samples, several_lines, skipped = state.rows, state.samples, state.several_lines, state.skipped
    with (
        contextlib.closing(results),
        (out / SKIPPED).open("ab") as causes,
        tqdm(total=len(table), initial=state.rows, desc="pack", unit=" rows") as bar,
        writer,
    ):
        causes.truncate(state.skipped_bytes)
        causes.seek(0, os.SEEK_END)

        def reached(rows: int, complete: bool = False) -> State:
            causes.flush()
            shards = state.shards + len(writer.paths)
            return State(state.options, rows, shards, samples, several_lines, skipped, causes.tell(), complete)

        for chunk, encoded in results:
            for row, members in zip(chunk, encoded, strict=True):
                if isinstance(members, str):
                    causes.write(_skipped_line(row, members))
                    skipped += 1
                else:
                    begun = len(writer.paths)
                    writer.write(row.key, members)
                    if len(writer.paths) > begun:
                        yield reached(row.start)
                    samples += 1
                    several_lines += row.several_lines
                rows_done = row.stop
                bar.update(row.stop - row.start)
            bar.set_postfix(samples=samples, skipped=skipped, refresh=False)
        writer.finish()
        yield reached(rows_done, complete=samples > 0)


def _skipped_line(row: Row, cause: str) -> bytes:
    image = str(row.image) if isinstance(row.image, Path) else ""
    record = {"row": row.start, "key": row.key, "image": image, "cause": encodable(cause)}
    # A file name that is not UTF-8 is escaped as JSON does it.
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def _lists(path: Path, shards: list[str], samples: int) -> bool:
    """Whether the manifest is of these shards; `index` may have written it when the pack was not done, or another tool
    without statistics."""
    try:
        manifest = load_manifest(path)
    except ValueError:
        return False
    urls = [os.path.normpath(shard) for shard in shards]
    is_whole = {"uncaptioned", "duplicates"} <= manifest.statistics.keys()
    return is_whole and [shard.url for shard in manifest.shards] == urls and manifest.nsamples == samples


def _finish(out: Path, state: State, args: argparse.Namespace, columns: Columns) -> int:
    """Write the manifest and say what came of it."""
    listed, cause = "", ""
    if state.skipped:
        with (out / SKIPPED).open(encoding="utf-8") as causes:
            first = json.loads(causes.readline())
        cause = first["cause"]
        listed = f"{out / SKIPPED} (first: row {first['row']}, {cause})"
    if not (state.complete or state.skipped):
        raise ValueError(f"INPUT: {args.input} has no rows")
    if not state.complete:
        advice = _advice(cause, columns)
        raise ValueError(
            f"no sample of {args.input} could be packed; all {state.skipped:,} are listed in {listed}{advice}"
        )
    manifest = out / FILE_NAME
    shards = [str(out / f"{PREFIX}-{number:06d}.tar") for number in range(state.shards)]
    if _lists(manifest, shards, state.samples):
        print(f"{out} is packed already")
    else:
        indexing.index(shards, manifest, args.workers)
    known = load_manifest(manifest).statistics
    print(f"{state.samples:,} samples in {state.shards:,} shards: {manifest}")
    if known["uncaptioned"]:
        print(f"{known['uncaptioned']:,} have no caption: only evaluation by class can use them")
    if known["duplicates"]["image"]:
        print(f"{known['duplicates']['image']:,} have the same image as another one, each with captions of its own")
    if state.several_lines:
        print(indexing.several_lines_note(state.several_lines, args.captions))
    if state.skipped:
        advice = _advice(cause, columns) if CONVERTIBLE.search(cause) else ""
        print(f"{state.skipped:,} skipped, each with its cause in {listed}{advice}")
    return 0


CONVERTIBLE = re.compile("image but an? (GIF|BMP|TIFF|AVIF)")
"""A cause for which --format helps."""


def _advice(cause: str, columns: Columns) -> str:
    """What may help where rows are skipped for that cause; for the end of a message."""
    if cause.startswith("the image cannot be read:"):
        return f"; paths start from {columns.root}: --image-root names another folder, --image-column another column"
    if cause.startswith("no caption"):
        return (
            "; captions are in a .txt or .json beside each image, or in the --caption-column of a table: "
            "python -m data_pipeline pack TABLE OUT --image-root IMAGES; a folder per class needs --class-column folder"
        )
    return "; --format png stores GIF, BMP, TIFF and AVIF as PNG" if CONVERTIBLE.search(cause) else ""
