"""The evaluation loader: every sample once, in order, whatever reads it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_pipeline.config import DataConfig
from data_pipeline.loader import EvalBatch, eval_loader
from data_pipeline.order import sequential
from data_pipeline.samples.text import split
from data_pipeline.samples.transforms import eval_transform
from data_pipeline.storage.manifest import Manifest, load_manifest
from data_pipeline.storage.shards import ShardReader
from data_pipeline.tokenizer import Tokenizer
from tests.support.loading import SIZES, damaged, settings


@pytest.fixture
def manifest(tiny_shards: Callable[..., Path]) -> Manifest:
    return load_manifest(tiny_shards(SIZES))


def evaluated(manifest: Manifest, tokenizer: Tokenizer, config: DataConfig, world: int, batch: int) -> list[EvalBatch]:
    options = {"batch": batch, "world": world}
    return [item for rank in range(world) for item in eval_loader(config, manifest, tokenizer, rank=rank, **options)]


@pytest.mark.parametrize(("workers", "world", "batch"), [(0, 1, 4), (2, 1, 4), (0, 3, 100), (1, 4, 3), (0, 40, 4)])
def test_evaluation_has_every_sample_once_in_order(
    manifest: Manifest, tokenizer: Tokenizer, workers: int, world: int, batch: int
) -> None:
    config = settings(workers)
    seen = evaluated(manifest, tokenizer, config, world, batch)
    transform, readers = eval_transform(config), [ShardReader(shard.url, shard) for shard in manifest.shards]
    raws = [readers[place.shard].raw(place.index) for place in sequential(SIZES)]
    assert [key for item in seen for key in item.keys] == [
        f"{Path(raw['__shard__']).name}/{raw['__key__']}" for raw in raws
    ]
    plain = torch.stack([transform(split(raw)[0]) for raw in raws])
    assert torch.equal(torch.cat([item.images_BCHW for item in seen]), plain)
    assert [text for item in seen for text in item.captions] == [text for raw in raws for text in split(raw)[1]]
    for item in seen:
        assert len(item.keys) == len(item.classes) == len(item.images_BCHW) <= batch
        assert item.caption_row == [row for row in range(len(item.keys)) for _ in range(2)]
        ids_ML, mask_ML = tokenizer(item.captions)
        assert torch.equal(item.ids_ML, ids_ML) and torch.equal(item.mask_ML, mask_ML)


def test_evaluation_leaves_bad_samples_out_and_records_them(tmp_path: Path, tokenizer: Tokenizer) -> None:
    manifest = damaged(tmp_path, (0, 1, 2, 3, 6), shards=1)
    seen = evaluated(manifest, tokenizer, settings(), 1, 4)
    names = [f"train-000000.tar/0-{index}" for index in (2, 4, 5, 7)]  # number 2 only lacks a caption
    assert [key for item in seen for key in item.keys] == names
    assert [record["key"] for item in seen for record in item.bad] == ["0-0", "0-1", "0-3", "0-6"]
    assert seen[0].images_BCHW.shape == (1, 3, 16, 16) and seen[0].ids_ML.shape[0] == 0
    with pytest.raises(ValueError, match=r"^batch is 0"):
        eval_loader(settings(), manifest, tokenizer, batch=0)
