"""What a rank says of itself while it lives, and of memory before that runs out."""

import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.support.distributed import run_distributed
from train import distributed
from train.run import watch
from train.run.signals import StopRequest
from train.run.watch import Watch


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> StopRequest:
    """A request that leaves this process's handlers alone."""
    found: list[StopRequest] = []
    thread = threading.Thread(target=lambda: found.append(StopRequest()))
    thread.start()
    thread.join()
    return found[0]


def test_memory_that_runs_out_is_said_once_with_who_has_it(stop, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setattr(watch, "BEAT_SECONDS", 0.02)
    with Watch(tmp_path, 100, stop):
        time.sleep(0.2)
        assert capfd.readouterr().err == "", "the machine has memory left"
        monkeypatch.setattr(watch, "FULL", 0.001)  # less than any machine uses
        monkeypatch.setattr(watch, "AGAIN", 0.0)
        time.sleep(0.5)
    said = capfd.readouterr().err
    assert said.count("warning: ") == 1
    numbers = re.search(r"([\d.]+) of ([\d.]+) GB of memory are used: rank 0 has ([\d.]+) GB", said)
    assert numbers and 0 < float(numbers[3]) <= float(numbers[1]) <= float(numbers[2])
    assert "lower data.workers" in said


def test_case_14_a_step_that_takes_too_long_has_its_stacks_written(stop, tmp_path) -> None:
    with Watch(tmp_path, 0.5, stop) as own:
        own.now("in step 7")
        beat = json.loads((tmp_path / "stacks" / "rank_00000.json").read_text())
        assert beat["pid"] == os.getpid()
        time.sleep(1)
    stacks = (tmp_path / "stacks" / "rank_00000.txt").read_text()
    assert "a_step_that_takes_too_long" in stacks
    # By a thread that has Python's lock: faulthandler's own has not, and once in a few thousand times its reading
    # crashes what runs meanwhile.
    assert "Current thread" in stacks and "Timeout" not in stacks
    assert not (tmp_path / "stacks" / "rank_00000.json").exists()


def suspected(directory: str) -> str:
    """What rank 0 knows of three others: one works, one is stopped, one is gone without a word."""
    watch.BEAT_SECONDS, watch.STALE_SECONDS = 0.1, 3.0
    own = Watch(Path(directory), 100, StopRequest())
    own.now(f"at {distributed.rank()}")
    own._write()
    distributed.barrier()
    if distributed.rank() == 3:
        own._closed.set()
        own._thread.join()
        Path(directory, "stacks", "rank_00003.json").write_text(
            json.dumps({"host": "elsewhere", "pid": 1, "doing": "at 3"})
        )
    if distributed.rank() == 2:
        Path(directory, "pid").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
    if distributed.rank() == 0:
        time.sleep(4)
        said = own.suspects()
        os.kill(int(Path(directory, "pid").read_text()), signal.SIGCONT)
        distributed.barrier()
        return said
    distributed.barrier()
    return ""


@pytest.mark.slow
def test_case_14_a_rank_knows_of_all_others_who_lives_who_is_stopped_and_who_is_silent(tmp_path) -> None:
    said, *_ = run_distributed(suspected, 4, str(tmp_path))
    lines = said.splitlines()
    assert len(lines) == 3
    assert re.fullmatch(r"rank 1 \(host .*\) is at 1", lines[0])
    assert re.fullmatch(r"rank 2 \(host .*\) is stopped; it was at 2", lines[1])
    assert re.fullmatch(r"rank 3 \(host elsewhere, pid 1\) has said nothing for [3-9] s; it was at 3", lines[2])
