"""The vectors nearest to a query: exactly, by numpy, or among more than a million by faiss where it is installed.

Shape suffixes: N vectors, Q queries, T results, D embedding.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_pipeline.embeddings.index import Index
from data_pipeline.storage.files import put_in_place

EXACT_UP_TO = 1_000_000
CHUNK = 1 << 16
"""Vectors that are compared at a time: what exists of the similarities at once."""
PROBES = 32
"""Cells of faiss' index that are looked into."""


def nearest(vectors_ND: np.ndarray, query_QD: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines float32 [Q, T] and rows int64 [Q, T] of the `top` nearest vectors, best first; T = min(top, N)."""
    scores_QT = np.empty((len(query_QD), 0), np.float32)
    rows_QT = np.empty((len(query_QD), 0), np.int64)
    for start, chunk_CD in chunks(vectors_ND):
        found_QC = query_QD @ chunk_CD.T
        rows_QC = np.broadcast_to(np.arange(start, start + len(chunk_CD)), found_QC.shape)
        scores_QA, rows_QA = np.hstack([scores_QT, found_QC]), np.hstack([rows_QT, rows_QC])
        if scores_QA.shape[1] > top:
            best_QT = np.argpartition(-scores_QA, top - 1, axis=1)[:, :top]
            scores_QA, rows_QA = (np.take_along_axis(each, best_QT, 1) for each in (scores_QA, rows_QA))
        order_QT = np.lexsort((rows_QA, -scores_QA))
        scores_QT, rows_QT = (np.take_along_axis(each, order_QT, 1) for each in (scores_QA, rows_QA))
    return scores_QT, rows_QT


def chunks(vectors_ND: np.ndarray, size: int = CHUNK) -> Iterator[tuple[int, np.ndarray]]:
    """Number of the first row, and rows, until there are no more."""
    for start in range(0, len(vectors_ND), size):
        yield start, np.asarray(vectors_ND[start : start + size])


class Searcher:
    """Finds the nearest vectors of one kind in an index.

    how: in words, for who reads the result.
    """

    def __init__(self, index: Index, kind: str, exact_up_to: int = EXACT_UP_TO):
        self.vectors_ND, self.how, self._faiss = index.vectors(kind), "exact", None
        if len(self.vectors_ND) > exact_up_to:
            if importlib.util.find_spec("faiss"):
                self._faiss = _faiss_index(self.vectors_ND, index.directory / f"{kind}.faiss")
                self.how = f"by faiss, which looks into {self._faiss.nprobe} of {self._faiss.nlist} cells"
            else:
                self.how = f"exact; above {exact_up_to:,} vectors faster with: pip install faiss-cpu"

    def __call__(self, query_QD: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
        """As `nearest`; faiss may leave out some of the nearest, and gives fewer where its cells have no more."""
        if self._faiss is None:
            return nearest(self.vectors_ND, query_QD, top)
        return self._faiss.search(np.ascontiguousarray(query_QD, np.float32), min(top, len(self.vectors_ND)))


def _faiss_index(vectors_ND: np.ndarray, path: Path):
    """faiss' index of these vectors: the one kept in the file `path`, or a new one, which is kept there."""
    import faiss

    count, dims = vectors_ND.shape
    if path.is_file() and (kept := faiss.read_index(str(path))).ntotal == count:
        kept.nprobe = min(PROBES, kept.nlist)
        return kept
    cells = max(1, min(65536, round(4 * math.sqrt(count)), count // 39))  # faiss wants 39 vectors a cell to learn from
    made = faiss.index_factory(dims, f"IVF{cells},Flat", faiss.METRIC_INNER_PRODUCT)
    made.train(np.ascontiguousarray(vectors_ND[:: max(1, count // (cells * 64))]))
    for _, chunk_CD in chunks(vectors_ND):
        made.add(np.ascontiguousarray(chunk_CD))
    part = path.with_name(f"{path.name}.part")
    faiss.write_index(made, str(part))
    put_in_place(part, path)
    made.nprobe = min(PROBES, cells)
    return made
