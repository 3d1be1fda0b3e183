"""What the tests of the model share."""

import pytest

from tests.support.bert import write_bert


@pytest.fixture(scope="module")
def text_tower(tmp_path_factory) -> str:
    """A directory with the configuration of a BERT of two layers, 16 wide, for 50 words and 32 positions."""
    return write_bert(tmp_path_factory.mktemp("bert"), width=16, vocab_size=50, max_position_embeddings=32)
