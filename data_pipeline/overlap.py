"""Held-out images that are also among the training images, found before a run starts."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path

from data_pipeline.samples.limits import IMAGE_EXTENSIONS
from data_pipeline.storage.kept_index import read_index
from data_pipeline.storage.manifest import Manifest
from data_pipeline.storage.remote import is_remote
from data_pipeline.storage.tar_index import Entry

MOST_SAMPLES = 2_000_000
"""Larger training sets are not looked at."""
MOST_READ = 10_000
"""Images of either side that are read at most; what more there may be is not counted. Other ranks wait meanwhile."""


def overlap(train: Sequence[Manifest], held_out: Manifest) -> int:
    """How many held-out images are in the training data, byte for byte; at least so many, where the data are large.

    Images of the same size in bytes are compared by a hash, those with the same key first. Remote shards are not
    fetched for it: only those that are a file of both sets are seen.
    """
    # Two selections of one shard may have no sample in common.
    whole = {shard.sha256 for shard in held_out.shards if shard.selection is None}
    same = whole & {shard.sha256 for manifest in train for shard in manifest.shards if shard.selection is None}
    found = sum(shard.nsamples for shard in held_out.shards if shard.sha256 in same and shard.selection is None)
    if sum(manifest.nsamples for manifest in train) > MOST_SAMPLES:
        return found
    by_size: dict[int, list[tuple[Path, Entry]]] = {}
    for path, entry in _images(held_out, leave_out=same):
        by_size.setdefault(_place(entry)[1], []).append((path, entry))
    if not by_size:
        return found
    keys = {entry.key for alike in by_size.values() for _, entry in alike}
    alike = [(path, entry) for manifest in train for path, entry in _images(manifest) if _place(entry)[1] in by_size]
    alike.sort(key=lambda one: one[1].key not in keys)
    hashes = {_hash(path, entry) for path, entry in alike[:MOST_READ]}
    sizes = dict.fromkeys(_place(entry)[1] for _, entry in alike[:MOST_READ])
    same_size = [one for size in sizes for one in by_size[size]]
    return found + sum(_hash(path, entry) in hashes for path, entry in same_size[:MOST_READ])


def warnings(train: Sequence[Manifest], held_out: Mapping[str, Manifest]) -> list[str]:
    """One line for every held-out set, by name, that is in part among the training data."""
    counts = {path: overlap(train, one) for path, one in {one.path: one for one in held_out.values()}.items()}
    return [
        f"warning: {counts[one.path]} of the {one.nsamples} images of {name} are training images, too: its numbers "
        "will look better than they are"
        for name, one in held_out.items()
        if counts[one.path]
    ]


def _images(manifest: Manifest, leave_out: Container[str] = ()) -> Iterator[tuple[Path, Entry]]:
    """Samples with an image of the local shards."""
    for shard in manifest.shards:
        if shard.sha256 not in leave_out and not is_remote(shard.url):
            entries = read_index(shard.url)
            for number in shard.selection.indices.tolist() if shard.selection else range(len(entries)):
                entry = entries[number]
                if any(extension in entry.members for extension in IMAGE_EXTENSIONS):
                    yield Path(shard.url), entry


def _place(entry: Entry) -> tuple[int, int]:
    """Offset and size of the image, in bytes."""
    return next(entry.members[extension] for extension in IMAGE_EXTENSIONS if extension in entry.members)


def _hash(path: Path, entry: Entry) -> bytes:
    offset, size = _place(entry)
    with path.open("rb") as file:
        file.seek(offset)
        return hashlib.blake2b(file.read(size), digest_size=16).digest()
