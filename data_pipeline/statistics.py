"""One streaming pass over shards: channel statistics, image sizes, captions, duplicates, bad samples.

What a shard gives is JSON and merges exactly, in any order: sums of whole numbers, counts and lists.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.samples.image import BadSample, load_image, open_image, oriented_size
from data_pipeline.samples.limits import IMAGE_EXTENSIONS, MOST_BYTES
from data_pipeline.samples.text import CAPTIONS, WHOLE, has_several_lines, split
from data_pipeline.storage.manifest import Shard
from data_pipeline.storage.shards import ShardReader

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of ImageNet's channels, RGB in 0..1."""
MEASURE_SIZE = 256
"""Images whose shorter side is longer than this, in pixels, are reduced to it before their pixels are counted."""
_READ = (*IMAGE_EXTENSIONS, "txt", "json", "cls")
_OTHER_TEXTS = ("text", "caption", "captions", "transcript")
EXAMPLES = 20
"""Bad samples that merged statistics name; all of them are counted."""
LISTED_CLASSES = 10_000
"""Classes that merged statistics name at most."""


class Moments:
    """Per-channel mean and standard deviation of uint8 pixels, from sums of whole numbers: exact however merged."""

    def __init__(self, count: int = 0, sums: Sequence[int] = (0, 0, 0), squares: Sequence[int] = (0, 0, 0)):
        self.count, self.sums, self.squares = count, list(sums), list(squares)

    def update(self, image_HWC: np.ndarray) -> None:
        """Count the pixels of a uint8 array [H, W, 3]."""
        pixels = image_HWC.reshape(-1, 3)
        self.count += len(pixels)
        for channel in range(3):
            # Counting levels and then weighting them is exact, and faster than squaring every pixel in 64 bits.
            levels = np.bincount(pixels[:, channel], minlength=256)
            self.sums[channel] += int(levels @ _LEVELS)
            self.squares[channel] += int(levels @ _LEVELS**2)

    def merge(self, other: Moments) -> None:
        """Add what `other` counted."""
        self.count += other.count
        self.sums = [mine + its for mine, its in zip(self.sums, other.sums, strict=True)]
        self.squares = [mine + its for mine, its in zip(self.squares, other.squares, strict=True)]

    @property
    def mean(self) -> list[float]:
        """Mean [3] in 0..1; zeros where nothing was counted."""
        return [total / (255 * max(self.count, 1)) for total in self.sums]

    @property
    def std(self) -> list[float]:
        """Standard deviation [3] in 0..1, of the population: sqrt(E[x^2] - E[x]^2), its numerator in whole numbers."""
        count = max(self.count, 1)
        variances = [
            (count * square - total**2) / count**2 for total, square in zip(self.sums, self.squares, strict=True)
        ]
        return [math.sqrt(variance) / 255 for variance in variances]

    def to_json(self) -> dict[str, Any]:
        return {"count": self.count, "sums": self.sums, "squares": self.squares}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Moments:
        return cls(content["count"], content["sums"], content["squares"])


_LEVELS = np.arange(256, dtype=np.int64)


