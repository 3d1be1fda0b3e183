"""Which pictures count as the same."""

import io
import math

import pytest
from PIL import Image, ImageDraw

from data_pipeline.embeddings.pixels import signature


def face(skin: str = "#fadcbc", mouth: int = 0, size: tuple[int, int] = (128, 128)) -> Image.Image:
    image = Image.new("RGB", (128, 128), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((8, 8, 120, 120), fill=skin, outline="black", width=3)
    draw.arc((40, 60 + mouth, 88, 100 + mouth), 20, 160, fill="black", width=5)
    return image.resize(size, Image.Resampling.LANCZOS)


def encoded(image: Image.Image, kind: str = "png", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(64, 64), (100, 100), (250, 250), (700, 700)])
@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_another_size_and_format_is_the_same_picture(size, kind):
    copy = encoded(face(size=size), kind, quality=60)
    assert signature(encoded(face())).distance(signature(copy)) < 8


@pytest.mark.parametrize(
    "other", [face(skin="#e0bb95"), face(mouth=12), face(size=(128, 100)), Image.new("RGB", (128, 128), "white")]
)
def test_another_colour_line_or_shape_is_another_picture(other):
    assert signature(encoded(face())).distance(signature(encoded(other))) == math.inf


def test_transparent_is_white():
    shape = face().convert("RGBA")
    shape.putalpha(face().convert("L").point(lambda level: 255 * (level < 255)))
    assert signature(encoded(shape)).distance(signature(encoded(face()))) < 1
