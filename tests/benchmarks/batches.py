"""Global batches of random pixels and words, for benchmarks of the training step."""

from __future__ import annotations

import torch

from data_pipeline.batch import MicroBatch
from train.config import RunConfig


def random_batch(config: RunConfig, step: int = 0) -> list[MicroBatch]:
    """The micro-batches of one process's step; the same for the same step. Captions are as long as they may be."""
    generator = torch.Generator().manual_seed(step)
    rows, side, tokens = config.train.micro_batch, config.data.image_size, config.data.max_tokens
    batches = []
    for index in range(config.train.global_batch // rows):
        images = torch.randint(0, 256, (rows, 3, side, side), generator=generator, dtype=torch.uint8)
        ids = torch.randint(1000, 30000, (rows, tokens), generator=generator)
        keys = [f"{index}/{row}" for row in range(rows)]
        batches.append(MicroBatch(images, ids, torch.ones_like(ids), index=index, step=step, keys=keys))
    return batches
