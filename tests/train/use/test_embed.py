"""`python -m train.embed`: what the index holds, however it was made, and what is refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.embeddings import parts
from data_pipeline.embeddings.index import Index, open_index
from data_pipeline.storage.manifest import load_manifest
from data_pipeline.tokenizer import Tokenizer
from tests.support.distributed import run_distributed
from tests.support.running import ROOT
from tests.support.small import write_data
from tests.train.use.conftest import BAD, SIZES
from train import embed
from train.evaluation.encode import Encoder
from train.export.source import load_source
from train.export.torch import TorchTarget
from train.model.text_files import tokenizer_name
from train.use import embed as module

FILES = ("index.json", "images.npy", "images.parquet", "texts.npy", "texts.parquet", "bad.jsonl")


pytestmark = pytest.mark.usefixtures("runs_in_this_process")


def content(out: Path) -> dict[str, bytes]:
    """The index's files, but for the paths of model and input."""
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES), "nothing is left over"
    found = {name: (out / name).read_bytes() for name in FILES}
    about = json.loads(found["index.json"])
    about["model"].pop("path")
    return found | {"index.json": json.dumps(about).encode()}


def embed_here(*arguments: object) -> int:
    return embed.main([str(each) for each in arguments])


def test_it_holds_what_evaluation_makes_of_each_sample_and_the_bad_ones_by_name(index, config, run, data):
    source = load_source(run)
    manifest = load_manifest(data)
    found = Encoder(source.model, config, Tokenizer(tokenizer_name(config), 32)).features(manifest)
    assert index.rows("images")["key"].to_pylist() == found.keys
    assert index.rows("texts")["text"].to_pylist() == found.captions
    samples = [number for number in range(sum(SIZES)) if number not in BAD]
    assert index.sample_N.tolist() == samples
    assert index.rows("texts")["sample"].to_pylist() == [samples[row] for row in found.image_of_text_M.tolist()]
    assert np.allclose(index.image_ND, found.image_ND.numpy(), atol=1e-6)
    assert np.allclose(index.vectors("texts"), found.text_MD.numpy(), atol=1e-6)
    about = index.about
    assert (about["images"], about["dims"], about["normalized"], about["bad"]) == (24, 16, True, 2)
    assert about["model"]["identity"] == source.identity and about["model"]["precision"] == "fp32"
    assert about["input"]["identity"] == manifest.hash
    bad = [json.loads(line) for line in (index.directory / "bad.jsonl").read_text().splitlines()]
    assert [one["key"] for one in bad] == [f"{number:04d}" for number in BAD] and all(one["cause"] for one in bad)


def test_an_export_embeds_like_the_run_and_is_the_same_model(index: Index, run: Path, data: Path, tmp_path: Path):
    (tmp_path / "exported").mkdir()
    TorchTarget().write(load_source(run), tmp_path / "exported")
    assert embed_here("--model", tmp_path / "exported", "--batch", 5, "--workers", 1, data, tmp_path / "out") == 0
    found = open_index(tmp_path / "out")
    assert found.about["model"]["identity"] == index.about["model"]["identity"]
    assert np.allclose(found.image_ND, index.image_ND, atol=1e-4)
    assert np.allclose(found.vectors("texts"), index.vectors("texts"), atol=1e-4)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> list:
    """Options of a command whose parts have four samples each."""
    monkeypatch.setattr(module, "PART_SAMPLES", 4)
    return ["--batch", 2, "--workers", 0]


