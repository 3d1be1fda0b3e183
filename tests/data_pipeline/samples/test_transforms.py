"""Crops against torchvision's, colours against arithmetic, policies by what they do."""

import io
import math
import pickle
import random
from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.samples.augment import POLICIES, rand_augment, resolve_augment
from data_pipeline.samples.image import BadSample, centre_crop, load_region, random_crop
from data_pipeline.samples.transforms import eval_transform, resize, train_transform

WHITE, BLUE = (255, 255, 255), (0, 0, 255)
OFF = AugmentConfig(policy="none")


def picture(width: int, height: int) -> Image.Image:
    """A smooth picture without symmetry."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [x * 255 / width, y * 255 / height, 255 * (x / width) ** 2 * (1 - y / height)]
    return Image.fromarray(np.stack(channels, 2).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def train(image: bytes, augment: AugmentConfig, seed: int = 0, size: int = 32, **options: object) -> torch.Tensor:
    """The training transform, once."""
    return train_transform(DataConfig(image_size=size, augment=augment, **options))(image, random.Random(seed))


def far(seen: torch.Tensor, other: torch.Tensor) -> float:
    assert seen.shape == other.shape and seen.dtype == other.dtype == torch.uint8
    return (seen.float() - other.float()).abs().mean().item()


@pytest.mark.parametrize("size", [(100, 60), (60, 100), (64, 64), (33, 200), (20, 31)])
@pytest.mark.parametrize(("kind", "crop"), [("PNG", 1.0), ("JPEG", 1.0), ("PNG", 0.8), ("JPEG", 0.8)])
def test_eval_is_resize_and_centre_crop(size: tuple[int, int], kind: str, crop: float) -> None:
    data = encoded(picture(*size), kind)
    resize = v2.Resize(round(32 / crop), v2.InterpolationMode.BICUBIC)
    plain = v2.Compose([resize, v2.CenterCrop(32), v2.PILToTensor()])
    seen = eval_transform(DataConfig(image_size=32, eval_crop=crop))(data)
    assert seen.shape == (3, 32, 32) and seen.permute(1, 2, 0).is_contiguous()
    assert far(seen, plain(Image.open(io.BytesIO(data)))) < 3


def test_evaluation_may_look_at_larger_images_than_training() -> None:
    data, sizes = encoded(picture(100, 60)), {"image_size": 32, "eval_size": 48}
    assert torch.equal(eval_transform(DataConfig(**sizes))(data), eval_transform(DataConfig(image_size=48))(data))
    assert torch.equal(train(data, OFF, eval_size=48), train(data, OFF))


def test_no_augmentation_is_the_eval_transform() -> None:
    for size in ((100, 60), (60, 100), (64, 64)):
        data = encoded(picture(*size))
        assert torch.equal(train(data, OFF), eval_transform(DataConfig(image_size=32))(data))


@given(
    st.integers(1, 900),
    st.integers(1, 900),
    st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)).map(sorted),
    st.tuples(st.floats(0.3, 3), st.floats(0.3, 3)).map(sorted),
    st.integers(0, 99),
)
def test_crops_lie_inside_and_have_the_area_and_shape_asked_for(
    width: int, height: int, scale: list[float], ratio: list[float], seed: int
) -> None:
    left, top, crop_width, crop_height = random_crop(width, height, tuple(scale), tuple(ratio), random.Random(seed))
    assert min(left, top) >= 0 and crop_width >= 1 and crop_height >= 1
    assert left + crop_width <= width and top + crop_height <= height
    if min(crop_width, crop_height) >= 50:
        assert ratio[0] * 0.96 <= crop_width / crop_height <= ratio[1] * 1.04 or crop_width == width
        share = crop_width * crop_height / (width * height)
        centred = abs(2 * left + crop_width - width) <= 1 and abs(2 * top + crop_height - height) <= 1
        assert scale[0] * 0.95 <= share <= scale[1] * 1.05 or centred


def test_crops_are_distributed_as_torchvisions() -> None:
    rng = random.Random(0)
    ours = np.array([random_crop(300, 200, (0.2, 0.9), (0.5, 2.0), rng) for _ in range(4000)])
    torch.manual_seed(0)
    image = torch.empty(3, 200, 300)
    drawn = [v2.RandomResizedCrop(8, (0.2, 0.9), (0.5, 2.0)).make_params([image]) for _ in range(4000)]
    theirs = np.array([[one["left"], one["top"], one["width"], one["height"]] for one in drawn])
    for name, column in zip(("left", "top", "width", "height"), range(4), strict=True):
        mine, its = ours[:, column], theirs[:, column]
        assert abs(mine.mean() - its.mean()) < 4 * its.std() / math.sqrt(2000), name
        assert abs(mine.std() - its.std()) < 0.06 * its.std(), name


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_region_is_the_crop_of_the_whole_picture_resized(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(640, 480), kind, exif=exif, quality=95)
    upright = Image.open(io.BytesIO(data))
    turns = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270}
    upright = upright.transpose(turns[orientation]) if orientation in turns else upright
    for crop in ((0, 0, *upright.size), (100, 60, 300, 290), (7, 9, 64, 80), (0, 0, 1, 1)):
        left, top, width, height = crop
        box = (left, top, left + width, top + height)
        plain = upright.resize((64, 64), Image.Resampling.BICUBIC, box=box)
        seen_HWC = resize(load_region(Image.open(io.BytesIO(data)), crop, 64, WHITE), 64).permute(1, 2, 0)
        assert far(seen_HWC, torch.from_numpy(np.array(plain))) < 2.5, crop


def test_randomness_comes_from_the_generator_given_alone() -> None:
    strong = AugmentConfig(policy="strong")
    data = encoded(picture(80, 60))
    first = train(data, strong, seed=5)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert torch.equal(first, train(data, strong, seed=5))
    assert not torch.equal(first, train(data, strong, seed=6))
    transform = train_transform(DataConfig(image_size=32, augment=strong))
    again = pickle.loads(pickle.dumps(transform))
    assert torch.equal(first, again(data, random.Random(5))), "a loader process may get it by pickle"


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_set_every_field_and_each_can_be_overridden(policy: str) -> None:
    resolved = resolve_augment(AugmentConfig(policy=policy))
    assert {item.name for item in fields(resolved)} | {"policy"} == {item.name for item in fields(AugmentConfig)}
    for name, value in {"flip": 0.25, "scale": (0.3, 0.4), "rand_ops": 3, "jitter_probability": 0.0}.items():
        changed = resolve_augment(replace(AugmentConfig(policy=policy), **{name: value}))
        assert getattr(changed, name) == value and replace(changed, **{name: getattr(resolved, name)}) == resolved
    seen = train(encoded(picture(50, 40)), AugmentConfig(policy=policy), size=24)
    assert seen.shape == (3, 24, 24) and seen.permute(1, 2, 0).is_contiguous()


def test_text_safe_never_flips_or_turns() -> None:
    resolved = resolve_augment(AugmentConfig(policy="text_safe"))
    assert resolved.flip == resolved.rotation == resolved.rand_ops == 0
    rising = encoded(picture(64, 64))
    for seed in range(50):
        seen = train(rising, AugmentConfig(policy="text_safe"), seed).float()
        assert seen[0, :, -4:].mean() > seen[0, :, :4].mean() and seen[1, -4:].mean() > seen[1, :4].mean()


def test_flip_happens_as_often_as_told_and_mirrors() -> None:
    data = encoded(picture(32, 32))
    plain = train(data, OFF)
    seen = [train(data, replace(OFF, flip=0.3), seed) for seed in range(400)]
    flips = sum(torch.equal(image, plain.flip(2)) for image in seen)
    assert flips + sum(torch.equal(image, plain) for image in seen) == 400 and 85 < flips < 160


def test_grayscale_and_jitter_happen_as_often_as_told() -> None:
    data = encoded(picture(16, 16))
    gray = [train(data, replace(OFF, grayscale=0.3), seed, size=16) for seed in range(300)]
    assert 60 < sum(torch.equal(image[0], image[1]) and torch.equal(image[1], image[2]) for image in gray) < 120
    jitter = replace(OFF, jitter=(0.4, 0.4, 0.4, 0.1), jitter_probability=0.3)
    changed = [not torch.equal(train(data, jitter, seed, size=16), train(data, OFF, size=16)) for seed in range(300)]
    assert 60 < sum(changed) < 120


def test_rotation_fills_with_the_background() -> None:
    data = encoded(Image.new("RGB", (40, 40), (0, 200, 0)))
    corners = []
    for seed in range(40):
        seen = train(data, replace(OFF, rotation=40.0), seed, background=BLUE)
        assert tuple(seen[:, 16, 16].tolist()) == (0, 200, 0)
        corners.append(tuple(seen[:, 0, 0].tolist()))
    assert corners.count(BLUE) > 25


def test_rand_augment_applies_all_its_operations() -> None:
    image = picture(24, 24)
    seen = {rand_augment(image, 1, 15, BLUE, random.Random(seed)).tobytes() for seed in range(400)}
    # Identity, autocontrast and equalize have one outcome, posterize and solarize one each, the nine others two.
    assert 20 <= len(seen) <= 23 and image.tobytes() in seen
    assert {rand_augment(image, 0, 15, BLUE, random.Random(seed)).tobytes() for seed in range(9)} == {image.tobytes()}


def test_an_opened_image_does_as_well_as_its_bytes_and_bad_ones_say_so() -> None:
    data = encoded(picture(300, 200), "JPEG")
    transform = eval_transform(DataConfig(image_size=32))
    assert torch.equal(transform(data), transform(Image.open(io.BytesIO(data))))
    with pytest.raises(BadSample):
        transform(data[:500])
    with pytest.raises(BadSample, match="max_pixels"):
        train(data, OFF, max_pixels=59_999)


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": (0.0, 1.0)},
        {"scale": (0.9, 0.5)},
        {"scale": (0.5, 1.5)},
        {"ratio": (2.0, 1.0)},
        {"flip": 1.5},
        {"rotation": -1.0},
        {"jitter": (0.1, 0.1, 0.1, 0.6)},
        {"jitter": (-0.1, 0.1, 0.1, 0.0)},
        {"grayscale": -0.5},
        {"rand_ops": -1},
        {"rand_magnitude": 31},
    ],
)
def test_unusable_values_are_refused_by_name(wrong: dict) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=rf"data\.augment\.{name} is "):
        train_transform(DataConfig(augment=AugmentConfig(**wrong)))


@pytest.mark.parametrize("wrong", [{"image_size": 0}, {"eval_size": -1}, {"eval_crop": 0.0}, {"eval_crop": 1.5}])
@pytest.mark.parametrize("transform", [eval_transform, train_transform])
def test_sizes_are_checked_before_training(wrong: dict, transform: Callable) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=rf"data\.{name} is {wrong[name]}"):
        transform(DataConfig(**wrong))


def test_centre_crop() -> None:
    assert centre_crop(10, 4) == (3, 0, 4, 4) and centre_crop(4, 9) == (0, 2, 4, 4)
    assert centre_crop(10, 8, 0.5) == (3, 2, 4, 4) and centre_crop(10, 1, 0.2) == (4, 0, 1, 1)
