"""Target `torch`: one directory that needs torch, transformers and Pillow, not Duet.

image.pt2, text.pt2    programs of torch.export, weights included: uint8 images or token ids -> unit vectors
tokenizer/             as transformers saves one
config.json            sizes, the temperature, where it came from
preprocessing.py       image files -> uint8 tensors, as in Duet's evaluation
load.py                a dozen lines that load all this
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from train.export.apart import embed_apart
from train.export.files import write_inputs
from train.export.pairs import Features
from train.export.programs import programs
from train.export.source import Source
from train.export.target import Target

LOAD = '''"""The model in this directory: images(paths) and texts(captions) give unit vectors, [N, D] and [M, D]."""

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer

from preprocessing import load

HERE = Path(__file__).parent
CONFIG = json.loads((HERE / "config.json").read_text())
encode_image, encode_text = (torch.export.load(HERE / f"{name}.pt2").module() for name in ("image", "text"))
tokenizer = AutoTokenizer.from_pretrained(HERE / "tokenizer")


@torch.no_grad()
def images(paths):
    options = (CONFIG["image_size"], CONFIG["eval_crop"], tuple(CONFIG["background"]))
    return encode_image(torch.stack([load(path, *options) for path in paths]))


@torch.no_grad()
def texts(captions):
    options = {"padding": CONFIG["padding"], "truncation": True, "max_length": CONFIG["max_tokens"]}
    tokens = tokenizer(captions, **options, return_tensors="pt")
    ids = tokens["input_ids"]
    return encode_text(ids, tokens.get("attention_mask", torch.ones_like(ids)))
'''
EMBED = """
sys.path.insert(0, directory)
from load import images, texts
"""


class TorchTarget(Target):
    """See the module."""

    def check(self, source: Source) -> None:
        """Every model can be traced."""

    def write(self, source: Source, directory: Path) -> None:
        for name, program in programs(source.model, source.image_size).items():
            torch.export.save(program, directory / f"{name}.pt2")
        write_inputs(source, directory)
        (directory / "load.py").write_text(LOAD)

    def embed(self, source: Source, directory: Path, images: list[Path], captions: list[str]) -> dict[str, Features]:
        return {"torch": embed_apart(EMBED, sys.executable, directory, images, captions)}