def shard_statistics(
    path: str | os.PathLike[str], *, caption_rule: str = WHOLE, shard: Shard | None = None
) -> dict[str, Any]:
    """What the samples of one local tar are like; JSON, for merge_statistics.

    Pixels are counted as decoded to RGB over white, images reduced to a shorter side of 256 pixels at most.
    caption_rule: how a text of several lines is read, WHOLE or LINES. shard: what a manifest says of it, which may
    select some of its samples.
    Raises ValueError for a damaged tar. Samples that cannot be used are listed under "bad", with cause, not counted.
    """
    moments, reader = Moments(), ShardReader(path, shard, MOST_BYTES)
    histograms: dict[str, Counter[int]] = {name: Counter() for name in _HISTOGRAMS}
    hashes: dict[str, list[str]] = {"image": [], "caption": []}
    classes: Counter[str] = Counter()
    bad, uncaptioned, several_lines, unread = [], 0, 0, Counter[str]()
    try:
        for number in range(len(reader)):
            raw = reader.raw(number) | {CAPTIONS: caption_rule}
            unread.update(_unread(raw))
            try:
                data, captions, label = split(raw, needs_caption=False)
                image = open_image(data)
                width, height = oriented_size(image)
                moments.update(measured(image))
            except BadSample as error:
                bad.append({"shard": Path(path).name, "key": raw["__key__"], "cause": error.cause})
                continue
            histograms["width"][width] += 1
            histograms["height"][height] += 1
            histograms["image_bytes"][len(data)] += 1
            uncaptioned += not captions
            several_lines += has_several_lines(raw)
            histograms["captions_per_image"][len(captions)] += 1
            histograms["caption_characters"].update(len(caption) for caption in captions)
            histograms["caption_words"].update(len(caption.split()) for caption in captions)
            hashes["image"].append(_digest(data))
            hashes["caption"].extend(_digest(caption.encode()) for caption in captions)
            if label is not None:
                classes[label] += 1
    finally:
        reader.close()
    return {
        "samples": len(reader),
        "moments": moments.to_json(),
        "histograms": {name: {str(value): n for value, n in counts.items()} for name, counts in histograms.items()},
        "hashes": {name: "".join(digests) for name, digests in hashes.items()},
        "classes": dict(classes),
        "bad": bad,
        "uncaptioned": uncaptioned,
        "several_lines": several_lines,
        "unread": dict(unread),
    }


def _unread(raw: dict[str, Any]) -> list[str]:
    """Extensions of members that look like an image or a text of the sample, and are not read.

    A second dot in a file's name ends the key too early: img.v2.jpg is member v2.jpg of the sample img.
    """
    images = [name for name in IMAGE_EXTENSIONS if name in raw]
    dotted = [name for name in raw if name.rpartition(".")[0] and name.rpartition(".")[2] in _READ]
    return [*images[1:], *dotted, *(name for name in _OTHER_TEXTS if name in raw)]


def measured(image: Image.Image) -> np.ndarray:
    """The pixels of an opened image that statistics count, uint8 [H, W, 3]. Raises BadSample."""
    image = load_image(image, shrink=min(image.size) / MEASURE_SIZE)
    shorter = min(image.size)
    if shorter > MEASURE_SIZE:
        size = (round(image.width * MEASURE_SIZE / shorter), round(image.height * MEASURE_SIZE / shorter))
        image = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    return np.asarray(image)


