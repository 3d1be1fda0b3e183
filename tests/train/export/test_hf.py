"""What transformers' own classes make of an export, and what they have no words for."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from tests.support.checkpoints import write_run
from train.config import RunConfig
from train.export.__main__ import main
from train.export.source import load_source


def test_auto_classes_load_it_and_its_card_says_what_the_run_says(run: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert main(["--run", str(run), "--to", "hf", str(out)]) == 0
    said = capsys.readouterr().out
    assert "transformers: least cosine image 0.9999" in said
    assert re.search(r"transformers: least cosine \d\.\d{4} of images of odd sizes, .*\n.* of large JPEG files", said)
    model = AutoModel.from_pretrained(out, trust_remote_code=False)
    processor = AutoProcessor.from_pretrained(out, trust_remote_code=False)
    picture = Image.effect_noise((90, 70), 60).convert("RGB")
    inputs = processor(text=["a cat", "two"], images=picture, padding=True, return_tensors="pt")
    logits = model(**inputs).logits_per_image
    assert logits.shape == (1, 2)
    assert model.logit_scale.item() == pytest.approx(load_source(run).model.log_scale.item())
    card = (out / "README.md").read_text()
    assert "the moving average of the weights after step 2" in card and "None were measured." in card
    assert "resnet18" in card and "1234" in card


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        ("model", "projection_bias", True, "--model.projection_bias true cannot be expressed by the target hf"),
        ("model.image", "projection", "mlp", "--model.image.projection mlp cannot be expressed by the target hf"),
        ("model.text", "projection", "mlp", "--model.text.projection mlp cannot be expressed by the target hf"),
        ("model.text", "pooling", "mean", "--model.text.pooling mean cannot be expressed"),
        ("model.image", "norm", "group", "--model.image.norm group cannot be expressed"),
        ("model.image", "name", "mobilenet_v3_small", "--model.image.name mobilenet_v3_small cannot be expressed"),
        ("loss", "kind", "sigmoid", "--loss.kind sigmoid, whose bias cannot be expressed"),
    ],
)
def test_a_recipe_without_words_for_it_is_refused_by_its_field(
    config: RunConfig, tmp_path: Path, capsys, section: str, field: str, value, message: str
) -> None:
    first, _, rest = section.partition(".")
    inner = getattr(config, first)
    changed = replace(inner, **{rest: replace(getattr(inner, rest), **{field: value})} if rest else {field: value})
    given = replace(config, **{first: changed}, runs_dir=str(tmp_path / "runs"))
    with torch.random.fork_rng():
        run = write_run(given, steps=1)
    assert main(["--run", str(run), "--to", "hf", str(tmp_path / "out")]) == 2
    assert re.search(re.escape(message), capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
