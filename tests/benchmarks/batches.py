"""Global batches of random pixels and words, for benchmarks of the training step."""

from __future__ import annotations

import torch

from data_pipeline.batch import MicroBatch
from data_pipeline.samples.masking import UNMASKED
from train.config import RunConfig

MASK = 103
"""The mask token of bert-base-uncased's vocabulary."""


def random_batch(config: RunConfig, step: int = 0) -> list[MicroBatch]:
    """The micro-batches of one process's step; the same for the same step. Captions are as long as they may be.

    Where the model has self-supervision, with what that needs: other pixels as views, every seventh word hidden.
    """
    generator = torch.Generator().manual_seed(step)
    rows, side, tokens = config.train.micro_batch, config.data.image_size, config.data.max_tokens
    wanted = config.model.self_supervision
    batches = []
    for index in range(config.train.global_batch // rows):
        images = torch.randint(0, 256, (rows, 3, side, side), generator=generator, dtype=torch.uint8)
        ids = torch.randint(1000, 30000, (rows, tokens), generator=generator)
        keys = [f"{index}/{row}" for row in range(rows)]
        batch = MicroBatch(images, ids, torch.ones_like(ids), index=index, step=step, keys=keys)
        if wanted.image:
            batch.views_BCHW = torch.randint(0, 256, images.shape, generator=generator, dtype=torch.uint8)
        if wanted.text:
            hidden = torch.arange(ids.numel()).view_as(ids) % 7 == 0
            batch.masked_BL, batch.targets_BL = ids.masked_fill(hidden, MASK), ids.masked_fill(~hidden, UNMASKED)
        batches.append(batch)
    return batches
