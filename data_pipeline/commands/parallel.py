"""One function over many items in processes that never outlive, nor hold up, the one that started them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 3
"""Items that are handed out per process, so that none waits for the next one."""


def run_parallel(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, *, in_order: bool = True
) -> Generator[tuple[Item, Result]]:
    """Yield (item, function(item)); in the order of `items`, else as they get done. `workers` <= 1: in this process.

    Items are taken as needed, at most AHEAD per worker before their results are asked for. An exception of the function
    surfaces as itself. However the iteration ends, by Ctrl-C or kill -9 too, the workers end at once. Raises
    ChildProcessError when a worker dies.
    """
    if workers <= 1:
        for item in items:
            yield item, function(item)
        return
    pool: list[_Worker] = []
    waiting: dict[int, Item] = {}
    results: dict[int, Result] = {}
    supply, given, supplied = iter(items), 0, False
    try:
        while True:
            while not supplied and len(waiting) < workers * AHEAD:
                try:
                    item = next(supply)
                except StopIteration:
                    supplied = True
                    break
                if len(pool) < workers and all(worker.load for worker in pool):
                    pool.append(_Worker(function))
                waiting[given] = item
                min(pool, key=lambda worker: worker.load).give(given, item)
                given += 1
            if not waiting:
                return
            while not (next(iter(waiting)) in results if in_order else results):
                for ready in wait([worker.connection for worker in pool if worker.load]):
                    worker = next(worker for worker in pool if worker.connection is ready)
                    number, result = worker.take()
                    results[number] = result
            number = next(iter(waiting)) if in_order else next(iter(results))
            yield waiting.pop(number), results.pop(number)
    finally:
        for worker in pool:
            worker.end()


class _Worker:
    """A process that answers items in the order it gets them."""

    def __init__(self, function: Callable[[Any], Any]):
        context = multiprocessing.get_context("spawn")
        self.connection, its = context.Pipe()
        self.load = 0
        """Items given and not yet answered."""
        self._process = context.Process(target=_serve, args=(its, function), daemon=True)
        # Started here, because it would end the holding of signals when it is started by the process.
        resource_tracker.ensure_running()
        with interrupts_held():
            self._process.start()
        # With this one closed, the end of either process is the end of file for the other.
        its.close()

    def give(self, number: int, item: Any) -> None:
        with self._alive():
            self.connection.send((number, item))
        self.load += 1

    def take(self) -> tuple[int, Any]:
        """The next answer; raises what the function raised."""
        with self._alive():
            number, result, error = self.connection.recv()
        self.load -= 1
        if error is not None:
            raise error
        return number, result

    def end(self) -> None:
        self.connection.close()
        self._process.kill()
        self._process.join()

    @contextlib.contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, ConnectionError):
            raise ChildProcessError(
                "a worker process died, perhaps for lack of memory: fewer --workers need less; what is done is kept"
            ) from None


def _serve(connection: Connection, function: Callable[[Any], Any]) -> None:
    """The life of a worker. Items are taken in by a thread, so that neither side ever blocks the other's sending."""
    items: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()

    def receive() -> None:
        try:
            while True:
                items.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)

    threading.Thread(target=receive, daemon=True).start()
    while True:
        number, item = items.get()
        answer: tuple[int, Any, Exception | None]
        try:
            answer = (number, function(item), None)
        except Exception as error:
            answer = (number, None, error)
        try:
            connection.send(answer)
        except OSError:
            os._exit(0)


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl-C waits until this ends. Processes started in here never see it. For the main thread only."""
    came = []
    # The mask is what new processes inherit; the handler is for this one, where any thread may be sent the signal.
    handler = signal.signal(signal.SIGINT, lambda *_: came.append(True))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)
