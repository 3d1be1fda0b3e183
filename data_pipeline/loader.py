"""All of the data pipeline, assembled: positions -> micro-batches."""

from __future__ import annotations

from data_pipeline.batch import EvalBatch, MicroBatch

__all__ = ["EvalBatch", "MicroBatch"]
