"""Images that pack keeps, changes or has to leave out, whatever their bytes and paths: one never stops the others."""

import io

import pytest
from PIL import Image

from data_pipeline.commands.encoding import Encoding, encode_rows
from data_pipeline.commands.rows import Row
from data_pipeline.samples.image import MAX_PIXELS, decode_image
from tests.support.pictures import tiny_image


def encoded(image, *, resize=0, form="KEEP"):
    """What becomes of an image (bytes or a path), which is between two good ones."""
    images = [tiny_image(1), image, tiny_image(2)]
    rows = [Row(number, number + 1, str(number), each, ("text",), None, "") for number, each in enumerate(images)]
    before, result, after = encode_rows(rows, Encoding(resize, form, 90, MAX_PIXELS))
    assert isinstance(before, dict) and isinstance(after, dict)
    return result


def several_pictures() -> bytes:
    """As phones write them."""
    buffer = io.BytesIO()
    first, second = (Image.new("RGB", (40, 30), color) for color in ((200, 10, 10), (10, 10, 200)))
    first.save(buffer, "MPO", save_all=True, append_images=[second])
    assert Image.open(buffer).format == "MPO"
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["KEEP", "JPEG"])
def test_a_jpeg_of_several_pictures_is_kept_as_it_is(form):
    data = several_pictures()
    assert encoded(data, form=form) == {"jpg": data, "txt": b"text"}


@pytest.mark.parametrize(("resize", "form", "extension"), [(10, "KEEP", "jpg"), (10, "JPEG", "jpg"), (0, "PNG", "png")])
def test_a_jpeg_of_several_pictures_is_stored_again_by_its_first(resize, form, extension):
    image = decode_image(encoded(several_pictures(), resize=resize, form=form)[extension])
    assert min(image.size) == (resize or 30)
    red, _, blue = image.getpixel((5, 5))
    assert red > 190 and blue < 20


@pytest.mark.parametrize("form", ["WEBP", "JPEG"])
def test_an_image_too_long_for_the_format_is_left_out(form):
    buffer = io.BytesIO()
    Image.new("L", (70_000, 2)).save(buffer, "PNG")
    assert f"70000 x 2 pixels cannot be stored as {form}" in encoded(buffer.getvalue(), form=form)


@pytest.mark.parametrize("name", ["a\0b.png", "\ud83d.png", "", "gone.png"])
def test_an_image_whose_path_cannot_be_read_is_left_out(name, tmp_path):
    assert encoded(tmp_path / name).startswith("the image cannot be read: ")
