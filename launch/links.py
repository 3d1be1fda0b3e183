"""How fast ranks exchange, measured with the collectives that training uses."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from train import distributed


@dataclass(frozen=True)
class Links:
    """latency: seconds of a reduction of one number among `ranks`. reduce, gather: bytes a second over a link."""

    ranks: int
    latency: float
    reduce: float
    gather: float

    def of(self, ranks: int, reduced: float, gathered: float) -> float:
        """Seconds in which ranks all-reduce a buffer and gather another, by rings; in bytes of whole buffers."""
        if ranks == 1:
            return 0.0
        each = self.latency * (ranks - 1) / (self.ranks - 1)
        ring = (ranks - 1) / ranks
        return 2 * each + 2 * ring * reduced / self.reduce + ring * gathered / self.gather


def measure_links(clock: Callable[[], float] = time.perf_counter) -> Links:
    """A collective of two ranks or more."""
    world = distributed.world_size()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    large = torch.ones((64 if device.type == "cuda" else 4) * 2**18, device=device)

    def timed(call: Callable[[Tensor], Tensor], tensor: Tensor, repeats: int) -> float:
        call(tensor)
        distributed.barrier()
        began = clock()
        for _ in range(repeats):
            result = call(tensor)
        float(result.flatten()[0])  # waits for the device
        return (clock() - began) / repeats

    latency = timed(distributed.all_reduce_sum, torch.ones(1, device=device), 20)
    size = large.numel() * 4
    # Bytes over a rank's link in a ring: 2 (W - 1) / W of the buffer for a reduction, (W - 1) of a share for a gather.
    reduce = 2 * (world - 1) / world * size / timed(distributed.all_reduce_sum, large, 5)
    gather = (world - 1) * size / timed(lambda x: distributed.all_gather_rows(x.view(-1, 256)), large, 5)
    return Links(world, latency, reduce, gather)
