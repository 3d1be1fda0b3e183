"""A run needs nothing but its newest checkpoint to resume, and loses nothing where it cannot."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import BertConfig

from tests.support import running
from tests.support.running import ROOT, curve, prepare, run_dir
from tests.support.small import write_data
from tests.support.vocabulary import write_tokenizer
from train import checkpoint, cli, loop
from train.checkpoint import FILES, load_model, load_state
from train.config import RunConfig
from train.run.records import read_history
from train.run.signals import EXIT_PREEMPTED

STEPS = 4


pytestmark = pytest.mark.usefixtures("runs_in_this_process")


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> tuple[Path, list]:
    """A directory with a run that ended after step 4 and lost what it saved after step 2; and its curve.

    It was started in `first`, where its text tower is.
    """
    directory = tmp_path_factory.mktemp("interrupted")
    config = prepare(directory, steps=STEPS, global_batch=16)
    config.data.image_size, config.checkpoint.every = 32, 2
    (directory / "first").mkdir()
    (directory / "text").rename(directory / "first" / "text")
    config.model.text.name = "text"
    config.optim.ema = 0.5
    start_in(directory / "first", running.command(config, directory))
    straight = curve(config)
    (run_dir(config) / "results.json").unlink()
    shutil.rmtree(run_dir(config) / "checkpoints" / f"step_{STEPS:08d}")
    return directory, straight


@pytest.fixture
def copied(interrupted, tmp_path: Path) -> RunConfig:
    """The configuration of a copy of that run, whose text tower is named by its full path."""
    shutil.copytree(interrupted[0], tmp_path, dirs_exist_ok=True)
    config = cli.load(run_dir(RunConfig(name="small", runs_dir=str(tmp_path / "runs"))) / "config.yaml")
    config.runs_dir, config.model.text.name = str(tmp_path / "runs"), str(tmp_path / "first" / "text")
    return config


def start_in(directory: Path, arguments: list[str], status: int = 0) -> str:
    """What a command printed that was started in `directory`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(arguments, cwd=directory, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stderr[-4000:]
    return done.stdout


def newest_of(config: RunConfig) -> Path:
    (found,) = (run_dir(config) / "checkpoints").glob("step_*")
    return found


def contents(directory: Path) -> dict[str, bytes]:
    """All files below a directory, but for the lock."""
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.name != ".lock"}


def refused(config: RunConfig, message: str) -> None:
    """The start is refused, and changes nothing in the run's directory."""
    before = contents(run_dir(config))
    with pytest.raises(ValueError, match=message):
        loop.run(config)
    assert contents(run_dir(config)) == before


def test_without_its_text_tower_and_from_elsewhere_it_resumes_and_evaluates(interrupted, copied, tmp_path) -> None:
    copied.model.text.name = "text"  # as it was spelled in the directory where it was started
    shutil.rmtree(tmp_path / "first")
    (tmp_path / "second").mkdir()
    start_in(tmp_path / "second", running.command(copied, tmp_path))
    assert curve(copied) == interrupted[1]
    evaluation = ["-m", "train.evaluate", "--run", str(run_dir(copied)), "--json"]
    measured = json.loads(start_in(tmp_path / "second", [sys.executable, *evaluation]))
    results = json.loads((run_dir(copied) / "results.json").read_text())["val"]
    assert {name: measured[name] for name in results} == pytest.approx(results)


