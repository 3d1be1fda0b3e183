"""A step of DeepSpeed as Duet configures it, against plain torch."""

import os
import time

import pytest
import torch
from torch import nn

from tests.support.distributed import run_distributed
from train import distributed
from train.engine.build import build_engine
from train.engine.precision import autocast
from train.engine.start import start
from train.engine.zero import BUCKET_ELEMENTS, deepspeed_config


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

    accelerator = start()
    precision = accelerator.mixed_precision
    assert not is_deepspeed_zero3_enabled(), "transformers would build an empty model"
    model = Probe()
    deepspeed_config(accelerator, 4, clip_grad)
    engine, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    assert engine.optimizer.reduce_bucket_size == BUCKET_ELEMENTS
    assert deepspeed.comm.comm.cdb.shm_comm_op is None, "an extension was compiled"
    assert not engine.tput_timer.config.enabled, "it waits for the device before every forward pass"
    assert not engine.bfloat16_enabled() and engine.gradient_clipping() == clip_grad
    loss = engine(inputs(distributed.rank())).square().mean()
    engine.backward(loss)
    gradients = {name: safe_get_full_grad(p) for name, p in model.named_parameters()}
    engine.step()
    parameters = {name: safe_get_full_fp32_param(p) for name, p in model.named_parameters()}
    dtypes = {str(p.dtype) for p in model.parameters()} | {str(g.dtype) for g in gradients.values()}
    with torch.no_grad():
        after = engine(inputs(9))
        with autocast(accelerator.device, precision):
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


def waits(seconds: int) -> list[float]:
    """On rank 0, how long a collective of each process group waits for rank 1, which does not come."""
    os.environ["DUET_TIMEOUT"] = str(seconds)
    model = Probe()
    build_engine(start(), model, torch.optim.AdamW(model.parameters()), blank=lambda: inputs(0))
    groups = list(torch.distributed.distributed_c10d._world.pg_map)
    if distributed.rank() == 1:
        time.sleep(3 * seconds * len(groups))
        return []
    waited = []
    for group in groups:
        began = time.monotonic()
        with pytest.raises(RuntimeError):
            torch.distributed.all_reduce(torch.zeros(1), group=group)
        waited.append(time.monotonic() - began)
    return waited


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_case_14_no_group_waits_longer_for_a_rank_than_duet_timeout(stage):
    environment = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
    waited, _ = run_distributed(waits, 2, 2, environment=environment | {"CUDA_VISIBLE_DEVICES": ""})
    assert waited and max(waited) < 6, waited
