"""What the tests of the loaders share."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch

from data_pipeline.config import AugmentConfig, CaptionConfig, DataConfig
from data_pipeline.loader import MicroBatch
from data_pipeline.samples.colors import recolored
from data_pipeline.storage.manifest import Manifest, load_manifest
from tests.support.pictures import tiny_image
from tests.support.tars import write_shards

BATCH, MICRO, LANES, SIZES, SEED = 8, 2, 2, (9, 7, 8, 5), 3
STEPS = 8  # three are an epoch of SIZES


def settings(workers: int = 0, **options: object) -> DataConfig:
    augment = AugmentConfig(policy="strong")
    caption = CaptionConfig(templates=["a drawing of {}"])
    return DataConfig(
        image_size=16, augment=augment, caption=caption, lanes=LANES, shuffle_shards=2, workers=workers, **options
    )


def assert_equal(seen: Sequence[MicroBatch], expected: Sequence[MicroBatch]) -> None:
    """Bit for bit."""
    for ours, plain in zip(map(recolored, seen), map(recolored, expected), strict=True):
        assert (ours.step, ours.index, ours.keys) == (plain.step, plain.index, plain.keys)
        assert torch.equal(ours.images_BCHW, plain.images_BCHW) and ours.images_BCHW.dtype == torch.uint8
        assert torch.equal(ours.ids_BL, plain.ids_BL) and torch.equal(ours.mask_BL, plain.mask_BL)
        assert torch.equal(ours.image_ids_B, plain.image_ids_B) and ours.image_ids_B.dtype == torch.int64
        assert torch.equal(ours.text_ids_B, plain.text_ids_B) and ours.text_ids_B.dtype == torch.int64
        assert (ours.digest - plain.digest) % 2**64 == 0 and -(2**63) <= ours.digest < 2**63
        assert ours.bad == plain.bad


def damaged(directory: Path, bad: Sequence[int], size: int = 8, shards: int = 2) -> Manifest:
    """Shards in which samples `bad` of each cannot be used, each for another reason."""
    reasons = itertools.cycle(({"png": b"broken", "txt": b"text"}, {"txt": b"no image"}, {"png": tiny_image(1)}))

    def sample(number: int) -> tuple[str, dict[str, bytes]]:
        shard, index = divmod(number, size)
        whole = {"png": tiny_image(index), "txt": f"picture {index}".encode()}
        return f"{shard}-{index}", next(reasons) if index in bad else whole

    return load_manifest(write_shards(directory, [size] * shards, sample))
