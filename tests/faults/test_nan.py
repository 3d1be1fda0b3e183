"""A gradient that is not finite on one rank: no rank updates, in any engine, and the next step is as ever."""

import os

import pytest
import torch

from tests.support.distributed import run_distributed
from tests.support.exactness import engine_environment, make_batch, make_config, write_text_tower


def steps(text_tower: str, precision: str, world: int) -> list[tuple[int, bool, bool]]:
    """Of three steps, the second with NaN in a gradient of the last rank: whether it was skipped, whether the weights
    moved, and whether they are finite."""
    os.environ["ACCELERATE_MIXED_PRECISION"] = precision
    from train import distributed
    from train.engine.build import engine_of_run
    from train.engine.start import start
    from train.model.pair import build_model
    from train.step import training_step

    config = make_config(text_tower, "tiled", global_batch=16)
    model = build_model(config, (0.5,) * 3, (0.25,) * 3)
    poisoned = False
    parameter = next(p for name, p in model.named_parameters() if name.endswith("layer4.0.conv1.weight"))
    if distributed.rank() == world - 1:
        parameter.register_hook(lambda gradient: gradient * torch.nan if poisoned else gradient)
    engine = engine_of_run(start(), model, config)
    share, found = 4 // world, []
    for step in range(3):
        poisoned = step == 1
        before = engine.weights()
        batches = make_batch(config, step)[distributed.rank() * share : (distributed.rank() + 1) * share]
        metrics = training_step(engine, [batch.to(engine.device) for batch in batches], config)
        after = engine.weights()
        learned = [name for name, _ in model.named_parameters() if name in after]
        moved = any(not torch.equal(after[name], before[name]) for name in learned)
        finite = all(bool(after[name].isfinite().all()) for name in learned)
        found.append((int(metrics["skipped"]), moved, finite))
    return found


ENGINES = ["ddp", *(pytest.param(engine, marks=pytest.mark.slow) for engine in ("zero1", "zero2", "zero3"))]


@pytest.mark.parametrize("precision", ["no", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("engine", ENGINES)
def test_case_15_nan_on_one_rank_is_skipped_by_all(engine, precision, tmp_path) -> None:
    text_tower = write_text_tower(tmp_path)
    environment = engine_environment(engine, tmp_path)
    results = run_distributed(steps, 2, text_tower, precision, 2, environment=environment)
    assert results[0] == [(0, True, True), (1, False, True), (0, True, True)]
    assert [skipped for skipped, _, _ in results[1]] == [0, 1, 0]
