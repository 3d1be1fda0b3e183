"""Zero-shot classification: an image belongs to the class whose name, put into sentences, lies nearest.

Source: CLIP, arXiv 2103.00020, section 3.1. Shape suffixes: N images, C classes, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from train.config import EvalTask
from train.evaluation.classes import SCORES, accuracy, class_indices, labelled, read_lines, read_names
from train.evaluation.encode import Encoder
from train.evaluation.retrieval import check_finite
from train.evaluation.task import Evaluation, Task

TEMPLATES = ("{}", "a picture of {}", "a photo of a {}", "a drawing of a {}")


class Zeroshot(Task):
    """`zeroshot_metrics` of the images that have a class; and those without one counted."""

    options: ClassVar = {
        "classnames": "a file with one class name per line, in the order of their numbers",
        "templates": "a file with one sentence per line, {} is the class name",
    }
    scores = SCORES

    def __init__(self, given: EvalTask):
        super().__init__(given)
        if not given.classnames:
            raise ValueError(
                "zeroshot needs `classnames`: a file with one class name per line, in the order of their numbers"
            )
        self.names = read_names(given.classnames)
        self.templates = read_lines("templates", given.templates) if given.templates else TEMPLATES
        check_templates(self.templates)

    def measure(self, encoder: Encoder) -> Evaluation:
        features = encoder.features(self.manifest)
        tested = labelled(features)
        rows_N = class_indices(tested.keys, tested.classes, self.names)
        metrics = zeroshot_metrics(tested.image_ND, class_features(encoder, self.names, self.templates), rows_N)
        return Evaluation(metrics | tested.counts, features)


def class_features(encoder: Encoder, names: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Tensor:
    """[C, D] float32: for each class the direction of the mean feature of its name in all templates.

    Raises:
        ValueError: a template without exactly one {}.
    """
    check_templates(templates)
    text_MD = encoder.texts([template.replace("{}", name) for name in names for template in templates])
    return F.normalize(text_MD.view(len(names), len(templates), -1).mean(1), dim=-1)


def check_templates(templates: Sequence[str]) -> None:
    """Raises ValueError for a template without exactly one {}."""
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"templates: {template!r} must hold exactly one {{}}, the place of the class name")


def zeroshot_metrics(image_ND: Tensor, class_CD: Tensor, right_N: np.ndarray) -> dict[str, float]:
    """`accuracy` of the nearest classes. Raises ValueError on features that are not finite."""
    check_finite("image", image_ND)
    check_finite("class", class_CD)
    return accuracy(image_ND.double() @ class_CD.double().T, right_N)
