"""What an index holds that is nearest to texts or images, with keys and captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from data_pipeline.embeddings.index import IMAGES, KINDS, TEXTS, Index
from data_pipeline.embeddings.nearest import Searcher
from data_pipeline.samples.image import BadSample
from data_pipeline.samples.limits import IMAGE_EXTENSIONS
from data_pipeline.storage.files import read_file
from train.use.towers import Towers


@dataclass(frozen=True)
class Hit:
    """One thing that was found."""

    rank: int
    """From 1."""
    score: float
    """Cosine."""
    sample: int
    """Number of the sample in the input of the index."""
    key: str
    text: str
    """The caption that was found; of an image all its captions, where the index has them."""


@dataclass(frozen=True)
class Answer:
    """What was found for one query."""

    query: str
    hits: list[Hit]

    def as_json(self) -> dict:
        return asdict(self)


def check_model(index: Index, towers: Towers) -> None:
    """Raises ValueError where the index is of another model."""
    of = index.about["model"]
    if of["identity"] != towers.identity:
        raise ValueError(
            f"index {index.directory} is of another model, {of['path']} (identity {of['identity'][:12]}), not of "
            f"{towers.path} ({towers.identity[:12]}): leave out --model, give that one, or embed again with this one"
        )


def queries(towers: Towers, given: Sequence[str]) -> np.ndarray:
    """Unit vectors float32 [Q, D]: of the image file where there is one of that name, else of the text.

    Raises:
        ValueError: an image cannot be read or is not there, or a text is empty.
    """
    vectors = []
    for query in given:
        if not query.strip():
            raise ValueError("QUERY is empty: give a text, or the path of an image")
        if query.lower().endswith(tuple(f".{suffix}" for suffix in IMAGE_EXTENSIONS)) and not is_image(query):
            raise ValueError(f"QUERY {query}: there is no such file; a text does not end like the name of an image")
        try:
            found = towers.image(read_file(Path(query))) if is_image(query) else towers.texts([query])
        except (BadSample, OSError) as error:
            raise ValueError(f"QUERY {query}: {error}") from error
        vectors.append(found)
    return torch.cat(vectors).cpu().numpy()


def is_image(query: str) -> bool:
    """Whether a query is the path of a file."""
    return len(query) < 1000 and Path(query).is_file()


def search(
    index: Index, given: Sequence[str], query_QD: np.ndarray, top: int, kind: str = ""
) -> tuple[list[Answer], str]:
    """The nearest `top` of a kind for each query, and how they were looked for.

    kind: images or texts; images where the index has any, if it is empty.

    Raises:
        ValueError: the index has none of that kind.
    """
    kind = kind or index.kinds[0]
    if kind not in index.kinds:
        raise ValueError(f"among {kind}: index {index.directory} has none, only {' and '.join(index.kinds)}")
    assert kind in KINDS
    searcher = Searcher(index, kind)
    scores_QT, rows_QT = searcher(query_QD, top)
    known = index.rows(kind)
    answers = []
    for query, scores_T, rows_T in zip(given, scores_QT, rows_QT, strict=True):
        rows = [row for row in rows_T.tolist() if row >= 0]
        found = known.take(rows).to_pylist()
        texts = _captions(index, [one["sample"] for one in found]) if kind == IMAGES else {}
        hits = []
        for rank, (score, one) in enumerate(zip(scores_T.tolist(), found, strict=False), 1):
            text = one.get("text") or texts.get(one["sample"], "")
            hits.append(Hit(rank, round(score, 4), one["sample"], one["key"], text))
        answers.append(Answer(query, hits))
    return answers, searcher.how


def _captions(index: Index, samples: list[int]) -> dict[int, str]:
    """All captions of these samples."""
    if TEXTS not in index.kinds or not samples:
        return {}
    texts: dict[int, list[str]] = {}
    for one in index.rows(TEXTS, samples).to_pylist():
        texts.setdefault(one["sample"], []).append(one["text"])
    return {sample: "; ".join(found) for sample, found in texts.items()}


def table(answer: Answer) -> str:
    """The answer for the terminal."""
    width = max((len(hit.key) for hit in answer.hits), default=0)
    lines = [answer.query]
    lines += [f"{hit.rank:>4}  {hit.score:6.3f}  {hit.key:<{width}}  {hit.text}".rstrip() for hit in answer.hits]
    return "\n".join(lines)
