"""DDP as Duet uses it."""

import hashlib

import torch

from tests.support.distributed import run_distributed
from tests.support.exactness import make_batch, make_config, write_text_tower


def gradients_of_steps(text_tower: str, world: int) -> list[str]:
    """Hashes of all gradients of two steps with the same weights and batch."""
    from train import distributed
    from train.engine.build import engine_of_run
    from train.engine.start import start
    from train.model.pair import build_model
    from train.step import training_step

    config = make_config(text_tower, "tiled", global_batch=4 * world)
    engine, found = engine_of_run(start(), build_model(config, (0.5,) * 3, (0.25,) * 3), config), []

    def no_update() -> tuple[torch.Tensor, torch.Tensor]:
        content = b"".join(p.grad.contiguous().numpy().tobytes() for p in engine.module.parameters())
        found.append(hashlib.sha256(content).hexdigest())
        engine.optimizer.zero_grad()
        return torch.zeros(()), torch.ones((), dtype=torch.bool)

    engine._update = no_update
    for _ in range(2):
        training_step(engine, make_batch(config, 0)[distributed.rank() :][:1], config)
    return found


def test_the_first_step_after_a_start_adds_up_gradients_in_the_order_of_all_others(tmp_path) -> None:
    """Else a run of three ranks that resumes would part from one that was not stopped, by rounding."""
    results = run_distributed(gradients_of_steps, 3, write_text_tower(tmp_path), 3)
    assert len({digest for found in results for digest in found}) == 1
