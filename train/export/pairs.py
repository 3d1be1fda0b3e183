"""The check of every export: 64 image files and captions, embedded by Duet and by the target's own runtime.

Shapes: N images, M captions, D embedding.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from data_pipeline.samples.transforms import eval_transform
from train.export.source import Source

COUNT, FEW, BATCH = 64, 16, 16
OTHERS = (
    "images of odd sizes, cropped up to half a pixel elsewhere",
    "large JPEG files, decoded at their full size",
    "images with transparent parts, put over black",
)
"""Of what other code makes other pixels than Duet's evaluation, which crops between pixels, decodes a JPEG file at a
half, a quarter or an eighth of its size where that is enough, and puts images over `data.background`; FEW of each."""
ODD_SIZES, LARGE_JPEG, TRANSPARENT = range(len(OTHERS))
LEAST_COSINE = 0.9999
TIE, ROUGH_TIE = 1e-4, 5e-3
"""Similarities that differ by less have no order: of the same pixels in fp32; in fp16 or of pictures shrunk by other
code, whose cosine of 0.9999 allows them to differ by 0.014."""

WORDS = ("a", "the", "two", "red", "small", "cat", "ship", "tree", "of", "on", "house", "cloud", "7", "and", "old")


class Features(NamedTuple):
    """Unit vectors, what counts as a tie between their similarities, and whether other code prepared the pictures."""

    image_ND: Tensor
    text_MD: Tensor
    tie: float = TIE
    other_pixels: bool = False


def make_pairs(directory: Path, shorter: int, middle: int) -> tuple[list[Path], list[str]]:
    """The same pictures every time, of many sizes, as files in a new directory, and captions of many lengths.

    Of the first COUNT, every right way to prepare them gives the same pixels, but for rounding. Shrunk to `shorter`
    pixels on the shorter side, each has a longer one of whole pixels, and its middle, a square of `middle` pixels,
    starts at a whole pixel; its colour is even along the edges of that, so that it does not matter which one is first,
    to crop or to shrink. No JPEG file is so large that it could be decoded at half its size. Then those of OTHERS.
    """
    rng = random.Random(0)
    directory.mkdir(parents=True)
    images, captions = [], []
    for number in range(COUNT + FEW * len(OTHERS)):
        others = (number - COUNT) // FEW
        factor, longer = rng.choice((1, 2, 3, 4)), shorter + 2 * rng.randint(0, shorter // 2)
        factor = max(factor, 2) if others == LARGE_JPEG else factor
        size = (shorter * factor, longer * factor) if rng.random() < 0.5 else (longer * factor, shorter * factor)
        if others == ODD_SIZES:
            size = (size[0] | 1, size[1] * 6 // 5 | 1)
        jpeg = others == LARGE_JPEG or (others < 0 and factor == 1)
        images.append(directory / f"{number:02d}.{'jpg' if jpeg else 'png'}")
        picture = draw(size, factor, rng, middle * factor if others < 0 else max(size))
        if others == TRANSPARENT:
            picture.putalpha(draw(size, factor, rng, max(size)).convert("L"))
        picture.save(images[-1], quality=95)
        if number < COUNT:
            captions.append(" ".join(rng.choice(WORDS) for _ in range(rng.choice((1, 5, 9, 20, 200)))))
    return images, captions


def draw(size: tuple[int, int], factor: int, rng: random.Random, middle: int) -> Image.Image:
    """A picture as soft as a photograph of `factor` times the size that it is shrunk to: at hard edges, ways to shrink
    it differ most. It has one colour along the edges of its middle, a square of `middle` pixels."""
    picture = Image.new("RGB", size, tuple(rng.randrange(256) for _ in "rgb"))
    pen = ImageDraw.Draw(picture)
    for _ in range(12):
        x, y = (rng.randrange(side) for side in size)
        shape = rng.choice((pen.ellipse, pen.rectangle))
        end = tuple(start + rng.randint(1, side) for start, side in zip((x, y), size, strict=True))
        shape(((x, y), end), fill=tuple(rng.randrange(256) for _ in "rgb"))
    colour, reach = tuple(rng.randrange(256) for _ in "rgb"), 8 * factor  # of the kernel and of the blur below
    for axis, length in enumerate(size):
        for edge in ((length - middle) // 2, (length + middle) // 2) if length > middle else ():
            box = [0, 0, *size]
            box[axis], box[axis + 2] = edge - reach, edge + reach
            pen.rectangle(tuple(box), fill=colour)
    return picture.filter(ImageFilter.GaussianBlur(factor))


def reference(source: Source, images: list[Path], captions: list[str]) -> Features:
    """The embeddings as Duet's evaluation makes them."""
    transform, model = eval_transform(source.config.data), source.model
    image_NCHW = torch.stack([transform(path.read_bytes()) for path in images])
    image_ND = torch.cat([model.encode_image(part) for part in image_NCHW.split(BATCH)])
    texts = [source.tokenizer(captions[start : start + BATCH]) for start in range(0, len(captions), BATCH)]
    return Features(image_ND, torch.cat([model.encode_text(ids_BL, mask_BL) for ids_BL, mask_BL in texts]))


def compare(name: str, wanted: Features, found: Features) -> str:
    """A line that says how near the two are.

    Raises:
        ValueError: a cosine is below LEAST_COSINE, or candidates that are no ties are ranked otherwise; where other
            code prepared the pictures, only the first COUNT of them have to agree.
    """
    image_N = torch.cosine_similarity(wanted.image_ND, found.image_ND)
    count = COUNT if found.other_pixels else len(image_N)
    cosines = {
        "image": image_N[:count].min().item(),
        "text": torch.cosine_similarity(wanted.text_MD, found.text_MD).min().item(),
    }
    for tower, cosine in cosines.items():
        if not cosine >= LEAST_COSINE:  # NaN is not
            raise ValueError(f"{name}: the least cosine of {tower} embeddings is {cosine:.6f}, below {LEAST_COSINE}")
    before_NM, after_NM = (each.image_ND[:count] @ each.text_MD.T for each in (wanted, found))
    swapped = max(_swapped(before_NM, after_NM), _swapped(before_NM.T, after_NM.T))
    if swapped > found.tie:
        raise ValueError(f"{name}: candidates are ranked otherwise whose similarities differ by {swapped:.6f}")
    least = ", ".join(f"{tower} {cosine:.7f}" for tower, cosine in cosines.items())
    lines = [f"{name}: least cosine {least}; the same ranking of {COUNT} pairs"]
    if found.other_pixels:
        for what, part_N in zip(OTHERS, image_N[COUNT:].split(FEW), strict=True):
            lines.append(f"{name}: least cosine {part_N.min():.4f} of {what}")
    return "\n".join(lines)


def _swapped(before_NM: Tensor, after_NM: Tensor) -> float:
    """The largest difference between two similarities of a row that changed their order."""
    ranked_NM = before_NM.gather(1, after_NM.argsort(1, descending=True))
    best_later_NM = ranked_NM.flip(1).cummax(1).values.flip(1)
    return (best_later_NM - ranked_NM).max().item()
