"""JPEGs decoded by libjpeg-turbo itself (simplejpeg): the pixels that Pillow gives, in two thirds of its time.

Pillow reads the header, and the size is checked, before anything is decoded here; or the header is a plain one, which
Pillow would not refuse and which says nothing of how the picture is turned. What libjpeg-turbo so much as warns of is
left to Pillow, so that the same files are refused, for the same causes. Both decode by the same library with the same
settings: no pixel has differed, at any scale and chroma subsampling, grey or in colour, sequential or progressive.
"""

from __future__ import annotations

import math
from io import BytesIO
from typing import NamedTuple

import numpy as np
from PIL import Image

try:
    import simplejpeg
except ImportError:  # the pixels are the same without it
    simplejpeg = None

SCALES = (8, 4, 2)
_SCAN = b"\xff\xda"
_PLAIN: dict[bytes, tuple[bytes, int]] = {
    **dict.fromkeys((b"\xff\xc0", b"\xff\xc2", b"\xff\xc4", b"\xff\xdb", b"\xff\xdd", b"\xff\xfe"), (b"", 2)),
    b"\xff\xe0": (b"JFIF\0", 16),
    b"\xff\xe2": (b"ICC_PROFILE\0", 16),
    b"\xff\xee": (b"Adobe", 14),
}
"""Segments of a plain header (frames, tables, restarts, comments, and these of applications): how the content of each
begins, and the least length with which Pillow reads it without an error."""


class Plain(NamedTuple):
    """A JPEG with a plain header, its pixels not yet decoded."""

    data: bytes
    size: tuple[int, int]
    """width, height in pixels, upright."""


def plain(data: bytes) -> Plain | None:
    """The JPEG, where its header is a plain one, in a fifth of Pillow's time; None for what Pillow has to look at."""
    if simplejpeg is None or not data.startswith(b"\xff\xd8"):
        return None
    at = 2
    while (marker := data[at : at + 2]) != _SCAN:
        begins, least = _PLAIN.get(marker, (b"", 1 << 16))
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if length < least or not data.startswith(begins, at + 4):
            return None
        at += 2 + length
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return Plain(data, (width, height)) if colors in ("YCbCr", "RGB", "Gray") else None


def decode(image: Image.Image | Plain, shrink: float) -> np.ndarray | None:
    """The pixels of an opened JPEG, not yet turned upright: uint8 [H, W, 3]; None for what Pillow has to decode.

    shrink: how many times smaller the result may be, as in `image.load_image`.
    """
    data = image.data if isinstance(image, Plain) else _jpeg_data(image)
    if data is None:
        return None
    width, height = image.size
    scale = _scale(width, height, shrink)
    shape = -(-height // scale), -(-width // scale)
    try:
        pixels_HWC = simplejpeg.decode_jpeg(data, "RGB", min_height=shape[0], min_width=shape[1], min_factor=scale)
    except ValueError:
        return None
    return pixels_HWC if pixels_HWC.shape[:2] == shape else None


def _jpeg_data(image: Image.Image) -> memoryview | None:
    """The bytes of a JPEG that Pillow has opened; None for what it has to decode."""
    if simplejpeg is None or image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return None
    file = getattr(image, "fp", None)  # none, once its pixels are decoded
    if not isinstance(file, BytesIO):
        return None
    data = file.getbuffer()
    try:
        size = simplejpeg.decode_jpeg_header(data)[1::-1]
    except ValueError:
        return None
    return data if size == image.size else None  # two readers of one header may disagree


def _scale(width: int, height: int, shrink: float) -> int:
    """1, 2, 4 or 8: by how much Pillow's `draft` would reduce the picture."""
    if shrink < 2:
        return 1
    most = min(width // math.ceil(width / shrink), height // math.ceil(height / shrink))
    return next((scale for scale in SCALES if scale <= most), 1)
