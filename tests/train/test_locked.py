"""A tower that learns from a later step on is left out of the clipped norm until then, in every engine."""

import math
from pathlib import Path

import pytest

from tests.distributed import run_distributed
from tests.exactness import engine_environment, make_batch, make_config, plain_gradients, write_text_tower


def steps(text_tower: str) -> list[tuple[float, bool]]:
    """Per step the gradient's norm, and whether the image tower has moved; it learns from the second step on."""
    from train import distributed
    from train.engine import Engine
    from train.model import build_model
    from train.step import training_step

    config = make_config(text_tower, "tiled", global_batch=32)
    config.model.image.locked_until = 1
    config.optim.clip_grad = 1e-3  # far below the norm: clipping has to leave what is returned alone
    engine = Engine(distributed.start(), build_model(config, (0.5,) * 3, (0.25,) * 3), config)
    watched = engine.module.image.backbone.layer1[0].conv1.weight
    share = 8 // distributed.world_size()
    results = []
    for step in range(2):
        before = engine.full_parameter(watched).clone()
        engine.set_lrs(step, 10)
        own = make_batch(config, step)[distributed.rank() * share : (distributed.rank() + 1) * share]
        norm = training_step(engine, own, config)["grad_norm"]
        results.append((norm, not engine.full_parameter(watched).equal(before)))
    return results


@pytest.mark.parametrize(
    ("engine", "world"),
    [("ddp", 1), ("zero3", 2), *(pytest.param(name, 2, marks=pytest.mark.slow) for name in ("ddp", "zero1", "zero2"))],
)
def test_a_locked_tower_is_left_out_of_the_norm_until_it_learns(tmp_path: Path, engine: str, world: int) -> None:
    text_tower = write_text_tower(tmp_path / "text")
    config = make_config(text_tower, "tiled", global_batch=32)
    squares = {name: float(grad.square().sum()) for name, grad in plain_gradients(config)[1].items()}
    without = math.sqrt(sum(value for name, value in squares.items() if not name.startswith("image.")))
    assert without < 0.99 * math.sqrt(sum(squares.values())), "the tower would not be missed"

    environment = engine_environment(engine, tmp_path)
    for (first, moved), (_, moves) in run_distributed(steps, world, text_tower, environment=environment):
        assert first == pytest.approx(without, rel=1e-5)
        assert not moved and moves
