"""NaN in a gradient, an input or the loss of one rank: no rank updates, in any engine; the next step is as ever."""

import os
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.support.distributed import run_distributed
from tests.support.exactness import engine_environment, make_batch, make_config, write_text_tower

PLACES = ("gradient", "input", "loss")


def poison(model: nn.Module, place: str, poisoned: Callable[[], bool]) -> None:
    """Have NaN in this place of this rank's pass while `poisoned`."""
    if place == "gradient":
        parameter = next(p for name, p in model.named_parameters() if name.endswith("layer4.0.conv1.weight"))
        parameter.register_hook(lambda gradient: gradient * torch.nan if poisoned() else gradient)
    elif place == "input":
        first = next(m for name, m in model.named_modules() if name.endswith("conv1"))
        first.register_forward_pre_hook(lambda _, inputs: tuple(x * torch.nan if poisoned() else x for x in inputs))
    else:  # by the temperature, which scales all logits

        def spoil(_module: nn.Module, _inputs: tuple, outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return outputs | {"logit_scale": outputs["logit_scale"] * torch.nan} if poisoned() else outputs

        model.register_forward_hook(spoil)


def steps(text_tower: str, precision: str, place: str, world: int) -> list[tuple[int, bool, bool]]:
    """Of three steps, the second with NaN in this place of the last rank: whether it was skipped, whether the weights
    moved, and whether all of them, moments and running statistics are finite."""
    os.environ["ACCELERATE_MIXED_PRECISION"] = precision
    from train import distributed
    from train.engine.build import engine_of_run
    from train.engine.start import start
    from train.model.pair import build_model
    from train.step import training_step

    config = make_config(text_tower, "tiled", global_batch=16)
    model = build_model(config, (0.5,) * 3, (0.25,) * 3)
    poisoned = False
    if distributed.rank() == world - 1:
        poison(model, place, lambda: poisoned)
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
        tensors = [*after.values(), *engine.moments().values()]
        found.append((int(metrics["skipped"]), moved, all(bool(tensor.isfinite().all()) for tensor in tensors)))
    return found


FAST = ("ddp", "no", "gradient")
CASES = [
    pytest.param(engine, precision, place, marks=[pytest.mark.slow][: (engine, precision, place) != FAST])
    for engine in ("ddp", "zero1", "zero2", "zero3")
    for precision in ("no", "bf16")
    for place in PLACES
]


@pytest.mark.parametrize(("engine", "precision", "place"), CASES)
def test_case_15_nan_on_one_rank_is_skipped_by_all(engine, precision, place, tmp_path) -> None:
    text_tower = write_text_tower(tmp_path)
    environment = engine_environment(engine, tmp_path)
    results = run_distributed(steps, 2, text_tower, precision, place, 2, environment=environment)
    assert results[0] == [(0, True, True), (1, False, True), (0, True, True)]
    assert [skipped for skipped, _, _ in results[1]] == [0, 1, 0]
