"""NaN in a gradient, an input or the loss of one rank: no rank updates, in any engine; the next step is as ever."""

import os

import pytest
import torch
from torch import Tensor, nn

from tests.support.distributed import run_distributed
from tests.support.exactness import engine_environment, make_batch, make_config, write_text_tower

PLACES = ("gradient", "input", "loss")


def poison(model: nn.Module, poisoned: set[str]) -> None:
    """Have NaN in the places of this rank's pass that are in `poisoned` at the time."""

    def spoil_gradient(gradient: Tensor) -> Tensor:
        return gradient * torch.nan if "gradient" in poisoned else gradient

    def spoil_input(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x * torch.nan for x in inputs) if "input" in poisoned else inputs

    def spoil_loss(_module: nn.Module, _inputs: tuple, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        scale = outputs["logit_scale"]  # of all logits
        return outputs | {"logit_scale": scale * torch.nan} if "loss" in poisoned else outputs

    parameter = next(p for name, p in model.named_parameters() if name.endswith("layer4.0.conv1.weight"))
    parameter.register_hook(spoil_gradient)
    next(m for name, m in model.named_modules() if name.endswith("conv1")).register_forward_pre_hook(spoil_input)
    model.register_forward_hook(spoil_loss)


def steps(text_tower: str, precision: str, world: int) -> list[tuple[int, bool, bool]]:
    """Of some steps, every second one with NaN in another place of the last rank: whether it was skipped, whether the
    weights moved, and whether all of them, moments and running statistics are finite."""
    os.environ["ACCELERATE_MIXED_PRECISION"] = precision
    from train import distributed
    from train.engine.build import engine_of_run
    from train.engine.start import start
    from train.model.pair import build_model
    from train.step import training_step

    config = make_config(text_tower, "tiled", global_batch=16)
    model = build_model(config, (0.5,) * 3, (0.25,) * 3)
    poisoned: set[str] = set()
    if distributed.rank() == world - 1:
        poison(model, poisoned)
    engine = engine_of_run(start(), model, config)
    share, found = 4 // world, []
    for step, place in enumerate(("", *(place for one in PLACES for place in (one, "")))):
        poisoned.clear()
        poisoned.add(place)
        before = engine.weights()
        batches = make_batch(config, step)[distributed.rank() * share : (distributed.rank() + 1) * share]
        metrics = training_step(engine, [batch.to(engine.device) for batch in batches], config)
        after = engine.weights()
        learned = [name for name, _ in model.named_parameters() if name in after]
        moved = any(not torch.equal(after[name], before[name]) for name in learned)
        tensors = [*after.values(), *engine.moments().values()]
        found.append((int(metrics["skipped"]), moved, all(bool(tensor.isfinite().all()) for tensor in tensors)))
    return found


ENGINES = ["ddp", *(pytest.param(engine, marks=pytest.mark.slow) for engine in ("zero1", "zero2", "zero3"))]


@pytest.mark.parametrize("precision", ["no", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("engine", ENGINES)
def test_case_15_nan_on_one_rank_is_skipped_by_all(engine, precision, tmp_path, record_property) -> None:
    text_tower = write_text_tower(tmp_path)
    environment = engine_environment(engine, tmp_path)
    results = run_distributed(steps, 2, text_tower, precision, 2, environment=environment)
    good, skipped = (0, True, True), (1, False, True)
    assert results[0] == [good, skipped, good, skipped, good, skipped, good]
    assert [count for count, _, _ in results[1]] == [0, 1, 0, 1, 0, 1, 0]
    record_property("tries", len(PLACES))
