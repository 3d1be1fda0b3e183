"""The data of a run's page: what the model finds for each prepared query and for images, and a map of both.

All of it is JSON for page.js; no server is asked. An item is an image that the page can show; held-out ones that can be
searched come first, then those that the galleries alone show, then training images. Shape suffixes: N images, M texts,
I items, Q queries, D embedding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.config import DataConfig
from train.evaluation.encode import Features
from train.evaluation.retrieval import TIE
from train.report.exhibit import READ, Exhibit, Query, Shown, cut, even, first_texts
from train.report.pictures import Pictures, write_sheet

NEAREST = 24
"""Images that are kept for a query."""
NEAREST_TEXTS = 6
"""Texts that are kept for an image."""
GALLERY, GALLERY_IMAGES = 8, 7
"""Texts and images, at even distances in the data, that are shown with the nearest of all held-out data."""
CHUNK = 8192
"""Rows that are in float64 at once."""
SIDE, TRAINING_SIDE = 96, 64
"""Pixels of a held-out and of a training image on the page."""


def explore(exhibit: Exhibit, config: DataConfig, directory: Path) -> dict[str, Any]:
    """The data of the page; writes its images to `directory`.

    Raises:
        ValueError: a shard is gone or damaged.
    """
    held_out, training = exhibit.sets[0], exhibit.sets[1:]
    texts, images = text_gallery(held_out.features), image_gallery(held_out.features)
    extra = {row for one in texts for row in (one["right"], *one["near"])} | {one["image"] for one in images}
    rows = [*held_out.rows, *sorted(extra - set(held_out.rows))]
    item_of = {row: item for item, row in enumerate(rows)}
    parts = [(held_out, rows), *((shown, shown.rows) for shown in training)]
    items = [item for shown, chosen in parts for item in described(shown.features, chosen, exhibit.class_names)]
    sheets = [sheet(parts[:1], config, SIDE, directory / "held_out.webp")]
    if training:
        sheets.append(sheet(parts[1:], config, TRAINING_SIDE, directory / "training.webp"))
    searched = len(held_out.rows)
    places = [*range(searched), *range(len(rows), len(items))]
    image_ID = torch.cat([shown.features.image_ND[shown.rows] for shown in exhibit.sets])
    return {
        "sheets": sheets,
        "items": [{name: item[name] for name in ("t", "c") if item[name]} for item in items],
        "searched": searched,
        "shown": len(rows),
        "total": len(held_out.features.keys),
        "queries": answers(exhibit.queries, exhibit.query_QD, image_ID, places, searched, items),
        "texts": nearest_texts(exhibit, image_ID[:searched]),
        "text_gallery": [
            one | {"right": item_of[one["right"]], "near": [item_of[r] for r in one["near"]]} for one in texts
        ],
        "image_gallery": [one | {"image": item_of[one["image"]]} for one in images],
        "map": plane(held_out),
    }


def sheet(parts: Sequence[tuple[Shown, Sequence[int]]], config: DataConfig, side: int, path: Path) -> dict[str, Any]:
    """The images at these rows of these sets as one picture."""
    readers = [(Pictures(shown.features, shown.manifest, config), rows) for shown, rows in parts]
    squares = (pictures.square(row, side) for pictures, rows in readers for row in rows)
    return write_sheet(squares, sum(len(rows) for _, rows in parts), side, path)


def described(features: Features, rows: Sequence[int], names: Sequence[str]) -> list[dict[str, Any]]:
    """Of each image: its first caption `t`, its class `c` by name, and all its `captions`, for comparison.

    names: of the classes, by their numbers.
    """
    captions: dict[int, list[str]] = {row: [] for row in rows}
    for caption, image in zip(features.captions, features.image_of_text_M.tolist(), strict=True):
        if image in captions:
            captions[image].append(caption[:READ])
    known = [
        names[int(label)] if label and label.isdecimal() and int(label) < len(names) else label or ""
        for label in (features.classes[row] for row in rows)
    ]
    return [
        {"t": cut(captions[row][0]) if captions[row] else "", "c": cut(label), "captions": captions[row]}
        for row, label in zip(rows, known, strict=True)
    ]


def answers(
    queries: Sequence[Query],
    query_QD: Tensor,
    image_ID: Tensor,
    places: Sequence[int],
    searched: int,
    items: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Of each query: its text `t` and kind `k`, the items nearest to it, best first, and which of these are right.

    Args:
        image_ID: of the images that are searched; places: which items they are; the first `searched` are held-out.

    Returns:
        `n` of the held-out images, `a` of all of them where there are training images, `r` the right ones among both.
    """
    found = []
    scores_QI = query_QD.double() @ image_ID.double().T
    for query, scores_I in zip(queries, scores_QI, strict=True):
        near = best(scores_I[:searched], NEAREST)
        both = [places[row] for row in best(scores_I, NEAREST)] if len(places) > searched else []
        right = [item for item in dict.fromkeys([*near, *both]) if is_right(query, items[item])]
        found.append({"t": query.text, "k": query.kind, "n": near, "r": right, **({"a": both} if both else {})})
    return found


