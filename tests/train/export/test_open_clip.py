"""open_clip, in an environment of its own below the cache directory, loads what is written for it."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from tests.support.checkpoints import write_run
from tests.support.open_clip import interpreter
from train.config import RunConfig
from train.export.__main__ import main
from train.export.open_clip import OpenClipTarget
from train.export.source import load_source

CLASSIFY = """
import sys
import open_clip, torch
from PIL import Image

name = f"local-dir:{sys.argv[1]}"
model, _, preprocess = open_clip.create_model_and_transforms(name)
tokens = open_clip.get_tokenizer(name)(["red", "a cat on the house", "two"])
with torch.no_grad():
    image = model.eval().encode_image(preprocess(Image.open(sys.argv[2]))[None], normalize=True)
    print(*(image @ model.encode_text(tokens, normalize=True).T)[0].tolist(), float(model.logit_scale))
"""


@pytest.fixture(scope="module")
def python() -> str:
    return interpreter()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "projection"), [("softmax", "linear"), ("sigmoid", "mlp")])
def test_open_clip_loads_it_from_where_it_was_put(
    config: RunConfig, tmp_path: Path, python: str, capsys, kind, projection
) -> None:
    model = replace(config.model, image=replace(config.model.image, projection=projection))
    model.projection_bias = kind == "sigmoid"
    given = replace(config, model=model, loss=replace(config.loss, kind=kind), runs_dir=str(tmp_path / "runs"))
    run, out = write_run(given, steps=1), tmp_path / "out"
    assert main(["--run", str(run), "--to", "open_clip", "--python", python, str(out)]) == 0
    assert "open_clip: least cosine image 0.9999" in capsys.readouterr().out
    Image.effect_noise((90, 70), 60).convert("RGB").save(tmp_path / "a.png")
    command = [python, "-I", "-c", CLASSIFY, str(out), str(tmp_path / "a.png")]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 4


def test_a_crop_that_open_clip_does_not_make_is_refused(config: RunConfig, tmp_path: Path, capsys) -> None:
    given = replace(config, data=replace(config.data, eval_crop=0.875), runs_dir=str(tmp_path / "runs"))
    run = write_run(given, steps=1)
    assert main(["--run", str(run), "--to", "open_clip", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "--data.eval_crop 0.875 cannot be expressed by the target open_clip: give --crop 1" in said
    assert main(["--run", str(run), "--to", "open_clip", "--crop", "2", str(tmp_path / "out")]) == 2
    assert "data.eval_crop is 2.0: a share above 0" in capsys.readouterr().err
    OpenClipTarget().check(load_source(run, crop=1.0))


def test_an_interpreter_without_open_clip_is_said(run: Path, tmp_path: Path, capsys) -> None:
    for python, said in (
        (sys.executable, "(pip install open_clip_torch), or give --python"),
        ("/no/python", "No such file"),
    ):
        assert main(["--run", str(run), "--to", "open_clip", "--python", python, str(tmp_path / "out")]) == 2
        assert said in capsys.readouterr().err
        assert not list(tmp_path.iterdir())
