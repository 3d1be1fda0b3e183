"""Image bytes -> uint8 tensor [3, H, W]: crop, resize, augment; scaling, normalization, and in training the changes of
colours, happen on the device.

Tensors are views of rows of RGB pixels: channels_last, which is what the image tower wants.
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
from data_pipeline.samples import jpeg
from data_pipeline.samples.augment import POLICIES, rand_augment, resolve_augment, rotate
from data_pipeline.samples.colors import draw_change, gathered, recolor
from data_pipeline.samples.image import (
    RGB,
    Crop,
    centre_crop,
    load_region,
    open_image,
    oriented_size,
    random_crop,
    scaled_box,
    turn_of,
)

__all__ = ["POLICIES", "eval_transform", "resolve_augment", "train_transform"]


def train_transform(config: DataConfig) -> TrainTransform:
    """The training transform: (image bytes or opened PIL image, random.Random) -> uint8 [3, image_size, image_size].

    Raises ValueError naming the field of `config` that cannot be used.
    """
    return TrainTransform(config)


def eval_transform(config: DataConfig) -> EvalTransform:
    """The evaluation transform, without randomness: image bytes or opened image -> uint8 [3, size, size].

    The square in the middle whose side is `eval_crop` of the shorter side, resized to `eval_size` (`image_size` where
    that is 0): the same as shorter side to size / eval_crop, then a crop in the middle. Raises ValueError naming the
    field that cannot be used.
    """
    return EvalTransform(config)


class EvalTransform:
    """See eval_transform."""

    def __init__(self, config: DataConfig):
        self.background = _checked(config)
        self.size, self.max_pixels, self.share = config.evaluated_size, config.max_pixels, config.eval_crop

    def __call__(self, source: bytes | Image.Image) -> Tensor:
        """Raises BadSample where the image cannot be used."""
        image = opened(source, self.max_pixels)
        crop = centre_crop(*upright_size(image), self.share)
        return resized_region(image, crop, self.size, self.background)


class TrainTransform:
    """See train_transform."""

    def __init__(self, config: DataConfig):
        self.background, self.augment = _checked(config), resolve_augment(config.augment)
        self.size, self.max_pixels = config.image_size, config.max_pixels

    def __call__(self, source: bytes | Image.Image, rng: random.Random) -> Tensor:
        """Raises BadSample where the image cannot be used."""
        image_CHW, change = self.drawn(source, rng)
        colors = gathered([change])
        return image_CHW if colors is None else recolor(image_CHW[None], colors)[0]

    def drawn(self, source: bytes | Image.Image, rng: random.Random) -> tuple[Tensor, np.ndarray | None]:
        """The image without its colour jitter, and that jitter, for `samples.colors`. Raises as when called."""
        augment, background = self.augment, self.background
        image = opened(source, self.max_pixels)
        crop = random_crop(*upright_size(image), augment.scale, augment.ratio, rng)
        image_CHW = resized_region(image, crop, self.size, background)
        if rng.random() < augment.flip:
            image_CHW = image_CHW.flip(2)
        jitter = any(augment.jitter) and rng.random() < augment.jitter_probability
        gray = rng.random() < augment.grayscale
        if augment.rotation or augment.rand_ops:
            picture = Image.fromarray(image_CHW.permute(1, 2, 0).numpy())
            if augment.rotation:
                picture = rotate(picture, rng.uniform(-augment.rotation, augment.rotation), background)
            if augment.rand_ops:
                picture = rand_augment(picture, augment.rand_ops, augment.rand_magnitude, background, rng)
            image_CHW = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        return image_CHW, draw_change(augment, jitter, gray, rng)


def opened(source: bytes | Image.Image, max_pixels: int) -> Image.Image | jpeg.Plain:
    """The image with its header read and its size checked. Raises BadSample."""
    if isinstance(source, Image.Image):
        return source
    plain = jpeg.plain(source)
    return open_image(source, max_pixels) if plain is None or math.prod(plain.size) > max_pixels else plain


def upright_size(image: Image.Image | jpeg.Plain) -> tuple[int, int]:
    """(width, height) in pixels of an opened image as it is to be seen. Raises BadSample."""
    return image.size if isinstance(image, jpeg.Plain) else oriented_size(image)


def resized_region(image: Image.Image | jpeg.Plain, crop: Crop, size: int, background: RGB) -> Tensor:
    """A crop of an opened image in size x size pixels: uint8 [3, size, size]. Raises BadSample."""
    pixels_HWC = jpeg.decode(image, min(crop[2:]) / size)
    if pixels_HWC is None:
        if isinstance(image, jpeg.Plain):  # Pillow says what is wrong with it
            image = open_image(image.data, math.prod(image.size))
        return resize(load_region(image, crop, size, background), size)
    if isinstance(image, Image.Image) and (turn := turn_of(image)) is not None:
        pixels_HWC = np.array(Image.fromarray(pixels_HWC).transpose(turn))
    height, width = pixels_HWC.shape[:2]
    left, top, right, bottom = scaled_box(crop, upright_size(image), (width, height))
    return resize(pixels_HWC[top:bottom, left:right], size)


def resize(image: Image.Image | np.ndarray, size: int) -> Tensor:
    """An RGB image, or its pixels uint8 [H, W, 3], in size x size pixels: uint8 [3, size, size]."""
    pixels_HWC = image if isinstance(image, np.ndarray) else np.array(image)
    # In this order, or torch would not see that it is channels_last.
    image_1CHW = torch.from_numpy(pixels_HWC)[None].permute(0, 3, 1, 2)
    if pixels_HWC.shape[:2] != (size, size):
        # Twice as fast as Pillow's resize on x86, and equal to it except for single steps of 1 in 255.
        image_1CHW = functional.interpolate(
            image_1CHW, (size, size), mode="bicubic", antialias=True, align_corners=False
        )
    return image_1CHW[0]


def _checked(config: DataConfig) -> RGB:
    """The background, once the fields that both transforms use are known to be good."""
    if config.image_size < 1:
        raise ValueError(f"data.image_size is {config.image_size}: at least 1 pixel")
    # Of both, so that a run says it before it trains, not at its first evaluation.
    if config.eval_size < 0:
        raise ValueError(f"data.eval_size is {config.eval_size}: pixels, or 0 for those of data.image_size")
    if not 0 < config.eval_crop <= 1:
        raise ValueError(f"data.eval_crop is {config.eval_crop}: a share above 0 and at most 1, such as 0.875")
    if not all(0 <= value <= 255 for value in config.background):
        raise ValueError(f"data.background is {list(config.background)}: red, green and blue, each from 0 to 255")
    red, green, blue = config.background
    return red, green, blue
