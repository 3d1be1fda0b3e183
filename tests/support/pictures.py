"""Encoded pictures that differ from number to number."""

import io
import random

from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (20, 160, 60), "blue": (30, 60, 220), "yellow": (240, 220, 20)}


def tiny_image(number: int, *, size: tuple[int, int] = (24, 20), kind: str = "png") -> bytes:
    """An encoded RGB picture that differs from number to number."""
    image = Image.new("RGB", size, (number * 37 % 256, number * 91 % 256, number * 53 % 256))
    image.paste((255, 255, 255), (number % size[0], 0, number % size[0] + 3, size[1]))
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def picture(number: int) -> bytes:
    """A colour with coarse noise that differs from number to number, as PNG."""
    noise = random.Random(number)
    colour = list(COLOURS.values())[number % len(COLOURS)]
    image = Image.new("RGB", (4, 4))
    image.putdata([tuple(min(255, part + noise.randrange(60)) for part in colour) for _ in range(16)])
    buffer = io.BytesIO()
    image.resize((40, 36), Image.Resampling.NEAREST).save(buffer, "png")
    return buffer.getvalue()


def rich_picture(number: int) -> bytes:
    """Noise of every brightness and colour, as PNG: BatchNorm sees no flat areas, which would amplify rounding."""
    pixels = random.Random(number).randbytes(12 * 12 * 3)
    buffer = io.BytesIO()
    Image.frombytes("RGB", (12, 12), pixels).resize((72, 72), Image.Resampling.BICUBIC).save(buffer, "png")
    return buffer.getvalue()
