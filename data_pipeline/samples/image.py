"""Bytes -> an image, or a crop of it: an allow-list of formats, limits checked first, and a cause for every refusal.

An image is opened (its header read), a crop is chosen from its size, and then it is decoded, so that a JPEG can be
decoded at the smallest scale that still covers the crop. Colour profiles are not applied; of an animation the first
frame counts.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 89_478_485

RGB = tuple[int, int, int]
Crop = tuple[int, int, int, int]
"""left, top, width, height in pixels of the upright image."""

# What each EXIF orientation asks for; 1 is upright. From 5 on, width and height change places.
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# open_image refuses by its own limit; Pillow's warning would only repeat it, once per process.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Pillow warns of what it passes over, such as unreadable EXIF, without saying where, in the middle of a progress bar.
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")


class BadSample(Exception):
    """A sample that cannot be used; `cause` says why, in words for the ledger."""

    def __init__(self, cause: str):
        super().__init__(cause)
        self.cause = cause


def open_image(data: bytes, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """The image with its header read and its size checked, its pixels not yet decoded.

    The format is found by content, whatever the member is called. Raises BadSample.
    """
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # else Pillow's own limit would come before the configured one
    try:
        image = Image.open(BytesIO(data), formats=formats)
    except MemoryError:
        raise
    except Image.UnidentifiedImageError:
        raise BadSample(f"not a JPEG, PNG or WebP image but {_kind(data)} ({len(data):,} bytes)") from None
    except Exception as error:  # damaged headers raise all sorts: SyntaxError, struct.error, ValueError, OSError
        raise BadSample(f"unreadable image header: {error}") from error
    if image.width * image.height > max_pixels:
        raise BadSample(f"{image.width} x {image.height} pixels are more than max_pixels {max_pixels:,}")
    return image


def _kind(data: bytes) -> str:
    """What bytes that are no image of FORMATS look like, for the user who wonders."""
    start = data[:512].lstrip()
    kinds = {b"GIF8": "a GIF", b"BM": "a BMP", b"II*\0": "a TIFF", b"MM\0*": "a TIFF", b"%PDF": "a PDF", b"{": "JSON"}
    kinds |= {b"<!doctype html": "a web page", b"<html": "a web page", b"<?xml": "XML or SVG", b"<svg": "an SVG"}
    if start[4:8] == b"ftyp":
        return "an AVIF or HEIC"
    found = [name for magic, name in kinds.items() if start.lower().startswith(magic.lower())]
    return found[0] if found else "something else" if data else "empty"


def oriented_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) in pixels of the image as it is to be seen, after its EXIF orientation. Raises BadSample."""
    return image.size[::-1] if _orientation(image) >= 5 else image.size


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
    logarithms = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(*logarithms))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left, top = rng.randint(0, width - crop_width), rng.randint(0, height - crop_height)
            return left, top, crop_width, crop_height
    aspect = min(max(width / height, ratio[0]), ratio[1])
    crop_width = min(width, max(1, round(height * aspect)))
    crop_height = min(height, max(1, round(width / aspect)))
    return (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height


def load_image(image: Image.Image, *, background: RGB = (255, 255, 255), shrink: float = 1.0) -> Image.Image:
    """Decode an opened image to upright RGB.

    shrink: how many times smaller the result may be. A JPEG is decoded, for less time, at the smallest of 1/1, 1/2, 1/4
    and 1/8 of its size that is at least 1 / shrink; other formats come in full size.
    Transparent pixels are put over `background`. Raises BadSample.
    """
    turn = turn_of(image)
    with _decoding(image):
        if shrink >= 2:
            image.draft(None, (math.ceil(image.width / shrink), math.ceil(image.height / shrink)))
        image.load()
        image = _opaque(image, background)
        return image if turn is None else image.transpose(turn)


def load_region(image: Image.Image, crop: Crop, size: int, background: RGB) -> Image.Image:
    """Decode an opened image to upright RGB and cut out `crop`, which is in pixels of the whole image.

    A JPEG is decoded at the smallest scale at which the crop still has size x size pixels. Raises BadSample.
    """
    full = oriented_size(image)
    image = load_image(image, background=background, shrink=min(crop[2:]) / size)
    box = scaled_box(crop, full, image.size)
    return image if box == (0, 0, *image.size) else image.crop(box)


def scaled_box(crop: Crop, full: tuple[int, int], seen: tuple[int, int]) -> tuple[int, int, int, int]:
    """left, top, right, bottom of a crop of the upright image of size `full`, in the picture of size `seen` of it."""
    left, top, width, height = crop
    x, y = seen[0] / full[0], seen[1] / full[1]
    right, bottom = round((left + width) * x), round((top + height) * y)
    left, top = int(left * x), int(top * y)
    return left, top, max(left + 1, right), max(top + 1, bottom)


def decode_image(
    data: bytes, *, max_pixels: int = MAX_PIXELS, background: RGB = (255, 255, 255), target: int | None = None
) -> Image.Image:
    """Decode image bytes to upright RGB.

    target: the shorter side in pixels that is wanted; a JPEG is decoded at a reduced scale that keeps at least that.
    Raises BadSample.
    """
    image = open_image(data, max_pixels)
    shrink = min(image.size) / target if target else 1.0
    return load_image(image, background=background, shrink=shrink)


def decode_square(
    data: bytes, side: int, *, max_pixels: int = MAX_PIXELS, background: RGB = (255, 255, 255)
) -> Image.Image:
    """Decode image bytes, the whole of it, into the middle of a square of `side` pixels. Raises BadSample."""
    image = decode_image(data, max_pixels=max_pixels, background=background, target=side)
    return ImageOps.pad(image, (side, side), Image.Resampling.LANCZOS, color=tuple(background))


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """What turns the pixels of an opened image upright; None where they are. Raises BadSample."""
    return _TURNS.get(_orientation(image))


def _orientation(image: Image.Image) -> int:
    """1 to 8. EXIF that cannot be read says nothing: the picture may well be fine. Raises BadSample."""
    if image.format == "PNG":  # keeps EXIF behind the pixels
        with _decoding(image):
            image.load()
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:
        return 1
    return orientation if isinstance(orientation, int) and orientation in _TURNS else 1


@contextmanager
def _decoding(image: Image.Image) -> Iterator[None]:
    """Damaged pixels raise as many sorts as damaged headers do; all become BadSample."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise BadSample(f"unreadable {image.format or 'image'}: {error}") from error


def _opaque(image: Image.Image, background: RGB) -> Image.Image:
    """RGB without transparency, of an image in any mode that JPEG, PNG and WebP have."""
    if image.mode.startswith("I"):  # 16-bit grey; convert() would clip it at 255 instead of scaling it
        levels = np.asarray(image).astype(np.int64)
        canvas = Image.fromarray((levels >> 8).astype(np.uint8)).convert("RGB")
        if "transparency" in image.info:  # the one level that is, which convert() would not know either
            canvas.paste(background, mask=Image.fromarray(levels == image.info["transparency"]))
        return canvas
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, background)
        canvas.paste(seen, mask=seen.getchannel("A"))
        return canvas
    return image if image.mode == "RGB" else image.convert("RGB")
