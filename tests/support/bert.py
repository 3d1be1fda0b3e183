"""A small BERT, to be made from scratch."""

from pathlib import Path
from typing import Any


def write_bert(directory: str | Path, *, width: int, **fields: Any) -> str:
    """config.json of a BERT of two layers, `width` wide, with dropout 0.1; returns the directory."""
    from transformers import BertConfig

    sizes = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 2 * width}
    BertConfig(**sizes, **fields).save_pretrained(directory)
    return str(directory)
