"""Checkpoints between engines and world sizes: what one writes, every other one continues from."""

import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import running
from tests.support.distributed import run_distributed
from tests.support.exactness import LEVELS, engine_environment, make_batch, make_config, write_text_tower
from tests.support.running import assert_same_curve, curve, prepare, run
from tests.support.small import TEXT_FILES
from train.run.signals import EXIT_PREEMPTED

STATISTICS = ((0.5,) * 3, (0.25,) * 3)
DECAY = 0.5
TENSORS = ("model.safetensors", "optimizer.safetensors", "ema.safetensors")


def steps_between(text_tower: str, source: str, target: str, count: int) -> list[tuple[float, float]]:
    """Load the newest checkpoint of `source`, make `count` steps, save to `target`; loss and norm of each step."""
    from unittest import mock

    from torch import distributed as dist

    from tests.support.checkpoints import save
    from train import checkpoint, distributed
    from train.begin import restore
    from train.checkpoint import TrainState
    from train.engine.build import engine_of_run
    from train.engine.ema import WeightAverage
    from train.engine.host import HostMemory
    from train.engine.optim import set_lrs
    from train.engine.start import start
    from train.model.pair import build_model
    from train.saving.saver import collect
    from train.step import training_step

    config = make_config(text_tower, LEVELS, global_batch=32)
    config.optim.lr, config.optim.ema = 1e-3, DECAY
    config.model.max_logit_scale = 14.0  # just below where scales start, so that every engine has to clamp them
    config.model.image.norm = "group"  # a smooth problem: BatchNorm over few values would amplify rounding
    accelerator = start()
    model, state = build_model(config, *STATISTICS), TrainState()
    found = checkpoint.newest(Path(source)) if source else None
    if found is not None:
        state = checkpoint.load_state(found)
        checkpoint.load_weights(found, model)
    engine = engine_of_run(accelerator, model, config)
    average = WeightAverage(engine, DECAY)
    if found is not None:
        restore(found, engine, average, state)
    share = 8 // distributed.world_size()
    results = []
    for _ in range(count):
        set_lrs(engine.optimizer, state.step, 10, config.optim)
        own = make_batch(config, state.step)[distributed.rank() * share : (distributed.rank() + 1) * share]
        metrics = training_step(engine, own, config)
        average.update()
        state.step += 1
        results.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    average_now = average.state()  # ahead of what gathers the weights: after a step ZeRO-3 has small ones whole
    room = {part: HostMemory() for part in ("model", "optimizer", "ema")}
    with (
        mock.patch.object(dist, "reduce", wraps=dist.reduce) as reduced,
        mock.patch.object(dist, "all_reduce") as summed,
    ):
        summed.side_effect = AssertionError("moments by themselves")
        if engine.stage != 3:
            engine.moments()
    if engine.stage in (1, 2) and state.step:
        assert 0 < reduced.call_count < 20, "some 250 moments come together"
    tensors = collect(engine, average, state, room)
    assert all(torch.equal(value, tensors.ema[name]) for name, value in average_now.items())
    taken = sum(value.nbytes for part in vars(tensors).values() for value in part.values())
    assert taken == (engine.saved_bytes(copies=2) if distributed.is_main() else 0)
    save(Path(target), tensors, state, config, TEXT_FILES)
    return results


def leg(engine: str, world: int, directory: Path, source: str, target: str, count: int) -> list[tuple[float, float]]:
    environment = engine_environment(engine, directory)
    arguments = (str(directory / "text"), source and str(directory / source), str(directory / target), count)
    return run_distributed(steps_between, world, *arguments, environment=environment, timeout=300)[0]


def files(directory: Path) -> dict[str, bytes]:
    (checkpoint,) = (directory / "checkpoints").glob("step_*")
    return {name: (checkpoint / name).read_bytes() for name in TENSORS}


def scales(directory: Path) -> list[float]:
    """All logit scales of a checkpoint."""
    (checkpoint,) = (directory / "checkpoints").glob("step_*")
    weights = load_file(checkpoint / "model.safetensors")
    return torch.cat([weights["log_scale"], weights["level_log_scales"]]).exp().tolist()


