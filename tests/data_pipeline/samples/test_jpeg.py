"""libjpeg-turbo beside Pillow: the same pixels, and of damaged files the same causes."""

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.config import DataConfig
from data_pipeline.samples import jpeg
from data_pipeline.samples.image import BadSample, load_image, open_image
from data_pipeline.samples.transforms import train_transform
from tests.data_pipeline.samples.test_image import encoded, picture

noise = np.random.default_rng(0).integers(-30, 30, (150, 211, 3))
NOISY = Image.fromarray((np.asarray(picture(211, 150)) + noise).clip(0, 255).astype(np.uint8))


def both(data: bytes) -> list:
    """What training sees of the bytes, or why it cannot: by libjpeg-turbo, and by Pillow alone."""
    transform, found = train_transform(DataConfig(image_size=32)), []
    for library in (jpeg.simplejpeg, None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jpeg, "simplejpeg", library)
            try:
                found.append(transform(data, random.Random(0)))
            except BadSample as error:
                found.append(error.cause)
    return found


def same(found: list) -> bool:
    ours, pillows = found
    return ours == pillows if isinstance(ours, str) or isinstance(pillows, str) else torch.equal(ours, pillows)


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("progressive", [False, True])
def test_pixels_are_those_of_pillow_at_every_scale(grey: bool, progressive: bool) -> None:
    for subsampling, quality, shrink in itertools.product((0, 1, 2), (40, 95), (1, 1.9, 2.1, 3, 4.5, 11, 200)):
        options = {} if grey else {"subsampling": subsampling}
        image = NOISY.convert("L") if grey else NOISY
        data = encoded(image, "JPEG", quality=quality, progressive=progressive, **options)
        decoded = jpeg.decode(open_image(data), shrink)
        assert decoded is not None and np.array_equal(decoded, np.array(load_image(open_image(data), shrink=shrink)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_regions_are_turned_as_pillow_turns_them(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = both(encoded(NOISY, "JPEG", exif=exif))
    assert isinstance(found[0], torch.Tensor) and same(found)


def test_what_is_left_to_pillow() -> None:
    whole = encoded(NOISY, "JPEG")
    left = {
        "another format": open_image(encoded(NOISY, "PNG")),
        "four inks": open_image(encoded(NOISY.convert("CMYK"), "JPEG")),
        "a preview behind it": open_image(encoded(NOISY, "MPO", save_all=True, append_images=[picture()])),
        "cut": open_image(whole[:-200]),
        "decoded before": open_image(whole),
    }
    left["decoded before"].load()
    for what, image in left.items():
        assert jpeg.decode(image, 1) is None, what
    assert jpeg.decode(open_image(whole), 1) is not None


def test_a_header_that_is_read_in_two_ways_is_left_to_pillow_before_it_is_decoded(monkeypatch) -> None:
    decoded = []
    monkeypatch.setattr(jpeg.simplejpeg, "decode_jpeg", lambda *arguments, **options: decoded.append(arguments))
    image = open_image(encoded(NOISY, "JPEG"))
    image._size = (100, 100)
    assert jpeg.decode(image, 1) is None and not decoded


def test_a_header_is_plain_where_pillow_would_find_nothing_in_it() -> None:
    whole = encoded(NOISY, "JPEG", icc_profile=bytes(500), comment="taken at noon", progressive=True)
    assert jpeg.plain(whole) == (whole, NOISY.size) and same(both(whole))
    exif = Image.Exif()
    exif[0x0112] = 6
    segments = {
        "turned": b"\xff\xe1" + (len(exif.tobytes()) + 2).to_bytes(2, "big") + exif.tobytes(),
        "turned by XMP": b'\xff\xe1\0\x33http://ns.adobe.com/xap/1.0/\0tiff:Orientation="6"',
        "cut profile": b"\xff\xe2\0\x0fICC_PROFILE\0\1",
        "cut JFIF": b"\xff\xe0\0\x08JFIF\0\1",
        "junk": b"junk",
        "padding": b"\xff",
    }
    for what, segment in segments.items():
        data = whole[:2] + segment + whole[2:]
        assert jpeg.plain(data) is None and same(both(data)), what
    assert jpeg.plain(whole[:40]) is None


def test_a_cut_file_has_the_same_cause() -> None:
    data = encoded(NOISY, "JPEG", progressive=True)
    for length in range(0, len(data), max(1, len(data) // 60)):
        assert same(both(data[:length])), length


@settings(max_examples=150)
@given(at=st.floats(0, 1), damage=st.binary(min_size=1, max_size=8), progressive=st.booleans())
def test_a_damaged_file_has_the_same_pixels_or_cause(at: float, damage: bytes, progressive: bool) -> None:
    data = bytearray(encoded(NOISY, "JPEG", progressive=progressive))
    start = int(at * (len(data) - 1))
    data[start : start + len(damage)] = damage
    assert same(both(bytes(data)))
