"""Augmentation policies, and the operations on images that they are made of; those on colours are in `colors`.

Every operation draws from the random.Random that it is given, so that a sample looks the same wherever it is made.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from PIL import Image, ImageEnhance, ImageOps

from data_pipeline.config import AugmentConfig
from data_pipeline.samples.image import RGB


@dataclass(frozen=True)
class Augmentation:
    """An AugmentConfig with every field set; the defaults here are those of "none": no augmentation."""

    scale: tuple[float, float] = (1.0, 1.0)
    ratio: tuple[float, float] = (1.0, 1.0)
    flip: float = 0.0
    rotation: float = 0.0
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    jitter_probability: float = 0.0
    grayscale: float = 0.0
    rand_ops: int = 0
    rand_magnitude: int = 9


_RATIO = (3 / 4, 4 / 3)
_JITTER = (0.2, 0.2, 0.2, 0.02)
POLICIES = {
    "none": Augmentation(),
    "light": Augmentation(scale=(0.8, 1.0), ratio=_RATIO, flip=0.5),
    "standard": Augmentation(scale=(0.5, 1.0), ratio=_RATIO, flip=0.5, jitter=_JITTER, jitter_probability=0.5),
    "strong": Augmentation(
        scale=(0.25, 1.0),
        ratio=_RATIO,
        flip=0.5,
        rotation=10.0,
        jitter=(0.4, 0.4, 0.4, 0.1),
        jitter_probability=0.8,
        grayscale=0.1,
        rand_ops=2,
    ),
    "text_safe": Augmentation(scale=(0.8, 1.0), ratio=(0.9, 1.1), jitter=_JITTER, jitter_probability=0.5),
}
"""What each named policy sets. "none" is what evaluation shows with eval_crop 1: the largest square in the middle."""


def resolve_augment(given: AugmentConfig) -> Augmentation:
    """The policy of `given`, with the fields that it sets itself in place of the policy's.

    Raises ValueError naming the field whose value cannot be used.
    """
    own = {item.name: getattr(given, item.name) for item in fields(Augmentation)}
    config = replace(POLICIES[given.policy], **{name: value for name, value in own.items() if value is not None})
    for name, largest in (("scale", 1.0), ("ratio", 100.0)):
        low, high = getattr(config, name)
        if not 0 < low <= high <= largest:
            raise ValueError(
                f"data.augment.{name} is {low}, {high}: two numbers above 0, at most {largest:g}, the smaller first"
            )
    probabilities = dict.fromkeys(("flip", "jitter_probability", "grayscale"), 1)
    for name, largest in {**probabilities, "rotation": 180, "rand_ops": 14, "rand_magnitude": 30}.items():
        value = getattr(config, name)
        if not 0 <= value <= largest:
            raise ValueError(f"data.augment.{name} is {value}: a number from 0 to {largest}")
    if len(config.jitter) != 4 or not all(value >= 0 for value in config.jitter) or config.jitter[3] > 0.5:
        raise ValueError(
            f"data.augment.jitter is {config.jitter}: four numbers from 0 (brightness, contrast, saturation, hue), "
            f"the hue at most 0.5"
        )
    return config


def rotate(image: Image.Image, degrees: float, background: RGB) -> Image.Image:
    """Rotate about the middle; the corners that open show `background`."""
    return image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=background)


def _affine(
    image: Image.Image, matrix: tuple[float, float, float, float, float, float], background: RGB
) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=background)


# Each operation takes the image, its strength from -1 to 1 (magnitude / 30 with a random sign) and the background.
# The largest strengths are those of the paper, its table of ranges scaled to 30.
_OPERATIONS: tuple[Callable[[Image.Image, float, RGB], Image.Image], ...] = (
    lambda image, strength, background: image,
    lambda image, strength, background: ImageOps.autocontrast(image),
    lambda image, strength, background: ImageOps.equalize(image),
    lambda image, strength, background: rotate(image, 30 * strength, background),
    lambda image, strength, background: ImageOps.solarize(image, round(256 * (1 - abs(strength)))),
    lambda image, strength, background: ImageEnhance.Color(image).enhance(1 + 0.9 * strength),
    lambda image, strength, background: ImageOps.posterize(image, 8 - round(4 * abs(strength))),
    lambda image, strength, background: ImageEnhance.Contrast(image).enhance(1 + 0.9 * strength),
    lambda image, strength, background: ImageEnhance.Brightness(image).enhance(1 + 0.9 * strength),
    lambda image, strength, background: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * strength),
    lambda image, strength, background: _affine(image, (1, 0.3 * strength, 0, 0, 1, 0), background),
    lambda image, strength, background: _affine(image, (1, 0, 0, 0.3 * strength, 1, 0), background),
    lambda image, strength, background: _affine(image, (1, 0, 0.45 * strength * image.width, 0, 1, 0), background),
    lambda image, strength, background: _affine(image, (1, 0, 0, 0, 1, 0.45 * strength * image.height), background),
)


def rand_augment(
    image: Image.Image, operations: int, magnitude: int, background: RGB, rng: random.Random
) -> Image.Image:
    """RandAugment (Cubuk et al., arXiv 1909.13719): `operations` drawn alike from 14, all at `magnitude` of 30."""
    for _ in range(operations):
        operation = rng.choice(_OPERATIONS)
        image = operation(image, rng.choice((-1, 1)) * magnitude / 30, background)
    return image
