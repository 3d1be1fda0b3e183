"""One function over many items in processes that never outlive, nor hold up, the one that started them."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 4
"""Items that are handed out per process, so that none waits for the next one."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_parallel(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, *, in_order: bool = True
) -> Iterator[tuple[Item, Result]]:
    """Yield (item, function(item)); in the order of `items`, else as they get done. `workers` <= 1: in this process.

    Items are taken as needed, at most AHEAD per worker in advance. An exception of the function surfaces as itself.
    However the iteration ends, by Ctrl-C or kill -9 too, the workers end at once. Raises ChildProcessError when a
    worker dies.
    """
    if workers <= 1:
        for item in items:
            yield item, function(item)
        return
    context = multiprocessing.get_context("spawn")
    # Only this process holds the writing end: when it closes, or this process dies, every worker sees the end of file.
    lifeline, held = context.Pipe(duplex=False)
    executor = ProcessPoolExecutor(workers, context, initializer=_follow, initargs=(lifeline,))
    pending: deque[tuple[Item, Future[Result]]] = deque()
    supply = iter(items)
    try:
        while True:
            for item in islice(supply, workers * AHEAD - len(pending)):
                with interrupts_held():
                    pending.append((item, executor.submit(function, item)))
            if not pending:
                break
            futures = [future for _, future in pending]
            wait(futures[:1] if in_order else futures, return_when=FIRST_COMPLETED)
            ready = next(index for index, future in enumerate(futures) if future.done())
            item, future = pending[ready]
            del pending[ready]
            yield item, future.result()
    except BrokenProcessPool:
        raise ChildProcessError(
            "a worker process died, perhaps for lack of memory; fewer --workers need less, and what is done is kept"
        ) from None
    finally:
        held.close()
        executor.shutdown(wait=True, cancel_futures=True)
        lifeline.close()


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl-C waits until this ends. Processes started in here never see it, not even while they start."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _follow(lifeline: multiprocessing.connection.Connection) -> None:
    def end_with_parent() -> None:
        multiprocessing.connection.wait([lifeline])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