def best(scores_I: Tensor, most: int) -> list[int]:
    """Rows of the highest scores, best first; of equal ones the first."""
    return torch.argsort(scores_I, descending=True, stable=True)[:most].tolist()


def is_right(query: Query, item: Mapping[str, Any]) -> bool:
    """Whether the image is of the class, has the caption, or has a caption with the keyword."""
    if query.kind == "class":
        return item["c"] == query.text
    if query.kind == "caption":
        return any(cut(caption) == query.text for caption in item["captions"])
    word = re.compile(rf"(?<!\w){re.escape(query.text)}(?!\w)")
    return any(word.search(caption.casefold()) for caption in item["captions"])


def nearest_texts(exhibit: Exhibit, image_ID: Tensor) -> list[list[int]]:
    """For each held-out image that is searched the nearest prepared captions, as numbers of queries."""
    chosen = [number for number, query in enumerate(exhibit.queries) if query.kind == "caption"]
    scores_IQ = image_ID.double() @ exhibit.query_QD[chosen].double().T
    return [[chosen[row] for row in best(scores_Q, NEAREST_TEXTS)] for scores_Q in scores_IQ]


def nearest(query_D: Tensor, items_ID: Tensor, right_I: Tensor) -> tuple[Tensor, int]:
    """All items from the best on, and the position of the best right one among the wrong ones; ties go to the wrong."""
    # In parts: in float64 a large set would take as much memory again as twice its features.
    scores_I = torch.cat([part.double() @ query_D.double() for part in items_ID.split(CHUNK)])
    order_I = torch.argsort(scores_I - TIE * right_I, descending=True, stable=True)
    hits_I = right_I[order_I]
    return order_I, 1 + int((~hits_I[: int(hits_I.int().argmax())]).sum())


def text_gallery(features: Features) -> list[dict[str, Any]]:
    """For a few texts, good and bad alike, the nearest of all held-out images, as rows."""
    first, found = first_texts(features), []
    for image in even(len(features.keys), GALLERY):
        if image in first:
            right_N = torch.arange(len(features.keys), device=features.image_ND.device) == image
            order_N, position = nearest(features.text_MD[first[image]], features.image_ND, right_N)
            text = cut(features.captions[first[image]])
            found.append({"t": text, "position": position, "right": image, "near": order_N[:GALLERY_IMAGES].tolist()})
    return found


def image_gallery(features: Features) -> list[dict[str, Any]]:
    """For a few images the nearest of all held-out texts, with whether each is right."""
    found = []
    for image in even(len(features.keys), GALLERY):
        right_M = features.image_of_text_M == image
        if bool(right_M.any()):
            order_M, position = nearest(features.image_ND[image], features.text_MD, right_M)
            near = [[cut(features.captions[text]), bool(right_M[text])] for text in order_M[:NEAREST_TEXTS].tolist()]
            found.append({"image": image, "position": position, "near": near})
    return found


def plane(held_out: Shown) -> dict[str, Any]:
    """The held-out images that are searched, and the first text of each, in two dimensions.

    The two principal components of both together, after the mean of each modality is taken from it: images and texts
    are apart in the space of most models, and that gap would be all that is seen.

    Returns:
        `images` and `texts`, [x, y], both from -1 to 1 (of a text that there is not: null); `share` of the variance.
    """
    first = first_texts(held_out.features)
    with_text = [row for row in held_out.rows if row in first]
    image_ND = held_out.features.image_ND[held_out.rows].double().cpu()
    text_MD = held_out.features.text_MD[[first[row] for row in with_text]].double().cpu()
    parts = [part - part.mean(0) for part in (image_ND, text_MD) if len(part)]
    both_ID = torch.cat(parts)
    if len(both_ID) < 3 or both_ID.shape[1] < 2:
        return {}
    _, values, vectors = torch.linalg.svd(both_ID, full_matrices=False)
    axes_2D = vectors[:2]
    largest = axes_2D.abs().argmax(-1, keepdim=True)
    axes_2D = axes_2D * axes_2D.gather(1, largest).sign()  # the sign of a component means nothing; one is chosen
    points_I2 = both_ID @ axes_2D.T
    low_2, high_2 = points_I2.amin(0), points_I2.amax(0)
    points_I2 = (2 * points_I2 - low_2 - high_2) / (high_2 - low_2).clamp_min(1e-12)
    points = points_I2.round(decimals=3).tolist()
    text_point = dict(zip(with_text, points[len(image_ND) :], strict=True))
    return {
        "images": points[: len(image_ND)],
        "texts": [text_point.get(row) for row in held_out.rows],
        "share": float(values[:2].square().sum() / values.square().sum().clamp_min(1e-12)),
    }
