"""A run to embed with, data, and their index."""

from pathlib import Path

import pytest

from data_pipeline.embeddings.index import Index, open_index
from tests.support.checkpoints import write_run
from tests.support.small import small_config, write_data
from train import embed
from train.config import RunConfig

SIZES, BAD = (9, 5, 12), (3, 20)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = small_config(tmp_path_factory.mktemp("use"))
    config.checkpoint.keep = 0
    return config


@pytest.fixture(scope="module")
def run(config: RunConfig) -> Path:
    return write_run(config)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 samples in three shards, two of which cannot be read."""
    return write_data(tmp_path_factory.mktemp("data"), SIZES, BAD)


@pytest.fixture(scope="module")
def index(run: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    out = tmp_path_factory.mktemp("index") / "index"
    assert embed.main(["--model", str(run), "--workers", "0", str(data), str(out)]) == 0
    return open_index(out)
