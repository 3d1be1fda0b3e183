"""Images that are the same picture: within a data set, or in a training set and a held-out one.

Shape suffixes: N and M images, P pairs, D embedding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_pipeline.embeddings.index import IMAGES, Index
from data_pipeline.embeddings.inputs import open_input
from data_pipeline.embeddings.nearest import chunks
from data_pipeline.embeddings.pixels import signatures

COSINE = 0.8
"""Least cosine of two embeddings whose pixels are compared."""
CANDIDATES = 20
"""Nearest images of each one whose pixels are compared."""
ROWS = 1024


@dataclass(frozen=True)
class Duplicate:
    """A sample, by number and key, and the key of another one with the same picture."""

    sample: int
    key: str
    of_key: str
    cosine: float


def copies(queries: Index, among: Index, cosine: float = COSINE) -> list[Duplicate]:
    """Each image of `queries` with the nearest image of `among` that is the same picture, where there is one.

    Raises:
        ValueError: the two indexes are of different models, or an input is gone or has changed.
    """
    check_same_model(queries, among)
    return _verified(queries, among, candidates(queries.image_ND, among.image_ND, cosine))


def duplicates(index: Index, cosine: float = COSINE) -> list[Duplicate]:
    """Each image with the nearest earlier image that is the same picture, where there is one.

    Raises:
        ValueError: the index has no images, or its input is gone or has changed.
    """
    check_images(index)
    return _verified(index, index, candidates(index.image_ND, None, cosine))


def check_images(*indexes: Index) -> None:
    """Raises ValueError for an index of texts alone."""
    for index in indexes:
        if IMAGES not in index.kinds:
            raise ValueError(f"index {index.directory} has no images: embed shards or a folder of images")


def check_same_model(one: Index, other: Index) -> None:
    """Raises ValueError where two indexes are of different models, whose vectors have nothing to do with each other."""
    check_images(one, other)
    a, b = (index.about["model"] for index in (one, other))
    if a["identity"] != b["identity"]:
        raise ValueError(
            f"index {one.directory} is of the model {a['path']} ({a['identity'][:12]}), {other.directory} of "
            f"{b['path']} ({b['identity'][:12]}): embed both with the same one"
        )


def candidates(
    query_ND: np.ndarray, among_MD: np.ndarray | None, cosine: float
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For each query the row, and the rows and cosines of its CANDIDATES nearest ones of at least `cosine`, best first.

    among_MD: None compares each query with the queries before it.
    """
    earlier = among_MD is None
    others = query_ND if among_MD is None else among_MD
    for start, rows_QD in chunks(query_ND, ROWS):
        stop = start + len(rows_QD)
        found: list[list[tuple[float, int]]] = [[] for _ in rows_QD]
        for left, chunk_CD in chunks(others[:stop] if earlier else others):
            scores_QC = rows_QD @ chunk_CD.T
            if earlier:
                scores_QC[np.arange(start, stop)[:, None] <= np.arange(left, left + len(chunk_CD))[None]] = -1
            for query, column in zip(*(each.tolist() for each in np.nonzero(scores_QC >= cosine)), strict=True):
                found[query].append((-float(scores_QC[query, column]), left + column))
            found = [sorted(one)[:CANDIDATES] for one in found]
        for number, one in enumerate(found, start):
            if one:
                yield number, np.array([row for _, row in one]), -np.array([score for score, _ in one])


def _verified(queries: Index, among: Index, proposed: Iterator[tuple[int, np.ndarray, np.ndarray]]) -> list[Duplicate]:
    """For each query the one of those proposed whose pixels are nearest, where it is the same picture."""
    pairs = [(queries.sample_N[row], among.sample_N[rows], scores) for row, rows, scores in proposed]
    if not pairs:
        return []
    left = signatures(open_input(queries.about["input"]), sorted({int(sample) for sample, _, _ in pairs}))
    wanted = sorted({int(sample) for _, samples, _ in pairs for sample in samples})
    right = signatures(open_input(among.about["input"]), wanted)
    query_keys, among_keys = (dict(zip(*_keys(index), strict=True)) for index in (queries, among))
    found = []
    for sample, samples, scores in pairs:
        there = [pair for pair in zip(samples.tolist(), scores.tolist(), strict=True) if pair[0] in right]
        if sample not in left or not there:
            continue
        distances = [left[sample].distance(right[other]) for other, _ in there]
        if (least := min(distances)) < math.inf:
            other, score = there[distances.index(least)]
            found.append(Duplicate(int(sample), query_keys[sample], among_keys[other], round(score, 4)))
    return found


def _keys(index: Index) -> tuple[list[int], list[str]]:
    rows = index.rows(IMAGES)
    return rows["sample"].to_pylist(), rows["key"].to_pylist()
