"""Disks that get full, read-only or fail under a run of several ranks: one line, the old checkpoint, and on it goes.

Time is taken from the last thing that went well: the fault, or the last step that was logged, whichever was later. No
Python is started meanwhile: the ranks are forked from a process that has all imported.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.faults.test_ranks import SECONDS, prepare, saved
from tests.support import running
from tests.support.disks import Failing, Full, ReadOnly, mounted
from tests.support.forked import forked
from tests.support.running import curve, run_dir
from tests.support.small import write_data
from train import checkpoint
from train.config import RunConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
IN_TIME = 10
"""Seconds from a fault to the end of the last rank."""


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[list, dict[str, bytes]]:
    """Curve and last checkpoint of a run that nothing disturbed."""
    directory = tmp_path_factory.mktemp("alone")
    config = prepare(directory)
    with forked(config, directory) as ranks:
        assert ranks.wait(SECONDS) == [0, 0], (directory / "run.log").read_text()[-3000:]
    return curve(config), saved(config)


def ended_by_one_line(directory: Path, *words: str, world: int = 2) -> None:
    """All ranks have said the same, and nothing else that looks like a failure."""
    said = (directory / "run.log").read_text()
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == world and len(set(lines)) == 1 and all(word in lines[0] for word in words), said[-3000:]
    assert "Traceback" not in said, said[-3000:]
    (directory / "run.log").unlink()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Full, "No space left on device"),
        (ReadOnly, "Read-only file system"),
        (Failing, "Input/output error"),
    ],
)
def test_case_05_a_disk_that_fails_in_a_save_ends_all_ranks_with_the_checkpoint_before(
    kind, words, straight, tmp_path
) -> None:
    config = prepare(tmp_path)
    with mounted(kind, run_dir(config) / "checkpoints") as disk:
        with forked(config, tmp_path) as ranks:
            running.wait_for_step(config, 5, ranks)  # when what was saved at step 2 is whole
            disk.fail()
            failed = time.time()
            assert ranks.wait(SECONDS) == [2, 2], (tmp_path / "run.log").read_text()[-3000:]
            took = time.time() - max(failed, last_logged(config))
            assert took < IN_TIME, f"{took:.1f} s"
        ended_by_one_line(tmp_path, words)
        disk.mend()
        assert checkpoint.verify(checkpoint.newest(run_dir(config))) == ""
        with forked(config, tmp_path) as ranks:
            assert ranks.wait(SECONDS) == [0, 0], (tmp_path / "run.log").read_text()[-3000:]
        assert (curve(config), saved(config)) == straight


@pytest.mark.parametrize(
    ("kind", "words"),
    [(Full, "No space left on device"), (ReadOnly, "Read-only file system"), (Failing, "Input/output error")],
)
def test_case_05_a_disk_that_fails_under_a_start_changes_nothing(kind, words, straight, tmp_path) -> None:
    config = prepare(tmp_path)
    with mounted(kind, run_dir(config)) as disk:
        with forked(config, tmp_path) as ranks:
            running.wait_for_step(config, 3, ranks)
            for process in ranks.processes:
                process.kill()
        (tmp_path / "run.log").unlink()
        disk.fail()
        began = time.time()
        with forked(config, tmp_path) as ranks:
            assert ranks.wait(SECONDS) == [2, 2], (tmp_path / "run.log").read_text()[-3000:]
            assert time.time() - began < IN_TIME, f"{time.time() - began:.1f} s"
        ended_by_one_line(tmp_path, words)
        disk.mend()
        with forked(config, tmp_path) as ranks:
            assert ranks.wait(SECONDS) == [0, 0], (tmp_path / "run.log").read_text()[-3000:]
        assert (curve(config), saved(config)) == straight


@pytest.mark.parametrize(("kind", "words"), [(Full, "No space left on device"), (Failing, "Input/output error")])
@pytest.mark.parametrize("log", ["metrics.jsonl", "ledger.jsonl"])
def test_case_05_a_log_that_cannot_be_written_ends_three_ranks_with_its_name(log, kind, words, tmp_path) -> None:
    alone, config = (with_bad_samples(tmp_path / name) for name in ("alone", "disturbed"))
    directory = tmp_path / "disturbed"
    with forked(alone, tmp_path / "alone", world=3) as ranks:
        assert ranks.wait(SECONDS) == [0] * 3, (tmp_path / "alone" / "run.log").read_text()[-3000:]
    with mounted(kind, tmp_path / "disk") as disk:
        run_dir(config).mkdir(parents=True)
        (run_dir(config) / log).symlink_to(tmp_path / "disk" / log)
        with forked(config, directory, world=3) as ranks:
            running.wait_for_step(config, 3, ranks)
            disk.fail()
            failed = time.time()
            assert ranks.wait(SECONDS) == [2] * 3, (directory / "run.log").read_text()[-3000:]
            ended = time.time()
        ended_by_one_line(directory, log, words, "Free or mend the disk and start again", world=3)
        disk.mend()
        took = ended - max(failed, last_logged(config))
        assert took < IN_TIME, f"{took:.1f} s"
        assert checkpoint.verify(checkpoint.newest(run_dir(config))) == ""
        with forked(config, directory, world=3) as ranks:
            assert ranks.wait(SECONDS) == [0] * 3, (directory / "run.log").read_text()[-3000:]
        assert curve(config) == curve(alone) and saved(config) == saved(alone)
        ledgers = [(run_dir(one) / "ledger.jsonl").read_text() for one in (config, alone)]
        assert ledgers[0] == ledgers[1].replace(str(tmp_path / "alone"), str(directory))


def with_bad_samples(directory: Path) -> RunConfig:
    """A run of three ranks that writes to its ledger in every step."""
    config = prepare(directory, world=3)
    config.data.train = str(write_data(directory / "bad", (40, 30), bad=range(0, 70, 3)))
    config.data.max_bad_fraction = 1.0
    return config


def last_logged(config: RunConfig) -> float:
    """When the last step was logged that could be, in seconds since the epoch."""
    return (run_dir(config) / "metrics.jsonl").stat().st_mtime


def test_case_05_metrics_that_cannot_be_read_end_all_ranks(straight, tmp_path) -> None:
    """EIO from the kernel itself: the memory of a process has nothing at its beginning."""
    config = prepare(tmp_path)
    with forked(config, tmp_path) as ranks:
        running.wait_for_step(config, 3, ranks)
        for process in ranks.processes:
            process.kill()
    (tmp_path / "run.log").unlink()
    log = run_dir(config) / "metrics.jsonl"
    kept = log.rename(tmp_path / "kept")
    log.symlink_to("/proc/self/mem")
    with forked(config, tmp_path) as ranks:
        assert ranks.wait(SECONDS) == [2, 2], (tmp_path / "run.log").read_text()[-3000:]
    ended_by_one_line(tmp_path, "Input/output error")
    log.unlink()
    kept.rename(log)
    with forked(config, tmp_path) as ranks:
        assert ranks.wait(SECONDS) == [0, 0], (tmp_path / "run.log").read_text()[-3000:]
    assert (curve(config), saved(config)) == straight
