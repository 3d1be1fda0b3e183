"""What a run's page shows of the finished model: which images, which prepared queries, and their features.

All processes collect it together, before the page is written by one of them. The work is bounded whatever the data are:
of more than HELD_OUT_IMAGES held-out images those at even distances are shown; training images all, or none where they
are more than TRAINING_IMAGES or not all here. Shape suffixes: N images, M texts, Q queries, D embedding.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.storage.manifest import Manifest, Shard
from data_pipeline.storage.remote import is_remote
from train import distributed
from train.evaluation.encode import Encoder, Features
from train.evaluation.suite import HELD_OUT, Suite
from train.evaluation.task import Evaluation, Predictions
from train.evaluation.zeroshot import Zeroshot, class_features

HELD_OUT_IMAGES = 500
TRAINING_IMAGES = 2_000
MOST = {"class": 60, "keyword": 160, "caption": 400}
"""Prepared queries of each kind."""
LETTERS = 120
"""Of a text on the page; more are cut."""
READ = 1_000
"""Letters of a caption in which keywords are looked for."""
COMMON = {
    *("and", "are", "for", "from", "has", "her", "his", "its", "not", "off", "out", "that", "the", "their", "them"),
    *("they", "this", "was", "were", "who", "with", "without"),
}
"""Words that say nothing by themselves."""


@dataclass
class Shown:
    """Images of one data set."""

    features: Features
    manifest: Manifest
    rows: list[int]
    """Of the features: the images that are shown."""
    training: bool = False


@dataclass
class Query:
    """A text that can be asked on the page."""

    text: str
    kind: str
    """One of MOST."""


@dataclass
class Exhibit:
    """What is shown, the same on every process."""

    sets: list[Shown]
    """The held-out images, then those of each training source."""
    queries: list[Query] = field(default_factory=list)
    query_QD: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    """Their unit vectors."""
    class_names: list[str] = field(default_factory=list)
    """Of the held-out data, by their numbers; empty where no evaluation names them."""
    predictions: dict[str, Predictions] = field(default_factory=dict)
    """Of each evaluation that has some, by its name."""


def collect(
    encoder: Encoder, suite: Suite, found: Mapping[str, Evaluation], training: Sequence[Manifest]
) -> Exhibit | None:
    """The exhibit of a model whose evaluations are `found`; None where there are none. All processes call it together.

    training: manifests of the training data.

    Raises:
        ValueError: a shard of the training data is gone or damaged.
    """
    if not found:
        return None
    name = HELD_OUT if HELD_OUT in found else next(iter(found))
    features = found[name].features
    sets = [Shown(features, suite.tasks[name].manifest, even(len(features.keys), HELD_OUT_IMAGES))]
    if training_is_shown(training):
        for manifest in training:
            known = encoder.features(manifest)
            sets.append(Shown(known, manifest, list(range(len(known.keys))), training=True))
    exhibit = Exhibit(sets, predictions={name: one.predictions for name, one in found.items() if one.predictions})

    parts: list[Tensor] = []
    for name in found:
        task = suite.tasks[name]
        if isinstance(task, Zeroshot) and task.manifest.path == sets[0].manifest.path and not parts:
            exhibit.class_names = task.names
            names = [task.names[row] for row in even(len(task.names), MOST["class"])]
            exhibit.queries += [Query(cut(each), "class") for each in names]
            parts.append(class_features(encoder, names, task.templates))
    rows = caption_rows(features, sets[0].rows)
    captions = {cut(features.captions[row]): row for row in rows}
    words = keywords(captions_of(sets), leave_out=captions)
    if words:
        exhibit.queries += [Query(word, "keyword") for word in words]
        parts.append(encoder.texts(words))
    exhibit.queries += [Query(text, "caption") for text in captions]
    parts.append(features.text_MD[list(captions.values())])
    exhibit.query_QD = torch.cat(parts)
    encoder.forget()
    return exhibit


def training_is_shown(training: Sequence[Manifest]) -> bool:
    """Whether the training images are few enough, and here; one answer for all processes, which ask together."""
    shards = [shard for manifest in training for shard in manifest.shards]
    if any(is_remote(shard.url) for shard in shards):
        return False
    # The run has been trained: a shard that is gone by now is no reason to end it without its results.
    gone = any(not is_whole(shard) for shard in shards)
    return not distributed.any_rank(gone) and 0 < sum(manifest.nsamples for manifest in training) <= TRAINING_IMAGES


def is_whole(shard: Shard) -> bool:
    """Whether the file of a local shard is there, in the size that it had."""
    path = Path(shard.url)
    return path.is_file() and path.stat().st_size == shard.filesize


def even(total: int, most: int) -> list[int]:
    """At most so many of 0 to total - 1, at even distances."""
    count = min(total, most)
    return [round((i + 0.5) * total / count - 0.5) for i in range(count)]


def cut(text: str) -> str:
    """The beginning of a text that may be a whole book."""
    return text if len(text) <= LETTERS else text[: LETTERS - 1].rstrip() + "…"


def first_texts(features: Features) -> dict[int, int]:
    """Row of an image -> that of its first text, where it has one."""
    first: dict[int, int] = {}
    for text, image in enumerate(features.image_of_text_M.tolist()):
        first.setdefault(image, text)
    return first


def caption_rows(features: Features, images: Sequence[int]) -> list[int]:
    """Rows of the texts that are prepared: the first one of each of these images; of too many, at even distances."""
    first = first_texts(features)
    texts = [first[image] for image in images if image in first]
    return [texts[place] for place in even(len(texts), MOST["caption"])]


def captions_of(sets: Iterable[Shown]) -> Iterable[str]:
    """All captions of the images that are shown."""
    for shown in sets:
        rows = set(shown.rows)
        for caption, image in zip(shown.features.captions, shown.features.image_of_text_M.tolist(), strict=True):
            if image in rows:
                yield caption


def keywords(captions: Iterable[str], leave_out: Iterable[str] = ()) -> list[str]:
    """Words, and parts between commas, that are in several captions; the most frequent ones, sorted."""
    counts: Counter[str] = Counter()
    for caption in captions:
        text = caption[:READ].casefold()
        parts = {part.strip() for part in text.split(",")} if "," in text else set()
        parts |= {word for word in re.findall(r"[^\W\d_][\w'’-]*", text) if word not in COMMON}
        counts.update(part for part in parts if 2 < len(part) <= 40)
    known = {text.casefold() for text in leave_out}
    often = [word for word in counts if counts[word] > 1 and word not in known]
    often.sort(key=lambda word: (-counts[word], word))  # by the word too: all processes take the same ones
    return sorted(often[: MOST["keyword"]])
