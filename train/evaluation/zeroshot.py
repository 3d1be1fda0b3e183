"""Zero-shot classification: an image belongs to the class whose name, put into sentences, lies nearest.

Source: CLIP, arXiv 2103.00020, section 3.1. Shape suffixes: N images, C classes, P templates, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.tokenizer import Tokenizer
from train.evaluation.encode import Autocast, Features, encode_texts, evaluating
from train.evaluation.retrieval import TIE, check_finite
from train.model.pair import PairModel

TEMPLATES = ("{}", "a picture of {}", "a photo of a {}", "a drawing of a {}")


def class_features(
    model: PairModel,
    tokenizer: Tokenizer,
    names: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
    *,
    size: int = 256,
    autocast: Autocast = nullcontext,
) -> Tensor:
    """[C, D] float32: for each class the direction of the mean feature of its name in all templates.

    Raises:
        ValueError: a template without exactly one {}.
    """
    check_templates(templates)
    device = next(model.parameters()).device
    ids_ML, mask_ML = tokenizer([template.replace("{}", name) for name in names for template in templates])
    with evaluating(model):
        text_MD = encode_texts(model, ids_ML.to(device), mask_ML.to(device), size, autocast)
    return F.normalize(text_MD.view(len(names), len(templates), -1).mean(1), dim=-1)


def check_templates(templates: Sequence[str]) -> None:
    """Raises ValueError for a template without exactly one {}."""
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"--templates: {template!r} must hold exactly one {{}}, the place of the class name")


class Labelled(NamedTuple):
    """The images that have a class, [N, D], with their keys and classes, and how many images have none."""

    image_ND: Tensor
    keys: list[str]
    classes: list[str]
    n_unlabelled: int


def labelled(features: Features) -> Labelled:
    """The images whose sample has a class. Raises ValueError where none has."""
    pairs = [(row, content) for row, content in enumerate(features.classes) if content is not None]
    if not pairs:
        raise ValueError(
            f"none of the {len(features.keys)} samples has a class: give them a `cls` member (a number or a name)"
        )
    rows, classes = map(list, zip(*pairs, strict=True))
    chosen = torch.tensor(rows, device=features.image_ND.device)
    keys = [features.keys[row] for row in rows]
    return Labelled(features.image_ND[chosen], keys, classes, len(features.keys) - len(rows))


def class_indices(keys: Sequence[str], classes: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """For each image the row of its class in `names`: its class is that row, counted from 0, or the name itself.

    Raises:
        ValueError: naming the key of a class that is not in the list.
    """
    row_of = {str(row): row for row in range(len(names))} | {name: row for row, name in enumerate(names)}
    for key, content in zip(keys, classes, strict=True):
        if content not in row_of:
            raise ValueError(f"--classnames: sample {key} has class {content!r}, not one of the {len(names)} listed")
    return np.array([row_of[content] for content in classes])


def zeroshot_metrics(image_ND: Tensor, class_CD: Tensor, right_N: np.ndarray) -> dict[str, float]:
    """`accuracy` of the nearest classes. Raises ValueError on features that are not finite."""
    check_finite("image", image_ND)
    check_finite("class", class_CD)
    return accuracy(image_ND.double() @ class_CD.double().T, right_N)


def accuracy(scores_NC: Tensor, right_N: np.ndarray) -> dict[str, float]:
    """`top1`, `top5` and `mean_per_class` (top-1 averaged over the classes that occur) in percent; chance; counts.

    Ties count against the model.
    """
    n_images, n_classes = scores_NC.shape
    own_N1 = scores_NC.gather(1, torch.as_tensor(right_N, device=scores_NC.device)[:, None])
    ranks_N = (scores_NC >= own_N1 - TIE).sum(-1).cpu().numpy()
    per_class = [float(np.mean(ranks_N[right_N == row] == 1)) for row in np.unique(right_N)]
    return {
        "top1": 100.0 * float(np.mean(ranks_N == 1)),
        "top5": 100.0 * float(np.mean(ranks_N <= 5)),
        "mean_per_class": 100.0 * float(np.mean(per_class)),
        "chance_top1": 100.0 / n_classes,
        "chance_top5": 100.0 * min(5, n_classes) / n_classes,
        "n_images": float(n_images),
        "n_classes": float(n_classes),
    }


def read_lines(flag: str, path: str | Path) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        ValueError: naming `flag`, where the file is missing or empty.
    """
    return [line for line in _lines(flag, path) if line]


def read_names(path: str | Path) -> list[str]:
    """The class names of a file, by their numbers.

    Raises:
        ValueError: as `read_lines`; an empty line among them, after which the numbers would be others; a name that
            stands twice, of which no text could tell the one class from the other.
    """
    names = _lines("--classnames", path)
    seen: dict[str, int] = {}
    for number, name in enumerate(names, start=1):
        if not name:
            raise ValueError(f"--classnames: line {number} of {path} is empty; class numbers are those of the lines")
        if name in seen:
            raise ValueError(
                f"--classnames: {name!r} stands in lines {seen[name]} and {number} of {path}; give each class a name "
                "of its own"
            )
        seen[name] = number
    return names


def _lines(flag: str, path: str | Path) -> list[str]:
    """The lines of a file, without space around them, up to the last that is not empty."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag}: cannot read {path}: {error}") from None
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise ValueError(f"{flag}: {path} is empty; it needs one entry per line")
    return lines
