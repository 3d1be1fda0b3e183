"""What the tests of the model share."""

import pytest
import transformers


@pytest.fixture(scope="module")
def text_tower(tmp_path_factory) -> str:
    """A directory with the configuration of a BERT of two layers, 16 wide, for 50 words and 32 positions."""
    directory = tmp_path_factory.mktemp("bert")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.BertConfig(vocab_size=50, max_position_embeddings=32, **sizes).save_pretrained(directory)
    return str(directory)
