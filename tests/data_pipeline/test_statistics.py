"""Statistics against numpy over all decoded pixels, and merging against one pass."""

import io
import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.statistics import (
    IMAGENET,
    MEASURE_SIZE,
    Moments,
    merge_statistics,
    normalization,
    shard_statistics,
)
from data_pipeline.storage.shards import ShardWriter


def random_image(seed: int, width: int, height: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 200 + seed, (height, width, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6))
def test_moments_equal_numpy_and_merge_exactly(images: list[tuple[int, int, int]]) -> None:
    together, merged = Moments(), Moments()
    pixels = []
    for seed, width, height in images:
        image_HWC = random_image(seed, width, height)
        pixels.append(image_HWC.reshape(-1, 3) / 255)
        together.update(image_HWC)
        part = Moments()
        part.update(image_HWC)
        merged.merge(Moments.from_json(json.loads(json.dumps(part.to_json()))))
    assert merged.to_json() == together.to_json()
    everything = np.concatenate(pixels)
    assert np.allclose(together.mean, everything.mean(0), atol=1e-12, rtol=0)
    assert np.allclose(together.std, everything.std(0), atol=1e-9, rtol=0)


def test_moments_stay_exact_where_floats_would_cancel() -> None:
    moments = Moments()
    for level in (254, 255):
        moments.update(np.full((500, 1000, 3), level, np.uint8))
    moments.merge(Moments(10**12, [255 * 10**12] * 3, [255**2 * 10**12] * 3))
    share = 5e5 / (1e12 + 1e6)
    assert moments.std[0] == pytest.approx(np.sqrt(share * (1 - share)) / 255, rel=1e-9)
    assert moments.mean[0] == pytest.approx(1 - share / 255, abs=1e-15)


def test_nothing_counted_is_zero() -> None:
    assert Moments().mean == Moments().std == [0.0, 0.0, 0.0]


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """Four shards of three images each, two captions an image; bad samples, repeats and classes among them."""
    paths = []
    for shard in range(4):
        with ShardWriter(tmp_path, "s", first=shard) as writer:
            for number in range(3):
                seed = 3 * shard + number
                pixels = random_image(seed, 20 + seed, 30 - seed)
                members = {
                    "png": encoded(pixels),
                    "json": json.dumps({"captions": [f"n {seed}", "every one"]}).encode(),
                }
                writer.write(f"{seed:03d}", {**members, "cls": str(seed % 2).encode()})
            if shard == 1:
                writer.write("twin", {"png": encoded(random_image(0, 20, 30)), "txt": b"n 0"})
                writer.write("broken", {"png": encoded(random_image(0, 20, 30))[:60], "txt": b"text"})
                writer.write("silent", {"png": encoded(random_image(0, 20, 30))})
        paths += writer.paths
    return paths


def test_statistics_of_shards_equal_plain_ones(shards: list[str]) -> None:
    seeds = [*range(12), 0, 0]
    images = [random_image(seed, 20 + seed, 30 - seed) for seed in seeds]
    pixels = np.concatenate([image.reshape(-1, 3) for image in images]) / 255
    got = merge_statistics(map(shard_statistics, shards))
    assert np.allclose(got["mean"], pixels.mean(0), atol=1e-6, rtol=0)
    assert np.allclose(got["std"], pixels.std(0), atol=1e-6, rtol=0)
    widths = sorted(20 + seed for seed in seeds)
    assert got["width"]["min"] == 20 and got["width"]["max"] == 31 and got["width"]["median"] == widths[6]
    assert got["height"]["mean"] == pytest.approx(np.mean([30 - seed for seed in seeds]))
    assert got["captions_per_image"]["mean"] == pytest.approx(25 / 14)
    assert got["caption_words"] == {"min": 2, "p5": 2, "median": 2, "p95": 2, "max": 2, "mean": 2.0}
    assert got["caption_characters"]["max"] == len("every one")
    assert got["duplicates"] == {"image": 2, "caption": 12}
    assert got["classes"] == {"count": 2, "samples": 12, "names": ["0", "1"]}
    assert got["samples"] == 15 and got["bad"]["count"] == 1 and got["uncaptioned"] == 1
    assert [record["key"] for record in got["bad"]["examples"]] == ["broken"]
    assert all(record["shard"] == "s-000001.tar" and record["cause"] for record in got["bad"]["examples"])
    json.dumps(got)


def test_statistics_do_not_depend_on_the_number_of_processes(shards: list[str]) -> None:
    alone = merge_statistics(map(shard_statistics, shards))
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        parts = pool.map(shard_statistics, shards)
    assert merge_statistics(json.loads(json.dumps(parts))) == alone


def test_large_images_are_measured_at_the_size_stated(tmp_path: Path) -> None:
    y, x = np.mgrid[0:900, 0:1200]
    pixels = np.stack([x * 255 // 1200, y * 255 // 900, (x + y) * 255 // 2100], 2).astype(np.uint8)
    for kind in ("jpg", "png"):
        with ShardWriter(tmp_path, kind) as writer:
            writer.write("large", {kind: encoded(pixels, "JPEG" if kind == "jpg" else "PNG"), "txt": b"large"})
        part = shard_statistics(writer.paths[0])
        assert part["moments"]["count"] == round(MEASURE_SIZE * 4 / 3) * MEASURE_SIZE
        assert part["histograms"]["width"] == {"1200": 1}
        got = merge_statistics([part])
        assert np.allclose(got["mean"], pixels.reshape(-1, 3).mean(0) / 255, atol=0.01)
        assert np.allclose(got["std"], pixels.reshape(-1, 3).std(0) / 255, atol=0.01)


def test_no_shards_and_no_good_samples(tmp_path: Path) -> None:
    assert merge_statistics([])["samples"] == 0 and merge_statistics([])["width"] == {}
    with ShardWriter(tmp_path, "bad") as writer:
        writer.write("a", {"png": b"nothing", "txt": b"text"})
    got = merge_statistics([shard_statistics(writer.paths[0])])
    assert got["samples"] == got["bad"]["count"] == 1 and got["mean"] == [0.0, 0.0, 0.0]


def counted(pixels: np.ndarray) -> dict:
    moments = Moments()
    moments.update(pixels)
    return {"moments": moments.to_json()}


def test_normalization() -> None:
    assert normalization("imagenet") == tuple(list(part) for part in IMAGENET)
    assert normalization([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    parts = [np.random.default_rng(n).integers(0, 256, (9, 7 + n, 3), dtype=np.uint8) for n in range(2)]
    together = np.concatenate([part.reshape(-1, 3) for part in parts]) / 255
    mean, std = normalization("dataset", *map(counted, parts))
    assert np.allclose(mean, together.mean(0), atol=1e-9) and np.allclose(std, together.std(0), atol=1e-9)


@pytest.mark.parametrize(
    ("setting", "statistics", "message"),
    [
        ("dataset", (), r"data\.normalize dataset: .* no image statistics; .*python -m data_pipeline index"),
        ("dataset", ({},), r"data\.normalize dataset: .* no image statistics"),
        ("dataset", (counted(np.zeros((2, 2, 3), np.uint8)),), r"data\.normalize: .* deviations .* above 0"),
        ("imagnet", (), r"data\.normalize is 'imagnet': imagenet, dataset, or"),
        (((0.5, 0.5), (0.5, 0.5)), (), r"data\.normalize is "),
        (((128, 128, 128), (50, 50, 50)), (), r"data\.normalize: means .* must be in 0\.\.1"),
    ],
)
def test_unusable_normalization_is_refused(setting: object, statistics: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normalization(setting, *statistics)
