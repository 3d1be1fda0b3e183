"""k-NN: the class that most of an image's nearest neighbours in another data set have.

Each neighbour votes with exp(similarity / temperature). Source: Wu et al., arXiv 1805.01978, section 3.4; k and
temperature as there. Shape suffixes: N images, F images of the other set, C classes, D embedding, K neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from data_pipeline.storage.manifest import named_manifest
from train.config import EvalTask
from train.evaluation.classes import SCORES, accuracy, check_fit, known_classes, labelled
from train.evaluation.encode import Encoder
from train.evaluation.retrieval import check_finite
from train.evaluation.task import Evaluation, Task

TEMPERATURE = 0.07


class Neighbours(Task):
    """`neighbour_metrics` of the images that have a class; those without one are counted."""

    options: ClassVar = {
        "fit": "manifest of the data that neighbours are from; default: the other images of --data",
        "neighbours": "how many neighbours vote (default 200, or all where there are fewer)",
    }
    scores: ClassVar = SCORES

    def __init__(self, given: EvalTask):
        super().__init__(given)
        if given.neighbours < 1:
            raise ValueError(f"neighbours {given.neighbours}: give at least 1")
        self.fit_manifest = named_manifest("fit", given.fit) if given.fit else None
        tested, fitted = known_classes(self.manifest), known_classes(self.fit_manifest or self.manifest)
        if fitted is not None:
            check_fit("k-NN", fitted, tested or ())

    def measure(self, encoder: Encoder) -> Evaluation:
        features = encoder.features(self.manifest)
        tested = fitting = labelled(features, self.manifest.path)
        if self.fit_manifest is not None:
            fitting = labelled(encoder.features(self.fit_manifest), self.fit_manifest.path)
        metrics = neighbour_metrics(
            fitting.image_ND,
            fitting.classes,
            tested.image_ND,
            tested.classes,
            k=self.given.neighbours,
            chunk=encoder.config.eval.chunk,
            leave_out_self=self.fit_manifest is None,
        )
        return Evaluation(metrics | tested.counts, features)


def neighbour_metrics(
    fit_FD: Tensor,
    fit_classes: Sequence[str],
    test_ND: Tensor,
    test_classes: Sequence[str],
    *,
    k: int,
    chunk: int = 1024,
    leave_out_self: bool = False,
) -> dict[str, float]:
    """`train.evaluation.classes.accuracy` of the votes of the `k` nearest neighbours; `n_fit`.

    Args:
        fit_FD, test_ND: unit vectors.
        chunk: rows of the similarities that exist at once.
        leave_out_self: both sets are the same, and an image is not its own neighbour.

    Raises:
        ValueError: features that are not finite, fewer than two classes or images, or a class to test that none of
            the neighbours can have.
    """
    check_finite("image", fit_FD)
    check_finite("image", test_ND)
    check_fit("k-NN", fit_classes, test_classes)
    names = sorted(set(fit_classes))
    row_of = {name: row for row, name in enumerate(names)}
    fit_F = torch.tensor([row_of[name] for name in fit_classes], device=fit_FD.device)
    test_N = np.array([row_of[name] for name in test_classes])
    k = min(k, len(fit_FD) - leave_out_self)
    votes_NC = torch.zeros(len(test_ND), len(names), dtype=torch.float64, device=fit_FD.device)
    for start in range(0, len(test_ND), chunk):
        rows = slice(start, min(start + chunk, len(test_ND)))
        # float64, as in retrieval: the tile's shape must not decide between two neighbours.
        scores_NF = test_ND[rows].double() @ fit_FD.double().T
        if leave_out_self:
            scores_NF[torch.arange(rows.stop - start), torch.arange(start, rows.stop)] = -torch.inf
        nearest_NK = scores_NF.topk(k, dim=-1)
        votes_NC[rows].scatter_add_(1, fit_F[nearest_NK.indices], (nearest_NK.values / TEMPERATURE).exp())
    # As shares: a tie is then one of relative size, however many vote.
    return {**accuracy(votes_NC / votes_NC.sum(-1, keepdim=True), test_N), "n_fit": float(len(fit_FD))}
