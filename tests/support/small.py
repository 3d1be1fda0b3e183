"""A small real model and data set: a ResNet-18 and a BERT of two layers, pictures of 32 pixels in tar shards."""

import io
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image
from transformers import BertConfig

from data_pipeline.storage.manifest import write_manifest
from data_pipeline.storage.shards import ShardWriter
from tests.support.tars import describe
from tests.support.vocabulary import write_tokenizer
from train.config import RunConfig

COLOURS = {"red": (220, 30, 30), "green": (20, 160, 60), "blue": (30, 60, 220), "yellow": (240, 220, 20)}


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
    number, paths = 0, []
    for shard, size in enumerate(sizes):
        with ShardWriter(directory, "part", first=shard) as writer:
            for _ in range(size):
                label = number % len(COLOURS)
                captions = [f"{name} no. {number}" for name in ("picture", "drawing", "heart")[: 1 + number % 3]]
                captions[0] = f"the {list(COLOURS)[label]} {captions[0]}"
                members = {"json": json.dumps({"captions": captions}).encode()}
                members["png"] = b"no picture" if number in bad else (draw or picture)(number)
                if classes:
                    members["cls"] = str(label).encode()
                writer.write(f"{number:04d}", members)
                number += 1
        paths += writer.paths
    write_manifest(directory, [describe(path) for path in paths], {})
    return directory


def picture(number: int) -> bytes:
    """A colour with coarse noise that differs from number to number, as PNG."""
    chance = random.Random(number)
    colour = list(COLOURS.values())[number % len(COLOURS)]
    image = Image.new("RGB", (4, 4))
    image.putdata([tuple(min(255, part + chance.randrange(60)) for part in colour) for _ in range(16)])
    buffer = io.BytesIO()
    image.resize((40, 36), Image.Resampling.NEAREST).save(buffer, "png")
    return buffer.getvalue()


def rich_picture(number: int) -> bytes:
    """Noise of every brightness and colour, as PNG: BatchNorm sees no flat areas, which would amplify rounding."""
    pixels = random.Random(number).randbytes(12 * 12 * 3)
    buffer = io.BytesIO()
    Image.frombytes("RGB", (12, 12), pixels).resize((72, 72), Image.Resampling.BICUBIC).save(buffer, "png")
    return buffer.getvalue()


def small_config(directory: Path) -> RunConfig:
    """The configuration of a small run; writes its text tower and tokenizer to `directory`."""
    write_tokenizer(directory / "text")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertConfig(vocab_size=100, max_position_embeddings=40, **sizes).save_pretrained(directory / "text")
    config = RunConfig(name="small", runs_dir=str(directory / "runs"))
    config.data.image_size, config.data.max_tokens, config.data.workers = 32, 32, 0
    config.model.image.name = "resnet18"
    config.model.text.name, config.model.text.weights = str(directory / "text"), "scratch"
    config.model.embed_dim = 16
    config.tracking.wandb = "disabled"
    config.eval.batch = 4
    return config
