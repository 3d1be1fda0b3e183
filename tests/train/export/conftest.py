"""A run to export."""

import json
from pathlib import Path

import pytest

from tests.support.checkpoints import write_run
from tests.support.small import small_config
from train.config import RunConfig


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = small_config(tmp_path_factory.mktemp("export"))
    config.data.image_size, config.data.eval_size, config.optim.ema, config.checkpoint.keep = 48, 64, 0.9, 0
    options = Path(config.model.text.name) / "tokenizer_config.json"
    options.write_text(
        json.dumps(json.loads(options.read_text()) | {"max_length": 128})
    )  # as sentence-transformers does
    return config


@pytest.fixture(scope="module")
def run(config: RunConfig) -> Path:
    return write_run(config)