def saved(directory: Path, part: str) -> torch.Tensor:
    """All values of one file of a checkpoint that learn."""
    (checkpoint,) = (directory / "checkpoints").glob("step_*")
    moments = sorted(load_file(checkpoint / "optimizer.safetensors"))
    names = [name.removesuffix(".exp_avg") for name in moments if name.endswith(".exp_avg")]
    tensors = load_file(checkpoint / f"{part}.safetensors")
    return torch.cat([tensors[name].flatten() for name in names])


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    """Two steps under DDP on two processes, saved; and the two that follow."""
    directory = tmp_path_factory.mktemp("straight")
    write_text_tower(directory / "text")
    leg("ddp", 2, directory, "", "two", 2)
    return directory, leg("ddp", 2, directory, "two", "four", 2)


@pytest.mark.parametrize(("engine", "world"), [("ddp", 1), ("zero1", 2), ("zero2", 4), ("zero3", 2)])
def test_a_checkpoint_goes_through_every_engine_unchanged(straight, tmp_path: Path, engine: str, world: int) -> None:
    directory, _ = straight
    shutil.copytree(directory / "text", tmp_path / "text")
    shutil.copytree(directory / "two", tmp_path / "two")
    leg(engine, world, tmp_path, "two", "again", 0)
    assert files(tmp_path / "again") == files(tmp_path / "two")


@pytest.mark.parametrize(("engine", "world"), [("zero2", 2), ("zero3", 2)])
def test_the_steps_after_a_change_of_engine_are_the_same(straight, tmp_path: Path, engine: str, world: int) -> None:
    directory, expected = straight
    shutil.copytree(directory / "text", tmp_path / "text")
    shutil.copytree(directory / "two", tmp_path / "two")
    actual = leg(engine, world, tmp_path, "two", "four", 2)
    assert scales(tmp_path / "four") == pytest.approx(scales(directory / "four"), rel=1e-5)
    assert max(scales(tmp_path / "four")) < 14.0001
    average = saved(directory / "four", "ema")
    lag = (saved(directory / "four", "model") - average).norm()
    assert (saved(tmp_path / "four", "ema") - average).norm() < 0.1 * lag
    for (loss, norm), (expected_loss, expected_norm) in zip(actual, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-3)


LR = 3e-6  # that of tests/support/curves.py, which says why
ROUTES = {
    "fewer and fewer processes": (("ddp", 4), ("ddp", 2), ("ddp", 1)),
    "other engines": (("ddp", 2), ("zero2", 2), ("zero3", 2), ("ddp", 2)),
    "both": (("zero3", 4), ("zero1", 2), ("zero2", 1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_a_run_that_moves_has_the_curve_of_one_that_does_not(tmp_path: Path, route: tuple) -> None:
    expected = prepare(tmp_path, steps=3 * len(route))
    expected.name, expected.optim.lr = "straight", LR
    run(expected, tmp_path)
    config = prepare(tmp_path, steps=3 * len(route))
    config.optim.lr = LR
    for number, (engine, processes) in enumerate(route[:-1]):
        command = running.command(config, tmp_path, engine=engine, processes=processes)
        process = running.start(command, tmp_path / "route.log")
        running.wait_for_step(config, 3 * number + 1, process)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=120) == EXIT_PREEMPTED
    run(config, tmp_path, engine=route[-1][0], processes=route[-1][1])
    assert_same_curve(curve(config), curve(expected), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2", "zero3"])
def test_the_same_world_goes_on_with_the_same_bytes(tmp_path: Path, engine: str) -> None:
    write_text_tower(tmp_path / "text")
    whole = leg(engine, 2, tmp_path, "", "whole", 4)
    parts = leg(engine, 2, tmp_path, "", "two", 2) + leg(engine, 2, tmp_path, "two", "four", 2)
    assert parts == whole
    assert files(tmp_path / "four") == files(tmp_path / "whole")
