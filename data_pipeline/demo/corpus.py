"""What the demo corpora share: concepts, the split by concept, shards with their manifests and licences."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.commands.index import index
from data_pipeline.storage.files import write_atomically
from data_pipeline.storage.manifest import load_manifest
from data_pipeline.storage.shards import ShardWriter

RECORD = "corpus.json"
CLASS_NAMES = "classnames.txt"
SAMPLES_PER_SHARD = 512


@dataclass(frozen=True)
class Example:
    """One picture: a key unique in its corpus, captions (the plainest first), the image and its extension, and the
    names that tie it to others of the same concept. Its pixels tie it to identical pictures without being named.
    `label` names its class, where the corpus has classes and knows this one's."""

    key: str
    captions: tuple[str, ...]
    extension: str
    image: bytes
    names: frozenset[str]
    label: str | None = None


@dataclass(frozen=True)
class Split:
    """Training and held-out examples, and how many examples of their concepts are in neither."""

    train: list[Example]
    val: list[Example]
    left_out: dict[str, int]


def concepts(examples: Sequence[Example]) -> dict[str, list[Example]]:
    """Examples by concept, in their order: those joined, directly or through others, by a name or by equal images.

    A concept is called by the least of its names, so that what it is called does not depend on the order.
    """
    parent: dict[str, str] = {}

    def find(name: str) -> str:
        parent.setdefault(name, name)
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    links = [sorted({*example.names, "=" + hashlib.sha256(example.image).hexdigest()}) for example in examples]
    for names in links:
        for name in names[1:]:
            first, second = find(names[0]), find(name)
            parent[max(first, second)] = min(first, second)
    grouped: dict[str, list[Example]] = defaultdict(list)
    called: dict[str, str] = {}
    for example, names in zip(examples, links, strict=True):
        root = find(names[0])
        grouped[root].append(example)
        called[root] = min(called.get(root, names[-1]), *example.names)
    return {called[root]: members for root, members in grouped.items()}


def place(text: str) -> float:
    """Where a text falls in [0, 1): the first 8 bytes of its sha256 as a fraction. Always the same."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def split(examples: Sequence[Example], *, held_out: float, variants: int) -> Split:
    """Split by concept: a concept is held out when `place` puts its name below `held_out`, whatever else there is.

    A concept's first example stands for it. A held-out concept keeps that one alone, with its plainest caption, so that
    every held-out text has one right image; a training concept keeps up to `variants` examples, chosen by `place`, so
    that people, drawn in every skin tone, do not crowd out the rest. Both lists are shuffled by `place`.
    """
    train: list[Example] = []
    val: list[Example] = []
    left_out = {"variants of training concepts": 0, "variants of held-out concepts": 0}
    for concept, members in concepts(examples).items():
        first, *others = members
        if place(concept) < held_out:
            val.append(first)
            left_out["variants of held-out concepts"] += len(others)
        else:
            others.sort(key=lambda example: place(example.key))
            train += [first, *others[: variants - 1]]
            left_out["variants of training concepts"] += len(others[variants - 1 :])
    for part in (train, val):
        part.sort(key=lambda example: place(example.key))
    return Split(train, val, left_out)


def write_shards(examples: Iterable[Example], folder: Path, *, first_caption: bool) -> int:
    """Shards of the examples in `folder`, and their manifest.json. Returns the number of samples."""
    with ShardWriter(folder, folder.name, max_samples=SAMPLES_PER_SHARD) as writer:
        for example in examples:
            captions = example.captions[:1] if first_caption else example.captions
            described = json.dumps({"captions": captions}, ensure_ascii=False).encode()
            members = {example.extension: example.image, "json": described}
            if example.label is not None:
                members["cls"] = example.label.encode()
            writer.write(example.key, members)
    return index(writer.paths, folder / "manifest.json", workers=1).nsamples


def build(
    out: Path,
    recipe: Mapping[str, Any],
    examples: Callable[[], tuple[Sequence[Example], dict[str, int]]],
    licences: Callable[[Path], None],
    *,
    held_out: float,
    variants: int,
) -> dict[str, Any]:
    """Write `out`/{train,val}, licences and RECORD, unless `out` is whole and of the same recipe. Returns the record.

    examples: makes the examples, and counts of what was left out by cause. licences: writes them into the folder given.
    Where examples have labels, CLASS_NAMES lists them, one a line.
    `out` appears under its name when all of it is on the disk; one of another recipe is replaced.
    """
    recipe = {**recipe, "held_out": held_out, "variants": variants}
    existing = read_record(out)
    if existing is not None and existing["recipe"] == recipe:
        return existing
    made, dropped = examples()
    parts = split(made, held_out=held_out, variants=variants)
    if not parts.train or not parts.val:
        raise ValueError(
            f"--limit leaves {len(parts.train)} training and {len(parts.val)} held-out samples; make it larger"
        )
    with replacing(out) as folder:
        record = {
            "recipe": recipe,
            "train": write_shards(parts.train, folder / "train", first_caption=False),
            "val": write_shards(parts.val, folder / "val", first_caption=True),
            "left_out": {**dropped, **parts.left_out},
        }
        if labels := sorted({example.label for example in made if example.label is not None}):
            write_atomically(folder / CLASS_NAMES, "".join(f"{label}\n" for label in labels))
        licences(folder)
        write_atomically(folder / RECORD, json.dumps(record, indent=2))
    return record


def read_record(out: Path) -> dict[str, Any] | None:
    """The record of a corpus that is whole: both manifests, and every shard with its size; else None."""
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
        for part in ("train", "val"):
            manifest = load_manifest(out / part)
            if any(Path(shard.url).stat().st_size != shard.filesize for shard in manifest.shards):
                return None
    except (OSError, ValueError):
        return None
    return record


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the name (and the place) of `folder` when the block ends well."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        folder.replace(old)
    part.replace(folder)
    shutil.rmtree(old, ignore_errors=True)
