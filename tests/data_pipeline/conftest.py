"""A small real data set and a tokenizer for the tests of the data pipeline."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import settings

from data_pipeline.tokenizer import Tokenizer
from tests.support.pictures import tiny_image
from tests.support.tars import write_shards
from tests.support.vocabulary import write_tokenizer

# No time limit per example: the machine may be busy.
settings.register_profile("duet", deadline=None)
settings.load_profile("duet")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(str(write_tokenizer(tmp_path_factory.mktemp("tokenizer"))), 24)


@pytest.fixture
def tiny_shards(tmp_path: Path) -> Callable[..., Path]:
    """Make a directory of tar shards with a manifest: sizes[i] samples in shard i, png or jpg, two captions in json."""

    def make(sizes: Sequence[int] = (5, 4, 3), *, name: str = "shards") -> Path:

        def sample(number: int) -> tuple[str, dict[str, bytes]]:
            kind = "png" if number % 2 else "jpeg"
            captions = f'{{"captions": ["picture {number}", "number {number} of the {name}"]}}'
            return f"{number:05d}", {kind: tiny_image(number, kind=kind), "json": captions.encode()}

        return write_shards(tmp_path / name, sizes, sample)

    return make
