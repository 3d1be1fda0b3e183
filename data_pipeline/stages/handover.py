"""Batches on their way out of a loader process: all tensors of one in a piece of shared memory, which is used again.

torch's own way is a file and fresh pages for every tensor of every batch, in both processes: more work than putting the
batch together. Here a piece goes back to its process when nobody holds any of its tensors, or views of them, any more.
A process makes another piece only where all are out, so there are as many as batches are held or on their way.
"""

from __future__ import annotations

import itertools
import math
import os
import weakref
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipeline.batch import Batch

ALIGNED = 64
"""Bytes that every tensor's place is a multiple of."""
NUMBER_BYTES = 4
_numbers = itertools.count()
_inboxes: weakref.WeakValueDictionary[int, Inbox] = weakref.WeakValueDictionary()


class Place(NamedTuple):
    """Where in a piece a tensor is, and what it looks like."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def within(self, piece: Tensor) -> Tensor:
        """The tensor that is there in a piece: uint8 [bytes]."""
        end = self.offset + self.dtype.itemsize * math.prod(self.shape)
        return piece[self.offset : end].view(self.dtype).as_strided(self.shape, self.strides)


class Inbox:
    """Where the training process gets the batches of its loader processes; until it is forgotten."""

    def __init__(self) -> None:
        self.number = next(_numbers)
        _inboxes[self.number] = self
        self._free: list[Connection] = []
        self._pieces: dict[tuple[int, int], Tensor] = {}

    def outboxes(self, workers: int) -> list[Outbox]:
        """For each loader process that is to be started, what it sends its batches by."""
        pipes = [Pipe(duplex=False) for _ in range(workers)]
        for end in itertools.chain(*pipes):
            os.set_blocking(end.fileno(), False)
        self._free = [writer for _, writer in pipes]
        return [Outbox(self.number, worker, reader) for worker, (reader, _) in enumerate(pipes)]

    def opened(self, worker: int, number: int, piece: Tensor | None, batch: Batch) -> Batch:
        """The batch with its tensors, which are in piece `number` of a process; `piece` where it comes first."""
        if piece is not None:
            self._pieces[worker, number] = piece
        # The tensors of the batch hold this array, which is the last to go.
        held = self._pieces[worker, number].numpy()
        weakref.finalize(held, _give_back, self._free[worker], number, os.getpid()).atexit = False
        memory = torch.from_numpy(held)
        return batch.mapped(lambda place: place.within(memory), Place)


def _give_back(free: Connection, number: int, pid: int) -> None:
    if os.getpid() == pid:  # a process that is forked here may let go of what its parent holds
        with suppress(OSError):  # its loader process has ended; or reads no more, and the pipe is full
            os.write(free.fileno(), number.to_bytes(NUMBER_BYTES, "big"))


class Outbox:
    """The pieces of a loader process; `returned` is the end of a pipe that says which of them are free."""

    def __init__(self, inbox: int, worker: int, returned: Connection):
        self.inbox, self.worker, self.returned = inbox, worker, returned
        self._pieces: list[Tensor] = []
        self._free: list[int] = []

    def packed(self, batch: Batch) -> Parcel:
        """The batch as it is sent."""
        tensors: list[Tensor] = []
        places: list[Place] = []
        size = 0

        def place(tensor: Tensor) -> Place:
            nonlocal size
            if not (tensor.is_contiguous() or _is_channels_last(tensor)):
                tensor = tensor.contiguous()
            tensors.append(tensor)
            places.append(Place(size, tensor.dtype, tuple(tensor.shape), tensor.stride()))
            size += -(-tensor.nbytes // ALIGNED) * ALIGNED
            return places[-1]

        hollow = batch.mapped(place)
        number, is_new = self._piece(size)
        for tensor, where in zip(tensors, places, strict=True):
            where.within(self._pieces[number]).copy_(tensor)
        return Parcel(self.inbox, self.worker, number, self._pieces[number] if is_new else None, hollow)

    def _piece(self, size: int) -> tuple[int, bool]:
        """Number of a piece that is free and large enough, and whether it is a new one."""
        with suppress(BlockingIOError):
            data = os.read(self.returned.fileno(), 1 << 16)
            self._free += np.frombuffer(data, f">u{NUMBER_BYTES}").tolist()
        fitting = [number for number in self._free if len(self._pieces[number]) >= size]
        if fitting:
            self._free.remove(fitting[-1])  # what came back last may still be in the processor's cache
            return fitting[-1], False
        if self._free:
            number = self._free.pop()
        else:
            number = len(self._pieces)
            self._pieces.append(torch.empty(0))
        self._pieces[number] = torch.empty(piece_bytes(size), dtype=torch.uint8).share_memory_()
        return number, True


def piece_bytes(size: int) -> int:
    """How large a piece is made for a batch of this size, so that others with longer captions fit as well."""
    return size + size // 20 + 4096


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


class Parcel(NamedTuple):
    """What is sent of a batch; pickled, and read in the training process, it is the batch again."""

    inbox: int
    worker: int
    number: int
    piece: Tensor | None
    batch: Batch

    def __reduce__(self):
        return _received, tuple(self)


def _received(inbox: int, worker: int, number: int, piece: Tensor | None, batch: Batch) -> Batch | None:
    own = _inboxes.get(inbox)
    return None if own is None else own.opened(worker, number, piece, batch)  # nobody waits for it any more
