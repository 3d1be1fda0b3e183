"""One optimizer step: the gradient of the loss over the global batch, however many ranks share its micro-batches.

The towers see a micro-batch at a time; the loss sees all rows of the global batch. Where a rank keeps the activations
of its whole share (`train.resident`), a step is forward, loss, backward. Otherwise features are cached without a graph,
the loss gives the gradient with respect to the features, and a second forward of each part carries it into the towers
(GradCache, arXiv 2101.06983). Dropout is seeded per micro-batch, so the second forward repeats the first.

b: rows of this rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from data_pipeline.loader import MicroBatch
from data_pipeline.samples.text import name_bytes
from train import distributed
from train.config import LossConfig, RunConfig
from train.engine.base import Engine
from train.engine.embedding import embedding_metrics
from train.loss.gradients import loss_gradients
from train.model import norm
from train.terms.objective import Objective


def training_step(
    engine: Engine, micro_batches: Sequence[MicroBatch], config: RunConfig, measure: bool = False
) -> dict[str, float]:
    """Train on one global batch.

    Args:
        micro_batches: this rank's share of the step, in order, on the engine's device.
        measure: also return what train.engine's meter and embedding measure.

    Returns:
        Metrics of the step, the same on every rank.
    """
    seeds = [micro_batch_seed(config.train.seed, batch.step, batch.index) for batch in micro_batches]
    size = config.train.resident
    parts = [(micro_batches[i : i + size], seeds[i : i + size]) for i in range(0, len(seeds), size)]
    cached = len(parts) > 1
    # Before the forward, which reading them from a GPU would wait for.
    image_ids_b, text_ids_b = row_ids(micro_batches, config.loss)

    engine.announce_backward(last=not cached)
    with norm.recording(engine.module):
        outputs = [engine.features(*part) for part in parts] if cached else [engine.forward(*parts[0])]

    objective = Objective(config)
    losses, gradients = loss_gradients(
        outputs, objective, scalars=objective.scalars, image_ids_b=image_ids_b, text_ids_b=text_ids_b
    )

    for number, (part, gradient) in enumerate(zip(parts, gradients, strict=True), start=1):
        engine.announce_backward(last=number == len(parts))
        output = engine.forward(*part) if cached else outputs[0]
        engine.backward(torch.stack([(output[name] * value).sum() for name, value in gradient.items()]).sum())

    if measure:
        engine.meter.arm()
    grad_norm, applied = engine.step()
    count = config.train.global_batch // config.train.micro_batch
    norm.update_running(engine.module, distributed.all_reduce_sum, count)
    scale = float(outputs[0]["logit_scale"].detach())
    metrics = {name: float(value) for name, value in losses.items()}
    metrics |= {"grad_norm": grad_norm, "temperature": 1 / scale, "skipped": int(not applied)}
    if measure:
        metrics |= engine.meter.read(applied, grad_norm, config.optim.clip_grad)
        metrics |= embedding_metrics(*(torch.cat([output[name] for output in outputs]) for name in ("image", "text")))
    return metrics


def row_ids(micro_batches: Sequence[MicroBatch], config: LossConfig) -> tuple[Tensor | None, Tensor | None]:
    """Numbers [b] int64 that are equal for rows with the same sample key, and for rows with the same caption tokens."""
    if not config.mask_duplicates:
        return None, None
    captions, images = [], []
    for batch in micro_batches:
        for ids, mask in zip(batch.ids_BL.tolist(), batch.mask_BL.tolist(), strict=True):
            captions.append(_digest(repr(ids[: sum(mask)]).encode()))
        images += [_digest(name_bytes(key)) for key in batch.keys]
    device = micro_batches[0].images_BCHW.device
    image_ids_b, text_ids_b = (torch.tensor(values, dtype=torch.int64, device=device) for values in (images, captions))
    return image_ids_b, text_ids_b


def micro_batch_seed(seed: int, step: int, index: int) -> int:
    """The dropout seed of one micro-batch: the same wherever, and how often, it runs."""
    return _digest(f"{seed}/{step}/{index}".encode())


def batch_digest(micro_batches: Sequence[MicroBatch], micro_batch: int) -> int:
    """A number whose sum over ranks (modulo 2^64) tells which sample was in which row of the global batch."""
    total = 0
    for batch in micro_batches:
        for row, key in enumerate(batch.keys, start=batch.index * micro_batch):
            total += _digest(name_bytes(f"{row} {key}"))
    return (total + 2**63) % 2**64 - 2**63


def _digest(data: bytes) -> int:
    """63 bits of a hash."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1
