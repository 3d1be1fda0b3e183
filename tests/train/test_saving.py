"""Checkpoints are written while training goes on: they hold their step, and all ranks hear of one that failed."""

import json
import resource
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.distributed import run_distributed
from tests.support.running import curve, prepare, run_dir
from train import checkpoint, cli, distributed, loop
from train.config import RunConfig
from train.saving import saver, write

pytestmark = pytest.mark.usefixtures("runs_in_this_process")
STEPS = 6


def small(directory: Path) -> RunConfig:
    config = prepare(directory, steps=STEPS, global_batch=16)
    config.data.val, config.data.image_size, config.checkpoint.every = "", 32, 2
    config.model.image.name, config.optim.ema = "shufflenet_v2_x0_5", 0.5
    config.optim.lr = 1e-3  # a difference in any last digit grows
    return config


def after_steps(config: RunConfig, ahead: int) -> Callable:
    """`save_file` on a disk so slow that training makes so many steps more before anything is written."""
    save_file = write.save_file

    def slowly(tensors: dict, path: Path) -> None:
        step, limit = int(path.parent.name.split("_")[1].removesuffix(".part")), time.monotonic() + 60
        while curve(config)[-1][0] < min(step + ahead, STEPS):
            assert time.monotonic() < limit, f"training waits for the checkpoint of step {step}"
            time.sleep(0.01)
        save_file(tensors, path)

    return slowly


@contextmanager
def no_large_files(size: int = 100_000) -> Iterator[None]:
    """The kernel refuses to write a file beyond this size, as a disk that is full does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(config: RunConfig, step: int) -> dict[str, bytes | dict]:
    """All files of a checkpoint, without what differs from run to run: time, and hashes of what has it."""
    path = checkpoint.path_of(run_dir(config), step)
    assert checkpoint.verify(path) == ""
    found: dict = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    found["state.json"] = json.loads(found["state.json"])
    del found["state.json"]["state"]["seconds"], found["sha256.json"]
    return found


def test_it_holds_its_step_to_the_byte_though_training_has_gone_on(tmp_path, monkeypatch, capfd) -> None:
    config = small(tmp_path)
    with monkeypatch.context() as full:
        full.setattr(saver, "memory", lambda: (1e12, 1e12))
        assert loop.run(config) == 0
    assert capfd.readouterr().out.count("training waits until each checkpoint is written: memory has no room for") == 1
    one_by_one, expected = curve(config), [contents(config, step) for step in (2, 4, 6)]
    shutil.rmtree(run_dir(config))

    monkeypatch.setattr(write, "save_file", after_steps(config, 2))
    monkeypatch.setattr(saver, "LONG_SECONDS", 0.0)
    assert loop.run(config) == 0
    said = capfd.readouterr().out
    assert "step 4 waited" in said and "for the checkpoint of step 2 to be written" in said
    assert [contents(config, step) for step in (2, 4, 6)] == expected and curve(config) == one_by_one

    (run_dir(config) / "results.json").unlink()
    for step in (4, 6):
        shutil.rmtree(checkpoint.path_of(run_dir(config), step))
    assert loop.run(config) == 0
    assert curve(config) == one_by_one


def test_case_05_where_the_first_one_fails_later_the_run_begins_again(tmp_path, monkeypatch) -> None:
    """Steps were logged meanwhile, which are no sign that a checkpoint has got lost."""
    config = small(tmp_path)
    with monkeypatch.context() as slow, no_large_files():
        slow.setattr(write, "save_file", after_steps(config, 1))
        with pytest.raises(ValueError, match=r"step_00000002 could not be written: .*File too large"):
            loop.run(config)
    assert len(curve(config)) > 2 and checkpoint.steps(run_dir(config)) == []
    assert loop.run(config) == 0
    assert len(curve(config)) == STEPS and checkpoint.steps(run_dir(config)) == [2, 4, 6]


def told_after_the_next_step(path: str) -> str:
    """What a rank is told by a run whose save of step 4 fails on rank 0, before step 5 has come to its end."""
    config, step_of = cli.load(Path(path)), loop.training_step
    made = 0

    def step(*arguments):
        nonlocal made
        made += 1
        for thread in threading.enumerate():
            if thread.name == "duet-save":
                thread.join()
        if made == 4 and distributed.is_main():
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        return step_of(*arguments)

    loop.training_step = step  # of this process, which ends with the test
    with pytest.raises(ValueError) as error:
        loop.run(config)
    return str(error.value)


def test_case_05_a_failure_is_told_on_all_ranks_after_the_next_step(tmp_path) -> None:
    config = small(tmp_path)
    (tmp_path / "config.yaml").write_text(cli.to_yaml(config))
    first, second = run_distributed(told_after_the_next_step, 2, str(tmp_path / "config.yaml"), timeout=100)
    assert first == second and "step_00000004 could not be written: " in first and "File too large" in first
    assert "free or mend the disk and start again" in first
    assert [step for step, _, _ in curve(config)] == [1, 2, 3, 4]
    assert checkpoint.steps(run_dir(config)) == [2] and checkpoint.verify(checkpoint.newest(run_dir(config))) == ""
    assert loop.run(config) == 0
