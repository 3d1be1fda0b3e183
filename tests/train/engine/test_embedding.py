"""How embeddings lie on the sphere, against the formulas of the papers in float64; the same on any number of ranks."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.distributed import run_distributed
from train import distributed
from train.engine.embedding import ROWS, effective_rank, embedding_metrics

SIZES = ((256, 48), (32, 48))  # more rows than columns, and fewer


def plain_embedding_metrics(image: Tensor, text: Tensor) -> dict[str, float]:
    """By the formulas of the papers, in float64."""
    features = {"image": image.double(), "text": text.double()}
    x, y = features.values()
    metrics = {"alignment": (x - y).norm(dim=1).pow(2).mean(), "modality_gap": (x.mean(0) - y.mean(0)).norm()}
    for tower, value in features.items():
        metrics[f"uniformity/{tower}"] = torch.pdist(value).pow(2).mul(-2).exp().mean().log()
        singular = torch.linalg.svdvals(value)
        shares = singular / singular.sum()
        shares = shares[shares > 0]
        metrics[f"effective_rank/{tower}"] = (-(shares * shares.log()).sum()).exp()
    return {name: float(value) for name, value in metrics.items()}


@pytest.mark.parametrize(("rows", "width"), [(300, 20), (20, 300), (ROWS + 7, 8)])
def test_embedding_metrics_are_those_of_the_papers(rows: int, width: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    image = F.normalize(torch.randn(rows, width, generator=generator) + 0.5, dim=1)
    text = F.normalize(image + 0.3 * torch.randn(rows, width, generator=generator), dim=1)
    metrics = embedding_metrics(image, text)
    expected = plain_embedding_metrics(image, text)
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5), name


def test_embedding_metrics_at_their_ends() -> None:
    corners = torch.eye(8)
    same = embedding_metrics(corners, corners)
    assert same["alignment"] == same["modality_gap"] == 0
    assert same["effective_rank/image"] == pytest.approx(8) and same["uniformity/text"] == pytest.approx(-4)
    point = embedding_metrics(corners, corners[:1].expand(8, 8))
    assert point["effective_rank/text"] == pytest.approx(1, abs=1e-5) and point["uniformity/text"] == 0
    flat = (torch.randn(500, 3) @ torch.randn(3, 200)).double()
    assert effective_rank((flat.T @ flat)[None]) < 3.001


def similar_pairs(rows: int, width: int) -> list[Tensor]:
    """Unit vectors of both towers whose singular values fall steeply, as those of trained towers do."""
    generator = torch.Generator().manual_seed(rows)
    image, noise = torch.randn(2, rows, width, generator=generator) * torch.arange(1, width + 1) ** -1.5
    return [F.normalize(x, dim=1) for x in (image, image + 0.3 * noise)]


def metrics_of_a_rank() -> list[dict[str, float]]:
    world, rank, found = distributed.world_size(), distributed.rank(), []
    for rows, width in SIZES:
        own = (x.chunk(world)[rank] for x in similar_pairs(rows, width))
        found.append({name: float(value) for name, value in embedding_metrics(*own).items()})
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_embedding_metrics_are_the_same_on_any_number_of_ranks(world: int) -> None:
    first, *others = run_distributed(metrics_of_a_rank, world)
    assert all(other == first for other in others)
    for (rows, width), found in zip(SIZES, first, strict=True):
        image, text = similar_pairs(rows, width)
        expected = plain_embedding_metrics(image, text)
        for name, value in embedding_metrics(image, text).items():
            rank = name.startswith("effective_rank")  # in float64; the others round in fp32
            assert found[name] == pytest.approx(float(value), rel=1e-9 if rank else 1e-6), name
            assert found[name] == pytest.approx(expected[name], rel=1e-7 if rank else 1e-5), name


def test_features_that_are_not_finite_are_reported_and_do_not_stop_the_run() -> None:
    broken = torch.full((4, 3), math.nan)
    metrics = embedding_metrics(torch.eye(4, 3), broken)
    assert math.isnan(metrics["effective_rank/text"]) and math.isnan(metrics["alignment"])
    assert metrics["effective_rank/image"] == pytest.approx(3)
