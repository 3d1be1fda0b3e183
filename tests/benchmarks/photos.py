"""JPEGs like photographs, made on the spot."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def photo(rng: np.random.Generator) -> bytes:
    """A JPEG with structure at all scales, like a photograph's, of about 100 KB."""
    width, height = (int(side) for side in rng.integers(400, 901, 2))
    pixels = np.zeros((height, width, 3))
    for scale, strength in ((128, 70), (32, 40), (8, 25), (2, 16)):
        coarse = rng.normal(0, 1, (height // scale + 2, width // scale + 2, 3)).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(coarse[..., channel]).resize((width, height), Image.Resampling.BICUBIC)
            pixels[..., channel] += strength * np.asarray(layer)
    image = Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8))
    for quality in (95, 90, 85, 75, 60):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        if buffer.tell() < 130_000:
            break
    return buffer.getvalue()
