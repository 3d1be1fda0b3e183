"""Micro-batches on their way to a GPU: copied there, and their colours changed, beside the steps before them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import suppress
from queue import Empty, Queue
from typing import NamedTuple

import torch

from data_pipeline.batch import MicroBatch
from data_pipeline.samples.colors import recolored


class _Arrived(NamedTuple):
    """A micro-batch with the event after which it is on the device, None for at once; or what was raised instead."""

    batch: MicroBatch | None
    done: torch.cuda.Event | None
    error: BaseException | None = None


def landed(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """A micro-batch of the loader on the device, as the towers see it."""
    return recolored(batch.to(device, non_blocking=True))


def arriving(batches: Iterator[MicroBatch], device: torch.device, ahead: int) -> Iterator[MicroBatch]:
    """The same micro-batches: for a GPU on it, `ahead` of them before they are asked for; else untouched."""
    return Arrivals(batches, device, ahead) if device.type == "cuda" else batches


class Arrivals(Iterator[MicroBatch]):
    """Takes micro-batches in a thread, and copies them on a stream of its own, which waits for no step.

    The loader's are in pinned memory, from which the device copies while it computes. What the loader raises is raised
    here, after all that came before it. When this is forgotten, the thread lets go of `batches` and ends. The first
    one is taken by the caller, before there is a thread: with it the loader's processes are forked.

    Args:
        ahead: micro-batches that may lie on the device before they are asked for.
    """

    def __init__(self, batches: Iterator[MicroBatch], device: torch.device, ahead: int) -> None:
        self.device = device
        self.thread: threading.Thread | None = None
        self._batches = batches
        self._arrived: Queue[_Arrived] = Queue(ahead)
        self._ended = False

    def __next__(self) -> MicroBatch:
        if self._ended:
            raise StopIteration
        if self.thread is None:
            first = landed(next(self._batches), self.device)
            self._begin()
            return first
        batch, done, error = self._arrived.get()
        if error is not None:
            self._ended = True
            raise error
        assert batch is not None
        if done is not None:
            # The memory is the copying stream's: it must not be used again there before this stream is done with it.
            computing = torch.cuda.current_stream(self.device)
            computing.wait_event(done)
            batch.mapped(lambda tensor: tensor.record_stream(computing))
        return batch

    def _begin(self) -> None:
        stopped = threading.Event()
        weakref.finalize(self, _stop, stopped, self._arrived).atexit = False
        work = self._batches, self.device, self._arrived, stopped
        self._batches = iter(())
        self.thread = threading.Thread(target=_take, args=work, name="arrivals", daemon=True)
        self.thread.start()


def _take(
    batches: Iterator[MicroBatch], device: torch.device, arrived: Queue[_Arrived], stopped: threading.Event
) -> None:
    """The thread's work; it knows nothing of the Arrivals, so that these can be forgotten."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    with torch.cuda.stream(stream):
        while not stopped.is_set():
            try:
                batch = landed(next(batches), device)
                arrived.put(_Arrived(batch, stream.record_event() if stream is not None else None))
            except BaseException as error:  # StopIteration, too
                arrived.put(_Arrived(None, None, error))
                return


def _stop(stopped: threading.Event, arrived: Queue[_Arrived]) -> None:
    stopped.set()
    with suppress(Empty):  # the thread may wait for room
        while True:
            arrived.get_nowait()
