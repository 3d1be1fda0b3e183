"""Runs of several ranks of which one is killed, stopped or told to stop; each ends in the bytes of one left alone."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
TIMEOUT = 20
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


def prepare(directory: Path, world: int = 2, **data: int) -> RunConfig:
    """A run with a micro-batch of each step for each rank."""
    directory.mkdir(exist_ok=True)
    config = running.prepare(directory, steps=STEPS, global_batch=8 * world, micro_batch=8)
    config.data.val, config.data.image_size, config.checkpoint.every, config.checkpoint.keep = "", 32, 2, 2
    config.model.image.name = "shufflenet_v2_x0_5"
    config.optim.lr = 1e-3  # a difference in any last digit grows
    for name, value in data.items():
        setattr(config.data, name, value)
    return config


@contextmanager
def started(config: RunConfig, directory: Path, engine: str, world: int = 2) -> Iterator[Popen]:
    """The run on so many ranks, by its launcher; whatever is left of it at the end is killed."""
    process = running.start(running.command(config, directory, engine=engine, processes=world), directory / "run.log")
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

    def __init__(self, directory: Path, engine: str = "ddp", world: int = 2, every: int = 2):
        self.directory, self.engine, self.world = directory / "disturbed", engine, world
        self.rng, self.runs = random.Random(0), 1
        self.alone, self.config = prepare(directory / "alone", world), prepare(self.directory, world)
        self.alone.checkpoint.every = self.config.checkpoint.every = every
        with forked(self.alone, directory / "alone", engine, world) as ranks:
            assert ranks.wait(SECONDS) == [0] * world, (directory / "alone" / "run.log").read_text()[-3000:]

    @contextmanager
    def start(self) -> Iterator[Ranks]:
        """One start, a few steps further than the one before: in its last step a run is disturbed once more."""
        with forked(self.config, self.directory, self.engine, self.world) as ranks:
            running.wait_for_step(self.config, min(reached(self.config) + self.rng.randint(1, 4), STEPS - 1), ranks)
            yield ranks

    @contextmanager
    def launch(self, expected: set[int]) -> Iterator[Popen]:
        """One start by the real launcher, two steps further; it ends with one of these codes, and leaves no process."""
        with started(self.config, self.directory, self.engine, self.world) as process:
            running.wait_for_step(self.config, min(reached(self.config) + 2, STEPS - 1), process, SECONDS)
            everyone = family(process)
            yield process
            code = process.wait(timeout=SECONDS)
            assert not gone(everyone, 10)
            self.ended([code], expected)

    def in_a_save(self, process: Ranks | Popen) -> None:
        """Wait for some moment of a save, or the end of the run."""
        checkpoints = run_dir(self.config) / "checkpoints"
        while not list(checkpoints.glob(".step_*.part")) and process.poll() is None:
            time.sleep(0.001)
        time.sleep(self.rng.random() * 0.06)

    def ended(self, codes: list[int], expected: set[int]) -> None:
        """After every start."""
        assert set(codes) <= {0, *expected}, (codes, self.said())
        if is_done(self.config):
            self.compare()
            self.config, self.runs = replace(self.config, name=f"small{self.runs}"), self.runs + 1

    def finish(self) -> None:
        """Let the last run end in peace."""
        with forked(self.config, self.directory, self.engine, self.world) as ranks:
            assert ranks.wait(SECONDS) == [0] * self.world, self.said()
        self.compare()

    def compare(self) -> None:
        assert curve(self.config) == curve(self.alone) and saved(self.config) == saved(self.alone)

    def said(self) -> str:
        return (self.directory / "run.log").read_text()[-3000:]


def listens(pid: int, number: int) -> bool:
    """Whether a process has a handler for this signal, as launch.start asks before it passes one on."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(status.split("SigCgt:")[1].split()[0], 16) >> (number - 1) & 1)