def test_a_tower_that_has_moved_is_the_same_and_another_in_its_place_is_not(interrupted, copied, tmp_path) -> None:
    text = Path(copied.model.text.name)
    BertConfig.from_pretrained(text, hidden_dropout_prob=0.5).save_pretrained(text)
    refused(copied, r"model\.text\.name .*\n  hidden_dropout_prob: 0\.1 -> 0\.5")
    BertConfig.from_pretrained(text, hidden_dropout_prob=0.1).save_pretrained(text)
    tokenizer = json.loads((text / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {"red": tokenizer["model"]["vocab"]["heart"], "heart": 10}
    (text / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(copied, r"model\.text\.tokenizer .* is not what .* was trained with:\n  vocabulary and rules")
    write_tokenizer(text)
    copied.model.text.name = copied.model.text.tokenizer = str(text.rename(tmp_path / "moved"))
    assert loop.run(copied) == 0
    assert curve(copied) == interrupted[1]
    assert load_state(checkpoint.newest(run_dir(copied))).precision == "no"


def test_a_name_that_leads_nowhere_and_was_spelled_otherwise_is_refused(copied, tmp_path) -> None:
    copied.model.text.name = str(tmp_path / "none")
    refused(copied, r"model\.text\.name .*none: no such directory")


def test_format_1_is_still_read(interrupted, copied) -> None:
    path = newest_of(copied)
    for directory in ("text", "tokenizer"):
        shutil.rmtree(path / directory)
    state = json.loads((path / "state.json").read_text())
    for name in ("precision", "code"):
        del state["state"][name]
    content = {"format": 1, "state": state["state"], "torch": "2.15.0"}
    (path / "state.json").write_text(json.dumps(content, indent=2) + "\n")
    config = cli.load(path / "config.yaml")
    config.model.text.name = copied.model.text.name
    (path / "config.yaml").write_text(cli.to_yaml(config))
    hashes = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in FILES}
    (path / "sha256.json").write_text(json.dumps(hashes, indent=2) + "\n")
    model, config = load_model(run_dir(copied))
    assert config.model.text.name == copied.model.text.name
    assert torch.equal(model.state_dict()["log_scale"], checkpoint.load_part(path, "ema")["log_scale"])
    copied.model.text.name += "/."
    refused(copied, "and .*step_00000002 holds no copy")
    copied.model.text.name = config.model.text.name
    assert loop.run(copied) == 0
    assert curve(copied) == interrupted[1]
    assert json.loads((checkpoint.newest(run_dir(copied)) / "state.json").read_text())["format"] == 2


def test_case_06_where_no_checkpoint_is_whole_or_none_is_left_nothing_is_touched(copied) -> None:
    path = newest_of(copied)
    earlier = shutil.copytree(path, path.with_name("step_00000001"))
    for damaged in (path / "text" / "config.json", earlier / "optimizer.safetensors"):
        content = bytearray(damaged.read_bytes())
        content[len(content) // 2] ^= 1
        damaged.write_bytes(content)
    before = contents(run_dir(copied))
    copied.tracking.log_every = 2  # would show in config.yaml
    start_in(ROOT, running.command(copied, Path(copied.runs_dir).parent), status=2)
    assert contents(run_dir(copied)) == before
    refused(
        copied, r"(?s)all checkpoints in .* are damaged:.*step_00000002: text/config.json.*step_00000001: optimizer"
    )
    shutil.rmtree(path.parent)
    refused(copied, r"metrics\.jsonl has 4 steps, but there is no checkpoint in")


def test_other_data_is_refused_and_leaves_the_configuration_as_it_was(copied, tmp_path) -> None:
    copied.data.train = str(write_data(tmp_path / "other", (70,)))
    copied.tracking.log_every = 2
    refused(copied, "was trained on other data")


@pytest.mark.slow
@pytest.mark.parametrize("by", ["variable", "file"])
def test_a_compiled_model_saves_and_resumes_under_the_names_of_the_plain_one(copied, monkeypatch, by: str) -> None:
    directory = Path(copied.runs_dir).parent
    if by == "variable":
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
        start_in(ROOT, running.command(copied, directory))
        monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND")
    else:
        command = running.command(copied, directory, engine="ddp", processes=2)
        with (directory / "accelerate_ddp.yaml").open("a") as file:
            file.write("dynamo_config: {dynamo_backend: EAGER}\n")
        start_in(ROOT, command)
    newest = checkpoint.newest(run_dir(copied))
    model, _ = load_model(run_dir(copied))
    assert set(checkpoint.load_part(newest, "model")) == set(model.state_dict())
    learned = {name for name, _ in model.named_parameters()}
    assert learned <= set(checkpoint.load_part(newest, "ema"))
    moments = {f"{name}.{key}" for name in learned for key in ("exp_avg", "exp_avg_sq")}
    assert set(checkpoint.load_part(newest, "optimizer")) == moments


def test_a_signal_saves_before_what_is_due_is_evaluated_and_resuming_makes_up_for_it(tmp_path) -> None:
    config = prepare(tmp_path, steps=6, global_batch=16)
    config.data.image_size, config.checkpoint.every, config.eval.every = 32, 100, 1
    assert loop.run(config) == 0
    expected = read_history(run_dir(config))
    config.name = "stopped"

    def stop() -> None:
        while not curve(config):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    assert loop.run(config) == EXIT_PREEMPTED
    thread.join()
    last = read_history(run_dir(config))[-1]
    (saved,) = checkpoint.steps(run_dir(config))
    assert saved == last["step"] < 6 and "val/t2i_R@1" not in last
    assert loop.run(config) == 0
    names = ("step", "loss", "val/t2i_mean_rank", "val/i2t_mean_rank")
    found = read_history(run_dir(config))
    assert [[one[name] for name in names] for one in found] == [[one[name] for name in names] for one in expected]
