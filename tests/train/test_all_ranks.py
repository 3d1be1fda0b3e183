"""What one rank meets is one decision of all: each scenario ends both ranks in the same way."""

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.distributed import run_distributed
from tests.support.running import metrics, prepare, run_dir
from tests.support.small import write_data
from train import checkpoint, cli, distributed, loop
from train.config import RunConfig


def outcome(config: RunConfig) -> str:
    """How the run ended on this rank."""
    try:
        return str(loop.run(config))
    except ValueError as error:
        return str(error)


def signal_after_a_step(config: RunConfig) -> None:
    while not metrics(config):
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGUSR1)


def scenarios(directory: str) -> list[str]:
    """On each rank, how these runs ended: a signal to rank 1, no room for a checkpoint, too many bad samples."""
    config = cli.load(Path(directory) / "config.yaml")
    if distributed.rank() == 1:
        threading.Thread(target=signal_after_a_step, args=(config,), daemon=True).start()
    ends = [outcome(config)]
    full = replace(config, name="full", checkpoint=replace(config.checkpoint, every=1))
    (run_dir(full) / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run_dir(full) / "checkpoints" / ".step_00000001.part").touch()  # a file where a directory has to be
    ends.append(outcome(full))
    bad = replace(config, name="bad", data=replace(config.data, train=str(Path(directory) / "bad")))
    ends.append(outcome(bad))
    # Rank 1 alone reads this shard; lane 1 of 2 is its own.
    gone = replace(config, name="gone", data=replace(config.data, train=str(Path(directory) / "gone")))
    ends.append(outcome(gone))
    return ends


@pytest.mark.slow
def test_case_03_05_10_what_happens_to_one_rank_ends_all_in_the_same_way(tmp_path: Path) -> None:
    config = prepare(tmp_path, steps=200, global_batch=16, micro_batch=8)
    config.data.val, config.data.image_size, config.data.lanes, config.checkpoint.every = "", 32, 2, 0
    write_data(tmp_path / "bad", (64,), bad=range(0, 64, 2))
    write_data(tmp_path / "gone", (16, 16))
    with (tmp_path / "gone" / "part-000001.tar").open("r+b") as file:
        file.seek(700)
        file.write(b"!")
    (tmp_path / "config.yaml").write_text(cli.to_yaml(config))
    first, second = run_distributed(scenarios, 2, str(tmp_path), timeout=100)
    assert first[0] == second[0] == "85" and checkpoint.steps(run_dir(config))
    assert first[1] == second[1] and "could not be written" in first[1]
    assert first[2] == second[2] and first[2].startswith("data.max_bad_fraction 0.01: ")
    assert first[3] == second[3] and "part-000001.tar has" in first[3]


def with_a_long_report(directory: str) -> int:
    """The run's exit status; rank 0's report takes until rank 1 has ended, a minute at most."""
    config, ended = cli.load(Path(directory) / "config.yaml"), Path(directory) / "rank 1 has ended"
    write_report = loop.write_report

    def long_report(*arguments: Any) -> None:
        limit = time.monotonic() + 60
        while not ended.exists() and time.monotonic() < limit:
            time.sleep(0.05)
        assert ended.exists(), "rank 1 waits for rank 0's report"
        write_report(*arguments)

    loop.write_report = long_report  # of this process, which ends with the test
    status = loop.run(config)
    if distributed.rank() == 1:
        ended.touch()
    return status


@pytest.mark.slow
def test_no_rank_waits_for_the_report(tmp_path: Path) -> None:
    config = prepare(tmp_path, steps=1, global_batch=16, micro_batch=8)
    config.data.image_size = 32
    (tmp_path / "config.yaml").write_text(cli.to_yaml(config))
    assert run_distributed(with_a_long_report, 2, str(tmp_path), timeout=200) == [0, 0]
    assert (run_dir(config) / "report" / "index.html").is_file()
