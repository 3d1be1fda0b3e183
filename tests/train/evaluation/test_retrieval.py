import itertools

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.distributed import run_distributed
from train.evaluation.retrieval import RECALL_AT, TIE, chance, chance_median, retrieval_metrics


def reference(images_ND: np.ndarray, texts_MD: np.ndarray, owner_M: np.ndarray) -> dict[str, float]:
    """The definition, over the full matrix in float64, one query at a time; cosines closer than TIE are equal."""
    scores_MN = texts_MD.astype(np.float64) @ images_ND.astype(np.float64).T
    t2i = []
    for text, owner in enumerate(owner_M):
        others = np.delete(scores_MN[text], owner)
        t2i.append(1 + sum(others >= scores_MN[text, owner] - TIE))
    i2t = []
    for image in range(len(images_ND)):
        best = max(scores_MN[t, image] for t, owner in enumerate(owner_M) if owner == image)
        i2t.append(1 + sum(scores_MN[t, image] >= best - TIE for t, owner in enumerate(owner_M) if owner != image))
    metrics = {"n_images": len(images_ND), "n_texts": len(texts_MD)}
    for side, ranks in (("t2i", t2i), ("i2t", i2t)):
        metrics |= {f"{side}_R@{k}": 100 * sum(rank <= k for rank in ranks) / len(ranks) for k in RECALL_AT}
        metrics |= {f"{side}_median_rank": np.median(ranks), f"{side}_mean_rank": sum(ranks) / len(ranks)}
    return metrics


def unit(generator: np.random.Generator, rows: int, size: int = 6) -> np.ndarray:
    features = generator.normal(size=(rows, size))
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)


def owners(generator: np.random.Generator, images: int, extra: int) -> np.ndarray:
    """Every image has a text; `extra` more are spread over the images, in any order."""
    return generator.permutation(np.concatenate([np.arange(images), generator.integers(images, size=extra)]))


def measure(images_ND, texts_MD, owner_M, chunk=1024) -> dict[str, float]:
    return retrieval_metrics(*(torch.from_numpy(x) for x in (images_ND, texts_MD, owner_M)), chunk)


def without_chance(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if "chance" not in name}


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32), images=st.integers(1, 12), extra=st.integers(0, 12), chunk=st.integers(1, 9))
def test_metrics_equal_their_definition(seed, images, extra, chunk):
    generator = np.random.default_rng(seed)
    owner_M = owners(generator, images, extra)
    images_ND, texts_MD = unit(generator, images), unit(generator, images + extra)
    metrics = measure(images_ND, texts_MD, owner_M, chunk)
    assert without_chance(metrics) == pytest.approx(reference(images_ND, texts_MD, owner_M), rel=1e-12)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32), images=st.integers(1, 10), extra=st.integers(0, 10), chunk=st.integers(1, 9))
def test_ties_count_as_in_the_definition(seed, images, extra, chunk):
    # Few small integers: most scores occur several times.
    generator = np.random.default_rng(seed)
    owner_M = owners(generator, images, extra)
    images_ND, texts_MD = (
        generator.integers(-1, 2, size=(rows, 2)).astype(np.float32) for rows in (images, images + extra)
    )
    metrics = measure(images_ND, texts_MD, owner_M, chunk)
    assert without_chance(metrics) == pytest.approx(reference(images_ND, texts_MD, owner_M), rel=1e-12)


@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_constant_features_get_the_worst_rank(noise):
    # A collapsed model, also where float32 makes its features differ in their last digit.
    generator = torch.Generator().manual_seed(0)
    features = [torch.full((rows, 4), 0.5) + noise * torch.rand(rows, 4, generator=generator) for rows in (20, 60)]
    metrics = retrieval_metrics(*features, torch.arange(60) % 20)
    assert metrics["t2i_R@10"] == metrics["i2t_R@10"] == 0.0
    assert metrics["t2i_mean_rank"] == metrics["t2i_median_rank"] == 20
    assert metrics["i2t_mean_rank"] == metrics["i2t_median_rank"] == 58  # its own three texts are not before it


def test_perfect_features():
    metrics = retrieval_metrics(torch.eye(20), torch.eye(20).repeat(3, 1), torch.arange(60) % 20)
    for side in ("t2i", "i2t"):
        assert metrics[f"{side}_R@1"] == 100
        assert metrics[f"{side}_median_rank"] == metrics[f"{side}_mean_rank"] == 1


@pytest.mark.parametrize(("tower", "row"), [(0, "image"), (1, "text")])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_refused(tower, row, value):
    features = [torch.eye(8), torch.eye(8)]
    features[tower][3, 2] = value
    with pytest.raises(ValueError, match=f"1 of 8 {row} features are not finite"):
        retrieval_metrics(*features, torch.arange(8))


@pytest.mark.parametrize("owner", [[0, 0, 1], [0, 1, 3]])
def test_an_image_without_a_text_is_refused(owner):
    with pytest.raises(ValueError, match="every one of the 3 images needs at least one text"):
        retrieval_metrics(torch.eye(3), torch.eye(3), torch.tensor(owner))


def test_nothing_to_retrieve_is_refused():
    with pytest.raises(ValueError, match="found 0 images and 0 texts"):
        retrieval_metrics(torch.empty(0, 4), torch.empty(0, 4), torch.empty(0, dtype=torch.int64))


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def test_the_whole_matrix_never_exists():
    generator = np.random.default_rng(0)
    features = [torch.from_numpy(unit(generator, rows, 4)) for rows in (200, 400)]
    with LargestTensor() as seen:
        retrieval_metrics(*features, torch.arange(400) % 200, chunk=32)
    assert seen.largest <= 400 * 4


@settings(deadline=None, max_examples=30)
@given(rights=st.lists(st.integers(1, 4), min_size=1, max_size=3), wrong=st.integers(0, 3), k=st.integers(1, 9))
@example(rights=[1, 1, 2], wrong=3, k=1)  # a half at the second place, but for rounding
def test_chance_is_the_mean_over_all_orders(rights, wrong, k):
    total = max(rights) + wrong
    hits, ranks = [], []
    for right in rights:
        first = [min(order[:right]) for order in itertools.permutations(range(total))]  # place of the best right item
        hits.append(np.mean([place < k for place in first]))
        ranks.append(np.array(first) + 1)
    rights = np.array(rights)
    assert chance(k, rights, total) == pytest.approx(np.mean(hits))
    below = [np.mean([np.mean(rank <= place) for rank in ranks]) for place in range(1, total + 1)]
    assert chance_median(rights, total) == 1 + next(i for i, share in enumerate(below) if share >= 0.5 - 1e-12)


def test_chance_in_the_metrics():
    generator = np.random.default_rng(1)
    metrics = measure(unit(generator, 305), unit(generator, 305), np.arange(305))
    assert metrics["t2i_chance_R@1"] == pytest.approx(100 / 305)
    assert metrics["i2t_chance_R@10"] == pytest.approx(1000 / 305)
    assert metrics["t2i_chance_median_rank"] == 153
    assert metrics["t2i_chance_mean_rank"] == 153


def _on_a_rank(seed: int) -> dict[str, float]:
    generator = np.random.default_rng(seed)
    return measure(unit(generator, 37), unit(generator, 90), owners(generator, 37, 53), chunk=10)


def test_every_world_gets_the_same_numbers():
    assert run_distributed(_on_a_rank, 3, 5) == [_on_a_rank(5)] * 3
