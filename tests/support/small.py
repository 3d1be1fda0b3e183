"""A small real model and data set: a ResNet-18 and a BERT of two layers, pictures of 32 pixels in tar shards."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.support.bert import write_bert
from tests.support.pictures import COLOURS, picture
from tests.support.tars import write_shards
from tests.support.vocabulary import write_tokenizer
from train.config import RunConfig

# Of a checkpoint whose text tower nobody builds.
TEXT_FILES = {"text/config.json": b"{}", "tokenizer/tokenizer_config.json": b"{}"}


def write_data(
    directory: Path,
    sizes: Sequence[int],
    bad: Sequence[int] = (),
    classes: bool = True,
    draw: Callable[[int], bytes] | None = None,
) -> Path:
    """Shards of sizes[i] samples: coloured pictures, one to three captions each, class = number of the colour.

    bad: numbers of samples whose image cannot be read. draw: makes other pictures, from the number.
    """

    def sample(number: int) -> tuple[str, dict[str, bytes]]:
        label = number % len(COLOURS)
        captions = [f"{name} no. {number}" for name in ("picture", "drawing", "heart")[: 1 + number % 3]]
        captions[0] = f"the {list(COLOURS)[label]} {captions[0]}"
        members = {"json": json.dumps({"captions": captions}).encode()}
        members["png"] = b"no picture" if number in bad else (draw or picture)(number)
        if classes:
            members["cls"] = str(label).encode()
        return f"{number:04d}", members

    return write_shards(directory, sizes, sample, prefix="part")


def small_config(directory: Path) -> RunConfig:
    """The configuration of a small run; writes its text tower and tokenizer to `directory`."""
    write_tokenizer(directory / "text")
    write_bert(directory / "text", width=32, vocab_size=100, max_position_embeddings=40)
    config = RunConfig(name="small", runs_dir=str(directory / "runs"))
    config.data.image_size, config.data.max_tokens, config.data.workers = 32, 32, 0
    config.model.image.name = "resnet18"
    config.model.text.name, config.model.text.weights = str(directory / "text"), "scratch"
    config.model.embed_dim = 16
    config.tracking.wandb = "disabled"
    config.eval.batch = 4
    return config