def merge_statistics(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The statistics of several shards together, as they are in a manifest:

    samples, bad {count, causes, examples}, hopeless (shards without a sample to train with), uncaptioned (samples that
    only evaluation by class can use), several_lines (samples whose captions depend on how a text of several lines is
    read), unread (members that look like an image or a text, but whose names hold another dot, by extension),
    mean and std (RGB, 0..1), moments (what they are computed
    from, so that several manifests can be merged), the distribution (min, p5, median, p95, max, mean) of width and
    height in pixels, image_bytes, captions_per_image, caption_characters and caption_words, duplicates of images (equal
    bytes) and of captions (how many are repeats of an earlier one), and classes {count, samples, names}: the names, as
    `cls` members have them, are sorted, and left out where they are more than LISTED_CLASSES.
    """
    samples, moments, bad = 0, Moments(), []
    counted, unread = Counter({"uncaptioned": 0, "several_lines": 0}), Counter[str]()
    histograms: dict[str, Counter[int]] = {name: Counter() for name in _HISTOGRAMS}
    hashes: dict[str, list[np.ndarray]] = {"image": [], "caption": []}
    classes: Counter[str] = Counter()
    hopeless = 0
    for part in parts:
        samples += part["samples"]
        hopeless += len(part["bad"]) + part["uncaptioned"] == part["samples"]
        unread.update(part["unread"])
        counted.update({name: part[name] for name in ("uncaptioned", "several_lines")})
        moments.merge(Moments.from_json(part["moments"]))
        for name, counts in histograms.items():
            counts.update({int(value): n for value, n in part["histograms"][name].items()})
        for name, digests in hashes.items():
            digests.append(np.frombuffer(bytes.fromhex(part["hashes"][name]), dtype=np.uint64))
        classes.update(part["classes"])
        bad.extend(part["bad"])
    # Causes that differ in their numbers alone are one kind.
    causes = Counter(re.sub(r"0x[0-9a-f]+|\d[\d,.]*\d|\d", "…", record["cause"]) for record in bad)
    return {
        "samples": samples,
        "bad": {"count": len(bad), "causes": dict(causes.most_common(EXAMPLES)), "examples": bad[:EXAMPLES]},
        "hopeless": hopeless,
        **counted,
        "unread": dict(unread.most_common(EXAMPLES)),
        "mean": moments.mean,
        "std": moments.std,
        "moments": moments.to_json(),
        **{name: _distribution(counts) for name, counts in histograms.items()},
        "duplicates": {name: _repeats(digests) for name, digests in hashes.items()},
        "classes": {
            "count": len(classes),
            "samples": sum(classes.values()),
            **({"names": sorted(classes)} if len(classes) <= LISTED_CLASSES else {}),
        },
    }


_HISTOGRAMS = ("width", "height", "image_bytes", "captions_per_image", "caption_characters", "caption_words")


def _digest(data: bytes) -> str:
    """64 bits of a hash, hexadecimal; 10 million different images collide with probability 3e-6."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _repeats(digests: list[np.ndarray]) -> int:
    together = np.concatenate(digests) if digests else np.empty(0, dtype=np.uint64)
    return len(together) - len(np.unique(together))


def _distribution(counts: Counter[int]) -> dict[str, float]:
    """Quantiles (the smallest value that at least this share of all values does not exceed) and the mean."""
    if not counts:
        return {}
    values = np.array(sorted(counts), dtype=np.int64)
    weights = np.array([counts[int(value)] for value in values], dtype=np.int64)
    upto, total = np.cumsum(weights), int(weights.sum())
    at = {name: int(values[np.searchsorted(upto, share * total)]) for name, share in _SHARES.items()}
    return {"min": int(values[0]), **at, "max": int(values[-1]), "mean": float(values @ weights / total)}


_SHARES = {"p5": 0.05, "median": 0.5, "p95": 0.95}


def normalization(normalize: str | tuple, *statistics: dict) -> tuple[list[float], list[float]]:
    """Mean [3] and standard deviation [3], RGB in 0..1, for the setting data.normalize.

    statistics: of the manifests of all training sources, for "dataset"; sources count by their pixels.
    Raises ValueError where the setting cannot be used.
    """
    if normalize == "imagenet":
        return list(IMAGENET[0]), list(IMAGENET[1])
    if normalize == "dataset":
        if not statistics or not all(one.get("moments") for one in statistics):
            raise ValueError(
                "data.normalize dataset: the manifest of data.train has no image statistics; "
                "build it again with: python -m data_pipeline index SHARDS"
            )
        moments = Moments()
        for one in statistics:
            moments.merge(Moments.from_json(one["moments"]))
        mean, std = moments.mean, moments.std
    else:
        try:
            mean, std = ([float(value) for value in row] for row in normalize)
        except (TypeError, ValueError):
            mean, std = [], []
        if len(mean) != 3 or len(std) != 3:
            raise ValueError(
                f"data.normalize is {normalize!r}: imagenet, dataset, or [[mean r, g, b], [std r, g, b]] in 0..1"
            )
    if not all(0 <= value <= 1 for value in mean) or not all(0 < value <= 1 for value in std):
        raise ValueError(f"data.normalize: means {mean} must be in 0..1 and deviations {std} above 0, at most 1")
    return list(mean), list(std)
