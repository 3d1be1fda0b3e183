"""Bytes -> one decoded sample. What imports torch (transforms, masking) is imported from its own file."""

from data_pipeline.samples.image import (
    MAX_PIXELS,
    RGB,
    BadSample,
    decode_image,
    load_image,
    open_image,
    oriented_size,
)
from data_pipeline.samples.limits import IMAGE_EXTENSIONS
from data_pipeline.samples.text import captions, encodable, name_bytes, split

__all__ = [
    "IMAGE_EXTENSIONS",
    "MAX_PIXELS",
    "RGB",
    "BadSample",
    "captions",
    "decode_image",
    "encodable",
    "load_image",
    "name_bytes",
    "open_image",
    "oriented_size",
    "split",
]
