"""Gradients of the global batch's loss, for any model that sees a part of the rows at a time."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.support.distributed import run_distributed
from tests.support.exactness import clip_loss
from tests.support.wire import counted
from train import distributed
from train.config import LossConfig
from train.loss import Rows, contrastive_loss, loss_gradients


class Pair(nn.Module):
    """Two linear towers and a temperature without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(5, 4), nn.Linear(3, 4)
        self.log_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, rows_B8):
        image, text = (F.normalize(t) for t in (self.image(rows_B8[:, :5]), self.text(rows_B8[:, 5:])))
        return {"image": image, "text": text, "logit_scale": self.log_scale.exp()}


def data() -> torch.Tensor:
    return torch.randn(12, 8, generator=torch.Generator().manual_seed(1))


def pull_together(outputs, rows: Rows):
    """An objective of one's own: squared distances, weighed by what does not belong to a row."""
    own = slice(rows.start, rows.stop)
    loss = outputs["logit_scale"] * (outputs["image"][own] - outputs["text"].mean(0)).square().sum(1).mean()
    return loss, {"loss": loss}


def pull_together_own(outputs, rows: Rows):
    """The same of this rank's images, where they are all that there is of them."""
    return pull_together(outputs, Rows(0, len(outputs["image"])))


def clip(outputs):
    return clip_loss(*outputs.values())


def sigmoid(outputs):
    logits = outputs["logit_scale"] * outputs["image"] @ outputs["text"].T
    return -F.logsigmoid((2 * torch.eye(12) - 1) * logits).sum() / 12


def pull(outputs):
    return pull_together(outputs, Rows())[0]


def only_texts(name: str) -> bool:
    return name == "text"


OBJECTIVES = (
    # An objective, what it asks for, and the numbers per row that ranks gather; those that they then add up: gradients
    # of as many, and three per column of the tiles.
    (LossConfig(), {}, 4, 4 + 3),
    (LossConfig(kind="sigmoid"), {}, 4, 4),
    (LossConfig(rows="local"), {}, 8, 8),
    (LossConfig(mask_duplicates=True), {}, 4 + 2, 4 + 3),
    (pull_together, {}, 8, 8),
    (pull_together_own, {"gathers": only_texts}, 4, 4),
)


def gradients_of_a_rank(parts: int) -> list[list[torch.Tensor]]:
    """Loss and averaged gradients for each objective."""
    world, rank = distributed.world_size(), distributed.rank()
    own = data().chunk(world)[rank].chunk(parts)
    ids = dict.fromkeys(("image_ids_b", "text_ids_b"), torch.arange(12).chunk(world)[rank])
    results = []
    for objective, options, gathered, added in OBJECTIVES:
        model = Pair()
        with torch.no_grad():
            outputs = [model(part) for part in own]
        with counted() as sent:
            masked = getattr(objective, "mask_duplicates", False)
            losses, gradients = loss_gradients(outputs, objective, **options, **(ids if masked else {}))
        if world > 1:  # float64: 12 rows, and at last the loss and the temperature's gradient
            assert sent == {"all_gather_into_tensor": 8 * 12 * gathered, "all_reduce": 8 * (12 * added + 2)}, objective
        for part, gradient in zip(own, gradients, strict=True):
            output = model(part)
            torch.autograd.backward(list(output.values()), [gradient[name] for name in output])
        averaged = [distributed.all_reduce_sum(p.grad) / world for p in model.parameters()]
        results.append([losses["loss"], *averaged])
    return results


@pytest.mark.parametrize(("world", "parts"), [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_a_model_of_ones_own_accumulates_exactly(world, parts):
    results = run_distributed(gradients_of_a_rank, world, parts)
    for number, loss_of in enumerate((clip, sigmoid, clip, clip, pull, pull)):
        model = Pair()
        loss = loss_of(model(data()))
        loss.backward()
        for rank in results:
            for found, expected in zip(rank[number], [loss, *(p.grad for p in model.parameters())], strict=True):
                torch.testing.assert_close(found.float(), expected.detach(), rtol=1e-5, atol=1e-7)


def test_without_start_and_stop_all_rows_count():
    outputs = Pair()(data())
    image, text, scale = outputs.values()
    torch.testing.assert_close(contrastive_loss(image, text, scale), clip_loss(image, text, scale))


def test_duplicates_of_this_ranks_rows_are_left_out():
    outputs, ids = Pair()(data()), torch.arange(12) // 2
    config = LossConfig(mask_duplicates=True)
    losses, _ = loss_gradients([outputs], config, image_ids_b=ids, text_ids_b=ids)
    image, text, scale = outputs.values()
    expected = contrastive_loss(image, text, scale, config=config, image_ids_B=ids, text_ids_B=ids)
    torch.testing.assert_close(losses["loss"].float(), expected)
    assert losses["loss"] < contrastive_loss(image, text, scale)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"text": torch.ones(5, 4)},
            r"number of rows \(image 12, text 5\): name those .* in .* scalars",
        ),
        ({"margin": torch.ones(1)}, r"differ in their number of rows \(image 12, text 12, margin 1\)"),
        ({"image": None}, "outputs have no image: a LossConfig needs image, text and logit_scale"),
        ({"text": torch.ones(12, 3)}, r"image_BD has shape \[12, 4\] and text_BD \[12, 3\]: both must be \[B, D\]"),
    ],
)
def test_outputs_that_do_not_fit_are_refused(change, match):
    outputs = {name: value for name, value in (Pair()(data()) | change).items() if value is not None}
    with pytest.raises(ValueError, match=match):
        loss_gradients([outputs])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"start": 6, "stop": 6}, "start 6 and stop 6 must be a range of the 12 rows of text_BD"),
        (
            {"start": 2, "stop": 5, "collective": True},
            "collective: rank 0 has rows 0 to 12 of 12, not start 2 and stop 5",
        ),
        ({"stop": 13}, "start 0 and stop 13 must be a range of the 12 rows"),
        ({"config": LossConfig(mask_duplicates=True)}, "config.mask_duplicates needs image_ids_B and text_ids_B"),
    ],
)
def test_arguments_that_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        contrastive_loss(*Pair()(data()).values(), **arguments)


@pytest.mark.parametrize(("rows", "collective"), [("tiled", False), ("local", True)])
def test_a_ranks_own_images_are_not_enough_but_in_tiles_and_collective(rows, collective):
    image, text, scale = Pair()(data()).values()
    with pytest.raises(ValueError, match=r"image_BD has shape \[6, 4\] and text_BD \[12, 4\]: both must be"):
        contrastive_loss(image[:6], text, scale, config=LossConfig(rows=rows), stop=6, collective=collective)
