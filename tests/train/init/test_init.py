"""A run that begins with a trained pair: as good at step 0 as the pair was, whatever form it came in."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_pipeline.tokenizer import Tokenizer
from tests.support.checkpoints import MEAN, STD, write_run
from tests.support.small import write_data
from train import cli, loop
from train.checkpoint import load_state, newest
from train.config import RunConfig
from train.evaluation import build_task
from train.evaluation.encode import Encoder
from train.evaluation.suite import given_tasks
from train.export.hf import HfTarget
from train.export.open_clip import OpenClipTarget
from train.export.source import Source, load_source
from train.export.target import Target
from train.init.fit import fill
from train.init.origin import open_origin
from train.model.pair import PairModel, build_model
from train.model.text_files import tokenizer_name
from train.run.directory import read_results
from train.run.records import read_history

KINDS = ("open_clip", "hf", "duet")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The configuration of a run with a checkpoint, and held-out data."""
    from tests.support.small import small_config

    directory = tmp_path_factory.mktemp("init")
    config = small_config(directory)
    config.data.image_size, config.data.normalize, config.optim.ema = 64, (tuple(MEAN), tuple(STD)), 0.9
    config.data.train = str(write_data(directory / "train", [8]))
    config.data.val = str(write_data(directory / "val", [20]))
    config.data.lanes = 1
    write_run(config)
    return config


