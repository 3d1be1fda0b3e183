"""`verify`: read every shard of a manifest again and report each one whose bytes are not those that were indexed."""

from __future__ import annotations

import argparse
import contextlib
import sys

from tqdm import tqdm

from data_pipeline.commands.flags import positive
from data_pipeline.commands.parallel import run_parallel
from data_pipeline.cores import cores
from data_pipeline.storage.files import measure
from data_pipeline.storage.manifest import Shard, load_manifest
from data_pipeline.storage.redaction import redact_urls
from data_pipeline.storage.remote import described, is_remote, open_remote

HELP = """\
examples:
  python -m data_pipeline verify data/train
  python -m data_pipeline verify https://host/data/manifest.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("manifest", metavar="MANIFEST", help="manifest.json, or the directory that holds it")
    parser.add_argument("--workers", type=positive, default=cores(), help="processes (default: one per core)")


def run(args: argparse.Namespace) -> int:
    """The command: 0 when all shards are as indexed, else 1. Raises ValueError where there is no manifest."""
    manifest = load_manifest(args.manifest)
    differing, checked = [], 0
    try:
        with (
            contextlib.closing(run_parallel(fault, manifest.shards, args.workers)) as results,
            tqdm(
                total=sum(shard.filesize for shard in manifest.shards), desc="verify", unit="B", unit_scale=True
            ) as bar,
        ):
            for shard, cause in results:
                checked += 1
                bar.update(shard.filesize)
                if cause:
                    differing.append(redact_urls(f"{shard.url}: {cause}"))
    except KeyboardInterrupt:
        report = "; ".join(["differing so far:", *differing]) if differing else "none of them differs"
        raise KeyboardInterrupt(f"{checked:,} of {len(manifest.shards):,} shards are verified; {report}") from None
    for line in differing:
        print(line)
    if differing:
        print(f"{len(differing):,} of {len(manifest.shards):,} shards differ from {manifest.path}", file=sys.stderr)
        return 1
    print(f"all {len(manifest.shards):,} shards ({manifest.nsamples:,} samples) are as {manifest.path} says")
    return 0


def fault(shard: Shard) -> str:
    """How the bytes of a shard, local or remote, differ from the manifest's; empty where they do not."""
    try:
        with open_remote(shard.url) if is_remote(shard.url) else open(shard.url, "rb") as file:
            size, digest = measure(file)
    except FileNotFoundError:
        return "it is missing"
    except Exception as error:  # Each remote backend has exceptions of its own.
        return f"it cannot be read ({described(shard.url, error)})"
    if size != shard.filesize:
        return f"it has {size:,} bytes, the manifest says {shard.filesize:,}"
    return "" if digest == shard.sha256 else f"its sha256 is {digest}, the manifest says {shard.sha256}"
