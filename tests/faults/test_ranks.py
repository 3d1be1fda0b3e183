"""Runs of several ranks of which one is killed, stopped or told to stop; each ends in the bytes of one left alone."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from subprocess import Popen

import psutil
import pytest

from tests.support import running
from tests.support.family import family, gone, loaders, ranks
from tests.support.forked import Ranks, forked
from tests.support.running import curve, metrics, run_dir
from train import checkpoint
from train.config import RunConfig
from train.run.signals import EXIT_PREEMPTED, SIGNALS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
STEPS = 24
TIMEOUT = 40
"""DUET_TIMEOUT, in seconds, where it is to be heeded."""
SECONDS = 600
"""That a start may take on a busy machine."""


@pytest.fixture(autouse=True)
def short_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody but this ends a rank whose peer was killed before the two had met."""
    monkeypatch.setenv("DUET_TIMEOUT", "60")


def tries(usual: int) -> int:
    """How often a fault is tried: so often, or DUET_FAULT_TRIES times."""
    return int(os.environ.get("DUET_FAULT_TRIES", usual))


def prepare(directory: Path, **data: int) -> RunConfig:
    directory.mkdir(exist_ok=True)
    config = running.prepare(directory, steps=STEPS, global_batch=16, micro_batch=8)
    config.data.val, config.data.image_size, config.checkpoint.every, config.checkpoint.keep = "", 32, 2, 2
    config.model.image.name = "shufflenet_v2_x0_5"
    config.optim.lr = 1e-3  # a difference in any last digit grows
    for name, value in data.items():
        setattr(config.data, name, value)
    return config


@contextmanager
def started(config: RunConfig, directory: Path, engine: str) -> Iterator[Popen]:
    """The run on two ranks, by its launcher; whatever is left of it at the end is killed."""
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


def is_done(config: RunConfig) -> bool:
    return (run_dir(config) / "results.json").is_file()


def reached(config: RunConfig) -> int:
    """The last step that was logged."""
    return max((record["step"] for record in metrics(config)), default=0)


class Disturbed:
    """A run that is disturbed again and again, and then another: each has to end as one left alone.

    Run and reference are in the same engine, on as many ranks.
    """

    def __init__(self, directory: Path, engine: str = "ddp", every: int = 2):
        self.directory, self.engine, self.rng, self.runs = directory / "disturbed", engine, random.Random(0), 1
        self.alone, self.config = prepare(directory / "alone"), prepare(self.directory)
        self.alone.checkpoint.every = self.config.checkpoint.every = every
        with forked(self.alone, directory / "alone", engine) as ranks:
            assert ranks.wait(SECONDS) == [0, 0], (directory / "alone" / "run.log").read_text()[-3000:]

    @contextmanager
    def start(self) -> Iterator[Ranks]:
        """One start, a few steps further than the one before: in its last step a run is disturbed once more."""
        with forked(self.config, self.directory, self.engine) as ranks:
            running.wait_for_step(self.config, min(reached(self.config) + self.rng.randint(1, 4), STEPS - 1), ranks)
            yield ranks

    def ended(self, codes: list[int], expected: set[int]) -> None:
        """After every start."""
        assert set(codes) <= {0, *expected}, (codes, self.said())
        if is_done(self.config):
            self.compare()
            self.config, self.runs = replace(self.config, name=f"small{self.runs}"), self.runs + 1

    def finish(self) -> None:
        """Let the last run end in peace."""
        with forked(self.config, self.directory, self.engine) as ranks:
            assert ranks.wait(SECONDS) == [0, 0], self.said()
        self.compare()

    def compare(self) -> None:
        assert curve(self.config) == curve(self.alone) and saved(self.config) == saved(self.alone)

    def said(self) -> str:
        return (self.directory / "run.log").read_text()[-3000:]


