"""The collectives that training needs, over the process group that `train.engine.start` joins.

All of them also work without a process group, where the world is one process.

b: rows of this rank, B: rows of all ranks, D: features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from train.timing import section


def world_size() -> int:
    """Processes of the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Index of this process, 0 to world_size() - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def span(total: int) -> tuple[int, int]:
    """Start and stop of this process's contiguous share of `total` rows."""
    return total * rank() // world_size(), total * (rank() + 1) // world_size()


def is_main() -> bool:
    """Whether this is rank 0."""
    return rank() == 0


def barrier() -> None:
    """Returns when every rank has called it."""
    if world_size() > 1:
        all_reduce_sum(torch.zeros(1))


@section("gather")
def all_gather_rows(x_bD: Tensor) -> Tensor:
    """[b, ...] of every rank -> [B, ...] in rank order, without gradient. Every rank has the same b."""
    x_bD = x_bD.detach().contiguous()
    if world_size() == 1:
        return x_bD.clone()
    x_BD = x_bD.new_empty(world_size() * x_bD.shape[0], *x_bD.shape[1:])
    dist.all_gather_into_tensor(x_BD, x_bD)
    return x_BD


@section("gather")
def reduce_scatter_rows(grad_BD: Tensor) -> Tensor:
    """[B, ...] on every rank -> [b, ...]: the sum over ranks; each rank gets its own rows of it."""
    world = world_size()
    assert grad_BD.shape[0] % world == 0, f"{grad_BD.shape[0]} rows over {world} ranks"
    rows = grad_BD.shape[0] // world
    if world == 1:
        return grad_BD.detach().clone()
    if dist.get_backend() == "nccl":
        grad_bD = grad_BD.new_empty(rows, *grad_BD.shape[1:])
        dist.reduce_scatter_tensor(grad_bD, grad_BD.detach().contiguous())
        return grad_bD
    # Not every gloo has reduce_scatter.
    return _all_reduce(grad_BD, dist.ReduceOp.SUM)[rank() * rows : (rank() + 1) * rows].clone()


@section("exchange")
def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over ranks, on every rank, without gradient; the argument stays as it is."""
    return _all_reduce(tensor, dist.ReduceOp.SUM)


def sum_on_main(tensor: Tensor) -> None:
    """Add up the tensors of all ranks in that of rank 0, without gradient; those of the others are spent."""
    if world_size() > 1:
        dist.reduce(tensor, dst=0)


def all_reduce_max(tensor: Tensor) -> Tensor:
    """The elementwise largest value over ranks, on every rank, without gradient; the argument stays as it is."""
    return _all_reduce(tensor, dist.ReduceOp.MAX)


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of tensors on the CPU, in one transfer: what waits for the device, waits once."""
    flat = torch.cat([tensor.detach().reshape(-1).view(torch.uint8) for tensor in tensors]).cpu()
    parts = flat.split([tensor.nbytes for tensor in tensors])
    return [part.clone().view(t.dtype).view(t.shape) for part, t in zip(parts, tensors, strict=True)]


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank: one decision for all."""
    return bool(all_reduce_max(torch.tensor([int(flag)])).item())


def broadcast_object(value: Any) -> Any:
    """Rank 0's object, on every rank (pickled)."""
    if world_size() == 1:
        return value
    box = [value if is_main() else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(write: Callable[[], object]) -> None:
    """Have rank 0 write something.

    Raises:
        ValueError: on all ranks, where it cannot.
    """
    problem = ""
    if is_main():
        try:
            write()
        except OSError as error:
            problem = f"{error}: free or mend the disk and start again"
    if problem := broadcast_object(problem):
        raise ValueError(problem)


def gather_objects(value: Any) -> list[Any]:
    """Every rank's object in rank order on rank 0 (pickled); an empty list on the others."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size() if is_main() else []
    dist.gather_object(value, values if is_main() else None, dst=0)
    return values


def all_gather_objects(value: Any) -> list[Any]:
    """Every rank's object in rank order, on every rank (pickled)."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def _all_reduce(tensor: Tensor, operation: Any) -> Tensor:
    if world_size() == 1:
        return tensor.detach().clone()
    device = torch.accelerator.current_accelerator() if dist.get_backend() == "nccl" else torch.device("cpu")
    reduced = tensor.detach().to(device, copy=True, memory_format=torch.contiguous_format)
    dist.all_reduce(reduced, op=operation)
    return reduced.to(tensor.device)
