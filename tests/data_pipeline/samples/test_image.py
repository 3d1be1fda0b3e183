"""Real images in every mode, and broken ones of every kind: what is read, and what is refused why."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from data_pipeline.samples.image import BadSample, decode_image, open_image, oriented_size

RED, GREEN, BLUE = (250, 10, 10), (10, 240, 10), (10, 10, 250)


def picture(width: int = 90, height: int = 60) -> Image.Image:
    """Smooth, and different in all four quarters."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [x * 255 // width, y * 255 // height, x * 128 // width + y * 127 // height]
    return Image.fromarray(np.stack(channels, 2).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def far(image: Image.Image, other: Image.Image) -> float:
    """Mean difference of two pictures, in levels."""
    assert image.size == other.size and image.mode == other.mode == "RGB"
    return float(np.abs(np.asarray(image, np.float64) - np.asarray(other, np.float64)).mean())


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"quality": 95}), ("PNG", {}), ("WEBP", {"lossless": True})])
def test_the_allowed_formats(kind: str, options: dict) -> None:
    assert far(decode_image(encoded(picture(), kind, **options)), picture()) < (4 if kind == "JPEG" else 0.01)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "ICO"])
def test_other_formats_are_refused_whatever_they_are_called(kind: str) -> None:
    with pytest.raises(BadSample, match="not a JPEG, PNG or WebP"):
        decode_image(encoded(picture(), kind))


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"<svg></svg>", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"])
def test_case_09_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(BadSample):
        decode_image(data)


def test_modes_become_rgb() -> None:
    plain = picture()
    grey = plain.convert("L")
    assert far(decode_image(encoded(grey, "PNG")), grey.convert("RGB")) == 0
    assert far(decode_image(encoded(grey, "JPEG", quality=95)), grey.convert("RGB")) < 3
    assert far(decode_image(encoded(plain.convert("1"), "PNG")), plain.convert("1").convert("RGB")) == 0
    palette = plain.quantize(64)
    assert far(decode_image(encoded(palette, "PNG")), palette.convert("RGB")) == 0
    cmyk = plain.convert("CMYK")
    assert far(decode_image(encoded(cmyk, "JPEG", quality=95)), plain) < 6


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    levels = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    seen = np.asarray(decode_image(encoded(Image.fromarray(levels), "PNG")))
    assert np.array_equal(seen, np.repeat((levels >> 8).astype(np.uint8)[..., None], 3, 2))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_shows_the_background(kind: str) -> None:
    image = Image.new("RGBA", (8, 4), (0, 0, 0, 0))
    image.paste((*RED, 255), (0, 0, 4, 4))
    options = {"lossless": True} if kind == "WEBP" else {}
    seen = decode_image(encoded(image, kind, **options), background=BLUE)
    assert seen.getpixel((0, 0)) == RED and seen.getpixel((7, 0)) == BLUE
    half = Image.new("RGBA", (2, 2), (200, 0, 0, 128))
    blended = decode_image(encoded(half, kind, **options), background=(0, 100, 0)).getpixel((0, 0))
    assert np.abs(np.subtract(blended, (100, 50, 0))).max() <= 1


def test_transparency_in_palettes_and_colour_keys_shows_the_background() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, *GREEN])
    palette.putpixel((1, 0), 1)
    seen = decode_image(encoded(palette, "PNG", transparency=1), background=BLUE)
    assert [seen.getpixel((x, 0)) for x in (0, 1)] == [RED, BLUE]
    key = Image.new("RGB", (2, 1), RED)
    key.putpixel((1, 0), GREEN)
    seen = decode_image(encoded(key, "PNG", transparency=GREEN), background=BLUE)
    assert [seen.getpixel((x, 0)) for x in (0, 1)] == [RED, BLUE]
    deep = Image.fromarray(np.array([[700, 65535]], np.uint16))
    seen = decode_image(encoded(deep, "PNG", transparency=700), background=BLUE)
    assert [seen.getpixel((x, 0)) for x in (0, 1)] == [BLUE, (255, 255, 255)]
    grey = Image.new("LA", (1, 1), (9, 0))
    assert decode_image(encoded(grey, "PNG"), background=BLUE).getpixel((0, 0)) == BLUE


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [*range(10), 65535])
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(), kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert far(decode_image(data), expected) == 0
    assert oriented_size(open_image(data)) == expected.size


