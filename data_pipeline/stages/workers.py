"""Loader processes around a webdataset pipeline: they keep the order, pass errors on, and leave nothing behind."""

from __future__ import annotations

import itertools
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

T = TypeVar("T")
HELD = {signal.SIGINT, *([signal.SIGTERM] if hasattr(signal, "sigwaitinfo") else [])}
"""Signals that do not end a loader process. macOS cannot tell who sent a TERM, so there a TERM does."""


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
    """Yields what the pipeline yields; an exception becomes the last item, because torch would rewrite its message."""

    def __init__(self, pipeline: Iterable):
        self.pipeline = pipeline

    def __iter__(self) -> Iterator:
        try:
            yield from self.pipeline
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
    # torch ends a loader that hangs by TERM, which is blocked here.
    if signal.SIGTERM in HELD:
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)


def _end_with_parent(parent: int) -> None:
    """End this process at the first TERM that its parent sends, or anybody once the parent is gone."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent == os.getppid():
        pass
    os._exit(0)


class WorkerLoader:
    """Iterates over a pipeline in `workers` processes, or in this one where that is 0.

    The pipeline is iterated once in each process; item i comes from process i % workers. An exception is raised here
    as it was there. When the iterator ends, is closed or is forgotten, its processes end; or, where they are to be
    kept for the next iteration, when this object does.
    """

    def __init__(self, pipeline: Iterable, *, workers: int, prefetch: int, keep: bool = False):
        if workers < 0:
            raise ValueError(f"data.workers is {workers}: 0 (load in the training process) or more")
        if prefetch < 1:
            raise ValueError(f"data.prefetch is {prefetch}: at least 1 micro-batch")
        self._loader: DataLoader[Any] = DataLoader(
            _Guarded(pipeline),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            worker_init_fn=_start,
            persistent_workers=keep and workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def __iter__(self) -> Iterator:
        for item in self._started():
            if isinstance(item, _Failure):
                raise item.error from RuntimeError(f"in the data loader:\n{item.trace}")
            yield item

    def _started(self) -> Iterator:
        # Ctrl-C and SLURM's TERM reach the whole process group; the training process decides what happens, and stops
        # its loaders itself. They inherit the mask, so that neither signal ends one, however early it comes.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
        try:
            return iter(self._loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
