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
from train.evaluation.classes import (
    SCORES,
    accuracy,
    class_indices,
    known_classes,
    labelled,
    read_names,
    read_templates,
)
from train.evaluation.encode import Encoder
from train.evaluation.retrieval import check_finite
from train.evaluation.task import Evaluation, Predictions, Task
from train.evaluation.templates import TEMPLATES


class Zeroshot(Task):
    """`accuracy` of the nearest classes, over the images that have a class; those without one are counted."""

    options: ClassVar = {
        "classnames": "a file with one class name per line (or a list), in the order of their numbers; default: "
        "classnames.txt beside the data",
        "templates": "imagenet, for CLIP's 80 sentences, or a file with one per line, {} or {c} is the class name; "
        "default: zeroshot_classification_templates.txt beside the data, or four sentences",
    }
    scores = SCORES

    def __init__(self, given: EvalTask):
        super().__init__(given)
        known = known_classes(self.manifest)
        if not given.classnames:
            raise ValueError(
                "zeroshot needs `classnames`: a file with one class name per line, in the order of their numbers "
                "(classnames.txt beside the data is found)"
            )
        self.names = read_names(given.classnames)
        class_indices(known or (), self.names, self.manifest.path)
        self.templates = TEMPLATES.get(given.templates) or read_templates(given.templates)

    def measure(self, encoder: Encoder) -> Evaluation:
        features = encoder.features(self.manifest)
        tested = labelled(features, self.manifest.path)
        rows_N = class_indices(tested.classes, self.names, self.manifest.path)
        class_CD = class_features(encoder, self.names, self.templates)
        scores_NC = class_scores(tested.image_ND, class_CD)
        predictions = Predictions(self.names, tested.keys, rows_N.tolist(), scores_NC.argmax(-1).tolist())
        return Evaluation(accuracy(scores_NC, rows_N) | tested.counts, features, predictions)


def class_features(encoder: Encoder, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """[C, D] float32: for each class the direction of the mean feature of its name in all templates."""
    text_MD = encoder.texts([template.replace("{}", name) for name in names for template in templates])
    return F.normalize(text_MD.view(len(names), len(templates), -1).mean(1), dim=-1)


def zeroshot_metrics(image_ND: Tensor, class_CD: Tensor, right_N: np.ndarray) -> dict[str, float]:
    """`accuracy` of the nearest classes. Raises ValueError on features that are not finite."""
    return accuracy(class_scores(image_ND, class_CD), right_N)


def class_scores(image_ND: Tensor, class_CD: Tensor) -> Tensor:
    """Cosines float64 [N, C] of images and classes. Raises ValueError on features that are not finite."""
    check_finite("image", image_ND)
    check_finite("class", class_CD)
    return image_ND.double() @ class_CD.double().T
