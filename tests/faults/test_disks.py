"""Disks that get full, read-only or fail under a run of two ranks: one line, the old checkpoint, and on it goes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.faults.test_ranks import SECONDS, prepare, saved
from tests.support import running
from tests.support.disks import Failing, Full, ReadOnly, mounted
from tests.support.forked import forked
from tests.support.running import curve, run_dir
from train import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[list, dict[str, bytes]]:
    """Curve and last checkpoint of a run that nothing disturbed."""
    directory = tmp_path_factory.mktemp("alone")
    config = prepare(directory)
    with forked(config, directory) as ranks:
        assert ranks.wait(SECONDS) == [0, 0], (directory / "run.log").read_text()[-3000:]
    return curve(config), saved(config)


def ended_by_one_line(directory: Path, words: str) -> None:
    """Both ranks have said the same, and nothing else that looks like a failure."""
    said = (directory / "run.log").read_text()
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 2 and lines[0] == lines[1] and words in lines[0], said[-3000:]
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
            began = time.monotonic()
            assert ranks.wait(SECONDS) == [2, 2], (tmp_path / "run.log").read_text()[-3000:]
            assert time.monotonic() - began < 30  # 10 s on a machine that is not busy
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
        with forked(config, tmp_path) as ranks:
            assert ranks.wait(SECONDS) == [2, 2], (tmp_path / "run.log").read_text()[-3000:]
        ended_by_one_line(tmp_path, words)
        disk.mend()
        with forked(config, tmp_path) as ranks:
            assert ranks.wait(SECONDS) == [0, 0], (tmp_path / "run.log").read_text()[-3000:]
        assert (curve(config), saved(config)) == straight


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
