"""Loader processes around a webdataset pipeline: they keep the order, pass errors on, and leave nothing behind.

One that dies or hangs is named, with the sample that it was at: each writes that on a board that all of them share.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import itertools
import math
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data_pipeline.batch import Batch
from data_pipeline.cores import cores
from data_pipeline.stages.handover import Inbox, Outbox

T = TypeVar("T")
HELD = {signal.SIGINT, *([signal.SIGTERM] if hasattr(signal, "sigwaitinfo") else [])}
"""Signals that do not end a loader process. macOS cannot tell who sent a TERM, so there a TERM does."""
POLL_SECONDS = 1.0
"""How often it is seen, while waiting, whether all loader processes are alive and whether to wait on."""
MOST_WORKERS = 16
"""Loader processes per training process, where nobody has given a number: enough for the GPUs of today."""
HELD_UP = {psutil.STATUS_STOPPED: ", which is stopped,", psutil.STATUS_DISK_SLEEP: ", which waits for a device,"}
NOTE_BYTES = 1024
_note: memoryview | None = None
"""Where this loader process writes what it is at."""


class LoaderFailure(RuntimeError):
    """A loader process died, or made nothing within the time that it had."""


def _wait_on() -> None:
    """Nothing ends the waiting."""


@dataclass(frozen=True)
class Patience:
    """How long is waited for the next item of a loader."""

    seconds: float = math.inf
    """After this, a LoaderFailure is raised."""
    check: Callable[[], None] = _wait_on
    """Called about every second meanwhile; may raise."""
    stacks: str = ""
    """A file for the stacks of a loader process that hangs; empty for none."""
    remedy: str = ""
    """What the caller's user can do where the time was too short."""


