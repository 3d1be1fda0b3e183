"""One optimizer step: the gradient of the loss over the global batch, however many ranks share its micro-batches.

The towers see a micro-batch at a time; the loss sees all rows of the global batch. Where a rank keeps the activations
of its whole share (`train.resident`), a step is forward, loss, backward. Otherwise the share is cut into parts; of all
but the last the features are cached without a graph, the loss gives the gradient with respect to the features, and a
second forward of each cached part carries it into the towers (GradCache, arXiv 2101.06983). Dropout is seeded per
micro-batch, so the second forward repeats the first.

b: rows of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from data_pipeline.batch import MicroBatch
from data_pipeline.seeds import micro_batch_seed
from train import distributed
from train.config import RunConfig
from train.engine.base import Engine
from train.engine.embedding import embedding_metrics
from train.loss.gradients import loss_gradients
from train.loss.products import three_products
from train.model import norm
from train.terms.objective import Objective
from train.timing import exchange_from_end_of, section


def training_step(
    engine: Engine, micro_batches: Sequence[MicroBatch], config: RunConfig, measure: bool = False
) -> dict[str, Tensor]:
    """Train on one global batch.

    Args:
        micro_batches: this rank's share of the step, in order, on the engine's device.
        measure: also return what train.engine's meter and embedding measure.

    Returns:
        Metrics of the step, the same on every rank: scalars on the device, for `distributed.to_host`.
    """
    seeds = [micro_batch_seed(config.train.seed, batch.step, batch.index) for batch in micro_batches]
    size = config.train.resident or len(seeds)
    *cached, kept = [(micro_batches[i : i + size], seeds[i : i + size]) for i in range(0, len(seeds), size)]

    engine.announce_backward(last=not cached)
    with norm.recording(engine.module), section("forward"):
        outputs = [*(engine.features(*part) for part in cached), engine.forward(*kept)]

    objective = Objective(config)
    ids = duplicate_ids(micro_batches) if config.loss.mask_duplicates else {}
    with section("loss"), three_products(engine.precision == "bf16" and engine.device.type == "cuda"):
        losses, gradients = loss_gradients(
            outputs, objective, scalars=objective.scalars, gathers=objective.gathers, **ids
        )

    # First the part whose graph is there already, so that there is never a second one beside it.
    for number in (len(cached), *range(len(cached))):
        gradient = gradients[number]
        engine.announce_backward(last=number == len(cached) - 1 or not cached)
        with section("forward"):
            output = outputs[-1] if number == len(cached) else engine.forward(*cached[number])
        with section("backward"):
            carrier = torch.stack([(output[name] * value).sum() for name, value in gradient.items()]).sum()
            exchange_from_end_of(carrier)
            engine.backward(carrier)

    if measure:
        engine.meter.arm()
    with section("optimizer"):
        grad_norm, applied = engine.step()
    count = config.train.global_batch // config.train.micro_batch
    norm.update_running(engine.module, distributed.all_reduce_sum, count)
    scale = outputs[0]["logit_scale"].detach().reshape(()).to(next(iter(losses.values())).dtype)
    metrics = {**losses, "grad_norm": grad_norm, "temperature": 1 / scale}
    metrics["skipped"] = ~applied
    if measure:
        metrics |= engine.meter.read(applied, grad_norm, config.optim.clip_grad)
        metrics |= embedding_metrics(*(torch.cat([output[name] for output in outputs]) for name in ("image", "text")))
    return metrics


def duplicate_ids(micro_batches: Sequence[MicroBatch]) -> dict[str, Tensor]:
    """Of this rank's rows, for `loss_gradients`: equal numbers are the same sample, or the same caption."""
    images, texts = [], []
    for batch in micro_batches:
        assert batch.image_ids_B is not None and batch.text_ids_B is not None, "the loader sets them"
        images.append(batch.image_ids_B)
        texts.append(batch.text_ids_B)
    return {"image_ids_b": torch.cat(images), "text_ids_b": torch.cat(texts)}
