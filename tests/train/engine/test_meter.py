"""What is measured of a step in every engine, against a plain model in float64; what balance makes of it."""

import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.seeds import micro_batch_seed
from tests.support.distributed import run_distributed
from tests.support.exactness import engine_environment, make_batch, make_config, write_text_tower
from tests.support.small import TEXT_FILES
from tests.train.engine.test_embedding import plain_embedding_metrics
from train.checkpoint import load_state
from train.config import TOWERS, BalanceConfig, RunConfig

ENGINES = ("ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero2", "zero3")))
STATISTICS = ((0.5,) * 3, (0.25,) * 3)
CLIP = 0.5


class Trained(NamedTuple):
    """What a process saw of a run."""

    metrics: list[dict[str, float]]
    multipliers: list[dict[str, float]]
    weights: list[dict[str, Tensor]]  # before the first step and after each


def train(accelerator, config: RunConfig, steps: int, target: Path, source: Path | None = None) -> Trained:
    """Go on from `source` for some measured steps with the configured balance, and save to `target`."""
    from tests.support.checkpoints import save
    from train import checkpoint, distributed
    from train.begin import restore
    from train.checkpoint import TrainState
    from train.engine.balance import Balance
    from train.engine.build import engine_of_run
    from train.engine.ema import WeightAverage
    from train.engine.optim import set_lrs
    from train.model.pair import build_model
    from train.saving.saver import collect
    from train.step import training_step

    model, state = build_model(config, *STATISTICS), TrainState()
    found = checkpoint.newest(source) if source else None
    if found is not None:
        state = checkpoint.load_state(found)
        checkpoint.load_weights(found, model)
    engine = engine_of_run(accelerator, model, config)
    average = WeightAverage(engine, 0.0)
    if found is not None:
        restore(found, engine, average, state)
    balance, share = Balance(config, state.balance), config.train.resident
    run = Trained([], [], [whole_weights(engine)])
    for _ in range(steps):
        set_lrs(engine.optimizer, state.step, 10, config.optim, balance.multipliers())
        own = make_batch(config, state.step)[distributed.rank() * share : (distributed.rank() + 1) * share]
        measure = config.tracking.diagnostics_every > 0
        run.metrics.append({name: float(value) for name, value in training_step(engine, own, config, measure).items()})
        balance.update(state.step, run.metrics[-1])
        state.step += 1
        run.multipliers.append(balance.multipliers())
        run.weights.append(whole_weights(engine))
    save(target, collect(engine, average, state), state, config, TEXT_FILES)
    return run


def runs_of_a_rank(text_tower: str, directory: str) -> dict:
    """Balanced runs, straight and interrupted, with references; and runs without balance, measured and not."""
    from train import distributed
    from train.engine.start import start

    config = make_config(text_tower, "tiled", global_batch=16)
    # A smooth problem: BatchNorm over few values would amplify rounding. A bias that does not divide by the ranks.
    config.model.image.norm, config.model.embed_dim, config.model.projection_bias = "group", 15, True
    config.optim.clip_grad, config.model.image.lr, config.model.text.lr = CLIP, 1e-3, 3e-4
    config.train.resident = 4 // distributed.world_size()
    config.balance = BalanceConfig(kind="progress", every=1, strength=0.4)
    accelerator, root = start(), Path(directory)
    straight = train(accelerator, config, 3, root / "straight")
    steps = enumerate(itertools.pairwise(straight.weights))
    expected = [reference(before, after, make_batch(config, step), config) for step, (before, after) in steps]
    first = train(accelerator, config, 2, root / "two")
    second = train(accelerator, config, 1, root / "three", root / "two")
    config.balance = BalanceConfig()
    measured = train(accelerator, config, 2, root / "measured")
    config.tracking.diagnostics_every = 0
    bare = train(accelerator, config, 2, root / "bare")
    return {
        "metrics": straight.metrics,
        "expected": expected,
        "multipliers": straight.multipliers,
        "resumed": first.multipliers + second.multipliers,
        "losses": [[metrics["loss"] for metrics in run.metrics] for run in (measured, bare)],
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[list[dict], Path]]:
    """What every rank of an engine returns, and the directory of its checkpoints; each engine runs once."""

    @functools.cache
    def of(engine: str) -> tuple[list[dict], Path]:
        root = tmp_path_factory.mktemp(engine)
        environment, text_tower = engine_environment(engine, root), write_text_tower(root / "text")
        return run_distributed(runs_of_a_rank, 2, text_tower, str(root), environment=environment, timeout=500), root

    return of


