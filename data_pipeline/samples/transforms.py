"""Image bytes -> uint8 tensor [3, H, W]: crop, resize, augment; scaling and normalization happen on the device.

The crop is chosen from the header alone, before decoding, so that a JPEG can be decoded at the smallest scale that
still covers it. Tensors are views of rows of RGB pixels: channels_last, which is what the image tower wants.
"""

from __future__ import annotations

import math
import random

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from data_pipeline.config import DataConfig
from data_pipeline.samples.augment import POLICIES, color_jitter, rand_augment, resolve_augment, rotate
from data_pipeline.samples.image import RGB, load_image, open_image, oriented_size
from data_pipeline.statistics import Moments

__all__ = ["POLICIES", "eval_transform", "normalization", "resolve_augment", "train_transform"]

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

Crop = tuple[int, int, int, int]
"""left, top, width, height in pixels of the upright image."""


def train_transform(config: DataConfig) -> TrainTransform:
    """The training transform: (image bytes or opened PIL image, random.Random) -> uint8 [3, image_size, image_size].

    Raises ValueError naming the field where the augmentation cannot be used.
    """
    return TrainTransform(config)


def eval_transform(config: DataConfig) -> EvalTransform:
    """The evaluation transform, without chance: image bytes or opened PIL image -> uint8 [3, image_size, image_size].

    The square in the middle whose side is `eval_crop` of the shorter side, resized: the same as shorter side to
    image_size / eval_crop, then a crop in the middle.
    """
    return EvalTransform(config)


class EvalTransform:
    """See eval_transform."""

    def __init__(self, config: DataConfig):
        self.region, self.share = Region(config), config.eval_crop

    def __call__(self, source: bytes | Image.Image) -> Tensor:
        """Raises BadSample where the image cannot be used."""
        image = self.region.open(source)
        return to_tensor(self.region.load(image, centre_crop(*oriented_size(image), self.share)))


class TrainTransform:
    """See train_transform."""

    def __init__(self, config: DataConfig):
        self.region, self.augment = Region(config), resolve_augment(config.augment)

    def __call__(self, source: bytes | Image.Image, rng: random.Random) -> Tensor:
        """Raises BadSample where the image cannot be used."""
        augment, image, background = self.augment, self.region.open(source), self.region.background
        crop = random_crop(*oriented_size(image), augment.scale, augment.ratio, rng)
        region_HWC = self.region.load(image, crop)
        if rng.random() < augment.flip:
            region_HWC = region_HWC.flip(1)
        jitter = any(augment.jitter) and rng.random() < augment.jitter_probability
        gray = rng.random() < augment.grayscale
        if not (augment.rotation or augment.rand_ops or jitter or gray):
            return to_tensor(region_HWC)
        image = Image.fromarray(region_HWC.numpy())
        if augment.rotation:
            image = rotate(image, rng.uniform(-augment.rotation, augment.rotation), background)
        if augment.rand_ops:
            image = rand_augment(image, augment.rand_ops, augment.rand_magnitude, background, rng)
        if jitter:
            image = color_jitter(image, augment.jitter, rng)
        if gray:
            image = image.convert("L").convert("RGB")
        return to_tensor(torch.from_numpy(np.array(image)))


def to_tensor(image_HWC: Tensor) -> Tensor:
    """[H, W, 3] -> [3, H, W], a view."""
    return image_HWC.permute(2, 0, 1)


class Region:
    """Decodes a crop of an image at the size that the tower sees."""

    def __init__(self, config: DataConfig):
        if config.image_size < 1:
            raise ValueError(f"--data.image_size is {config.image_size}: at least 1 pixel")
        # Here, so that a run says it before it trains, not at its first evaluation.
        if not 0 < config.eval_crop <= 1:
            raise ValueError(f"--data.eval_crop is {config.eval_crop}: a share above 0 and at most 1, such as 0.875")
        red, green, blue = config.background
        self.size, self.background, self.max_pixels = config.image_size, (red, green, blue), config.max_pixels

    def open(self, source: bytes | Image.Image) -> Image.Image:
        """The image with its header read. Raises BadSample."""
        return source if isinstance(source, Image.Image) else open_image(source, self.max_pixels)

    def load(self, image: Image.Image, crop: Crop) -> Tensor:
        """Decode an opened image and resize `crop` of it: uint8 [size, size, 3]. Raises BadSample."""
        return load_region(image, crop, self.size, self.background)


def load_region(image: Image.Image, crop: Crop, size: int, background: RGB) -> Tensor:
    """Decode an opened image and resize `crop` of it to size x size: uint8 [size, size, 3]. Raises BadSample."""
    full_width, full_height = oriented_size(image)
    left, top, width, height = crop
    image = load_image(image, background=background, shrink=min(width, height) / size)
    x, y = image.width / full_width, image.height / full_height
    left, top = int(left * x), int(top * y)
    right, bottom = max(left + 1, round((crop[0] + width) * x)), max(top + 1, round((crop[1] + height) * y))
    if (left, top, right, bottom) != (0, 0, *image.size):
        image = image.crop((left, top, right, bottom))
    region_HWC = torch.from_numpy(np.array(image))
    if image.size == (size, size):
        return region_HWC
    # Twice as fast as Pillow's resize on x86, and equal to it but for single steps of 1 in 255.
    resized_1CHW = functional.interpolate(
        region_HWC[None].permute(0, 3, 1, 2), (size, size), mode="bicubic", antialias=True, align_corners=False
    )
    return resized_1CHW[0].permute(1, 2, 0)


def centre_crop(width: int, height: int, share: float = 1.0) -> Crop:
    """The square in the middle whose side is this share of the shorter side."""
    side = max(1, round(min(width, height) * share))
    return (width - side) // 2, (height - side) // 2, side, side


def random_crop(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], rng: random.Random
) -> Crop:
    """The crop of Inception training (Szegedy et al., arXiv 1409.4842): area and aspect ratio drawn, then the place.

    scale: share of the area; ratio: width / height, drawn evenly in its logarithm. Where ten draws do not fit into the
    image, the largest crop in its middle whose ratio is allowed.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left, top = rng.randint(0, width - crop_width), rng.randint(0, height - crop_height)
            return left, top, crop_width, crop_height
    aspect = min(max(width / height, ratio[0]), ratio[1])
    crop_width = min(width, max(1, round(height * aspect)))
    crop_height = min(height, max(1, round(width / aspect)))
    return (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height


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
                "--data.normalize dataset: the manifest of --data.train has no image statistics; "
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
                f"--data.normalize is {normalize!r}: imagenet, dataset, or [[mean r, g, b], [std r, g, b]] in 0..1"
            )
    if not all(0 <= value <= 1 for value in mean) or not all(0 < value <= 1 for value in std):
        raise ValueError(f"--data.normalize: means {mean} must be in 0..1 and deviations {std} above 0, at most 1")
    return list(mean), list(std)
