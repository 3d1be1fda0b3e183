"""Who may use a run directory: the same experiment, one process at a time."""

import math
import shlex
import subprocess
import sys
from dataclasses import replace
from operator import attrgetter

import pytest

from tests.support import running
from tests.support.running import ROOT
from train import loop
from train.checks import RANGES, check_ranges
from train.config import RunConfig
from train.run.directory import open_run

HOLD = """
import sys
from train.run.directory import open_run
from train.config import RunConfig
with open_run(RunConfig(name="run", runs_dir=sys.argv[1])):
    print("open", flush=True)
    sys.stdin.read()
"""


def test_another_configuration_is_refused_once_a_step_has_been_made(tmp_path):
    first = RunConfig(name="run", runs_dir=str(tmp_path))
    other = replace(first, train=replace(first.train, seed=7))
    with open_run(first):
        pass
    with open_run(other) as directory:
        assert "seed: 7" in (directory / "config.yaml").read_text(), "the first has made no step"
    (directory / "metrics.jsonl").write_text('{"step": 1, "loss": 4.0}\n')
    refused = pytest.raises(ValueError, match=r"(?s)holds a run with another configuration.*train.seed: 7 -> 0")
    with refused, open_run(first):
        pass
    with open_run(other):
        pass


def test_a_directory_is_one_process_s_at_a_time(tmp_path):
    config = RunConfig(name="run", runs_dir=str(tmp_path))
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    holder = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "open\n"
    with pytest.raises(ValueError, match="another process is training in"), open_run(config):
        pass
    holder.kill()
    holder.communicate()
    with open_run(config):
        pass


def test_a_full_disk_is_said_and_leaves_no_part_of_a_checkpoint(tmp_path):
    config = running.prepare(tmp_path, steps=2)
    config.checkpoint.every = 1
    train = shlex.join(running.command(config, tmp_path))
    # No file may grow over 20 MB, and weights do: the same error as on a full disk, from the same calls.
    process = running.start(["bash", "-c", f"ulimit -f 20000; exec {train}"], tmp_path / "log")
    assert process.wait(120) == 2, (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text()
    assert "step_00000001 could not be written" in said and "Traceback" not in said
    assert not list((running.run_dir(config) / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("checkpoint", "keep", -1),
        ("optim", "clip_grad", -1.0),
        ("optim", "ema", 1.0),
        ("loss", "tile", 0),
        ("loss", "label_smoothing", 1.5),
        ("model", "temperature", 0.0),
        ("model", "max_logit_scale", 0.5),
        ("train", "steps", -1),
        ("train", "resident", 0),
        ("eval", "batch", 0),
        ("model.image", "lr", -1e-4),
        ("model.text", "layer_decay", 0.0),
        ("model.image", "locked_until", -2),
        ("model.self_supervision", "mask", 0.0),
        ("model.multiscale", "weight", math.inf),
        ("optim", "beta2", 1.0),
        ("optim", "eps", 0.0),
        ("optim", "lr", math.inf),
        ("optim", "min_lr", -1.0),
        ("train", "seed", 2**63),
        ("train", "max_skipped", -1),
        ("data", "max_bad_fraction", -0.1),
        ("data", "cache_gb", math.inf),
    ],
)
def test_numbers_out_of_their_range_are_refused_before_anything_starts(section, name, value):
    config = RunConfig()
    config.data.train = "shards"
    loop.check(config)
    setattr(attrgetter(section)(config), name, value)
    with pytest.raises(ValueError, match=f"--{section}.{name} {value}: give "):
        loop.check(config)


def test_every_range_is_one_of_a_field_and_holds_for_the_default():
    check_ranges(RunConfig())
    assert all(wanted for _, wanted in RANGES.values())
