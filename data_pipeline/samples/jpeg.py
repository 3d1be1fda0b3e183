"""JPEGs decoded by libjpeg-turbo itself (simplejpeg): the pixels that Pillow gives, in two thirds of its time.

Pillow has read the header and the size has been checked before anything comes here. What libjpeg-turbo so much as warns
of is left to Pillow, so that the same files are refused, for the same causes. Both decode by the same library with the
same settings: no pixel has differed, at any scale and chroma subsampling, grey or in colour, sequential or progressive.
"""

from __future__ import annotations

import math
from io import BytesIO

import numpy as np
from PIL import Image

try:
    import simplejpeg
except ImportError:  # the pixels are the same without it
    simplejpeg = None

SCALES = (8, 4, 2)


def decode(image: Image.Image, shrink: float) -> np.ndarray | None:
    """The pixels of an opened JPEG, not yet turned upright: uint8 [H, W, 3]; None for what Pillow has to decode.

    shrink: how many times smaller the result may be, as in `image.load_image`.
    """
    if simplejpeg is None or image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return None
    file = getattr(image, "fp", None)  # none, once its pixels are decoded
    if not isinstance(file, BytesIO):
        return None
    width, height = image.size
    scale = _scale(width, height, shrink)
    smallest = {"min_width": -(-width // scale), "min_height": -(-height // scale), "min_factor": scale}
    data = file.getbuffer()
    try:
        if simplejpeg.decode_jpeg_header(data)[:2] != (height, width):  # two readers of one header that disagree
            return None
        pixels_HWC = simplejpeg.decode_jpeg(data, "RGB", **smallest)
    except ValueError:
        return None
    return pixels_HWC if pixels_HWC.shape[:2] == (smallest["min_height"], smallest["min_width"]) else None


def _scale(width: int, height: int, shrink: float) -> int:
    """1, 2, 4 or 8: by how much Pillow's `draft` would reduce the picture."""
    if shrink < 2:
        return 1
    most = min(width // math.ceil(width / shrink), height // math.ceil(height / shrink))
    return next((scale for scale in SCALES if scale <= most), 1)