def test_the_first_frame_of_an_animation_counts() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in (GREEN, RED)]
    for kind in ("PNG", "WEBP"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert far(decode_image(data), frames[0]) < 2
    # What cameras write with a preview behind the picture is a JPEG too.
    assert far(decode_image(encoded(picture(), "MPO", save_all=True, append_images=frames)), picture()) < 6


@pytest.mark.filterwarnings("ignore:Image size")
def test_case_09_size_is_checked_before_decoding() -> None:
    def bomb(width: int, height: int) -> bytes:
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        data = b"\x89PNG\r\n\x1a\n"
        for name, body in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")):
            data += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        return data

    with pytest.raises(BadSample, match=r"11000 x 9000 pixels are more than max_pixels 89,478,485"):
        open_image(bomb(11_000, 9_000))
    with pytest.raises(BadSample, match="pixels"):
        open_image(bomb(1 << 20, 1 << 20))
    with pytest.raises(BadSample, match=r"90 x 60 pixels are more than max_pixels 5,399"):
        open_image(encoded(picture(), "PNG"), max_pixels=5399)
    assert open_image(encoded(picture(), "PNG"), max_pixels=5400).size == (90, 60)


def test_a_limit_above_pillows_own_holds() -> None:
    before = Image.MAX_IMAGE_PIXELS
    try:
        image = Image.new("1", (20_000, 10_000))
        assert open_image(encoded(image, "PNG"), max_pixels=200_000_000).size == image.size
    finally:
        Image.MAX_IMAGE_PIXELS = before


@pytest.mark.parametrize("size", [(900, 600), (600, 900), (897, 1001), (447, 449), (448, 448), (100, 50)])
def test_a_reduced_jpeg_covers_the_target_and_looks_the_same(size: tuple[int, int]) -> None:
    data = encoded(picture(*size), "JPEG", quality=95)
    reduced = decode_image(data, target=56)
    factor = next(factor for factor in (8, 4, 2, 1) if min(size) / factor >= 56 or factor == 1)
    assert reduced.size == (-(-size[0] // factor), -(-size[1] // factor))
    assert far(reduced.resize((56, 56)), decode_image(data).resize((56, 56))) < 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_case_09_an_image_cut_anywhere_is_refused_or_whole(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    whole = decode_image(data)
    for length in range(0, len(data), max(1, len(data) // 150)):
        try:
            seen = decode_image(data[:length])
        except BadSample as error:
            assert error.cause
        else:
            assert length > 0.99 * len(data) and far(seen, whole) == 0


@settings(max_examples=150)
@given(kind=st.sampled_from(["JPEG", "PNG", "WEBP"]), at=st.floats(0, 1), damage=st.binary(min_size=1, max_size=8))
def test_case_09_damage_raises_nothing_but_bad_sample(kind: str, at: float, damage: bytes) -> None:
    data = bytearray(encoded(picture(), kind))
    start = int(at * (len(data) - 1))
    data[start : start + len(damage)] = damage
    try:
        assert decode_image(bytes(data), max_pixels=1_000_000).mode == "RGB"
    except BadSample as error:
        assert error.cause


def test_a_damaged_chunk_is_refused() -> None:
    """A nameless chunk between two of pixels: Pillow raises SyntaxError, of all things."""
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    first, *others = encoded(Image.fromarray(noise), "PNG").split(b"IDAT")
    data = first + b"IDAT" + b"\xcfz}L".join(others)
    assert len(others) == 2
    with pytest.raises(BadSample, match="unreadable PNG"):
        decode_image(data)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x026\0\0\0"])
def test_unreadable_exif_does_not_cost_the_picture(kind: str, exif: bytes) -> None:
    data = encoded(picture(), kind, exif=exif, lossless=True)
    assert oriented_size(open_image(data)) == picture().size
    assert far(decode_image(data), picture()) < 6
