"""Bytes -> image and captions: an allow-list of formats, limits checked before decoding, and a cause for every refusal.

Colour profiles are not applied, and of an animation the first frame counts.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from math import ceil

import numpy as np
from PIL import Image

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 89_478_485

RGB = tuple[int, int, int]

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

# open_image refuses by its own limit; Pillow's warning would only say it again, once per process.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# What Pillow passes over, such as EXIF that cannot be read, it would tell without a name, amid the progress bar.
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")


class BadSample(Exception):
    """A sample that cannot be used; `cause` says why, in words for the ledger."""

    def __init__(self, cause: str):
        super().__init__(cause)
        self.cause = cause


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image with its header read and its size checked, its pixels not yet decoded.

    The format is found by content, whatever the member is called. Raises BadSample.
    """
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # else Pillow's own limit would stand in front of the configured one
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except MemoryError:
        raise
    except Image.UnidentifiedImageError:
        raise BadSample(f"not a JPEG, PNG or WebP image ({len(data):,} bytes)") from None
    except Exception as error:  # damaged headers raise all sorts: SyntaxError, struct.error, ValueError, OSError
        raise BadSample(f"unreadable image header: {error}") from error
    if image.width * image.height > max_pixels:
        raise BadSample(f"{image.width} x {image.height} pixels are more than max_pixels {max_pixels:,}")
    return image


def oriented_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) in pixels of the image as it is to be seen, after its EXIF orientation. Raises BadSample."""
    return image.size[::-1] if _orientation(image) >= 5 else image.size


def load_image(image: Image.Image, *, background: RGB = (255, 255, 255), shrink: float = 1.0) -> Image.Image:
    """Decode an opened image to upright RGB.

    shrink: how many times smaller the result may be. A JPEG is decoded, for less time, at the smallest of 1/1, 1/2, 1/4
    and 1/8 of its size that is at least 1 / shrink; other formats come in full size.
    Transparent pixels are put over `background`. Raises BadSample.
    """
    turn = _TURNS.get(_orientation(image))
    with _decoding(image):
        if shrink >= 2:
            image.draft(None, (ceil(image.width / shrink), ceil(image.height / shrink)))
        image.load()
        image = _opaque(image, background)
        return image if turn is None else image.transpose(turn)


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


def split(raw: dict) -> tuple[bytes, list[str], str | None]:
    """A raw sample's image bytes, its captions and its class (None without a `cls` member). Raises BadSample."""
    image = next((raw[extension] for extension in IMAGE_EXTENSIONS if extension in raw), None)
    if image is None:
        members = ", ".join(sorted(name for name in raw if not name.startswith("__"))) or "none"
        raise BadSample(f"no image member ({', '.join(IMAGE_EXTENSIONS)}); its members: {members}")
    label = _text(raw["cls"], "cls").strip() if "cls" in raw else None
    return image, captions(raw), label


def captions(raw: dict) -> list[str]:
    """The captions of a raw sample, at least one, white space tidied, repeats left out.

    A list `captions` in the `json` member comes first, then the `txt` member, then `caption` in `json`.
    Raises BadSample where there is none.
    """
    found: list = []
    described = raw.get("json", b"")
    if described and ("txt" not in raw or b'"captions"' in described):
        found = _described(described)
    if not found and "txt" in raw:
        found = [_text(raw["txt"], "txt")]
    if not all(isinstance(text, str) for text in found):
        raise BadSample("a caption in the json member is not text")
    tidy = [" ".join(encodable(text).split()) for text in found]
    kept = list(dict.fromkeys(text for text in tidy if text))
    if not kept:
        raise BadSample("no caption (txt, or json with caption or captions)")
    return kept


def name_bytes(text: str) -> bytes:
    """The bytes that text with names of files or tar members was read from; names need not be UTF-8."""
    return text.encode("utf-8", "surrogateescape")


def encodable(text: str) -> str:
    """The text with a ? for every half of a surrogate pair: JSON can say one ("cut \\ud83d"), UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def _described(data: bytes) -> list:
    try:
        content = json.loads(_text(data, "json"))
    except (ValueError, RecursionError) as error:
        raise BadSample(f"the json member is not JSON: {error}") from error
    if not isinstance(content, dict):
        return []
    several, one = content.get("captions"), content.get("caption")
    return [text for text in (several if isinstance(several, list) else [several]) if text is not None] or (
        [text for text in (one if isinstance(one, list) else [one]) if text is not None]
    )


def _text(data: bytes, member: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSample(f"the {member} member is not UTF-8: {error}") from error
