"""DDP as Duet uses it."""

import hashlib

import torch
from torch import nn

from tests.support.distributed import run_distributed
from train import distributed
from train.engine.build import build_engine
from train.engine.start import start

WIDTH = 300


def gradients_of_steps() -> list[str]:
    """Hashes of all gradients of two passes with the same weights and rows; they fill several of DDP's buckets."""
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())))
    engine = build_engine(start(), model, torch.optim.SGD(model.parameters()), blank=lambda: torch.zeros(1, WIDTH))
    x_bD = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(distributed.rank()))
    found = []
    for _ in range(2):
        engine.announce_backward(last=True)
        engine.backward(engine.wrapped(x_bD).square().sum())
        content = b"".join(parameter.grad.numpy().tobytes() for parameter in model.parameters())
        found.append(hashlib.sha256(content).hexdigest())
        engine.optimizer.zero_grad()
    return found


def test_the_first_step_after_a_start_adds_up_gradients_in_the_order_of_all_others() -> None:
    """Else a run of three ranks that resumes would part from one that was not stopped, by rounding."""
    results = run_distributed(gradients_of_steps, 3)
    assert len({digest for found in results for digest in found}) == 1
