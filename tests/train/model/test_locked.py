"""What an update leaves out, in every engine: a tower that learns later, and all of a gradient that is not finite."""

import math
from pathlib import Path

import pytest
import torch

from tests.support.activations import kept_for_backward
from tests.support.distributed import run_distributed
from tests.support.exactness import engine_environment, make_batch, make_config, plain_gradients, write_text_tower


def moved_parts(text_tower: str) -> dict[str, bool]:
    """Whether two steps move each parameter and statistic, where the lower parts of both towers never learn."""
    from train import distributed
    from train.engine.build import engine_of_run
    from train.engine.optim import set_lrs
    from train.engine.start import start
    from train.model.pair import build_model
    from train.step import training_step

    config = make_config(text_tower, "tiled", global_batch=32)
    config.model.image.locked_stages, config.model.text.locked_layers = 2, 1
    engine = engine_of_run(start(), build_model(config, (0.5,) * 3, (0.25,) * 3), config)
    before = engine.weights()
    share = 8 // distributed.world_size()
    for step in range(2):
        set_lrs(engine.optimizer, step, 10, config.optim)
        training_step(engine, make_batch(config, step)[distributed.rank() * share :][:share], config)
    after = engine.weights()
    assert engine.updates() == 2
    return {name: not torch.equal(value, after[name]) for name, value in before.items()}


@pytest.mark.parametrize(
    ("engine", "world"),
    [("ddp", 1), ("ddp", 2), *(pytest.param(f"zero{n}", 2, marks=pytest.mark.slow) for n in (1, 2)), ("zero3", 2)],
)
def test_lower_parts_never_learn_in_any_engine_but_their_statistics_move(
    tmp_path: Path, engine: str, world: int
) -> None:
    text_tower = write_text_tower(tmp_path / "text")
    moved = run_distributed(moved_parts, world, text_tower, environment=engine_environment(engine, tmp_path))[0]
    image = tuple(f"image.backbone.{name}." for name in ("conv1", "bn1", "layer1", "layer2"))
    text = ("text.encoder.embeddings.", "text.encoder.encoder.layer.0.")
    for name, has_moved in moved.items():
        statistic = name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")
        locked = name.startswith((*image, *text)) and not statistic
        constant = name in ("mean", "std") or name.endswith("position_ids")
        assert has_moved == (not locked and not constant), name


def test_the_backward_pass_stops_at_the_lowest_part_that_learns(tmp_path: Path) -> None:
    from train.model.pair import build_model

    text_tower, kept = write_text_tower(tmp_path), {}
    for stages in (0, 2):
        config = make_config(text_tower, "tiled", global_batch=32)
        config.model.image.locked_stages = stages
        tower = build_model(config, (0.5,) * 3, (0.25,) * 3).image
        features, kept[stages] = kept_for_backward(tower, torch.randn(2, 3, 32, 32))
        features.sum().backward()
        without = {name.split(".")[1] for name, p in tower.named_parameters() if p.grad is None}
        assert without == ({"conv1", "bn1", "layer1", "layer2"} if stages else set())
    assert kept[2] < 0.3 * kept[0], kept


@pytest.mark.parametrize(("tower", "field", "count"), [("image", "locked_stages", 4), ("text", "locked_layers", 2)])
def test_more_than_there_are_is_refused(tmp_path: Path, tower: str, field: str, count: int) -> None:
    from train.model.pair import build_model

    config = make_config(write_text_tower(tmp_path), "tiled", global_batch=32)
    getattr(config.model, tower).locked_until = 3  # beside a part that never learns
    setattr(getattr(config.model, tower), field, count)
    build_model(config, (0.5,) * 3, (0.25,) * 3)
    setattr(getattr(config.model, tower), field, count + 1)
    with pytest.raises(ValueError, match=rf"^model\.{tower}\.{field} {count + 1}: .* has {count} .*locked_until -1"):
        build_model(config, (0.5,) * 3, (0.25,) * 3)


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
        moved = not engine.full_parameter(watched).equal(before)
        results.append((float(metrics["grad_norm"]), moved, engine.updates()))
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