@pytest.fixture(scope="module")
def forms(trained: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The trained pair in every form, as `init` names it."""
    directory = tmp_path_factory.mktemp("forms")
    run = Path(trained.runs_dir) / trained.name
    source = load_source(run)
    for name, target in (("open_clip", OpenClipTarget()), ("hf", HfTarget())):
        (directory / name).mkdir()
        with torch.no_grad():
            target.write(source, directory / name)
    return {"duet": f"duet:{run}", **{kind: f"{kind}:{directory / kind}" for kind in ("open_clip", "hf")}}


def started(config: RunConfig) -> PairModel:
    """The model that a run of this configuration begins with."""
    origin = open_origin(config)
    with torch.random.fork_rng():
        model = build_model(config, MEAN, STD, pretrained=False)
    fill(model, origin, config)
    return model.eval()


def encoded(model: PairModel, config: RunConfig) -> tuple[Tensor, Tensor]:
    encoder = Encoder(model, config, Tokenizer(tokenizer_name(config), config.data.max_tokens))
    found = encoder.features(build_task(given_tasks(config)["val"]).manifest)
    return found.image_ND, found.text_MD


@pytest.mark.parametrize("kind", KINDS)
def test_it_embeds_as_the_trained_pair_does(kind: str, trained: RunConfig, forms: dict[str, str]) -> None:
    source = load_source(Path(trained.runs_dir) / trained.name)
    config = replace(trained, init=forms[kind])
    model = started(config)
    for actual_ND, expected_ND in zip(encoded(model, config), encoded(source.model, config), strict=True):
        torch.testing.assert_close(actual_ND, expected_ND, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.log_scale, source.model.log_scale)


def test_a_run_has_its_recall_at_step_0_and_resumes_without_it(
    trained: RunConfig, forms: dict[str, str], tmp_path: Path, runs_in_this_process, capfd
) -> None:
    source = load_source(Path(trained.runs_dir) / trained.name)
    encoder = Encoder(source.model, trained, source.tokenizer)
    expected = build_task(given_tasks(trained)["val"]).measure(encoder).metrics
    form = tmp_path / "form"
    Path(forms["open_clip"].partition(":")[2]).rename(form)
    config = replace(trained, init=f"open_clip:{form}", name="next", runs_dir=str(tmp_path / "runs"))
    config.optim = replace(config.optim, warmup_steps=0)
    config.train = replace(config.train, steps=2, global_batch=8, micro_batch=4)
    config.checkpoint = replace(config.checkpoint, every=1, keep=0)
    assert loop.run(config) == 0
    said = capfd.readouterr().out
    assert re.search(
        r"starts from open_clip:\S+ \(sha256 [0-9a-f]{12}\)\ntaken: 1\d\d tensors of the image tower", said
    )
    directory = Path(config.runs_dir) / "next"
    first = read_history(directory)[0]
    assert first["step"] == 0
    found = {name.removeprefix("val/"): value for name, value in first.items() if name.startswith("val/")}
    assert expected["t2i_R@5"] > 0
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert len(load_state(newest(directory)).init) == 64

    form.rename(tmp_path / "gone")
    (directory / "results.json").unlink()
    for step in (directory / "checkpoints").glob("step_00000002"):
        step.rename(tmp_path / "step")
    before = read_history(directory)
    assert loop.run(config) == 0
    assert "starts from" not in capfd.readouterr().out and read_results(directory)["steps"] == 2
    again = read_history(directory)
    assert [record["step"] for record in again] == [0, 1, 2] and again[2]["loss"] == before[2]["loss"]
    (tmp_path / "gone").rename(forms["open_clip"].partition(":")[2])


@pytest.mark.parametrize("kind", KINDS)
def test_all_fields_that_do_not_fit_are_said_at_once_and_these_fit(
    kind: str, trained: RunConfig, forms: dict[str, str], tmp_path: Path
) -> None:
    other = RunConfig(init=forms[kind])
    other.model.text.weights, other.model.text.pooling = "scratch", "mean"
    other.model.projection_bias = True
    with pytest.raises(ValueError, match=r"^init .*: this model is not of that shape\. Set\n") as caught:
        open_origin(other)
    lines = re.findall(r"\n  (\S+) (.*?)    \(now it ", str(caught.value))
    names = {name for name, _ in lines}
    assert {"model.image.name", "model.text.name", "model.embed_dim", "model.text.pooling"} <= names
    assert {"model.text.tokenizer", "model.projection_bias"} <= names
    flags = [f"--{name}={value}" for name, value in lines]
    given = ["--init", forms[kind], "--data.image_size=64", "--data.max_tokens=32"]
    fitting = cli.parse([*given, *flags])
    started(fitting)
    assert fitting.model.image.name == "resnet18" and fitting.model.embed_dim == 16


def exported_with_biases(trained: RunConfig, target: Target, tmp_path: Path) -> tuple[RunConfig, Source]:
    """A run whose projections have biases, one of them two layers, written to `tmp_path`/form."""
    model = replace(trained.model, projection_bias=True, image=replace(trained.model.image, projection="mlp"))
    config = replace(trained, model=model, runs_dir=str(tmp_path / "runs"))
    source = load_source(write_run(config, steps=1))
    (tmp_path / "form").mkdir()
    with torch.no_grad():
        target.write(source, tmp_path / "form")
    return config, source


def test_an_export_with_code_of_its_own_is_begun_with_like_any_other(trained: RunConfig, tmp_path: Path) -> None:
    config, source = exported_with_biases(trained, HfTarget(), tmp_path)
    with pytest.raises(ValueError, match=r"\n  model.projection_bias true    \(now it is False\)"):
        open_origin(replace(config, model=replace(config.model, projection_bias=False), init=f"hf:{tmp_path / 'form'}"))
    again = replace(config, init=f"duet:{tmp_path / 'form'}")
    for actual_ND, expected_ND in zip(encoded(started(again), again), encoded(source.model, config), strict=True):
        torch.testing.assert_close(actual_ND, expected_ND, rtol=0, atol=1e-6)


def test_biases_come_through_open_clip_which_has_none_for_texts(trained: RunConfig, tmp_path: Path) -> None:
    config, source = exported_with_biases(trained, OpenClipTarget(), tmp_path)
    again = replace(config, init=f"open_clip:{tmp_path / 'form'}")
    found = started(again)
    assert found.text_projection.bias.abs().sum() == 0 < source.model.text_projection.bias.abs().sum()
    for actual_ND, expected_ND in zip(encoded(found, again), encoded(source.model, config), strict=True):
        torch.testing.assert_close(actual_ND, expected_ND, rtol=0, atol=1e-5)


def test_what_is_fresh_and_what_is_left_is_said(trained: RunConfig, forms: dict[str, str]) -> None:
    config = cli.load(Path(trained.runs_dir) / trained.name / "config.yaml")
    config.init, config.loss.kind = forms["open_clip"], "sigmoid"
    config.model.multiscale.enabled, config.model.multiscale.heads = True, 2
    origin = open_origin(config)
    lines = fill(build_model(config, [0.1] * 3, STD, pretrained=False), origin, config)
    assert any(line.startswith("fresh: ") and "logit_bias" in line for line in lines), lines
    assert any("it was trained with data.normalize [[0.5, 0.45, 0.4]" in line for line in lines)
    origin = open_origin(replace(config, init=forms["hf"]))
    assert origin.left == []
    origin.tensors["text.encoder.more"] = torch.zeros(1)
    assert "left there: text.encoder.more" in fill(build_model(config, MEAN, STD, pretrained=False), origin, config)


def test_a_tensor_that_is_missing_or_a_scale_out_of_range_is_refused(trained: RunConfig, forms: dict[str, str]) -> None:
    config = replace(trained, init=forms["open_clip"])
    origin = open_origin(config)
    model = build_model(config, MEAN, STD, pretrained=False)
    config.model.max_logit_scale = 15.0
    with pytest.raises(
        ValueError, match=r"logit scale is 23\.\d+\. Set\n  model\.max_logit_scale 24    \(now it is 15"
    ):
        fill(model, origin, config)
    config.model.max_logit_scale = 100.0
    del origin.tensors["text.encoder.embeddings.LayerNorm.weight"]
    with pytest.raises(ValueError, match=r"1 of the .* text\.encoder\.embeddings\.LayerNorm\.weight is not there"):
        fill(model, origin, config)


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("clip:x", "init clip:x: give open_clip:MODEL, hf:MODEL, duet:MODEL"),
        ("hf:", "init hf:: give open_clip"),
        ("hf:./nowhere", "init hf:./nowhere: no such directory"),
        ("duet:./nowhere", "run ./nowhere: there is no complete checkpoint"),
        ("open_clip:{empty}", "open_clip_config.json cannot be read"),
        ("hf:{bert}", "is of type bert: give one of type clip, siglip, vision-text-dual-encoder"),
        ("hf:{lacking}", "holds none of model.safetensors"),
    ],
)
def test_what_cannot_be_read_is_said(trained: RunConfig, tmp_path: Path, init: str, message: str) -> None:
    (tmp_path / "lacking").mkdir()
    (tmp_path / "lacking" / "config.json").write_text(json.dumps({"model_type": "clip"}))
    places = {"empty": tmp_path, "bert": trained.model.text.name, "lacking": tmp_path / "lacking"}
    with pytest.raises(ValueError, match=re.escape(message.format(**places))):
        open_origin(replace(trained, init=init.format(**places)))
