"""The self-contained directory: what it gives for image files, and what is refused."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from data_pipeline.samples.transforms import eval_transform
from train.export import files
from train.export.__main__ import main
from train.export.pairs import Features, compare
from train.export.source import load_source


@pytest.fixture(scope="module")
def out(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("torch") / "out"
    assert main(["--run", str(run), "--to", "torch", str(out)]) == 0
    return out


USE = """
import sys
sys.path.insert(0, sys.argv[1])
import load
(vector,), texts = load.images([sys.argv[2]]), load.texts(["a red cat", "two"])
assert vector.norm().sub(1).abs() < 1e-5 and texts.shape == (2, 16), texts.shape
assert not {name.split(".")[0] for name in sys.modules} & {"train", "data_pipeline"}
print(*vector.tolist())
"""


def test_it_is_verified_and_used_without_duet_wherever_it_is_moved(run: Path, out: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(out, tmp_path / "moved")

    Image.effect_noise((90, 70), 60).convert("RGB").save(tmp_path / "a.png")
    command = [sys.executable, "-I", "-c", USE, str(moved), str(tmp_path / "a.png")]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    source = load_source(run)
    image_CHW = eval_transform(source.config.data)((tmp_path / "a.png").read_bytes())
    with torch.no_grad():
        wanted_D = source.model.encode_image(image_CHW[None])[0]
    assert torch.allclose(torch.tensor([float(value) for value in done.stdout.split()]), wanted_D, atol=1e-5)
    assert not list(out.parent.glob(".*")), "nothing else is left"


def test_averaged_weights_are_taken_of_the_step_that_is_asked_for_and_a_soup_is_their_mean(run: Path) -> None:
    kept = [load_file(run / "checkpoints" / f"step_0000000{step}" / "ema.safetensors") for step in (1, 2)]
    name = "text_projection.weight"
    assert torch.equal(load_source(run, step="1").model.state_dict()[name], kept[0][name])
    assert torch.equal(load_source(run).model.state_dict()[name], kept[1][name])
    soup = load_source(run, soup=("1", "2"))
    assert torch.allclose(soup.model.state_dict()[name], (kept[0][name] + kept[1][name]) / 2, atol=1e-7)
    assert soup.steps == [1, 2] and soup.averaged


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "nowhere", "--to", "torch"], "--run nowhere: there is no run"),
        (["--run", "{run}", "--to", "coreml"], "--to coreml: no such target; give one of torch"),
        (["--run", "{run}", "--to", "torch", "--step", "7"], "--step 7: .* has no such checkpoint. There are: 1, 2"),
        (
            ["--run", "{run}", "--to", "torch", "--step", "1", "--soup", "1,2"],
            "--step 1: give either this or --soup",
        ),
        (["--run", "{run}", "--to", "torch", "--soup", "2,"], "--soup 2,: give two steps or more"),
        (["--run", "{run}", "--to", "torch", "--soup", "1,b"], "--step b: .* has no such checkpoint"),
        (["--run", "{run}", "--to", "torch", "--soup", "1,9"], "--step 9: .* has no such checkpoint"),
    ],
)
def test_bad_input_is_said_and_writes_nothing(run: Path, tmp_path: Path, capsys, arguments, message) -> None:
    given = [argument.replace("{run}", str(run)) for argument in arguments]
    assert main([*given, str(tmp_path / "out")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_a_directory_that_is_there_stays_as_it_is(run: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "mine").write_text("mine")
    assert main(["--run", str(run), "--to", "torch", str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_export_that_differs_fails_and_leaves_nothing(run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(files, "PREPROCESSING", files.PREPROCESSING.replace("share)", "share / 2)"))
    assert main(["--run", str(run), "--to", "torch", str(tmp_path / "out")]) == 2
    assert "the least cosine of image embeddings is" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_ranking_is_the_same_but_for_ties() -> None:
    wanted, swapped = around([0.1, 0.105]), around([0.106, 0.104])  # similarities differ by 0.0005 before
    assert "the same ranking" in compare("x", wanted, wanted)
    with pytest.raises(ValueError, match=r"x: candidates are ranked otherwise whose similarities differ by 0\.0005"):
        compare("x", wanted, swapped)
    assert "the same ranking" in compare("x", wanted, swapped._replace(tie=1e-3))
    with pytest.raises(ValueError, match="x: the least cosine of text"):
        compare("x", wanted, wanted._replace(text_MD=-wanted.text_MD))


def around(angles: list[float]) -> Features:
    """One image, and texts at these angles to it."""
    angles_M = torch.tensor(angles)
    return Features(torch.tensor([[1.0, 0.0]]), torch.stack([angles_M.cos(), angles_M.sin()], 1))
