"""Who may use a run directory: the same experiment, one process at a time."""

import shlex
import subprocess
import sys
from dataclasses import replace

import pytest

from tests.support import running
from tests.support.running import ROOT
from train.config import RunConfig
from train.run.directory import open_run, record_config

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
    for config in (first, other):  # the first has made no step
        with open_run(config) as directory:
            record_config(directory, config)
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
    # The directory itself stays: by it the next start knows that no checkpoint has got lost.
    assert not [path for path in (running.run_dir(config) / "checkpoints").rglob("*") if not path.is_dir()]
