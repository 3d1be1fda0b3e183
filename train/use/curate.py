"""Choosing samples of a data set by what its index says: their CLIP scores, and which are copies of others.

Shape suffixes: N images, M texts, S samples, D embedding.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.commands.parallel import run_parallel
from data_pipeline.embeddings.duplicates import Duplicate
from data_pipeline.embeddings.index import IMAGES, TEXTS, Index
from data_pipeline.embeddings.inputs import ShardInput, open_input
from data_pipeline.embeddings.nearest import CHUNK
from data_pipeline.statistics import merge_statistics, shard_statistics
from data_pipeline.storage.manifest import Manifest, Shard, write_manifest
from data_pipeline.storage.remote import is_remote


def clip_scores(index: Index) -> np.ndarray:
    """Of each sample the cosine of its image and its best caption, float32 [S]; NaN where either is missing.

    Raises:
        ValueError: the index has no images, or no texts.
    """
    for kind in (IMAGES, TEXTS):
        if kind not in index.kinds:
            raise ValueError(f"index {index.directory} has no {kind}: scores need images and captions, so embed shards")
    scores_S = np.full(index.about["input"]["samples"], np.nan, np.float32)
    row_S = np.zeros(len(scores_S), np.int64)
    row_S[index.sample_N] = np.arange(len(index.sample_N))
    image_ND, text_MD = index.image_ND, index.vectors(TEXTS)
    sample_M = index.rows(TEXTS)["sample"].to_numpy()
    for start in range(0, len(text_MD), CHUNK):
        rows = slice(start, start + CHUNK)
        found = (text_MD[rows] * image_ND[row_S[sample_M[rows]]]).sum(-1)
        np.fmax.at(scores_S, sample_M[rows], found)
    return scores_S


def distribution(score_S: np.ndarray) -> str:
    """The scores in a line."""
    known = score_S[~np.isnan(score_S)]
    if not len(known):
        return "CLIP scores: not one sample has an image and a caption"
    quantiles = np.quantile(known, (0, 0.05, 0.5, 0.95, 1))
    named = zip(("least", "5 %", "median", "95 %", "most"), quantiles, strict=True)
    lacking = f"; {len(score_S) - len(known):,} samples have none" if len(known) < len(score_S) else ""
    return "CLIP scores: " + ", ".join(f"{name} {value:.3f}" for name, value in named) + lacking


@dataclass
class Choice:
    """Which samples are kept, and what was dropped by which rule.

    kept: bool [S].
    """

    kept: np.ndarray
    rules: list[str] = field(default_factory=list)
    """One for each rule, in words."""
    dropped: list[dict[str, Any]] = field(default_factory=list)
    """A record for each sample that was dropped: sample, rule, and what it is a copy of or its score."""

    def drop(self, samples: np.ndarray, rule: str, records: list[dict[str, Any]]) -> int:
        """Drop these samples, int64; returns how many of them were still there."""
        there = self.kept[samples]
        self.kept[samples] = False
        kept_records = [record for record, is_there in zip(records, there, strict=True) if is_there]
        self.dropped += [{"sample": int(record.pop("sample")), "rule": rule, **record} for record in kept_records]
        return int(there.sum())


def drop_copies(choice: Choice, found: list[Duplicate], rule: str, words: str) -> None:
    """Drop samples that are copies of others; `found` says of which."""
    records = [{"sample": one.sample, "of": one.of_key, "cosine": one.cosine} for one in found]
    count = choice.drop(np.array([one.sample for one in found], np.int64), rule, records)
    choice.rules.append(f"{count:,} {words}")


def keep_best(choice: Choice, score_S: np.ndarray, share: float) -> None:
    """Keep the best of the samples that are left, by score, ties to the earlier ones; none without a score."""
    left = np.flatnonzero(choice.kept)
    order = left[np.lexsort((left, -np.nan_to_num(score_S[left], nan=-np.inf)))]
    keep = round(share * len(left))
    gone = np.concatenate([order[:keep][np.isnan(score_S[order[:keep]])], order[keep:]])
    records = [{"sample": s, "score": None if np.isnan(score_S[s]) else round(float(score_S[s]), 4)} for s in gone]
    count = choice.drop(gone, "score", records)
    least = f", from {score_S[order[keep - 1]]:.4f} on" if keep and not np.isnan(score_S[order[keep - 1]]) else ""
    choice.rules.append(f"{count:,} not among the best {share:.4g} by CLIP score{least}")


def write_choice(index: Index, choice: Choice, out: Path, workers: int = 1) -> Manifest:
    """Write the manifest of the samples that are kept, with statistics of their own where the shards are local.

    Raises:
        ValueError: the index is not of shards, they have changed since, or nothing is left.
    """
    given = open_input(index.about["input"])
    if not isinstance(given, ShardInput):
        raise ValueError(f"index {index.directory} is of {given.path}: pack it, and embed the shards")
    manifest = given.manifest
    if not choice.kept.any():
        raise ValueError(f"not one of the {manifest.nsamples:,} samples is left: loosen the rules")
    selected = replace(manifest, shards=manifest.select(choice.kept))
    statistics: dict[str, Any] = {}
    if not any(is_remote(shard.url) for shard in selected.shards):
        measure = partial(_statistics, manifest.captions)
        statistics = merge_statistics(part for _, part in run_parallel(measure, selected.shards, workers))
        statistics["left_out"] = []
    statistics["selected"] = "dropped " + "; ".join(choice.rules) if choice.rules else "all"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_manifest(out, selected.shards, statistics, manifest.captions)
    return selected


def _statistics(captions: str, shard: Shard) -> dict[str, Any]:
    return shard_statistics(shard.url, caption_rule=captions, shard=shard)