def listens(pid: int, number: int) -> bool:
    """Whether a process has a handler for this signal, as launch.start asks before it passes one on."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(status.split("SigCgt:")[1].split()[0], 16) >> (number - 1) & 1)


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_case_01_one_rank_killed_at_random_steps(engine, tmp_path, record_property) -> None:
    run, count = Disturbed(tmp_path, engine), tries(20)
    for _ in range(count):
        with run.start() as ranks:
            time.sleep(run.rng.random() * 0.3)
            run.rng.choice(ranks.processes).kill()
            run.ended(ranks.wait(SECONDS), {1, -signal.SIGKILL})
    run.finish()
    record_property("tries", count)


def test_case_02_all_ranks_killed_at_random_moments_of_saves(tmp_path, record_property) -> None:
    run, count, unfinished = Disturbed(tmp_path, every=1), tries(50), 0
    for _ in range(count):
        with run.start() as ranks:
            checkpoints = run_dir(run.config) / "checkpoints"
            while not list(checkpoints.glob(".step_*.part")) and ranks.poll() is None:
                time.sleep(0.001)
            time.sleep(run.rng.random() * 0.06)
            for process in ranks.processes:
                process.kill()
            codes = ranks.wait(SECONDS)
            unfinished += bool(list(checkpoints.glob(".step_*.part")))
            run.ended(codes, {-signal.SIGKILL})
    run.finish()
    assert unfinished > count / 4, f"only {unfinished} of {count} were in the middle of a save"
    record_property("tries", count)


def test_case_03_signals_to_one_random_rank(tmp_path, record_property) -> None:
    run, count = Disturbed(tmp_path), tries(30)
    for number in range(count):
        with run.start() as ranks:
            time.sleep(run.rng.random() * 0.3)
            told, kind = run.rng.choice(ranks.processes).pid, getattr(signal, SIGNALS[number % len(SIGNALS)])
            while ranks.poll() is None and not listens(told, kind):
                time.sleep(0.01)
            if ranks.poll() is None:
                os.kill(told, kind)
            run.ended(ranks.wait(SECONDS), {EXIT_PREEMPTED})
    run.finish()
    record_property("tries", count)


def test_case_04_a_second_term_and_a_kill_one_second_after_a_term(tmp_path, record_property) -> None:
    run, count = Disturbed(tmp_path), tries(4)
    for number in range(count):
        with started(run.config, run.directory, "ddp") as process:
            running.wait_for_step(run.config, min(reached(run.config) + 2, STEPS - 1), process, SECONDS)
            process.send_signal(signal.SIGTERM)
            time.sleep(run.rng.choice([0.05, 1.0]))
            if number % 2:
                process.send_signal(signal.SIGTERM)
            else:
                for one in family(process):
                    if one.is_running():
                        one.kill()
            everyone, code = family(process), process.wait(timeout=SECONDS)
            assert not gone(everyone, 10)
            run.ended([code], {EXIT_PREEMPTED, -signal.SIGKILL})
    run.finish()
    record_property("tries", count)


FAULTS = pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])


def endless(directory: Path) -> RunConfig:
    config = prepare(directory, workers=1)
    config.train.steps = 10_000
    return config


def assert_named(config: RunConfig, said: str, lost: psutil.Process) -> None:
    """The rank that was stopped is named, and there are the stacks of the one that waited for it."""
    assert f"pid {lost.pid}) is stopped; it was " in said
    assert "train/loop.py" in (run_dir(config) / "stacks" / "rank_00000.txt").read_text()


@FAULTS
def test_case_14_a_rank_killed_or_stopped_ends_all_in_time(fault, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DUET_TIMEOUT", str(TIMEOUT))
    config = endless(tmp_path)
    with started(config, tmp_path, "ddp") as process:
        running.wait_for_step(config, 4, process)
        everyone, found = family(process), ranks(process)
        assert sorted(found) == [0, 1] and all(loaders(rank) for rank in found.values())
        found[1].send_signal(fault)
        began = time.monotonic()
        # torchrun gives a rank that does not heed its TERM, as one that is stopped, another 30 s.
        assert not gone([found[0]], TIMEOUT + 15), f"rank 0 is still there after {time.monotonic() - began:.0f} s"
        assert process.wait(timeout=60) != 0
        assert not gone(everyone, 10)
    if fault == signal.SIGSTOP:
        assert_named(config, (tmp_path / "run.log").read_text(), found[1])
    assert checkpoint.newest(run_dir(config)) is not None


@FAULTS
@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2", "zero3"])
def test_case_14_the_others_need_nobody_to_tell_them(fault, engine, tmp_path, monkeypatch) -> None:
    """As on another host, where no launcher sees that a rank is gone."""
    monkeypatch.setenv("DUET_TIMEOUT", str(TIMEOUT))
    config = endless(tmp_path)
    with forked(config, tmp_path, engine) as run:
        running.wait_for_step(config, 4, run)
        found = [psutil.Process(process.pid) for process in run.processes]
        readers = [reader for rank in found for reader in rank.children()]
        assert len(readers) == 2
        found[1].send_signal(fault)
        assert not gone([found[0]], TIMEOUT + 15)
        run.processes[1].kill()
        assert run.wait(SECONDS) == [1, -signal.SIGKILL]
        assert not gone(readers, 30)  # they look every 5 s
    if fault == signal.SIGSTOP:
        assert_named(config, (tmp_path / "run.log").read_text(), found[1])
    assert checkpoint.newest(run_dir(config)) is not None