def kill_all(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.mark.parametrize(
    ("engine", "world", "usual"),
    [("ddp", 2, 20), ("zero1", 2, 20), ("zero2", 2, 20), ("zero3", 2, 20), ("ddp", 4, 8), ("zero3", 3, 8)],
)
def test_case_01_one_rank_killed_at_random_steps(engine, world, usual, tmp_path, record_property) -> None:
    run, count = Disturbed(tmp_path, engine, world), tries(usual)
    for _ in range(count):
        with run.start() as ranks:
            time.sleep(run.rng.random() * 0.3)
            run.rng.choice(ranks.processes).kill()
            run.ended(ranks.wait(SECONDS), {1, -signal.SIGKILL})
    run.finish()
    record_property("tries", count)


def test_case_01_one_rank_killed_under_its_launcher(tmp_path) -> None:
    run = Disturbed(tmp_path, "zero1", world=3)
    with run.launch({1, 128 + signal.SIGKILL}) as process:
        run.rng.choice(list(ranks(process).values())).kill()
    run.finish()


@pytest.mark.parametrize(("world", "usual"), [(2, 50), (4, 10)])
def test_case_02_all_ranks_killed_at_random_moments_of_saves(world, usual, tmp_path, record_property) -> None:
    run, count, unfinished = Disturbed(tmp_path, world=world, every=1), tries(usual), 0
    for _ in range(count):
        with run.start() as ranks:
            run.in_a_save(ranks)
            for process in ranks.processes:
                process.kill()
            codes = ranks.wait(SECONDS)
            unfinished += bool(list((run_dir(run.config) / "checkpoints").glob(".step_*.part")))
            run.ended(codes, {-signal.SIGKILL})
    run.finish()
    assert unfinished > count / 4, f"only {unfinished} of {count} were in the middle of a save"
    record_property("tries", count)


def test_case_02_all_killed_with_their_launcher_in_a_save(tmp_path) -> None:
    run = Disturbed(tmp_path, world=3, every=1)
    with run.launch({-signal.SIGKILL}) as process:
        run.in_a_save(process)
        kill_all(family(process))
    run.finish()


@pytest.mark.parametrize(("world", "usual"), [(2, 30), (4, 10)])
def test_case_03_signals_to_one_random_rank(world, usual, tmp_path, record_property) -> None:
    run, count = Disturbed(tmp_path, world=world), tries(usual)
    for number in range(count):
        with run.start() as ranks:
            time.sleep(run.rng.random() * 0.3)
            told, kind = run.rng.choice(ranks.processes).pid, getattr(signal, SIGNALS[number % len(SIGNALS)])
            with suppress(FileNotFoundError, ProcessLookupError):  # this rank may have finished before the others
                while ranks.poll() is None and not listens(told, kind):
                    time.sleep(0.01)
                os.kill(told, kind)
            run.ended(ranks.wait(SECONDS), {EXIT_PREEMPTED})
    run.finish()
    record_property("tries", count)


def test_case_03_a_signal_to_one_rank_under_its_launcher(tmp_path) -> None:
    run = Disturbed(tmp_path, world=3)
    with run.launch({EXIT_PREEMPTED}) as process:
        run.rng.choice(list(ranks(process).values())).send_signal(signal.SIGUSR2)
    run.finish()


@pytest.mark.parametrize(("world", "usual"), [(2, 6), (4, 2)])
def test_case_04_a_second_term_and_a_kill_one_second_after_a_term(world, usual, tmp_path, record_property) -> None:
    run, count = Disturbed(tmp_path, world=world), tries(usual)
    for number in range(count):
        with run.launch({EXIT_PREEMPTED, -signal.SIGKILL}) as process:
            process.send_signal(signal.SIGTERM)
            time.sleep(run.rng.choice([0.05, 1.0]))
            if number % 2:
                process.send_signal(signal.SIGTERM)
            else:
                kill_all(family(process))
    run.finish()
    record_property("tries", count)


FAULTS = pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])


def endless(directory: Path, world: int) -> RunConfig:
    config = prepare(directory, world, workers=1)
    config.train.steps = 10_000
    return config


@FAULTS
def test_case_13_a_loader_killed_or_stopped_under_one_of_three_ranks_ends_all(fault, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DUET_TIMEOUT", str(TIMEOUT))
    config = endless(tmp_path, world=3)
    with forked(config, tmp_path, world=3) as run:
        running.wait_for_step(config, 3, run)
        readers = [reader for process in run.processes for reader in psutil.Process(process.pid).children()]
        assert len(readers) == 3
        readers[1].send_signal(fault)
        assert run.wait(TIMEOUT + 15) == [1] * 3
        assert not gone(readers, 10)
    said = (tmp_path / "run.log").read_text()
    assert said.count(f"loader process 0 (pid {readers[1].pid})") == 3 and "lost the other ranks" not in said
    newest = checkpoint.newest(run_dir(config))
    assert newest is not None and checkpoint.load_state(newest).step == reached(config), "what was trained is saved"


def assert_named(config: RunConfig, said: str, lost: psutil.Process) -> None:
    """The rank that was stopped is named, and there are the stacks of the one that waited for it."""
    assert f"pid {lost.pid}) is stopped; it was " in said
    assert "train/loop.py" in (run_dir(config) / "stacks" / "rank_00000.txt").read_text()


@FAULTS
@pytest.mark.parametrize(("engine", "world"), [("ddp", 2), ("zero2", 3), ("zero3", 2)])
def test_case_14_a_rank_killed_or_stopped_ends_all_in_time(fault, engine, world, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DUET_TIMEOUT", str(TIMEOUT))
    config = endless(tmp_path, world)
    with started(config, tmp_path, engine, world) as process:
        running.wait_for_step(config, 4, process)
        everyone, found = family(process), ranks(process)
        assert sorted(found) == list(range(world)) and all(loaders(rank) for rank in found.values())
        found[1].send_signal(fault)
        # torchrun gives a rank that does not heed its TERM, as one that is stopped, another 30 s.
        others = [rank for number, rank in found.items() if number != 1]
        assert not gone(others, TIMEOUT + 15), (tmp_path / "run.log").read_text()[-3000:]
        assert process.wait(timeout=60) != 0
        assert not gone(everyone, 10)
    if fault == signal.SIGSTOP:
        assert_named(config, (tmp_path / "run.log").read_text(), found[1])
    assert checkpoint.newest(run_dir(config)) is not None


@FAULTS
@pytest.mark.parametrize(
    ("engine", "world"), [("ddp", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2), ("ddp", 4), ("zero3", 3)]
)
def test_case_14_the_others_need_nobody_to_tell_them(fault, engine, world, tmp_path, monkeypatch) -> None:
    """As on another host, where no launcher sees that a rank is gone."""
    monkeypatch.setenv("DUET_TIMEOUT", str(TIMEOUT))
    config = endless(tmp_path, world)
    with forked(config, tmp_path, engine, world) as run:
        running.wait_for_step(config, 4, run)
        found = [psutil.Process(process.pid) for process in run.processes]
        readers = [reader for rank in found for reader in rank.children()]
        assert len(readers) == world
        found[1].send_signal(fault)
        assert not gone([found[0], *found[2:]], TIMEOUT + 15), (tmp_path / "run.log").read_text()[-3000:]
        run.processes[1].kill()
        assert run.wait(SECONDS) == [1, -signal.SIGKILL, *[1] * (world - 2)]
        assert not gone(readers, 30)  # they look every 5 s
    if fault == signal.SIGSTOP:
        assert_named(config, (tmp_path / "run.log").read_text(), found[1])
    assert checkpoint.newest(run_dir(config)) is not None