def whole_weights(engine) -> dict[str, Tensor]:
    return {name: engine.full_parameter(p).detach().clone() for name, p in engine.module.named_parameters()}


def reference(before: dict, after: dict, batch: list, config: RunConfig) -> dict[str, float]:
    """All metrics of a step between these weights, by a plain model and the formulas, in float64."""
    from train.model.pair import build_model

    model = build_model(config, *STATISTICS)
    model.load_state_dict(before, strict=False)
    outputs = [model([part], [micro_batch_seed(config.train.seed, part.step, part.index)]) for part in batch]
    image, text = (torch.cat([output[name] for output in outputs]) for name in TOWERS)
    logits = outputs[0]["logit_scale"] * image @ text.T
    labels = torch.arange(len(logits))
    ((F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    moved = {name: after[name].double() - before[name].double() for name in before}
    metrics = plain_embedding_metrics(image.detach(), text.detach())
    for tower in TOWERS:
        metrics[f"grad_norm/{tower}"] = tower_norm(gradients, tower)
        metrics[f"weight_norm/{tower}"] = tower_norm(before, tower)
        metrics[f"update_ratio/{tower}"] = tower_norm(moved, tower) / tower_norm(before, tower)
    return metrics


def tower_norm(tensors: dict[str, Tensor], tower: str) -> float:
    squares = [value.detach().double().square().sum() for name, value in tensors.items() if name.startswith(tower)]
    return math.sqrt(sum(squares))


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_measures_what_a_plain_model_has(runs, engine: str) -> None:
    ranks, _ = runs(engine)
    for metrics, expected in zip(ranks[0]["metrics"], ranks[0]["expected"], strict=True):
        assert metrics["grad_norm"] > CLIP  # so that it is seen that the norms are those before clipping
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(value, rel=1e-4), name
        assert expected["update_ratio/image"] > 1e-4
    assert ranks[0]["metrics"] == ranks[1]["metrics"]


@pytest.mark.parametrize("engine", ENGINES)
def test_multipliers_are_the_same_on_all_ranks_and_engines_and_when_resumed(runs, engine: str) -> None:
    (first, second), root = runs(engine)
    assert first["multipliers"] == second["multipliers"] == first["resumed"] == second["resumed"]
    saved = [root / name / "checkpoints" / "step_00000003" for name in ("straight", "three")]
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (saved[0] / name).read_bytes() == (saved[1] / name).read_bytes()
    states = [load_state(path).balance for path in saved]
    assert states[0] == states[1] and {name: states[0][name] for name in TOWERS} == first["multipliers"][-1]
    for factors, expected in zip(first["multipliers"], runs("ddp")[0][0]["multipliers"], strict=True):
        assert factors == pytest.approx(expected, rel=1e-4)
        assert abs(math.log(factors["image"])) > 0.01


@pytest.mark.parametrize("engine", ENGINES)
def test_measuring_alone_leaves_the_curve_as_it_is(runs, engine: str) -> None:
    ranks, root = runs(engine)
    measured, bare = ranks[0]["losses"]
    assert measured == bare
    saved = [root / name / "checkpoints" / "step_00000002" / "model.safetensors" for name in ("measured", "bare")]
    assert saved[0].read_bytes() == saved[1].read_bytes()
