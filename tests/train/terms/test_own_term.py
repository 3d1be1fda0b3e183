"""A term of the loss that is defined here alone, and registered by its row of TERMS, trains exactly."""

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from data_pipeline.seeds import micro_batch_seed
from tests.support.distributed import run_distributed
from tests.support.exactness import (
    TOLERANCE,
    clip_loss,
    counts,
    make_batch,
    make_config,
    relative_error,
    write_text_tower,
)
from tests.support.wire import counted
from train import distributed
from train.config import RunConfig
from train.engine.build import engine_of_run
from train.engine.start import start
from train.model.pair import PairModel, build_model
from train.step import training_step
from train.terms import TERMS, Term

STATISTICS = ((0.5,) * 3, (0.25,) * 3)
WEIGHT = 0.3


class Apart(Term):
    """Pushes a projection of all images of the global batch apart, at a temperature of its own."""

    scalars = ("apart_scale",)
    enabled = True

    def heads(self, pair):
        head = nn.Linear(pair.image.width, 6, bias=False)
        return {"image": {"apart": head}, "shared": {"apart_scale": nn.Parameter(torch.tensor([0.5]))}}

    def from_image(self, pair, encoded):
        return {"apart_rows": pair.apart(encoded.features_BD).float()}

    def scalar_outputs(self, pair):
        return {"apart_scale": pair.apart_scale.float().exp()}

    def loss(self, outputs, rows, config):
        rows_BD = outputs["apart_rows"]
        scores = outputs["apart_scale"] * rows_BD[rows.start : rows.stop] @ rows_BD.T
        loss = scores.logsumexp(1).mean()
        return WEIGHT * loss, {"loss/apart": loss}


def plain(config: RunConfig, model: PairModel) -> tuple[float, dict[str, Tensor]]:
    """The term and all gradients of one process, by the formulas and one backward."""
    batches = make_batch(config)
    outputs = [model([batch], [micro_batch_seed(config.train.seed, 0, batch.index)]) for batch in batches]
    image, text, rows = (torch.cat([output[name] for output in outputs]) for name in ("image", "text", "apart_rows"))
    loss = (model.apart_scale.exp() * rows @ rows.T).logsumexp(1).mean()
    (clip_loss(image, text, model.log_scale.exp()) + WEIGHT * loss).backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


def its_rows(self, output, config) -> bool:
    return output == "apart_rows"


def errors_of_a_rank(text_tower: str, residents: list[int]) -> list[dict[str, float]]:
    """For each number of resident micro-batches, the relative error of the term and of every gradient; and again where
    the term says what it needs of other ranks."""
    TERMS["apart"] = Apart
    accelerator = start()
    config = make_config(text_tower, "tiled", global_batch=16)
    loss, expected = plain(config, build_model(config, *STATISTICS))
    engine = engine_of_run(accelerator, build_model(config, *STATISTICS), config)
    share = 4 // distributed.world_size()
    own = make_batch(config)[distributed.rank() * share : (distributed.rank() + 1) * share]
    found = {}

    def keep_gradients() -> tuple[Tensor, Tensor]:
        found.update({name: parameter.grad.clone() for name, parameter in engine.module.named_parameters()})
        engine.optimizer.zero_grad(set_to_none=True)
        return torch.tensor(0.0), torch.tensor(False)

    engine.step = keep_gradients
    results = []
    for gathers, config.train.resident in product((Apart.gathers, its_rows), residents):
        Apart.gathers = gathers
        with counted() as sent:
            metrics = training_step(engine, own, config)
        # Captions and the term's rows, 16 and 6 numbers in float64; the images, too, where it does not say.
        numbers = 16 + 6 if gathers is its_rows else 16 + 16 + 6
        assert sent["all_gather_into_tensor"] == (8 * 16 * numbers if distributed.world_size() > 1 else 0)
        errors = {name: relative_error(found[name], expected[name]) for name in expected if counts(name)}
        results.append(errors | {"loss/apart": abs(float(metrics["loss/apart"]) - loss) / loss})
    return results


@pytest.mark.parametrize("world", [1, 2])
def test_an_own_term_trains_exactly(world, tmp_path):
    """Resident and accumulated; its head and its scale have gradients of their own."""
    ranks = run_distributed(errors_of_a_rank, world, write_text_tower(tmp_path), [4 // world, 1])
    for results in ranks:
        for errors in results:
            assert {"apart.weight", "apart_scale", "loss/apart"} <= errors.keys()
            worst = max(errors, key=errors.get)
            assert errors[worst] <= TOLERANCE, f"{worst} is off by {errors[worst]:.1e}"


def test_heads_learn_with_the_branch_that_the_term_names(tmp_path, monkeypatch):
    from train.engine.optim import param_groups

    monkeypatch.setitem(TERMS, "apart", Apart)
    config = make_config(write_text_tower(tmp_path), "tiled", global_batch=16)
    model = build_model(config, *STATISTICS)
    groups = {name: (group["tower"], group["part"]) for group in param_groups(model, config) for name in group["names"]}
    assert groups["apart.weight"] == ("image", "projection") and groups["apart_scale"] == ("shared", "scale")
    assert "apart.weight" in model.state_dict(), "a head has its own name in a checkpoint, not the term's before it"
