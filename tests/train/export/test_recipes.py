"""Recipes as they are shipped, with fresh weights: other runtimes agree with each other from image files on."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from data_pipeline.samples.transforms import eval_transform
from tests.support.bert import write_bert
from tests.support.checkpoints import write_run
from tests.support.open_clip import interpreter
from tests.support.pictures import COLOURS
from tests.support.small import write_data
from tests.support.vocabulary import write_tokenizer
from train import cli
from train.config import EvalTask, RunConfig
from train.evaluation import build_task
from train.evaluation.encode import Encoder
from train.export.__main__ import main
from train.export.hf import HfTarget
from train.export.onnx import OnnxTarget
from train.export.open_clip import OpenClipTarget
from train.export.pairs import COUNT, make_pairs
from train.export.source import Source, load_source
from train.export.target import export


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


ZERO_SHOT = """
import json, sys
import open_clip, torch
from PIL import Image

directory, given = sys.argv[1], json.loads(sys.argv[2])
name = f"local-dir:{directory}"
model, _, preprocess = open_clip.create_model_and_transforms(name)
tokenizer = open_clip.get_tokenizer(name)
templates = [lambda name, sentence=sentence: sentence.replace("{}", name) for sentence in given["templates"]]
classifier = open_clip.build_zero_shot_classifier(model.eval(), tokenizer, given["names"], templates)
with torch.no_grad():
    images = torch.stack([preprocess(Image.open(path)) for path in given["paths"]])
    print(json.dumps((model.encode_image(images, normalize=True) @ classifier).argmax(1).tolist()))
"""


@pytest.mark.slow
@pytest.mark.timeout(2400)  # resnet50_bert on two busy cores
@pytest.mark.parametrize("name", ["quickstart", "resnet50_bert"])
def test_open_clips_own_zero_shot_code_gives_the_same_class_to_every_sample(name: str, tmp_path: Path) -> None:
    python = interpreter()
    run, out = write_run(recipe(name, tmp_path), steps=1), tmp_path / "out"
    source = load_source(run, crop=1.0)
    paths = make_pairs(tmp_path / "pairs", source.image_size, source.image_size)[0][:COUNT]
    spread(source, [path.read_bytes() for path in paths])
    export(source, OpenClipTarget(python), out)
    data = write_data(tmp_path / "data", (COUNT,), draw=lambda number: paths[number].read_bytes())
    names, templates = (
        [*COLOURS, "heart", "number", "two", "of the shards", "7"],
        ["a {} picture.", "the drawing of a {} heart"],
    )
    for kind, lines in (("names", names), ("templates", templates)):
        (tmp_path / f"{kind}.txt").write_text("\n".join(lines))
    task = EvalTask(task="zeroshot", data=str(data))
    task.classnames, task.templates = str(tmp_path / "names.txt"), str(tmp_path / "templates.txt")
    predictions = build_task(task).measure(Encoder(source.model, source.config, source.tokenizer)).predictions
    assert predictions is not None
    given = json.dumps({"names": names, "templates": templates, "paths": [str(path) for path in paths]})
    done = subprocess.run(
        [python, "-I", "-c", ZERO_SHOT, str(out), given], cwd="/", capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == predictions.predicted
    assert len(set(predictions.predicted)) > 1, "they do not all look the same to it"


@torch.no_grad()
def spread(source: Source, pictures: list[bytes]) -> None:
    """Take what these pictures have in common out of their embeddings: to fresh weights they look much the same."""
    last = [module for module in source.model.image_projection.modules() if isinstance(module, nn.Linear)][-1]
    inputs: list[torch.Tensor] = []
    hook = last.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    transform = eval_transform(source.config.data)
    source.model.encode_image(torch.stack([transform(content) for content in pictures]))
    hook.remove()
    common = nn.functional.normalize(inputs[0].mean(0), dim=0)
    last.weight -= torch.outer(last.weight @ common, common)
