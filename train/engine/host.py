"""Host memory for what a checkpoint holds, so that training can go on while it is written."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SLAB = 1 << 26
ALIGNED = 512


class HostMemory:
    """A place for the copy of each tensor, by its name; the same one each time, so that only the first copies allocate.

    Copies from a GPU go to pinned memory and are under way when `copy` returns: training's next kernels, on the same
    stream, come after them. Places are cut from slabs, because pinned memory comes in powers of two: each weight by
    itself would take up to twice its size.
    """

    def __init__(self) -> None:
        self._places: dict[str, Tensor] = {}
        self._free: dict[bool, Tensor] = {}

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """A contiguous copy on the host; what was copied under this name before is gone."""
        if name not in self._places:
            self._places[name] = self._place(tensor)
        return self._places[name].copy_(tensor, non_blocking=tensor.is_cuda)

    def arrival(self) -> Callable[[], None]:
        """What waits, in any thread, for the copies made so far."""
        if True not in self._free:
            return lambda: None
        event = torch.cuda.Event(blocking=True)  # else the thread that waits keeps a core busy
        event.record()
        return event.synchronize

    def _place(self, tensor: Tensor) -> Tensor:
        pinned, size = tensor.is_cuda, tensor.numel() * tensor.element_size()
        free = self._free.get(pinned)
        if free is None or size > len(free):
            free = torch.empty(max(SLAB, size), dtype=torch.uint8, pin_memory=pinned)
        self._free[pinned] = free[-(-size // ALIGNED) * ALIGNED :]
        return free[:size].view(tensor.dtype).view(tensor.shape)
