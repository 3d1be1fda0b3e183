"""Runs of several ranks of which one is killed, stopped or told to stop; each ends in the bytes of one left alone."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from subprocess import Popen

import psutil
import pytest

from tests.support import running
from tests.support.family import family, gone, loaders, ranks
from tests.support.running import curve, metrics, run_dir
from train import checkpoint
from train.config import RunConfig
from train.run.signals import EXIT_PREEMPTED, SIGNALS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
STEPS = 24
ENGINES = ("ddp", "zero1", "zero2", "zero3")
TIMEOUT = 20
"""DUET_TIMEOUT, in seconds."""


def tries(usual: int) -> int:
    """How often a fault is tried: so often, or DUET_FAULT_TRIES times."""
    return int(os.environ.get("DUET_FAULT_TRIES", usual))


def prepare(directory: Path, **data: int) -> RunConfig:
    directory.mkdir(exist_ok=True)
    config = running.prepare(directory, steps=STEPS, global_batch=16, micro_batch=8)
    config.data.val, config.data.image_size, config.checkpoint.every, config.checkpoint.keep = "", 32, 2, 2
    config.optim.lr = 1e-3  # a difference in any last digit grows
    for name, value in data.items():
        setattr(config.data, name, value)
    return config


@contextmanager
def started(config: RunConfig, directory: Path, engine: str) -> Iterator[Popen]:
    """The run on two ranks; whatever is left of it at the end is killed."""
    process = running.start(running.command(config, directory, engine=engine, processes=2), directory / "run.log")
    seen: list[psutil.Process] = []
    try:
        yield process
    finally:
        seen += family(process)
        for one in seen:
            if one.is_running():
                one.kill()
        process.wait()


def saved(config: RunConfig) -> dict[str, bytes]:
    """Weights, moments and averages after the last step."""
    newest = checkpoint.newest(run_dir(config))
    assert newest is not None and newest.name == f"step_{STEPS:08d}"
    return {name: (newest / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer", "ema")}


def ends_as_if_nothing_had_happened(
    directory: Path, engine: str, faults: int, fault: Callable[[Popen, random.Random], None], status: set[int]
) -> None:
    """A run disturbed again and again ends as one left alone, in the same engine on as many ranks."""
    rng = random.Random(0)
    alone = prepare(directory / "alone")
    with started(alone, directory / "alone", engine) as process:
        assert process.wait(timeout=600) == 0
    config, number = prepare(directory / "disturbed"), 0
    while number < faults:
        # All steps but the last, again and again: what was saved is thrown away where the run would be at its end.
        with started(config, directory / "disturbed", engine) as process:
            reached = max((record["step"] for record in metrics(config)), default=0)
            running.wait_for_step(config, min(reached + rng.randint(1, 4), STEPS - 1), process)
            time.sleep(rng.random() * 0.3)
            if process.poll() is None:
                fault(process, rng)
            code, before = process.wait(timeout=120), family(process)
            assert code in {0, *status}, (directory / "disturbed" / "run.log").read_text()[-3000:]
            assert not gone(before, 10)
            number += 1
            if code == 0:
                assert curve(config) == curve(alone) and saved(config) == saved(alone)
                config = replace(config, name=f"small{number}")
    while checkpoint.newest(run_dir(config)) is None or not (run_dir(config) / "results.json").is_file():
        with started(config, directory / "disturbed", engine) as process:
            assert process.wait(timeout=600) == 0
    assert curve(config) == curve(alone) and saved(config) == saved(alone)


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_case_01_one_rank_killed_at_random_steps(engine, tmp_path, record_property) -> None:
    count = tries(8)

    def kill(process: Popen, rng: random.Random) -> None:
        if found := list(ranks(process).values()):
            rng.choice(found).kill()

    ends_as_if_nothing_had_happened(tmp_path, engine, count, kill, {1, 128 + signal.SIGKILL})
    record_property("tries", count)


def test_case_02_all_ranks_killed_at_random_moments_around_saves(tmp_path, record_property) -> None:
    count = tries(10)

    def kill(process: Popen, rng: random.Random) -> None:
        for one in family(process):
            if one.is_running():
                one.kill()

    ends_as_if_nothing_had_happened(tmp_path, "ddp", count, kill, {-signal.SIGKILL})
    record_property("tries", count)


def test_case_03_signals_to_one_random_rank(tmp_path, record_property) -> None:
    count = tries(10)

    def tell(process: Popen, rng: random.Random) -> None:
        if found := list(ranks(process).values()):
            rng.choice(found).send_signal(getattr(signal, rng.choice(SIGNALS)))

    ends_as_if_nothing_had_happened(tmp_path, "ddp", count, tell, {EXIT_PREEMPTED})
    record_property("tries", count)


def test_case_04_a_second_term_and_a_kill_one_second_after_a_term(tmp_path, record_property) -> None:
    count = tries(6)

    def tell(process: Popen, rng: random.Random) -> None:
        process.send_signal(signal.SIGTERM)
        time.sleep(rng.choice([0.05, 1.0]))
        if rng.random() < 0.5:
            process.send_signal(signal.SIGTERM)
            return
        for one in family(process):
            if one.is_running():
                one.kill()

    ends_as_if_nothing_had_happened(tmp_path, "ddp", count, tell, {EXIT_PREEMPTED, -signal.SIGKILL})
    record_property("tries", count)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_case_14_a_rank_killed_or_stopped_ends_the_others_in_time(engine, fault, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DUET_TIMEOUT", str(TIMEOUT))
    config = prepare(tmp_path, workers=1)
    config.train.steps = 10_000
    with started(config, tmp_path, engine) as process:
        running.wait_for_step(config, 4, process)
        everyone, found = family(process), ranks(process)
        assert sorted(found) == [0, 1] and all(loaders(rank) for rank in found.values())
        found[1].send_signal(fault)
        began = time.monotonic()
        # torchrun gives a rank that does not heed its TERM, as one that is stopped, another 30 s.
        assert not gone([found[0]], TIMEOUT + 15), f"rank 0 is still there after {time.monotonic() - began:.0f} s"
        assert process.wait(timeout=60) != 0
        assert not gone(everyone, 10)
    said = (tmp_path / "run.log").read_text()
    if fault == signal.SIGSTOP:
        assert f"pid {found[1].pid}) is stopped; it was " in said
        assert "train/loop.py" in (run_dir(config) / "stacks" / "rank_00000.txt").read_text()
    assert checkpoint.newest(run_dir(config)) is not None
