"""The loss over several ranks: together they have the gradients of one process, and wrong schemes do not."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.support.distributed import run_distributed
from tests.train.loss.test_loss import KINDS, ROWS, Batch, far_apart, plain_loss, relative, value_and_gradients
from train import distributed
from train.config import LossConfig
from train.loss.full import contrastive_loss
from train.loss.products import three_products

CASES = [
    (LossConfig(kind=kind, rows=rows, tile=5, label_smoothing=smoothing, mask_duplicates=mask), collective)
    for kind in KINDS
    for rows in ROWS
    for smoothing, mask in ((0.0, False), (0.1, True))
    for collective in (False, True)
]
ONE_PASS = [(config, True) for config, collective in CASES if collective and config.rows == "tiled"]
BATCHES = {"random": lambda: Batch(16, dtype=torch.float32), "far apart": lambda: far_apart(16)}


def own_gradients(make, cases, three=False):
    """For every case: the mean loss, this rank's rows of the gradients, and the gradients of scale and bias."""
    world, rank = distributed.world_size(), distributed.rank()
    whole = BATCHES[make]()
    b = 16 // world
    results = []
    for config, collective in cases:
        batch = whole.to(torch.float32)
        own = slice(rank * b, (rank + 1) * b)
        batch.image = distributed.all_gather_rows(whole.image[own]).requires_grad_()
        batch.text = distributed.all_gather_rows(whole.text[own]).requires_grad_()
        with three_products(three):
            loss = batch.loss(config, own.start, own.stop, collective)
        image, text, *scalars = torch.autograd.grad(loss, batch.inputs(config.kind))
        rows = [distributed.reduce_scatter_rows(g) / world for g in (image, text)]
        results.append([distributed.all_reduce_sum(loss) / world, *rows])
        results[-1] += [distributed.all_reduce_sum(g) / world for g in scalars]
    return results


def all_gradients():
    return {
        "random": own_gradients("random", CASES),
        "three": own_gradients("random", ONE_PASS, three=True),
        "far apart": own_gradients("far apart", ONE_PASS),
    }


def one_process(batch, config):
    return value_and_gradients(plain_loss(batch, config), batch.inputs(config.kind))


def joined(results):
    """Of all ranks' results of one case: those of the whole batch."""
    return [results[0][0], *(torch.cat([r[i] for r in results]) for i in (1, 2)), *results[0][3:]]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_have_the_gradients_of_one_process(world):
    ranks = run_distributed(all_gradients, world)
    for kind, cases, bound in (("random", CASES, 1e-6), ("three", ONE_PASS, 1e-4)):
        for index, (config, collective) in enumerate(cases):
            found = joined([rank[kind][index] for rank in ranks])
            for a, b in zip(found, one_process(BATCHES["random"](), config), strict=True):
                assert relative(a, b) <= bound, (kind, config, collective, relative(a, b))
    for index, (config, _) in enumerate(ONE_PASS):
        found = joined([rank["far apart"][index] for rank in ranks])
        for a, b in zip(found, one_process(far_apart(16).to(torch.float64), config), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def products_of_a_rank():
    """In units of B x B x D, with and without the work shared out; and whether a feature of rank 1 that is not a number
    is seen in the loss."""
    world, rank, batch = distributed.world_size(), distributed.rank(), Batch(16, dtype=torch.float32)
    b, found = 16 // world, []
    addmm = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
    for collective in (False, True):
        with FlopCounterMode(display=False, custom_mapping=addmm) as counter:
            batch.loss(LossConfig(tile=5), rank * b, (rank + 1) * b, collective).backward()
        found.append(counter.get_total_flops() / (2 * 16 * 16 * batch.image.shape[1]))
    with torch.no_grad():
        batch.image[b] = torch.nan
    return [*found, bool(batch.loss(LossConfig(tile=5), rank * b, (rank + 1) * b, True).isnan())]


def test_ranks_compute_each_similarity_once():
    assert run_distributed(products_of_a_rank, 2) == [[4, 2, True]] * 2  # forward 1, backward 3, of half the rows


def encoder_gradients(scheme):
    """Gradients of an encoder's weight and of the temperature as DDP averages them, under a right or a wrong scheme."""
    world, rank = distributed.world_size(), distributed.rank()
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(16, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = (torch.randn(12, 8, generator=generator, dtype=torch.float64) / 3).requires_grad_()
    scale = torch.tensor([14.0], dtype=torch.float64, requires_grad=True)
    b = 16 // world
    own = slice(rank * b, (rank + 1) * b)
    image, text = (F.normalize(features[own] @ weight, dim=1) for features in (x, y))
    all_image, all_text = (distributed.all_gather_rows(features) for features in (image, text))
    start, stop, repeats = own.start, own.stop, 1

    if scheme in ("cached", "cached, local rows", "temperature summed", "whole loss twice"):
        all_image.requires_grad_()
        all_text.requires_grad_()
    elif scheme in ("own slice put back, all rows", "own slice put back, own rows"):
        all_image, all_text = all_image.clone(), all_text.clone()
        all_image[own], all_text[own] = image, text
        if scheme == "own slice put back, all rows":
            start, stop = 0, 16
    elif scheme == "local batch only":
        all_image, all_text, start, stop = image, text, 0, b
    if scheme == "whole loss twice":
        repeats = 2
    config = LossConfig(rows="full" if scheme == "cached" else "tiled", tile=3)
    for _ in range(repeats):
        loss = contrastive_loss(all_image, all_text, scale, start=start, stop=stop, config=config)
        loss.backward()
    if all_image.is_leaf:
        for features, gathered in ((image, all_image), (text, all_text)):
            own_gradient = distributed.reduce_scatter_rows(gathered.grad) / repeats
            (features * own_gradient).sum().backward(retain_graph=True)
    gradients = [distributed.all_reduce_sum(g) / world for g in (weight.grad, scale.grad)]
    if scheme == "temperature summed":
        gradients[1] *= world
    return gradients


SCHEMES = {
    # scheme: (length of the encoder's gradient, whether its direction is right, the temperature's), relative to truth
    "cached": (1, True, 1),
    "cached, local rows": (1, True, 1),
    "own slice put back, all rows": (1 / 4, True, 1),
    "own slice put back, own rows": (None, False, 1),
    "local batch only": (None, False, None),
    "temperature summed": (1, True, 4),
    "whole loss twice": (1, True, 2),
}


def all_schemes():
    return {scheme: encoder_gradients(scheme) for scheme in SCHEMES}


@pytest.fixture(scope="module")
def schemes():
    return run_distributed(all_schemes, 4)[0], encoder_gradients("cached")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_wrong_gradient_schemes_are_told_apart(schemes, scheme):
    (weight, scale), (true_weight, true_scale) = schemes[0][scheme], schemes[1]
    length, direction, temperature = SCHEMES[scheme]
    cosine = F.cosine_similarity(weight.flatten(), true_weight.flatten(), dim=0).item()
    if direction:
        assert cosine == pytest.approx(1, abs=1e-12)
        assert (weight.norm() / true_weight.norm()).item() == pytest.approx(length, rel=1e-9)
    else:
        assert cosine < 0.99
    ratio = (scale / true_scale).item()
    if temperature is None:
        assert abs(ratio - 1) > 0.05
    else:
        assert ratio == pytest.approx(temperature, rel=1e-9)
