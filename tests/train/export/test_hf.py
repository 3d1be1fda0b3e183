"""What transformers makes of an export, by its own classes and by code that comes with one."""

import json
import operator
import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from data_pipeline.samples.transforms import eval_transform
from tests.support.checkpoints import write_run
from train.config import RunConfig
from train.export.__main__ import main
from train.export.hf import HfTarget, own_reason
from train.export.hf_own import write_own
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


def changed(config: RunConfig, tmp_path: Path, fields: dict[str, Any]) -> Path:
    """A run with other fields than `config`."""
    given = replace(config, **{name: deepcopy(getattr(config, name)) for name in ("model", "loss", "data")})
    given.runs_dir = str(tmp_path / "runs")
    for field, value in fields.items():
        section, _, name = field.rpartition(".")
        setattr(operator.attrgetter(section)(given), name, value)
    with torch.random.fork_rng():
        return write_run(given, steps=1)


def test_a_pair_without_a_class_brings_its_own_code(config: RunConfig, tmp_path: Path, capsys, monkeypatch) -> None:
    fields = {"model.image.projection": "mlp", "model.text.pooling": "mean", "model.projection_bias": True}
    fields |= {"loss.kind": "sigmoid", "data.eval_crop": 0.9}
    run, out = changed(config, tmp_path, fields), tmp_path / "out"
    assert main(["--run", str(run), "--to", "hf", str(out)]) == 0
    said = capsys.readouterr().out
    assert "transformers has no class for model.image.projection mlp: load it with trust_remote_code=True" in said
    assert re.search(r"least cosine image (1\.0000|0\.99999)", said) and "JPEG" not in said, "all files count"
    card = (out / "README.md").read_text()
    assert "from_pretrained(DIRECTORY, trust_remote_code=True)" in card and "no class for model.image.proj" in card
    Image.effect_noise((700, 500), 60).convert("RGB").save(tmp_path / "a.jpg")
    Image.effect_noise((91, 77), 60).convert("RGB").save(tmp_path / "b.png")
    paths = [tmp_path / name for name in ("a.jpg", "b.png")]
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = AutoModel.from_pretrained(out, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(out, trust_remote_code=True)
    opened = [Image.open(path) for path in paths]
    given = {"text": ["a red cat", "two"], "padding": True, "return_tensors": "pt"}
    with torch.no_grad():
        found, again, by_name = (model(**processor(images=images, **given)) for images in (opened, opened, paths))
    assert torch.equal(found.image_embeds, again.image_embeds), "it leaves the caller's images as they are"
    assert torch.equal(found.image_embeds, by_name.image_embeds)
    source = load_source(run)
    transform = eval_transform(source.config.data)
    with torch.no_grad():
        image_BD = source.model.encode_image(torch.stack([transform(path.read_bytes()) for path in paths]))
        text_BD = source.model.encode_text(*source.tokenizer(["a red cat", "two"]))
        wanted = image_BD @ text_BD.T * source.model.log_scale.exp() + source.model.logit_bias
    torch.testing.assert_close(found.logits_per_image, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("model.image.projection", "linear", ""),
        ("model.text.pooling", "pooler", ""),
        ("model.projection_bias", True, "model.projection_bias true"),
        ("model.text.projection", "mlp", "model.text.projection mlp"),
        ("model.text.pooling", "mean", "model.text.pooling mean"),
        ("model.image.name", "mobilenet_v3_small", "model.image.name mobilenet_v3_small"),
        ("loss.kind", "sigmoid", "loss.kind sigmoid"),
    ],
)
def test_code_of_its_own_comes_only_where_no_class_fits(
    config: RunConfig, tmp_path: Path, field: str, value: Any, reason: str
) -> None:
    source = load_source(changed(config, tmp_path, {field: value}))
    assert own_reason(source) == reason
    HfTarget().check(source)
    if field == "model.image.name":
        (tmp_path / "out").mkdir()
        with torch.no_grad():
            write_own(source, tmp_path / "out")
        written = json.loads((tmp_path / "out" / "config.json").read_text())
        assert (written["image_library"], written["image_head"]) == ("torchvision", "classifier.3")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "model.image.norm",
            "group",
            "--model.image.norm group cannot be expressed by the target hf; the target torch",
        ),
        ("model.image.name", "tests.support.vits.Clip", "--model.image.name tests.support.vits.Clip cannot be expr"),
    ],
)
def test_a_recipe_without_words_for_it_is_refused_by_its_field(
    config: RunConfig, tmp_path: Path, capsys, field: str, value: Any, message: str
) -> None:
    run = changed(config, tmp_path, {field: value, "data.eval_size": 0})
    assert main(["--run", str(run), "--to", "hf", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
