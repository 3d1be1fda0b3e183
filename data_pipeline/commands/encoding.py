"""A row of a table -> the members of a sample: its image checked, and reduced or re-encoded where that is asked for."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from data_pipeline.commands.rows import Row
from data_pipeline.samples.image import FORMATS, BadSample, decode_image, load_image, open_image, oriented_size
from data_pipeline.storage.files import read_file

CONVERTED = ("GIF", "BMP", "TIFF", "AVIF")
"""Formats that are read only to be re-encoded: in shards they would be bad samples."""
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
CHECK_SIZE = 64
"""Shorter side in pixels at which an image is decoded only to see whether it can be: a reduced JPEG takes less time."""


@dataclass(frozen=True)
class Encoding:
    """What becomes of an image's bytes; those that need nothing done are kept as they are."""

    resize: int
    """Shorter side in pixels that larger images are reduced to; 0: none are."""
    format: str
    """JPEG, PNG or WEBP; KEEP: as it is."""
    quality: int
    """Of re-encoded JPEG and WebP, 1 to 100."""
    max_pixels: int
    """Larger images (width x height) are bad samples."""


def encode_rows(rows: Sequence[Row], encoding: Encoding) -> list[dict[str, bytes] | str]:
    """For each row the members of its sample, extension -> bytes, or the cause why it cannot be one."""
    return [_encode(row, encoding) for row in rows]


def _encode(row: Row, encoding: Encoding) -> dict[str, bytes] | str:
    if row.cause or row.image is None:
        return row.cause
    try:
        data = row.image if isinstance(row.image, bytes) else read_file(row.image)
    except OSError as error:
        return f"the image cannot be read: {error.strerror or error} ({row.image!s})"
    except ValueError as error:  # no path at all: it has a NUL, or half of a surrogate pair
        return f"the image cannot be read: {error}"
    try:
        extension, data = encode_image(data, encoding)
    except BadSample as error:
        return error.cause
    members = {extension: data}
    if len(row.captions) == 1:
        members["txt"] = row.captions[0].encode()
    elif row.captions:
        members["json"] = json.dumps({"captions": row.captions}, ensure_ascii=False).encode()
    if row.cls is not None:
        members["cls"] = row.cls.encode()
    return members


def encode_image(data: bytes, encoding: Encoding) -> tuple[str, bytes]:
    """Extension and bytes of an image as it is to be stored.

    Raises BadSample where it cannot be decoded to its end, or not be stored in the format asked for.
    """
    image = open_image(data, encoding.max_pixels, FORMATS if encoding.format == "KEEP" else (*FORMATS, *CONVERTED))
    kind = "JPEG" if image.format == "MPO" else str(image.format)  # MPO: a JPEG with more pictures behind its end
    width, height = oriented_size(image)
    shrink = min(width, height) / encoding.resize if encoding.resize else 0.0
    if shrink <= 1 and encoding.format in ("KEEP", kind):
        decode_image(data, max_pixels=encoding.max_pixels, target=CHECK_SIZE)
        return EXTENSIONS[kind], data
    loaded = load_image(image, shrink=max(shrink, 1))
    if shrink > 1:
        size = (max(1, round(width / shrink)), max(1, round(height / shrink)))
        loaded = loaded.resize(size, Image.Resampling.BICUBIC)
    kind = kind if encoding.format == "KEEP" else encoding.format
    stored = io.BytesIO()
    try:
        loaded.save(stored, kind, quality=encoding.quality)
    except (OSError, ValueError) as error:
        raise BadSample(f"{loaded.width} x {loaded.height} pixels cannot be stored as {kind}: {error}") from error
    return EXTENSIONS[kind], stored.getvalue()
