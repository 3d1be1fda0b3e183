"""Linear probe: how well classes can be read off frozen image features by one linear layer.

Multinomial logistic regression, full batch, L-BFGS in float64; the L2 weight is chosen on a part of the data it is
fitted to. Source: CLIP, arXiv 2103.00020, appendix A.3. Shape suffixes: N images, C classes, D embedding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import compress
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.samples.text import name_bytes
from data_pipeline.storage.manifest import named_manifest
from train.config import EvalTask
from train.evaluation.classes import SCORES, accuracy, check_fit, known_classes, labelled
from train.evaluation.encode import Encoder
from train.evaluation.retrieval import check_finite
from train.evaluation.task import Evaluation, Task

L2_WEIGHTS = tuple(10.0**power for power in range(-7, 0))


class Probe(Task):
    """`probe_metrics` of the images that have a class; those without one are counted."""

    options: ClassVar = {"fit": "manifest of the data to fit to; default: four fifths of --data"}
    scores = SCORES

    def __init__(self, given: EvalTask):
        super().__init__(given)
        self.fit_manifest = named_manifest("fit", given.fit) if given.fit else None
        tested, fitted = known_classes(self.manifest), known_classes(self.fit_manifest or self.manifest)
        if fitted is not None:
            check_fit("a linear probe", fitted, tested or ())

    def measure(self, encoder: Encoder) -> Evaluation:
        features = encoder.features(self.manifest)
        tested = labelled(features, self.manifest.path)
        if self.fit_manifest is not None:
            fitting = labelled(encoder.features(self.fit_manifest), self.fit_manifest.path)
            metrics = probe_metrics(fitting.image_ND, fitting.classes, tested.image_ND, tested.classes)
        else:
            tested_N = split_by_key(tested.keys)
            rows = torch.as_tensor(tested_N, device=tested.image_ND.device)
            fit_classes, test_classes = (list(compress(tested.classes, chosen)) for chosen in (~tested_N, tested_N))
            metrics = probe_metrics(tested.image_ND[~rows], fit_classes, tested.image_ND[rows], test_classes)
        return Evaluation(metrics | tested.counts, features)


def probe_metrics(
    fit_ND: Tensor, fit_classes: Sequence[str], test_ND: Tensor, test_classes: Sequence[str]
) -> dict[str, float]:
    """`train.evaluation.classes.accuracy` of a linear classifier fitted to one set of features and tested on another.

    Also `l2`, the weight that was chosen, and `n_fit`.

    Raises:
        ValueError: features that are not finite, fewer than two classes to fit, nothing to test, or a class to test
            that is not among them.
    """
    check_finite("image", fit_ND)
    check_finite("image", test_ND)
    check_fit("a linear probe", fit_classes, test_classes)
    names = sorted(set(fit_classes))
    if not test_classes:
        raise ValueError(f"none of the {len(fit_classes)} samples fell into the tested fifth: give more data, or `fit`")
    row_of = {name: row for row, name in enumerate(names)}
    fit_N = torch.tensor([row_of[name] for name in fit_classes], device=fit_ND.device)
    test_N = np.array([row_of[name] for name in test_classes])

    # Centred and scaled as a whole: the L2 weights then mean the same for every model.
    mean_D, scale = fit_ND.double().mean(0), fit_ND.double().std(0).square().mean().sqrt().clamp_min(1e-12)
    fit_ND, test_ND = ((part.double() - mean_D) / scale for part in (fit_ND, test_ND))
    chosen_N = torch.arange(len(fit_ND), device=fit_ND.device) % 5 == 0
    held_out = [
        accuracy(
            linear(fit_ND[chosen_N], *fit(fit_ND[~chosen_N], fit_N[~chosen_N], len(names), l2)),
            fit_N[chosen_N].cpu().numpy(),
        )["top1"]
        for l2 in L2_WEIGHTS
    ]
    l2 = L2_WEIGHTS[int(np.argmax(held_out))]
    scores_NC = linear(test_ND, *fit(fit_ND, fit_N, len(names), l2))
    return {**accuracy(scores_NC, test_N), "l2": l2, "n_fit": float(len(fit_ND))}


def fit(x_ND: Tensor, classes_N: Tensor, n_classes: int, l2: float) -> tuple[Tensor, Tensor]:
    """Weight [C, D] and bias [C] that minimize mean cross-entropy + l2 / 2 * |weight|^2, a convex problem."""
    weight_CD = x_ND.new_zeros(n_classes, x_ND.shape[1], requires_grad=True)
    bias_C = x_ND.new_zeros(n_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight_CD, bias_C], max_iter=1000, tolerance_grad=1e-6, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(linear(x_ND, weight_CD, bias_C), classes_N) + l2 / 2 * weight_CD.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight_CD.detach(), bias_C.detach()


def linear(x_ND: Tensor, weight_CD: Tensor, bias_C: Tensor) -> Tensor:
    """Logits [N, C]."""
    return x_ND @ weight_CD.T + bias_C


def split_by_key(keys: Sequence[str]) -> np.ndarray:
    """Boolean [N]: which samples are tested where only one data set is given, a fifth, by a hash of their key."""
    return np.array([hashlib.sha256(name_bytes(key)).digest()[0] % 5 == 0 for key in keys], dtype=bool)
