"""Micro-batches that a thread takes ahead. Here the device is the CPU, so nothing is said of streams."""

import gc
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from data_pipeline.batch import MicroBatch, Recoloring
from train.arrival import Arrivals, arriving

CPU = torch.device("cpu")


def batch_of(number: int) -> MicroBatch:
    images_BCHW = torch.full((1, 2, 2, 3), number, dtype=torch.uint8).permute(0, 3, 1, 2)
    ids_BL = torch.full((1, 8), number)
    return MicroBatch(images_BCHW, ids_BL, ids_BL, number, 0, [str(number)])


class Loader:
    """So many micro-batches, then an error or the end; says what was taken of it, and whether it was closed."""

    def __init__(self, count: int, error: BaseException | None = None):
        self.count, self.error, self.taken, self.closed = count, error, 0, threading.Event()

    def __iter__(self) -> Iterator[MicroBatch]:
        try:
            for number in range(self.count):
                self.taken += 1
                yield batch_of(number)
            if self.error:
                raise self.error
        finally:
            self.closed.set()


def comes_true(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_all_arrive_in_order_and_then_it_is_over() -> None:
    arrivals = Arrivals(iter(Loader(20)), CPU, ahead=3)
    assert [batch.index for batch in arrivals] == list(range(20))
    assert list(arrivals) == []


def test_so_many_are_taken_ahead_and_one_that_waits_for_room() -> None:
    loader = Loader(20)
    arrivals = Arrivals(iter(loader), CPU, ahead=3)
    assert loader.taken == 0 and arrivals.thread is None  # a loader forks its processes with the first
    for asked in (1, 2):
        next(arrivals)
        assert comes_true(lambda asked=asked: loader.taken == asked + 4)
    time.sleep(0.1)
    assert loader.taken == 6


def test_their_colours_are_changed_on_the_way() -> None:
    grey = torch.tensor([[*[0.0] * 18, 0.0, *[0.299, 0.587, 0.114, 0, 0, 0] * 3]])
    batch = batch_of(0)
    batch.images_BCHW[:, 0] = 200
    batch.colors = Recoloring(torch.tensor([0]), grey, turns=False)
    for arrived in Arrivals(iter([batch, batch]), CPU, ahead=1):
        assert arrived.colors is None and (arrived.images_BCHW == round(0.299 * 200)).all()


@pytest.mark.parametrize("error", [ValueError("a shard is damaged"), KeyboardInterrupt()])
def test_what_the_loader_raises_comes_after_what_was_good(error: BaseException) -> None:
    arrivals = Arrivals(iter(Loader(2, error)), CPU, ahead=4)
    assert next(arrivals).index == 0
    arrivals.thread.join(30)
    assert next(arrivals).index == 1
    with pytest.raises(type(error)) as raised:
        next(arrivals)
    assert raised.value is error
    assert list(arrivals) == []


def test_forgotten_it_lets_go_of_the_loader() -> None:
    loader = Loader(20)
    arrivals = Arrivals(iter(loader), CPU, ahead=2)
    next(arrivals)
    thread = arrivals.thread
    del arrivals
    gc.collect()
    thread.join(30)
    assert not thread.is_alive() and loader.closed.is_set() and loader.taken <= 6


def test_without_a_gpu_nothing_is_taken_before_it_is_asked_for() -> None:
    batches = iter(Loader(3))
    assert arriving(batches, CPU, ahead=2) is batches


@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams need a GPU")
def test_on_a_gpu_every_micro_batch_is_whole_while_others_are_copied() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    loader = (batch_of(number).pin_memory() for number in range(200))
    work = torch.randn(2048, 2048, device=device)
    for number, batch in enumerate(arriving(loader, device, ahead=4)):
        work @ work
        assert batch.images_BCHW.device == device
        assert bool((batch.images_BCHW == number).all()) and bool((batch.ids_BL == number).all())
