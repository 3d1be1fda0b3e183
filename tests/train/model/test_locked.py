"""What an update leaves out, in every engine: a tower that learns later, and all of a gradient that is not finite."""

import math
from pathlib import Path

import pytest
import torch

from tests.support.distributed import run_distributed
from tests.support.exactness import engine_environment, make_batch, make_config, plain_gradients, write_text_tower


def steps(text_tower: str) -> list[tuple[float, bool, int]]:
    """Per step the gradient's norm, whether the image tower has moved, and the updates so far.

    The tower learns from the second step on. In the third, one element of the last rank's gradient is not finite.
    """
    from train import distributed
    from train.engine.build import engine_of_run
    from train.engine.optim import set_lrs
    from train.engine.start import start
    from train.model.pair import build_model
    from train.step import training_step

    config = make_config(text_tower, "tiled", global_batch=32)
    config.model.image.locked_until = 1
    config.optim.clip_grad = 1e-3  # far below the norm: clipping has to leave what is returned alone
    engine = engine_of_run(start(), build_model(config, (0.5,) * 3, (0.25,) * 3), config)
    watched = engine.module.image.backbone.layer1[0].conv1.weight
    share, last = 8 // distributed.world_size(), distributed.rank() == distributed.world_size() - 1
    poison = torch.zeros_like(engine.full_parameter(engine.module.image_projection.weight))
    engine.module.image_projection.weight.register_hook(lambda gradient: gradient + poison)
    results = []
    for step in range(4):
        poison[0, 0] = math.inf if step == 2 and last else 0
        before = engine.full_parameter(watched).clone()
        set_lrs(engine.optimizer, step, 10, config.optim)
        own = make_batch(config, step)[distributed.rank() * share : (distributed.rank() + 1) * share]
        metrics = training_step(engine, own, config)
        assert metrics["skipped"] == (step == 2)
        results.append((metrics["grad_norm"], not engine.full_parameter(watched).equal(before), engine.updates()))
    return results


@pytest.mark.parametrize(
    ("engine", "world"),
    [("ddp", 1), ("zero3", 2), *(pytest.param(name, 2, marks=pytest.mark.slow) for name in ("ddp", "zero1", "zero2"))],
)
def test_a_locked_tower_stays_out_of_the_norm_and_a_gradient_that_is_not_finite_out_of_all(
    tmp_path: Path, engine: str, world: int
) -> None:
    text_tower = write_text_tower(tmp_path / "text")
    config = make_config(text_tower, "tiled", global_batch=32)
    squares = {name: float(grad.square().sum()) for name, grad in plain_gradients(config)[1].items()}
    without = math.sqrt(sum(value for name, value in squares.items() if not name.startswith("image.")))
    assert without < 0.99 * math.sqrt(sum(squares.values())), "the tower would not be missed"

    environment = engine_environment(engine, tmp_path)
    for rank in run_distributed(steps, world, text_tower, environment=environment):
        norms, moved, updates = zip(*rank, strict=True)
        assert norms[0] == pytest.approx(without, rel=1e-5)
        assert [math.isfinite(norm) for norm in norms] == [True, True, False, True]
        assert moved == (False, True, False, True) and updates == (1, 2, 2, 3)
