"""Data sets with classes: which images have one, what the classes are called, and how accurate scores are.

Shape suffixes: N images, C classes, D embedding.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipeline.storage.manifest import Manifest
from train.distributed import is_main
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


def labelled(features: Features, data: str) -> Labelled:
    """The images of `data` whose sample has a class. Raises ValueError where none has."""
    pairs = [(row, content) for row, content in enumerate(features.classes) if content is not None]
    if not pairs:
        raise ValueError(no_class(data, len(features.keys)))
    rows, classes = map(list, zip(*pairs, strict=True))
    chosen = torch.tensor(rows, device=features.image_ND.device)
    keys = [features.keys[row] for row in rows]
    counts = {"n_unlabelled": float(len(features.keys) - len(rows)), "n_bad": float(len(features.bad))}
    return Labelled(features.image_ND[chosen], keys, classes, counts)


def known_classes(manifest: Manifest) -> list[str] | None:
    """The classes of a data set as its manifest lists them; None where an older one does not, or they are too many.

    Raises:
        ValueError: by the manifest, no sample has a class.
    """
    statistics = manifest.statistics.get("classes", {})
    if statistics.get("samples") == 0:
        raise ValueError(no_class(manifest.path, manifest.nsamples))
    return statistics.get("names")


def no_class(data: str, samples: int) -> str:
    """What to say of data that have no classes."""
    return (
        f"{data}: none of the {samples} samples has a class: give each a `cls` member (a number or a name), such as by "
        "`python -m data_pipeline pack --class-column`"
    )


def check_fit(what: str, fitted: Collection[str], tested: Collection[str]) -> None:
    """Raises ValueError where data with the classes `fitted` cannot tell those that are `tested` apart."""
    if len(set(fitted)) < 2:
        raise ValueError(f"{what} needs at least two classes, the data that it learns from have {len(set(fitted))}")
    if unknown := sorted(set(tested) - set(fitted)):
        raise ValueError(
            f"{len(unknown)} classes are tested that are not in the data that {what} learns from, such as "
            f"{unknown[0]!r}: give `fit` data that hold them"
        )


def class_indices(classes: Sequence[str], names: Sequence[str], data: str) -> np.ndarray:
    """For each image the row of its class in `names`: its class is that row, counted from 0, or the name itself.

    Of two equal names the first is meant.

    Raises:
        ValueError: with the classes of `data` that are not in the list.
    """
    row_of = {name: row for row, name in reversed(list(enumerate(names)))}
    row_of = {str(row): row for row in range(len(names))} | row_of
    if unknown := sorted(set(classes) - set(row_of)):
        others = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ValueError(
            f"classnames: {data} has the class {unknown[0]!r}{others}, not among the {len(names)} names listed: give a "
            f"file that lists every class; numbers count its lines from 0, so here to {len(names) - 1}"
        )
    return np.array([row_of[content] for content in classes], dtype=np.int64)


def accuracy(scores_NC: Tensor, right_N: np.ndarray) -> dict[str, float]:
    """`top1`, `top5` and `mean_per_class` (top-1 averaged over the classes that occur) in percent; chance; counts.

    Ties count against the model.
    """
    n_images, n_classes = scores_NC.shape
    own_N1 = scores_NC.gather(1, torch.as_tensor(right_N, device=scores_NC.device)[:, None])
    positions_N = (scores_NC >= own_N1 - TIE).sum(-1).cpu().numpy()
    per_class = [float(np.mean(positions_N[right_N == row] == 1)) for row in np.unique(right_N)]
    return {
        "top1": 100.0 * float(np.mean(positions_N == 1)),
        "top5": 100.0 * float(np.mean(positions_N <= 5)),
        "mean_per_class": 100.0 * float(np.mean(per_class)),
        "chance_top1": 100.0 / n_classes,
        "chance_top5": 100.0 * min(5, n_classes) / n_classes,
        "n_images": float(n_images),
        "n_classes": float(n_classes),
    }


def read_names(path: str | Path) -> list[str]:
    """The class names of a file, by their numbers: see `read_entries`.

    Equal names (ImageNet has two pairs) are reported on the screen: no text tells such classes apart.

    Raises:
        ValueError: as `read_entries`, or for an empty name, which would change the numbers of those after it.
    """
    names = read_entries("classnames", path, "classes")
    if "" in names:
        raise ValueError(
            f"classnames: line {names.index('') + 1} of {path} is empty; class numbers are those of the lines"
        )
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated and is_main():
        rows = [row for row, name in enumerate(names) if name == repeated[0]]
        print(
            f"warning: {path} gives {len(repeated)} name(s) to more than one class, such as {repeated[0]!r} to classes "
            f"{', '.join(map(str, rows))}: no text tells them apart",
            file=sys.stderr,
        )
    return names


def read_templates(path: str | Path) -> list[str]:
    """The sentences of a file (see `read_entries`), each with {} where the class name goes; {c} is taken as well.

    Raises:
        ValueError: as `read_entries`, or for a sentence without exactly one place for the name.
    """
    sentences = [line.replace("{c}", "{}") for line in read_entries("templates", path, "templates") if line]
    for sentence in sentences:
        if sentence.count("{}") != 1:
            raise ValueError(
                f"templates: {sentence!r} must hold exactly one {{}} or {{c}}, the place of the class name"
            )
    return sentences


def read_entries(what: str, path: str | Path, variable: str) -> list[str]:
    """The entries of a file, without space around them, up to the last that is not empty.

    It is one entry per line; a JSON list; or a list of strings in Python called `variable`, the form of CLIP's own
    data/prompts.md.

    Raises:
        ValueError: saying `what` the file is for, where it is missing or empty.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{what}: cannot read {path}: {error}") from None
    listed = text.strip() if text.lstrip().startswith("[") else ""
    if found := re.search(rf"^\w*{variable}\s*=\s*(\[.*?^\])", text, re.MULTILINE | re.DOTALL):
        listed = found[1]
    if listed:
        try:
            entries = ast.literal_eval(listed)
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"{what}: the list in {path} cannot be read: {error}") from None
        if not all(isinstance(entry, str) for entry in entries):
            raise ValueError(f"{what}: the list in {path} holds other things than text")
    else:
        entries = text.splitlines()
    entries = [entry.strip() for entry in entries]
    while entries and not entries[-1]:
        entries.pop()
    if not entries:
        raise ValueError(f"{what}: {path} is empty; it needs one entry per line")
    return entries