def number_of_workers(given: int | None) -> int:
    """`data.workers`, or where that is null what suits this machine. What the loader makes is the same for any number.

    Without a GPU one: the cores are for the towers, which are slower than it.
    """
    if given is not None:
        return given
    if not torch.cuda.is_available():
        return 1
    return workers_for(cores(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def workers_for(cores: int, processes: int) -> int:
    """Loader processes for each of the training processes that share so many cores of a host."""
    return max(1, min(MOST_WORKERS, cores // processes - 1))


def prepared(workers: int, prefetch: int, ahead: int) -> int:
    """Items that `workers` processes prepare ahead, `prefetch` each, and at least `ahead` together; as many each."""
    return workers * max(prefetch, -(-ahead // max(workers, 1)))


def at(what: str) -> None:
    """Note what this loader process is about to read, for the case that it never comes back."""
    if _note is not None:
        data = what.encode("utf-8", "replace")[: NOTE_BYTES - 1] + b"\0"
        _note[: len(data)] = data


def of_this_worker(items: Iterable[T]) -> Iterator[T]:
    """The items that this loader process makes: every n-th one, so that taking turns gives all back in order."""
    worker = get_worker_info()
    return iter(items) if worker is None else itertools.islice(items, worker.id, None, worker.num_workers)


@dataclass
class _Failure:
    """An exception on its way from a loader process."""

    error: Exception
    trace: str


class _Guarded(IterableDataset):
    """Yields what the pipeline yields; an exception becomes the last item, because torch would rewrite its message.

    board: uint8 [workers, NOTE_BYTES] in shared memory. outboxes: one for each process that is started.
    """

    def __init__(self, pipeline: Iterable, board: torch.Tensor, stacks: str):
        self.pipeline, self.board, self.stacks = pipeline, board, stacks
        self.outboxes: list[Outbox] = []
        self.outbox: Outbox | None = None

    def __iter__(self) -> Iterator:
        try:
            for item in self.pipeline:
                yield item if self.outbox is None or not isinstance(item, Batch) else self.outbox.packed(item)
        except Exception as error:
            yield _Failure(_portable(error), traceback.format_exc())


def _portable(error: Exception) -> Exception:
    """The exception, if it survives pickling; else a RuntimeError that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _start(worker: int) -> None:
    global _note
    # torch ends a loader that hangs by TERM, which is blocked here.
    if signal.SIGTERM in HELD:
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)
    gc.freeze()  # looking through all that the training process has made would copy it, again and again
    guarded: Any = get_worker_info().dataset  # type: ignore[union-attr]
    _note = memoryview(guarded.board[worker].numpy())
    guarded.outbox = guarded.outboxes[worker]
    if guarded.stacks:
        faulthandler.register(signal.SIGQUIT, open(guarded.stacks, "a"), all_threads=True)  # noqa: SIM115


def _end_with_parent(parent: int) -> None:
    """End this process at the first TERM that its parent sends, or anybody once the parent is gone."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent == os.getppid():
        pass
    os._exit(0)


class _Alarm(threading.Thread):
    """Kills the loader processes where one was stopped after it had said that an item is there: the item's tensors are
    then asked of it without a time limit, and only its death ends that.

    Attributes:
        heard: when torch gave control back last, or an item came; None while none is waited for.
        said: which process hangs; "" as long as none was killed.
    """

    def __init__(self, loader: WorkerLoader, iterator: Any):
        super().__init__(daemon=True)
        self.loader, self.iterator, self.said, self.number = loader, iterator, "", 0
        self.began = 0.0
        self.heard: float | None = None
        self.off = threading.Event()

    def waits(self, number: int) -> None:
        """From now on for this item."""
        self.number, self.began = number, time.monotonic()
        self.heard = self.began

    def run(self) -> None:
        while not self.off.wait(POLL_SECONDS):
            heard, now = self.heard, time.monotonic()
            if heard is not None and now - heard > 3 * POLL_SECONDS and self._is_due(now - self.began):
                self.said = self.loader._hang(self.iterator, self._suspect(), now - self.began)
                _kill(self.iterator)
                break

    def stop(self) -> None:
        """No item is waited for any more; it holds the processes no longer."""
        self.off.set()
        if self.is_alive():
            self.join(POLL_SECONDS)

    def _is_due(self, waited: float) -> bool:
        try:
            self.loader.patience.check()
        except BaseException:  # raised again where the item is waited for
            return True
        return waited > self.loader.patience.seconds

    def _suspect(self) -> int:
        stopped = (n for n, process in enumerate(self.iterator._workers) if _held_up(process.pid))
        return next(stopped, self.number % self.loader.workers)


class WorkerLoader:
    """Iterates over a pipeline in `workers` processes, or in this one where that is 0; None: see number_of_workers.

    prefetch, ahead: items that each process prepares ahead, and that all of them do together, at least.

    The pipeline is iterated once in each process; item i comes from process i % workers. An exception is raised here
    as it was there. When the iterator ends, is closed or is forgotten, its processes end; or, where they are to be
    kept for the next iteration, when this object does. A process that dies, or makes nothing for as long as `patience`
    says (where they are not kept), ends the iterator by a LoaderFailure; then all of them are killed.
    """

    def __init__(
        self,
        pipeline: Iterable,
        *,
        workers: int | None,
        prefetch: int,
        ahead: int = 0,
        keep: bool = False,
        patience: Patience = Patience(),
    ):
        workers = number_of_workers(workers)
        if workers < 0:
            raise ValueError(f"data.workers is {workers}: 0 (load in the training process) or more")
        if prefetch < 1:
            raise ValueError(f"data.prefetch is {prefetch}: at least 1 micro-batch")
        self.workers, self.patience = workers, patience
        # Kept processes are waited for by torch as well, when an iteration begins: that may take longer.
        self.patient = workers > 0 and not keep
        self._board = torch.zeros(max(workers, 1), NOTE_BYTES, dtype=torch.uint8).share_memory_()
        self._guarded = _Guarded(pipeline, self._board, patience.stacks)
        self._kept: Inbox | None = None
        self._loader: DataLoader[Any] = DataLoader(
            self._guarded,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=prepared(workers, prefetch, ahead) // workers if workers else None,
            worker_init_fn=_start,
            persistent_workers=keep and workers > 0,
            pin_memory=torch.cuda.is_available(),
            timeout=POLL_SECONDS if self.patient else 0,
        )

    def __iter__(self) -> Iterator:
        inbox = self._kept or Inbox()
        iterator = self._started(inbox)
        alarm = _Alarm(self, iterator)
        if self.patient:
            alarm.start()
        try:
            for number in itertools.count():
                alarm.waits(number)
                try:
                    item = self._next(iterator, alarm)
                except StopIteration:
                    return
                except BaseException:
                    _kill(iterator)
                    raise
                alarm.heard = None
                if isinstance(item, _Failure):
                    # With its processes; the traceback would keep it.
                    del iterator, alarm.iterator
                    raise item.error from RuntimeError(f"in the data loader:\n{item.trace}")
                yield item
        finally:
            alarm.stop()

    def _next(self, iterator: Iterator, alarm: _Alarm) -> Any:
        """The next item, for which the alarm waits."""
        while True:
            try:
                return next(iterator)
            except StopIteration:
                raise
            except Exception as error:
                if alarm.said:
                    self.patience.check()
                    raise LoaderFailure(alarm.said) from None
                if "exited unexpectedly" in str(error):
                    raise LoaderFailure(self._death(iterator)) from None
                if not str(error).startswith("DataLoader timed out"):
                    raise
            self.patience.check()
            alarm.heard = time.monotonic()
            waited = time.monotonic() - alarm.began
            if waited > self.patience.seconds:
                raise LoaderFailure(self._hang(iterator, alarm.number % self.workers, waited))

    def _death(self, iterator: Any) -> str:
        dead = [(n, process) for n, process in enumerate(iterator._workers) if not process.is_alive()]
        lines = [
            f"loader process {n} (pid {process.pid}) "
            + (f"was killed by {signal.Signals(-process.exitcode).name}" if process.exitcode < 0 else "ended")
            + self._noted(n)
            for n, process in dead
        ]
        killed = any(process.exitcode == -signal.SIGKILL for _, process in dead)
        return "; ".join(lines) + ("; the kernel kills so when memory runs out" if killed else "")

    def _hang(self, iterator: Any, worker: int, waited: float) -> str:
        pid, stacks = iterator._workers[worker].pid, self.patience.stacks
        how = _held_up(pid)
        if stacks:
            os.kill(pid, signal.SIGQUIT)
            time.sleep(0.5)
        where = f"; its stacks are in {stacks}" if stacks and not how else ""
        who = f"loader process {worker} (pid {pid}){how}"
        return f"{who} has made nothing in {waited:.0f} s{self._noted(worker)}{where}{self.patience.remedy}"

    def _noted(self, worker: int) -> str:
        note = bytes(self._board[worker].numpy()).partition(b"\0")[0].decode("utf-8", "replace")
        return f", at {note}" if note else ""

    def _started(self, inbox: Inbox) -> Iterator:
        # Ctrl-C and SLURM's TERM reach the whole process group; the training process decides what happens, and stops
        # its loaders itself. They inherit the mask, so that neither signal ends one, however early it comes.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
        on_child = signal.getsignal(signal.SIGCHLD)
        if inbox is not self._kept:
            self._guarded.outboxes = inbox.outboxes(self.workers)
        if self._loader.persistent_workers:
            self._kept = inbox
        try:
            return iter(self._loader)
        finally:
            self._guarded.outboxes = []
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            # torch's would raise in the middle of a step where a loader has died; here that is seen when an item is
            # due, at the same place on all ranks.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGCHLD, on_child)


def _held_up(pid: int) -> str:
    """By what a process cannot go on, nor write its stacks, in words; empty where nothing is known to hold it up."""
    with contextlib.suppress(psutil.Error):
        return HELD_UP.get(psutil.Process(pid).status(), "")
    return ""


def _kill(iterator: Any) -> None:
    """End the processes of an iterator that is given up: one that hangs would not hear of it."""
    for process in getattr(iterator, "_workers", ()):
        process.kill()
    for process in getattr(iterator, "_workers", ()):
        process.join(5)
