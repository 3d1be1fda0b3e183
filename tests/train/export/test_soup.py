"""Which checkpoints a soup is made of."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from data_pipeline.storage.files import sha256_of
from tests.support.checkpoints import write_run
from tests.support.small import small_config, write_data
from train import checkpoint
from train.export.__main__ import main
from train.export.card import model_card
from train.export.soup import greedy, in_words
from train.export.source import load_source


def test_a_checkpoint_is_kept_where_the_mean_with_it_is_at_least_as_good():
    weights = {1: 1.0, 2: 4.0, 3: -9.0, 4: math.nan, 5: 2.0}

    def score(model: dict) -> float:  # best at 3
        return -abs(float(model["x"]) - 3) if not torch.isnan(model["x"]) else math.nan

    loaded: list[int] = []

    def load(step: int) -> dict:
        loaded.append(step)
        return {"x": torch.tensor(weights[step])}

    tried = greedy(load, list(weights), score)
    assert max(map(loaded.count, weights)) == 2, "once for its own score, once for the mean with it"
    assert [(one.step, one.kept) for one in tried] == [(5, True), (2, True), (1, False), (3, False)], "4 has no score"
    assert tried[1].score == pytest.approx(0)
    with pytest.raises(ValueError, match="not one of the checkpoints"):
        greedy(lambda step: {"x": torch.tensor(math.nan)}, [1, 2], score)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three checkpoints, whose second one is bad."""
    config = small_config(tmp_path_factory.mktemp("soup"))
    config.checkpoint.keep, config.data.val = 0, str(write_data(tmp_path_factory.mktemp("val"), (24,)))
    made = write_run(config, steps=3)
    spoil(made / "checkpoints" / "step_00000002")
    return made


def test_a_bad_checkpoint_is_left_out_and_the_list_is_in_the_card(run: Path):
    source = load_source(run, greedily=True)
    assert sorted(one.step for one in source.tried) == [1, 2, 3] and 2 not in source.steps
    assert [line.endswith("left out") for line in in_words(source.tried) if "step 2 " in line] == [True]
    kept = [checkpoint.load_part(run / "checkpoints" / f"step_0000000{step}", "model") for step in source.steps]
    for name, tensor in source.model.state_dict().items():
        if tensor.is_floating_point():
            assert torch.allclose(tensor, torch.stack([one[name] for one in kept]).mean(0), atol=1e-6)
    card = model_card(source)
    assert "a greedy soup of steps" in card and f"{max(one.score for one in source.tried if one.kept):.2f} %" in card
    assert sorted(one.step for one in load_source(run, soup=("1", "2"), greedily=True).tried) == [1, 2]


def test_without_held_out_data_there_is_no_greedy_soup(tmp_path: Path, capsys):
    run = write_run(small_config(tmp_path))
    assert main(["--run", str(run), "--to", "torch", "--soup", "greedy", str(tmp_path / "out")]) == 2
    assert "--soup greedy: the run has no --data.val to choose by" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_prints_what_is_kept(run: Path, tmp_path: Path, capsys):
    assert main(["--run", str(run), "--to", "torch", "--soup", "greedy", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.splitlines()[:3] == in_words(load_source(run, greedily=True).tried)


def spoil(path: Path) -> None:
    """Make the image tower of a checkpoint give every image the same embedding, with hashes that are right."""
    weights = checkpoint.load_part(path, "model")
    weights["image_projection.weight"] = torch.zeros_like(weights["image_projection.weight"]) + 1e-3
    save_file(weights, path / "model.safetensors")
    hashes = json.loads((path / "sha256.json").read_text())
    hashes["model.safetensors"] = sha256_of(path / "model.safetensors")
    (path / "sha256.json").write_text(json.dumps(hashes))
