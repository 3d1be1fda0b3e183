"""Whether two images show the same picture: resized and encoded in another way, not changed.

Embeddings say what a picture is of, so that two drawings of one thing may be nearer to each other than a drawing is to
its own copy of low quality. Of the few pairs that they propose, the pixels decide.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
from PIL import Image

from data_pipeline.config import DataConfig
from data_pipeline.embeddings.inputs import Input
from data_pipeline.samples.image import BadSample, load_image, open_image, oriented_size
from data_pipeline.samples.text import split

SIDE = 32
"""Of the squares that pictures are compared at, in pixels."""
LIMITS = {1: 50, 2: 28, 4: 15}
"""Side in pixels of the blocks that are averaged -> the largest difference of two copies in any of them, of 255.
Encoders change edges much and the mean of a larger block little; another colour or another mouth changes some block for
good. Measured on drawings: python -m tests.benchmarks.leaks."""
SHAPE_LIMIT = 1.08
"""The largest ratio of two copies' width to height: one of 20 pixels may have lost one of them to rounding."""
SHRINK_TO = 8 * SIDE
"""A JPEG is decoded at a reduced scale, which is coarse, down to this shorter side in pixels alone."""
THREADS = 8
"""That decode at once: Pillow does so without Python's lock."""


@dataclass(frozen=True)
class Signature:
    """A picture squeezed into a square, uint8 [SIDE, SIDE, 3], and its width over its height."""

    pixels: np.ndarray
    shape: float

    def distance(self, other: Signature) -> float:
        """Root mean square difference, of 255; infinite where the two do not show the same picture."""
        if max(self.shape / other.shape, other.shape / self.shape) > SHAPE_LIMIT:
            return math.inf
        difference_SSC = self.pixels.astype(np.float32) - other.pixels
        for block, limit in LIMITS.items():
            blocks = difference_SSC.reshape(SIDE // block, block, SIDE // block, block, 3).mean((1, 3))
            if np.abs(blocks).max() > limit:
                return math.inf
        return float(np.sqrt(np.mean(difference_SSC**2)))


def signature(data: bytes) -> Signature:
    """The signature of image bytes, transparent pixels on white. Raises BadSample."""
    image = open_image(data)
    width, height = oriented_size(image)
    seen = load_image(image, shrink=min(width, height) / SHRINK_TO)
    return Signature(np.asarray(seen.resize((SIDE, SIDE), Image.Resampling.BILINEAR)), width / height)


def signatures(given: Input, samples: Iterable[int]) -> dict[int, Signature]:
    """Of these samples, by number; one that cannot be read is left out."""
    raw = given.opener(DataConfig())

    def one(item: tuple[int, dict]) -> tuple[int, Signature | None]:
        try:
            return item[0], signature(split(item[1], needs_caption=False)[0])
        except BadSample:
            return item[0], None

    found: dict[int, Signature] = {}
    waiting = ((sample, raw(sample)) for sample in samples)
    with ThreadPoolExecutor(THREADS) as pool:
        while group := list(islice(waiting, 256)):  # not all at once: they are whole image files
            found |= {sample: made for sample, made in pool.map(one, group) if made is not None}
    return found
