"""Recipes as they are shipped, with fresh weights: other runtimes agree with each other from image files on."""

from pathlib import Path

import pytest
import torch

from tests.support.bert import write_bert
from tests.support.checkpoints import write_run
from tests.support.vocabulary import write_tokenizer
from train import cli
from train.config import RunConfig
from train.export.__main__ import main
from train.export.hf import HfTarget
from train.export.onnx import OnnxTarget
from train.export.pairs import make_pairs
from train.export.source import load_source


def recipe(name: str, directory: Path) -> RunConfig:
    """The configuration of that name, without what would have to be fetched: BERT-base, or a small one for MiniLM."""
    write_tokenizer(directory / "tokenizer")
    text = "bert-base-uncased"
    if name == "quickstart":
        text = str(directory / "text")
        write_tokenizer(directory / "text")
        write_bert(directory / "text", width=384, vocab_size=100, max_position_embeddings=40)
    given = {"config": f"train/configs/{name}.yaml", "runs_dir": directory / "runs", "model.text.name": text}
    given |= {"model.image.weights": "scratch", "model.text.weights": "scratch"}
    given |= {"model.text.tokenizer": directory / "tokenizer"}
    return cli.parse([f"--{field}={value}" for field, value in given.items()])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quickstart", "resnet50_bert"])
def test_transformers_and_onnxruntime_agree_from_image_files_on(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    run = write_run(recipe(name, tmp_path), steps=1)
    for target in ("hf", "onnx"):
        assert main(["--run", str(run), "--to", target, str(tmp_path / target)]) == 0
    source = load_source(run)
    images, captions = make_pairs(tmp_path / "pairs", round(source.image_size / 0.9), source.image_size)
    one = HfTarget().embed(source, tmp_path / "hf", images, captions)["transformers"]
    other = OnnxTarget().embed(source, tmp_path / "onnx", images, captions)["fp32"]
    torch.testing.assert_close(one.image_ND, other.image_ND, rtol=0, atol=1e-4)
    torch.testing.assert_close(one.text_MD, other.text_MD, rtol=0, atol=1e-4)
