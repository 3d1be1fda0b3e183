"""Corrupted images against plain Pillow and NumPy, and what they change of an evaluation."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter

from data_pipeline.batch import EvalBatch
from data_pipeline.storage.manifest import load_manifest
from data_pipeline.tokenizer import Tokenizer
from tests.support.pictures import rich_picture
from tests.support.small import small_config, write_data
from train.config import EvalTask
from train.evaluation import build_task
from train.evaluation.encode import Encoder
from train.evaluation.robustness import CORRUPTIONS, Corruption, chosen, curves
from train.model.pair import build_model


def batch(count: int = 3, side: int = 48) -> EvalBatch:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (count, side // 8, side // 8, 3), dtype=np.uint8)
    large = np.stack([np.asarray(Image.fromarray(one).resize((side, side))) for one in pixels])
    images = torch.from_numpy(large).permute(0, 3, 1, 2)
    keys = [f"part.tar/{number}" for number in range(count)]
    return EvalBatch(images, torch.zeros(0, 8), torch.zeros(0, 8), [], [], [None] * count, keys)


def changed(name: str, severity: int, seed: int = 0, **values: int) -> np.ndarray:
    """[B, H, W, 3]."""
    return Corruption(name, severity, seed)(batch(**values)).permute(0, 2, 3, 1).numpy()


def test_blur_jpeg_and_grey_are_those_of_pillow():
    for number, pixels in enumerate(batch().images_BCHW.permute(0, 2, 3, 1).numpy()):
        image = Image.fromarray(pixels)
        saved = io.BytesIO()
        image.save(saved, "JPEG", quality=15)
        expected = {
            ("blur", 4): image.filter(ImageFilter.GaussianBlur(4 * 48 / 224)),
            ("jpeg", 3): Image.open(saved),
            ("grey", 2): ImageEnhance.Color(image).enhance(0.6),
            ("grey", 5): image.convert("L").convert("RGB"),
        }
        for (name, severity), wanted in expected.items():
            difference = np.abs(changed(name, severity)[number].astype(int) - np.asarray(wanted).astype(int)).max()
            assert difference <= (1 if name == "grey" else 0), (name, severity)


def test_noise_is_gaussian_of_the_strength_that_is_stated():
    grey = batch(count=8, side=96)
    grey.images_BCHW[:] = 128
    for severity, strength in enumerate(CORRUPTIONS["noise"][1][:3], start=1):
        noise = Corruption("noise", severity, 0)(grey).double() / 255 - 128 / 255
        assert abs(float(noise.mean())) < 0.01 * strength + 1e-3
        assert float(noise.std()) == pytest.approx(strength, rel=0.02)


def test_what_is_drawn_depends_on_seed_and_key_alone():
    whole = changed("noise", 3)
    assert np.array_equal(whole, changed("noise", 3))
    assert not np.array_equal(whole, changed("noise", 3, seed=1))
    other = batch()
    other.images_BCHW, other.keys = other.images_BCHW.flip(0), other.keys[::-1]
    again = Corruption("noise", 3, 0)(other).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(whole, again[::-1])
    other.images_BCHW[:] = 128
    assert len(np.unique(Corruption("noise", 3, 0)(other).numpy(), axis=0)) == 3, "each image has its own"


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_higher_severity_is_further_away(name):
    plain = batch(side=224).images_BCHW.permute(0, 2, 3, 1).numpy().astype(int)
    away = [np.abs(changed(name, severity, side=224).astype(int) - plain).mean() for severity in range(1, 6)]
    assert away == sorted(away) and away[0] > 0


def test_a_corruption_that_there_is_not():
    assert chosen("all") == list(CORRUPTIONS) and chosen("jpeg,blur") == ["jpeg", "blur"]
    with pytest.raises(ValueError, match="corrupt fog: give all, or some of noise,blur,jpeg,grey"):
        chosen("blur,fog")


def test_curves_are_of_corrupted_images_and_leave_the_rest_as_it_was(tmp_path):
    config = small_config(tmp_path)
    model, tokenizer = build_model(config, (0.5,) * 3, (0.25,) * 3), Tokenizer(config.model.text.name, 32)
    data = write_data(tmp_path / "data", (5, 4), bad=(3,), draw=rich_picture)
    task, encoder = build_task(EvalTask(data=str(data))), Encoder(model, config, tokenizer)
    plain = task.measure(encoder)
    found = curves(task, encoder, ["noise", "grey"], seed=0)
    assert {name: len(one) for name, one in found.items()} == {"noise": 5, "grey": 5}
    assert all(one.keys() == task.scores.keys() for of_one in found.values() for one in of_one)
    assert task.measure(encoder).metrics == plain.metrics

    manifest = load_manifest(data)
    with encoder.changed(manifest, Corruption("grey", 5, 0)):
        grey = encoder.features(manifest)
    assert (grey.keys, grey.text_MD.tolist()) == (plain.features.keys, plain.features.text_MD.tolist())
    assert not torch.allclose(grey.image_ND, plain.features.image_ND, atol=1e-3)
    with encoder.changed(manifest, lambda batch: batch.images_BCHW):
        assert torch.equal(encoder.features(manifest).image_ND, plain.features.image_ND)
