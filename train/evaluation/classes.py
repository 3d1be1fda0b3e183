"""Data sets with classes: which images have one, what the classes are called, and how accurate scores are.

Shape suffixes: N images, C classes, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from train.evaluation.encode import Features
from train.evaluation.retrieval import TIE

SCORES = {"top1": max, "top5": max, "mean_per_class": max}
"""Metrics of `accuracy` by which the best model can be chosen."""


class Labelled(NamedTuple):
    """The images that have a class, [N, D], with their keys and classes."""

    image_ND: Tensor
    keys: list[str]
    classes: list[str]
    counts: dict[str, float]
    """`n_unlabelled`, images that have no class, and `n_bad`, samples that could not be read."""


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
    counts = {"n_unlabelled": float(len(features.keys) - len(rows)), "n_bad": float(len(features.bad))}
    return Labelled(features.image_ND[chosen], keys, classes, counts)


def class_indices(keys: Sequence[str], classes: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """For each image the row of its class in `names`: its class is that row, counted from 0, or the name itself.

    Raises:
        ValueError: naming the key of a class that is not in the list.
    """
    row_of = {str(row): row for row in range(len(names))} | {name: row for row, name in enumerate(names)}
    for key, content in zip(keys, classes, strict=True):
        if content not in row_of:
            raise ValueError(f"classnames: sample {key} has class {content!r}, not one of the {len(names)} listed")
    return np.array([row_of[content] for content in classes])


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


def read_lines(what: str, path: str | Path) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        ValueError: saying `what` the file is for, where it is missing or empty.
    """
    return [line for line in _lines(what, path) if line]


def read_names(path: str | Path) -> list[str]:
    """The class names of a file, by their numbers.

    Raises:
        ValueError: as `read_lines`; an empty line among them, after which the numbers would be others; a name that
            is there twice, so that no text could tell the one class from the other.
    """
    names = _lines("classnames", path)
    seen: dict[str, int] = {}
    for number, name in enumerate(names, start=1):
        if not name:
            raise ValueError(f"classnames: line {number} of {path} is empty; class numbers are those of the lines")
        if name in seen:
            raise ValueError(
                f"classnames: {name!r} is in lines {seen[name]} and {number} of {path}; give each class a name "
                "of its own"
            )
        seen[name] = number
    return names


def _lines(what: str, path: str | Path) -> list[str]:
    """The lines of a file, without space around them, up to the last that is not empty."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{what}: cannot read {path}: {error}") from None
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise ValueError(f"{what}: {path} is empty; it needs one entry per line")
    return lines
