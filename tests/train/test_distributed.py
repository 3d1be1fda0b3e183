import os
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support.distributed import RankError, run_distributed
from train import distributed
from train.engine.precision import BUCKET_ELEMENTS, autocast, deepspeed_config

ROOT = Path(__file__).parents[2]


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


# ---- DeepSpeed ---------------------------------------------------------------------------------------------------


class Probe(nn.Module):
    """Two layers and a 1-element parameter, noting the dtype of the activations."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 4)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x_bD):
        hidden_bD = self.first(x_bD)
        self.dtype = hidden_bD.dtype
        return self.second(hidden_bD.relu()).float() * self.scale


def inputs(rank):
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(rank))


def deepspeed_step(clip_grad):
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
    from transformers.integrations import is_deepspeed_zero3_enabled

    accelerator = distributed.start()
    assert not is_deepspeed_zero3_enabled(), "transformers would build an empty model"
    model = Probe()
    deepspeed_config(accelerator, 4, clip_grad)
    engine, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    assert engine.optimizer.reduce_bucket_size == BUCKET_ELEMENTS
    assert deepspeed.comm.comm.cdb.shm_comm_op is None, "an extension was compiled"
    assert not engine.bfloat16_enabled() and engine.gradient_clipping() == clip_grad
    loss = engine(inputs(distributed.rank())).square().mean()
    engine.backward(loss)
    gradients = {name: safe_get_full_grad(p) for name, p in model.named_parameters()}
    engine.step()
    parameters = {name: safe_get_full_fp32_param(p) for name, p in model.named_parameters()}
    dtypes = {str(p.dtype) for p in model.parameters()} | {str(g.dtype) for g in gradients.values()}
    with torch.no_grad():
        after = engine(inputs(9))
        with autocast(accelerator):
            assert torch.equal(accelerator.unwrap_model(engine)(inputs(9)), after)
    return str(accelerator.distributed_type.value), str(model.dtype), dtypes, gradients, parameters, after


def plain_step(precision, clip_grad):
    model = Probe()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for rank in range(2):  # one at a time: one autocast around both would add up their gradients in bf16
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(inputs(rank)).square().mean()
        (loss / 2).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    if clip_grad:
        nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    optimizer.step()
    return gradients, dict(model.named_parameters()), model


@pytest.mark.parametrize(("stage", "precision", "clip_grad"), [(2, "bf16", 0.1), (3, "bf16", 0.0), (3, "no", 0.1)])
def test_deepspeed_steps_in_fp32_and_computes_in_bf16(stage, precision, clip_grad):
    environment = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
        "ACCELERATE_MIXED_PRECISION": precision,
        "ACCELERATE_USE_CPU": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }
    results = run_distributed(deepspeed_step, 2, clip_grad, environment=environment)
    expected_gradients, expected_parameters, model = plain_step(precision, clip_grad)
    for engine, activations, dtypes, gradients, parameters, after in results:
        assert engine == "DEEPSPEED"
        assert activations == ("torch.bfloat16" if precision == "bf16" else "torch.float32")
        assert dtypes == {"torch.float32"}
        for name, gradient in expected_gradients.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-7)
        for name, parameter in expected_parameters.items():
            torch.testing.assert_close(parameters[name], parameter.data, rtol=1e-5, atol=1e-7)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), torch.no_grad():
            torch.testing.assert_close(after, model(inputs(9)))
