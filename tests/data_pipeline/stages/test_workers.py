"""Loader processes that die or hang are named, with what they were at, and none is left behind."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from torch.utils.data import get_worker_info

from data_pipeline.stages import workers
from data_pipeline.stages.workers import LoaderFailure, Patience, WorkerLoader, at, prepared, workers_for


class Pids:
    """Gives its process's pid ten times; the first process stops at its third item, in the way of `fault`."""

    def __init__(self, fault: str):
        self.fault = fault

    def __iter__(self) -> Iterator[int]:
        for number in range(10):
            at(f"shard a.tar, sample {number}")
            if number == 2 and get_worker_info().id == 0:
                time.sleep(0.3)  # what it made before is on its way
                self.hang()
            yield os.getpid()

    def hang(self) -> None:
        if self.fault == "sleeps":
            time.sleep(600)
        os.kill(os.getpid(), getattr(signal, self.fault))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("SIGKILL", r" was killed by SIGKILL, at shard a\.tar, sample 2; the kernel kills so when memory runs out"),
        ("SIGSTOP", r", which is stopped, has made nothing in [23] s, at shard a\.tar, sample 2\. Wait longer"),
        ("sleeps", r" has made nothing in [23] s, at shard a\.tar, sample 2; its stacks are in .*loader\.txt\. Wait"),
    ],
)
def test_case_13_a_loader_that_dies_or_hangs_is_named_with_its_sample(fault, words, tmp_path: Path) -> None:
    began = time.monotonic()
    stacks = tmp_path / "loader.txt"
    patience = Patience(1.5, stacks=str(stacks), remedy=". Wait longer")
    seen: list[int] = []
    with pytest.raises(LoaderFailure, match=rf"^loader process 0 \(pid \d+\){words}") as failure:
        for pid in WorkerLoader(Pids(fault), workers=2, prefetch=2, patience=patience):
            seen.append(pid)
    assert len(seen) == 4 and str(seen[0]) in str(failure.value)
    assert not any(psutil.pid_exists(pid) for pid in seen)
    assert time.monotonic() - began < 20
    if fault == "sleeps":
        assert "in hang" in stacks.read_text()


class Stopped:
    """Gives tensors; its process stops once it has made four of them."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        for number in range(5):
            if number == 4:
                time.sleep(0.3)  # what it made before is on its way
                os.kill(os.getpid(), signal.SIGSTOP)
            yield torch.full((9,), number)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("is_asked", [True, False], ids=["while asked to stop", "in time"])
def test_case_13_a_loader_that_is_stopped_when_its_tensors_are_fetched_is_named(is_asked, monkeypatch) -> None:
    """It has said that an item is there, but hands over its memory no more, and torch would wait for ever."""

    class Enough(Exception):
        pass

    def check() -> None:
        if is_asked:
            raise Enough

    monkeypatch.setattr(workers, "POLL_SECONDS", 0.1)
    began = time.monotonic()
    iterator = iter(WorkerLoader(Stopped(), workers=1, prefetch=4, patience=Patience(600 if is_asked else 0.5, check)))
    assert next(iterator).tolist() == [0] * 9
    while psutil.STATUS_STOPPED not in [child.status() for child in psutil.Process().children()]:
        time.sleep(0.05)  # then three items are waiting, which none has fetched
    with pytest.raises(Enough if is_asked else LoaderFailure) as failure:
        list(iterator)
    assert is_asked or ", which is stopped, has made nothing in" in str(failure.value)
    assert time.monotonic() - began < 30


def test_while_waiting_the_caller_may_give_up(tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    def check() -> None:
        raise Enough

    seen = []
    with pytest.raises(Enough):
        for pid in WorkerLoader(Pids("sleeps"), workers=1, prefetch=2, patience=Patience(check=check)):
            seen.append(pid)
    assert len(seen) == 2 and not psutil.pid_exists(seen[0])


@pytest.mark.parametrize(
    ("cores", "processes", "workers"), [(2, 1, 1), (16, 1, 15), (96, 8, 11), (4, 8, 1), (256, 8, 16)]
)
def test_processes_share_the_cores_of_a_host(cores: int, processes: int, workers: int) -> None:
    assert workers_for(cores, processes) == workers


class Numbers:
    """Every process counts in a directory what it has made."""

    def __init__(self, directory: Path):
        self.directory = directory

    def __iter__(self) -> Iterator[int]:
        for number in range(50):
            (self.directory / f"{get_worker_info().id}-{number}").touch()
            yield number


@pytest.mark.parametrize(("workers", "prefetch", "ahead"), [(1, 1, 12), (2, 1, 7), (2, 4, 3)])
def test_so_many_items_are_prepared_ahead(workers: int, prefetch: int, ahead: int, tmp_path: Path) -> None:
    expected = prepared(workers, prefetch, ahead)
    assert expected >= max(ahead, workers * prefetch) and expected < ahead + workers * prefetch + workers
    iterator = iter(WorkerLoader(Numbers(tmp_path), workers=workers, prefetch=prefetch, ahead=ahead))
    next(iterator)
    # One is taken, so one more is made.
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < expected + 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    assert len(list(tmp_path.iterdir())) == expected + 1
