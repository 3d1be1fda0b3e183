"""Any module with the outputs of the contract trains under every engine as under plain torch."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.batch import MicroBatch
from tests.support.distributed import run_distributed
from tests.support.exactness import clip_loss, engine_environment, make_batch
from train.config import RunConfig

MICRO_BATCHES, ROWS = 4, 4
START, LOWEST = 2.0, 1.9  # of the log scale: a step would take it below the lowest


class Dots(nn.Module):
    """Two linear towers; two parameters have sizes that two ranks cannot halve."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pixels, self.words = nn.Linear(3 * 8 * 8, 7), nn.EmbeddingBag(64, 7)
        self.temperature = nn.Parameter(torch.tensor([START]))

    def forward(self, micro_batches: list[MicroBatch], seeds: list[int]) -> dict[str, Tensor]:
        images = torch.cat([batch.images_BCHW[:, :, ::4, ::4].flatten(1) for batch in micro_batches]).float() / 255
        texts = torch.cat([self.words(batch.ids_BL) for batch in micro_batches])
        return {
            "image": F.normalize(self.pixels(images), dim=-1),
            "text": F.normalize(texts, dim=-1),
            "logit_scale": self.temperature.exp(),
        }


def make_config() -> RunConfig:
    config = RunConfig()
    config.train.global_batch, config.train.micro_batch = MICRO_BATCHES * ROWS, ROWS
    return config


def batches(step: int) -> list[MicroBatch]:
    return make_batch(make_config(), step)


def sgd(model: nn.Module) -> torch.optim.SGD:
    """With which an update is the gradient itself."""
    return torch.optim.SGD(model.parameters(), lr=0.5)


def train(resident: int) -> list[dict[str, Tensor]]:
    """Whole weights after each of two steps, on rank 0."""
    from train import distributed
    from train.engine.build import build_engine
    from train.engine.start import start
    from train.step import training_step

    config, model = make_config(), Dots()
    config.train.resident = resident
    engine = build_engine(
        start(),
        model,
        sgd(model),
        blank=lambda: batches(0)[0],
        clamped=[(model.temperature, LOWEST, START)],
    )
    share, found = MICRO_BATCHES // distributed.world_size(), []
    for step in range(2):
        own = batches(step)[distributed.rank() * share :][:share]
        metrics = training_step(engine, own, config, measure=True)
        assert metrics["skipped"] == 0 and metrics["alignment"] > 0
        found.append(engine.weights())
        engine.clamped = ()  # the second step starts from the clamped value, and is free then
    return found


def plain_torch() -> list[dict[str, Tensor]]:
    """The same two steps with the whole batch in one backward pass."""
    model, found = Dots(), []
    optimizer = sgd(model)
    for step in range(2):
        output = model(batches(step), [0] * MICRO_BATCHES)
        optimizer.zero_grad()
        clip_loss(output["image"], output["text"], output["logit_scale"]).backward()
        optimizer.step()
        if step == 0:
            assert model.temperature.item() < LOWEST, "nothing would have to be clamped"
            model.temperature.data.clamp_(LOWEST, START)
        found.append({name: value.clone() for name, value in model.state_dict().items()})
    return found


@pytest.mark.parametrize("resident", [1, MICRO_BATCHES])
@pytest.mark.parametrize(("engine", "world"), [("ddp", 1), ("ddp", 2), ("zero2", 2), ("zero3", 2)])
def test_a_module_from_outside_trains_as_under_plain_torch(
    tmp_path: Path, engine: str, world: int, resident: int
) -> None:
    ranks = run_distributed(train, world, resident, environment=engine_environment(engine, tmp_path))
    assert all(weights == {} for rank in ranks[1:] for weights in rank)
    before = Dots().state_dict()
    for step, (actual, expected) in enumerate(zip(ranks[0], plain_torch(), strict=True)):
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            moved = (value - before[name]).norm()
            assert step or moved > 1e-2, f"{name} does not move"
            assert (actual[name] - value).norm() < 1e-5 * moved + 1e-6 * value.norm(), name
        before = expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"zero_optimization": {"stage": 0}}, "zero_stage 0 is DDP through DeepSpeed"),
        ({"optimizer": {"type": "AdamW"}}, "has `optimizer`: remove it"),
        ({"fp16": {"enabled": True}}, "fp16 enabled"),
    ],
)
def test_a_deepspeed_config_that_does_not_go_with_duet_is_refused(tmp_path: Path, content: dict, message: str) -> None:
    environment = engine_environment("zero2", tmp_path)
    path = Path(environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"])
    path.write_text(json.dumps(json.loads(path.read_text()) | content))
    with pytest.raises(ValueError, match=message):
        run_distributed(train, 1, 1, environment=environment)
