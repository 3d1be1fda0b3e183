"""Colour jitter on the device beside Pillow's ImageEnhance, operation by operation and as a whole."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from data_pipeline.batch import MicroBatch
from data_pipeline.samples.augment import POLICIES, Augmentation
from data_pipeline.samples.colors import draw_change, gathered, recolor, recolored
from tests.data_pipeline.samples.test_image import picture

NONE = Augmentation()


def pillow(image: Image.Image, jitter: tuple[float, ...], rng: random.Random) -> Image.Image:
    """The same draws, one operation after the other."""
    changes = []
    for kind, width in zip((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), jitter, strict=False):
        if width:
            factor = rng.uniform(max(0.0, 1 - width), 1 + width)
            changes.append(lambda image, kind=kind, factor=factor: kind(image).enhance(factor))
    if jitter[3]:
        turn = rng.uniform(-jitter[3], jitter[3])
        changes.append(lambda image: turned(image, turn))
    rng.shuffle(changes)
    for change in changes:
        image = change(image)
    return image


def turned(image: Image.Image, turn: float) -> Image.Image:
    """Exactly, where Pillow's HSV has 256 hues."""
    hsv = np.asarray(image.convert("RGB"), np.float64) / 255
    largest, spread = hsv.max(2), np.ptp(hsv, axis=2)
    red, green, blue = np.moveaxis(hsv, 2, 0)
    by = np.where(spread > 0, spread, 1)
    hue = np.select(
        [largest == red, largest == green], [(green - blue) / by, 2 + (blue - red) / by], 4 + (red - green) / by
    )
    parts = [(corner + hue + 6 * turn) % 6 for corner in (5, 3, 1)]
    channels = [largest - spread * np.clip(np.minimum(part, 4 - part), 0, 1) for part in parts]
    return Image.fromarray((np.stack(channels, 2) * 255).round().astype(np.uint8))


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def ours(image: Image.Image, jitter: tuple[float, ...], seed: int, grey: bool = False) -> torch.Tensor:
    change = draw_change(replace(NONE, jitter=jitter), any(jitter), grey, random.Random(seed))
    return recolor(tensor(image)[None], gathered([change]))[0]


def difference(seen: torch.Tensor, other: Image.Image) -> torch.Tensor:
    return (seen.float() - tensor(other).float()).abs()


@pytest.mark.parametrize("part", range(4))
def test_each_operation_is_that_of_pillow(part: int) -> None:
    image, jitter = picture(24, 24), [0.0, 0.0, 0.0, 0.0]
    jitter[part] = 0.5
    for seed in range(20):
        expected = pillow(image, tuple(jitter), random.Random(seed))
        assert difference(ours(image, tuple(jitter), seed), expected).max() <= 1
    assert difference(ours(image, tuple(jitter), 0), image).mean() > 5


@pytest.mark.parametrize(("policy", "most"), [("standard", 1.8), ("strong", 2.4)])
def test_all_of_them_together_are_near_to_one_after_the_other(policy: str, most: float) -> None:
    """In levels of 255; up to 1.5 of them because Pillow rounds down, three times."""
    image, jitter = picture(60, 40), POLICIES[policy].jitter
    expected = [pillow(image, jitter, random.Random(seed)) for seed in range(60)]
    apart = torch.stack([difference(ours(image, jitter, seed), one).mean() for seed, one in enumerate(expected)])
    changed = torch.stack([difference(tensor(image), one).mean() for one in expected])
    assert apart.mean() < most and changed.mean() > 8 * apart.mean()


def test_hue_turns_the_circle_of_colours() -> None:
    red = Image.new("RGB", (1, 1), (255, 0, 0))
    colors = gathered([np.array([*np.eye(3, 6).ravel(), 1 / 3, *np.eye(3, 6).ravel()], np.float32)])
    assert recolor(tensor(red)[None], colors).flatten().tolist() == [0, 255, 0]


def test_grey_comes_last_and_is_pillows() -> None:
    image = picture(24, 24)
    assert difference(ours(image, (0.0,) * 4, 0, grey=True), image.convert("L").convert("RGB")).max() <= 1
    seen = ours(image, (0.4, 0.4, 0.4, 0.1), 1, grey=True)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[1], seen[2])


def test_an_image_is_the_same_in_any_batch_and_others_stay() -> None:
    images = torch.stack([tensor(picture(24, 24)).roll(shift, 1) for shift in range(6)])
    images = images.contiguous(memory_format=torch.channels_last)
    strong, rng = POLICIES["strong"], random.Random(0)
    changes = [draw_change(strong, row % 2 == 0, row == 4, rng) for row in range(6)]
    whole = recolor(images, gathered(changes))
    assert whole.is_contiguous(memory_format=torch.channels_last) and whole.dtype == torch.uint8
    assert torch.equal(whole[1::2], images[1::2])
    for row in (0, 2, 4):
        assert torch.equal(recolor(images[row : row + 1], gathered([changes[row]]))[0], whole[row])
        assert not torch.equal(whole[row], images[row])
    assert gathered([None, None]) is None


def test_a_batch_is_recolored_once_its_views_too() -> None:
    images = torch.stack([tensor(picture(8, 8))] * 2)
    rng = random.Random(0)
    colors, view_colors = (gathered([draw_change(POLICIES["strong"], True, False, rng), None]) for _ in range(2))
    ids = torch.ones(2, 8, dtype=torch.int64)
    batch = MicroBatch(images, ids, ids, 0, 0, ["", ""], views_BCHW=images, colors=colors, view_colors=view_colors)
    batch = batch.clone()
    assert batch.colors is not colors and torch.equal(batch.colors.changes_RP, colors.changes_RP)
    seen = recolored(batch)
    assert torch.equal(seen.images_BCHW, recolor(images, colors))
    assert torch.equal(seen.views_BCHW, recolor(images, view_colors))
    assert seen.colors is seen.view_colors is None and recolored(seen) is seen
