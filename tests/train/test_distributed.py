import os
import time

import pytest
import torch

from tests.support.distributed import RankError, run_distributed
from train import distributed


def collectives():
    rank, world = distributed.rank(), distributed.world_size()
    rows = torch.arange(6.0).reshape(2, 3) + 100 * rank
    gradient = (torch.arange(2.0 * world * 3).reshape(2 * world, 3) + 1) * (rank + 1)
    source = torch.tensor([1.0, -rank], dtype=torch.float64)
    result = {
        "gathered": distributed.all_gather_rows(rows.requires_grad_()),
        "scattered": distributed.reduce_scatter_rows(gradient),
        "ids": distributed.all_gather_rows(torch.tensor([rank, 7])),
        "sum": distributed.all_reduce_sum(source),
        "max": distributed.all_reduce_max(source),
        "any": (distributed.any_rank(rank == world - 1), distributed.any_rank(False)),
        "broadcast": distributed.broadcast_object({"from": rank}),
        "objects": distributed.gather_objects(f"rank {rank}"),
        "main": distributed.is_main(),
        "source": source,
    }
    distributed.barrier()
    return result


def check_collectives(results):
    world = len(results)
    everything = torch.cat([torch.arange(6.0).reshape(2, 3) + 100 * rank for rank in range(world)])
    total = (torch.arange(2.0 * world * 3).reshape(2 * world, 3) + 1) * sum(range(1, world + 1))
    for rank, result in enumerate(results):
        assert torch.equal(result["gathered"], everything) and not result["gathered"].requires_grad
        assert torch.equal(result["scattered"], total[2 * rank : 2 * rank + 2])
        assert result["ids"].tolist() == [number for r in range(world) for number in (r, 7)]
        assert result["sum"].tolist() == [world, -sum(range(world))]
        assert result["max"].tolist() == [1, 0]
        assert result["source"].tolist() == [1, -rank], "the argument of a reduction has changed"
        assert result["any"] == (True, False)
        assert result["broadcast"] == {"from": 0}
        assert result["objects"] == ([f"rank {r}" for r in range(world)] if rank == 0 else [])
        assert result["main"] == (rank == 0)


def test_collectives_without_a_group():
    check_collectives([collectives()])


def test_collectives_over_three_ranks():
    check_collectives(run_distributed(collectives, 3))


def fail_on_rank_1(kind):
    if distributed.rank() == 1:
        if kind == "dies":
            os._exit(3)
        raise ValueError("--data.train: this is what rank 1 says")
    time.sleep(600)


def test_run_distributed_raises_what_a_rank_raised():
    began = time.monotonic()
    with pytest.raises(ValueError, match="this is what rank 1 says") as caught:
        run_distributed(fail_on_rank_1, 2, "raises")
    assert isinstance(caught.value.__cause__, RankError)
    assert "fail_on_rank_1" in str(caught.value.__cause__)
    assert time.monotonic() - began < 300, "waited for the other rank"


def test_run_distributed_notices_a_dead_rank():
    with pytest.raises(RuntimeError, match="rank 1 died"):
        run_distributed(fail_on_rank_1, 2, "dies")


def test_run_distributed_times_out():
    with pytest.raises(TimeoutError, match=r"ranks \[0\]"):
        run_distributed(time.sleep, 1, 60, timeout=8)
