"""A disk that is full, or cannot be written, under each file of a run: one line on all ranks, and nothing lost."""

import contextlib
import io
import shutil
from pathlib import Path

import pytest

from tests.support.distributed import run_distributed
from tests.support.running import curve, prepare, run_dir
from tests.support.small import write_data
from train import checkpoint, cli, loop
from train.__main__ import main
from train.config import RunConfig

pytestmark = pytest.mark.usefixtures("runs_in_this_process")
STEPS = 5


@pytest.fixture
def interrupted(tmp_path: Path) -> tuple[RunConfig, list]:
    """A run that ended after step 5 and lost what it saved after step 2; and its curve."""
    config = prepare(tmp_path, steps=STEPS, global_batch=16)
    config.data.train = str(write_data(tmp_path / "bad", (64,), bad=(3, 17, 40, 50)))
    config.data.val, config.data.image_size, config.checkpoint.every = "", 32, 2
    config.model.image.name = "shufflenet_v2_x0_5"
    assert loop.run(config) == 0
    straight = curve(config)
    (run_dir(config) / "results.json").unlink()
    for step in (4, 5):
        shutil.rmtree(run_dir(config) / "checkpoints" / f"step_{step:08d}")
    return config, straight


def full(config: RunConfig, log: str) -> Path:
    """Has every write to a log fail with ENOSPC; returns where the log is meanwhile."""
    path = run_dir(config) / log
    kept = path.rename(path.with_name("kept"))
    path.symlink_to("/dev/full")
    return kept


def freed(config: RunConfig, log: str, kept: Path) -> None:
    (run_dir(config) / log).unlink()
    kept.rename(run_dir(config) / log)


@pytest.mark.parametrize("log", ["metrics.jsonl", "ledger.jsonl"])
def test_case_05_under_a_log_it_ends_the_run_and_nothing_is_lost(interrupted, log: str) -> None:
    config, straight = interrupted
    ledger = (run_dir(config) / "ledger.jsonl").read_bytes()
    kept = full(config, log)
    with pytest.raises(
        ValueError, match=rf"{log} could not be written: No space left on device\. Free or mend the disk"
    ):
        loop.run(config)
    assert checkpoint.steps(run_dir(config)) == [2], "no checkpoint is ahead of the logs"
    freed(config, log, kept)
    assert loop.run(config) == 0
    assert curve(config) == straight and (run_dir(config) / "ledger.jsonl").read_bytes() == ledger


def test_case_05_under_a_log_of_rank_0_all_ranks_say_so(interrupted, tmp_path: Path) -> None:
    config, straight = interrupted
    config.train.resident = 2
    (tmp_path / "config.yaml").write_text(cli.to_yaml(config))
    kept = full(config, "metrics.jsonl")
    for status, said in run_distributed(main_of_a_rank, 2, str(tmp_path / "config.yaml"), timeout=100):
        assert status == 2 and said.count("\n") == 1
        assert "metrics.jsonl could not be written: No space left on device" in said
    freed(config, "metrics.jsonl", kept)
    assert loop.run(config) == 0
    assert [entry[:2] for entry in curve(config)] == [entry[:2] for entry in straight]


def main_of_a_rank(path: str) -> tuple[int, str]:
    """Exit status and messages of `python -m train`."""
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        status = main(["--config", path])
    return status, printed.getvalue()


def test_case_05_under_the_results_it_is_said_and_only_they_are_made_again(interrupted) -> None:
    config, straight = interrupted
    part = run_dir(config) / "results.json.part"
    part.symlink_to("/dev/full")
    with pytest.raises(ValueError, match=r"the results could not be written: .*No space left on device"):
        loop.run(config)
    part.unlink(missing_ok=True)
    assert loop.run(config) == 0 and curve(config) == straight


def test_case_05_under_the_configuration_it_is_said(interrupted) -> None:
    config, _ = interrupted
    (run_dir(config) / "config.yaml.part").symlink_to("/dev/full")
    config.tracking.log_every = 7
    with pytest.raises(ValueError, match=r"No space left on device.*free or mend the disk and start again"):
        loop.run(config)
    assert cli.load(run_dir(config) / "config.yaml").tracking.log_every == 1
