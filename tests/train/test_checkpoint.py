"""A checkpoint is complete or absent, wherever its save is killed, and the next save is not in its way."""

import os
import random
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch

from tests.support import checkpoints
from tests.support.distributed import run_alone, run_distributed
from tests.support.small import TEXT_FILES
from train import checkpoint, distributed
from train.checkpoint import Tensors, TrainState
from train.config import RunConfig

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def save(run_dir: Path, step: int, keep: int) -> None:
    """A checkpoint of one weight."""
    config = RunConfig()
    config.checkpoint.keep = keep
    weights = {"w": torch.full((9,), float(step))}
    checkpoints.save(run_dir, Tensors(weights, weights, weights), TrainState(step=step), config, TEXT_FILES)


def name(step: int) -> str:
    return f"step_{step:08d}"


def entries(run_dir: Path) -> set[str]:
    return {path.name for path in (run_dir / "checkpoints").iterdir()}


def damage(run_dir: Path, step: int) -> None:
    (run_dir / "checkpoints" / name(step) / "model.safetensors").write_bytes(b"torn")


def killed_save(run_dir: Path, step: int, keep: int, change: int) -> bool:
    """A save in a process that dies just before its `change`-th change of the disk; False: it made fewer."""
    pid = os.fork()
    if pid == 0:
        count = 0

        def die(event: str, arguments: tuple) -> None:
            nonlocal count
            count += event in CHANGES or (event == "open" and bool(arguments[2] & os.O_CREAT))
            if count == change:
                os._exit(9)

        try:
            sys.addaudithook(die)
            save(run_dir, step, keep)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


def kills(directory: Path, step: int, damaged: bool) -> list[tuple[str, bool, set[str]]]:
    """A save of `step` over those of 1 and 2, one of which is kept, killed at every change of the disk.

    Per kill the newest checkpoint after it, whether `latest` names one, and what is there once step 4 has been saved.
    """
    before = directory / "before"
    for old in (1, 2):
        save(before, old, 2)
    if damaged:
        damage(before, 2)
    results, alive = [], True
    while alive:
        run_dir = directory / str(len(results))
        shutil.copytree(before, run_dir)
        alive = killed_save(run_dir, step, 1, len(results) + 1)
        newest = checkpoint.newest(run_dir)
        latest = (run_dir / "checkpoints" / "latest").read_text().strip() in entries(run_dir)
        save(run_dir, 4, 1)
        results.append((newest.name, latest, entries(run_dir)))
    return results


@pytest.mark.parametrize(
    ("step", "damaged", "before"),
    [pytest.param(3, False, 2, marks=pytest.mark.slow, id="new"), pytest.param(2, True, 1, id="again")],
)
def test_case_02_killed_at_any_change_of_the_disk_a_save_leaves_the_old_or_the_new(
    tmp_path, step, damaged, before
) -> None:
    results = run_alone(kills, tmp_path, step, damaged)  # forks must not copy this process's threads
    assert len(results) > 15
    newest = [found for found, _, _ in results]
    after = newest.index(name(step))
    assert set(newest[:after]) == {name(before)} and set(newest[after:]) == {name(step)}
    for number, (_, latest, left) in enumerate(results, start=1):
        assert latest or damaged, f"after a kill at change {number}"
        assert left == {"latest", name(4)}, f"after a kill at change {number}"


@pytest.mark.parametrize("keep", [1, 2])
def test_case_06_a_damaged_later_one_does_not_push_out_what_is_saved_after_it_was_passed_over(tmp_path, keep) -> None:
    for step in (1, 4):
        save(tmp_path, step, 2)
    damage(tmp_path, 4)
    save(tmp_path, 2, keep)
    assert checkpoint.newest(tmp_path).name == name(2)
    save(tmp_path, 5, 1)
    assert entries(tmp_path) == {"latest", name(5)}


@pytest.mark.parametrize("content", ["", "null", "[]", "{}", "\0" * 40])
def test_case_06_hashes_that_are_none_are_damage(tmp_path, content) -> None:
    for step in (1, 2):
        save(tmp_path, step, 0)
    (tmp_path / "checkpoints" / name(2) / "sha256.json").write_text(content)
    assert checkpoint.newest(tmp_path).name == name(1)


def newest_from_own_directory(directory: str) -> str:
    """What a rank is told whose relative run directory is that of the first rank, or another, which has nothing."""
    os.chdir(Path(directory) / str(distributed.rank()))
    with pytest.raises(ValueError) as error:
        checkpoint.newest(Path("run"))
    return str(error.value)


def test_a_checkpoint_that_not_all_ranks_see_is_said_on_all_of_them(tmp_path) -> None:
    (tmp_path / "1").mkdir()
    save(tmp_path / "0" / "run", 1, 0)
    for said in run_distributed(newest_from_own_directory, 2, str(tmp_path)):
        assert "runs_dir: run/checkpoints/step_00000001 is not on every host" in said


def test_case_06_a_file_that_cannot_be_read_is_not_damage_and_is_read_again(tmp_path) -> None:
    for step in (1, 2):
        save(tmp_path, step, 0)
    path = tmp_path / "checkpoints" / name(2) / "ema.safetensors"
    kept = path.rename(tmp_path / "kept")
    path.symlink_to(path)  # an error from the file system itself: too many levels of links
    with pytest.raises(ValueError, match=r"cannot be read: .*ema\.safetensors.*\. Nothing was changed"):
        checkpoint.newest(tmp_path)
    mend = threading.Timer(checkpoint.RETRY_SECONDS[0] / 2, lambda: kept.rename(path))
    mend.start()
    assert checkpoint.newest(tmp_path).name == name(2)
    mend.join()


def test_case_06_no_byte_of_any_file_may_differ(tmp_path, record_property) -> None:
    for step in (1, 2):
        save(tmp_path, step, 0)
    rng, path = random.Random(0), tmp_path / "checkpoints" / name(2)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    for number in range(200):
        file = files[number % len(files)]
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        assert checkpoint.newest(tmp_path).name == name(1), file
        file.write_bytes(whole)
    for file in files:
        whole = file.read_bytes()
        for content in (whole[:-2], whole + b"\0", b""):  # sha256.json ends in a newline that nothing needs
            file.write_bytes(content)
            assert checkpoint.newest(tmp_path).name == name(1), file
        file.unlink()
        assert checkpoint.newest(tmp_path).name == name(1), file
        file.write_bytes(whole)
    (path / "extra").write_bytes(b"of somebody else")
    for latest in (b"", b"\0" * 14, b"step_99999999\n"):
        (tmp_path / "checkpoints" / "latest").write_bytes(latest)
        assert checkpoint.newest(tmp_path).name == name(2)
    save(tmp_path, 3, 1)
    assert entries(tmp_path) == {"latest", name(3)}
    record_property("tries", 200 + 4 * len(files) + 3)


def test_case_02_all_of_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch) -> None:
    """Else a power loss after the rename could leave a complete name with empty files."""
    synced: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))

    def noted_rename(path: Path, target: Path) -> Path:
        if path.name.startswith(".step_"):
            whole = {str(path), *(str(one) for one in path.rglob("*"))}
            assert whole <= set(synced), f"not on the disk yet: {whole - set(synced)}"
            synced.append("renamed")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    save(tmp_path, 1, 0)
    root = str(tmp_path / "checkpoints")
    assert synced[synced.index("renamed") + 1 :] == [f"{root}/latest.part", root]