def interrupted(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """From now on writing ends, as by Ctrl-C, when so many parts are written."""
    written = []

    def write(*part: object) -> None:
        if len(written) == after:
            raise KeyboardInterrupt
        written.append(parts.write_part(*part))

    monkeypatch.setattr(module, "write_part", write)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_interrupted_anywhere_it_resumes_to_the_same_bytes(
    run: Path, data: Path, tmp_path: Path, monkeypatch, small_parts
):
    command = ["--model", run, *small_parts, data]
    assert embed_here(*command, tmp_path / "whole") == 0
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted(patch, 3)
        embed_here(*command, tmp_path / "out")
    with pytest.raises(ValueError, match="is not complete: the command that began it, given again, resumes it"):
        open_index(tmp_path / "out")
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "parts").iterdir()}
    assert len(kept) == 3
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        made = []
        patch.setattr(
            module, "write_part", lambda out, number, part: made.append(number) or parts.write_part(out, number, part)
        )
        patch.setattr(module, "write_about", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        embed_here(*command, tmp_path / "out")
    assert made == [3, 4, 5, 6], "what is there is not made again"
    assert embed_here(*command, tmp_path / "out") == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert embed_here(*command, tmp_path / "out") == 0, "finished: said again"


def ranks(run: Path, data: Path, out: Path) -> int:
    module.PART_SAMPLES = 4
    return embed_here("--model", run, "--batch", 2, "--workers", 0, data, out)


def test_two_ranks_make_the_same_bytes_as_one(run: Path, data: Path, tmp_path: Path, small_parts):
    assert embed_here("--model", run, *small_parts, data, tmp_path / "one") == 0
    assert run_distributed(ranks, 2, run, data, tmp_path / "two") == [0, 0]
    assert content(tmp_path / "two") == content(tmp_path / "one")


SMALL_PARTS = "import sys; from train import embed; from train.use import embed as m; m.PART_SAMPLES = 4; embed.main()"


def test_killed_it_resumes(run: Path, tmp_path: Path, small_parts):
    arguments = ["--model", run, *small_parts, write_data(tmp_path / "data", (120,))]
    command = [sys.executable, "-c", SMALL_PARTS, *map(str, arguments), str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 200
    while not list((tmp_path / "out").glob("parts/*.safetensors")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and (tmp_path / "out" / "parts").is_dir(), "it was not finished"
    assert embed_here(*arguments, tmp_path / "out") == 0 and embed_here(*arguments, tmp_path / "whole") == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_folder_and_a_text_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "photos"
    (folder / "b").mkdir(parents=True)
    for name, colour in (("z.png", "red"), ("b/a.jpg", "blue"), ("b/c.webp", "green")):
        Image.new("RGB", (40, 30), colour).save(folder / name)
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "notes.md").write_text("not an image")
    (folder / "b/d.GIF").write_bytes(b"GIF89a")
    assert embed_here("--model", run, "--workers", 0, folder, tmp_path / "images") == 0
    assert f"1 images are left out, such as {folder / 'b/d.GIF'}: " in capsys.readouterr().out
    images = open_index(tmp_path / "images")
    assert images.rows("images")["key"].to_pylist() == [f"photos/{name}" for name in ("b/a.jpg", "b/c.webp", "z.png")]
    assert images.kinds == ["images"] and images.sample_N.tolist() == [0, 1, 3] and images.about["bad"] == 1

    (tmp_path / "names.txt").write_text("a red flag\n\n  two   \n")
    assert embed_here("--model", run, tmp_path / "names.txt", tmp_path / "texts") == 0
    texts = open_index(tmp_path / "texts")
    assert texts.kinds == ["texts"]
    rows = texts.rows("texts").to_pylist()
    assert [(row["key"], row["text"]) for row in rows] == [("1", "a red flag"), ("3", "two")]


def test_tars_without_a_manifest_are_shards(run: Path, data: Path, index: Index, tmp_path: Path):
    shutil.copytree(data, tmp_path / "tars")
    (tmp_path / "tars" / "manifest.json").unlink()
    assert embed_here("--model", run, "--workers", 0, f"{tmp_path}/tars/*.tar", tmp_path / "out") == 0
    assert np.array_equal(open_index(tmp_path / "out").image_ND, index.image_ND)
    assert embed_here("--model", run, "--workers", 0, data / "part-000001.tar", tmp_path / "second") == 0
    assert np.allclose(open_index(tmp_path / "second").image_ND, index.image_ND[8:13], atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere", "{data}", "{new}"], "--model nowhere: there is no such directory"),
        (["--model", "{data}", "{data}", "{new}"], "--model .* is neither a run nor an export: give the run"),
        (["--model", "{other}", "{data}", "{new}"], "is in the form of open_clip: give the run, or what comes of"),
        (["--model", "{run}", "--step", "9", "{data}", "{new}"], "--step 9: .* has no such checkpoint"),
        (["--model", "{run}", "{new}/nothing", "{new}"], "no shard matches"),
        (["--model", "{run}", "", "{new}"], "INPUT is empty: give shards"),
        (["--model", "{run}", "{empty}", "{new}"], "INPUT .*: neither manifest.json, nor tars, nor images"),
        (["--model", "{run}", "--workers", "-1", "{data}", "{new}"], "--workers -1: give 0 or more"),
        (["--model", "{run}", "{data}", "{full}"], "OUT .* is not empty, and holds no index"),
        (
            ["--model", "{run}", "--step", "1", "{data}", "{index}"],
            "another model .*: give the model that it was",
        ),
        (["--model", "{run}", "--precision", "bf16", "{data}", "{index}"], "is of another model"),
        (
            ["--model", "{run}", "--batch", "3", "{data}", "{index}"],
            "another batch .4.: give that number with",
        ),
        (
            ["--model", "{run}", "{data}/part-000001.tar", "{index}"],
            "another input .*: give that input, or another OUT",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_and_nothing_changes(run, data, index, tmp_path, capsys, arguments, message):
    for name in ("empty", "full", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "other" / "open_clip_config.json").write_text("{}")
    before = content(index.directory)
    names = {name: tmp_path / name for name in ("empty", "full", "other", "new")}
    names |= {"run": run, "data": data, "index": index.directory}
    assert embed.main([argument.format(**names) for argument in arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert content(index.directory) == before and not (tmp_path / "new").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_samples_that_cannot_be_read_at_all_are_said(run: Path, tmp_path: Path, capsys):
    data = write_data(tmp_path / "data", (3,), bad=(0, 1, 2))
    assert embed_here("--model", run, "--workers", 0, data, tmp_path / "out") == 2
    assert "is empty: not one sample of" in capsys.readouterr().err


def test_help_loads_no_torch():
    code = "import sys; from train import embed, search, curate; [m.make_parser() for m in (embed, search, curate)]"
    done = subprocess.run([sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules)"], cwd=ROOT)
    assert done.returncode == 0
