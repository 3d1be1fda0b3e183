"""One optimizer step: the gradient of the contrastive loss over the global batch, however its micro-batches are dealt.

The towers see a micro-batch at a time; the loss sees all B rows. Where a process keeps the activations of its whole
share (`train.resident`), a step is forward, loss, backward. Otherwise features are cached without a graph, the loss
gives the gradient with respect to the features, and a second forward of each part carries it into the towers
(GradCache, arXiv 2101.06983). Dropout is seeded per micro-batch, so the second forward repeats the first.

Shape suffixes: B global batch, b rows of this process, D embedding.
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
from train.model import norm
from train.terms.objective import objective

Outputs = dict[str, Tensor]
SCALARS = ("logit_scale", "logit_bias", "level_scales", "level_biases", "level_shares")


def training_step(
    engine: Engine, micro_batches: Sequence[MicroBatch], config: RunConfig, measure: bool = False
) -> dict[str, float]:
    """Train on one global batch.

    Args:
        micro_batches: this process's share of the step, in order, on the engine's device.
        measure: also return what train.engine's meter and embedding measure.

    Returns:
        Metrics of the step, the same on every rank.
    """
    seeds = [micro_batch_seed(config.train.seed, batch.step, batch.index) for batch in micro_batches]
    size = config.train.resident
    parts = [(micro_batches[i : i + size], seeds[i : i + size]) for i in range(0, len(seeds), size)]
    cached = len(parts) > 1
    # Before the forward, which reading them from a GPU would wait for.
    ids = row_ids(micro_batches, config.loss)

    engine.announce_backward(last=not cached)
    with norm.recording(engine.module):
        outputs = [engine.features(*part) for part in parts] if cached else [engine.forward(*parts[0])]

    losses, gradients = loss_gradients(outputs, config, *ids)

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


def loss_gradients(
    outputs: Sequence[Outputs], config: RunConfig, image_ids_B: Tensor | None = None, text_ids_B: Tensor | None = None
) -> tuple[Outputs, list[Outputs]]:
    """The objective over the global batch and its gradient with respect to every part's outputs.

    Args:
        outputs: what the model returned for each part of this process's rows: features [rows, ...], and SCALARS, which
            are the same in every part.
        image_ids_B, text_ids_B: equal numbers mark duplicates, for `loss.mask_duplicates`.

    Returns:
        Losses of the global batch by the names of their metrics, and per part a tensor for every output. A process's
        loss is that of its own rows, so that the mean over ranks is the global loss: features get the sum of all
        ranks' gradients, which the engine averages. All of it stays on the device: a number read here would keep a GPU
        from going straight on to the backward pass.
    """
    names = [name for name in outputs[0] if name not in SCALARS]
    # On a CPU float64 costs nothing beside the towers: rounded to float32 after the sums over ranks, gradients are the
    # same to the last bit whoever owned which rows.
    dtype = torch.float64 if outputs[0]["image"].device.type == "cpu" else torch.float32
    scalars = {name: outputs[0][name].detach().to(dtype).requires_grad_() for name in SCALARS if name in outputs[0]}
    own = {name: torch.cat([output[name].detach() for output in outputs]).to(dtype) for name in names}
    full = {name: distributed.all_gather_rows(value).requires_grad_() for name, value in own.items()}

    rows = own["image"].shape[0]
    start = rows * distributed.rank()
    ids = {"image_ids_B": image_ids_B, "text_ids_B": text_ids_B}
    inputs = full | scalars
    total, terms = objective(inputs, config, start=start, stop=start + rows, **ids)
    grads = dict(zip(inputs, torch.autograd.grad(total, list(inputs.values())), strict=True))

    sizes = [output["image"].shape[0] for output in outputs]
    split = {name: distributed.reduce_scatter_rows(grads[name]).split(sizes) for name in names}
    # Means over ranks: the ranks' shares, each rounded by itself, would not add up to the same bits.
    values = [value.detach().reshape(1) for value in terms.values()] + [grads[name] for name in scalars]
    means = distributed.all_reduce_sum(torch.cat(values)) / distributed.world_size()
    losses, *means = means.split([len(terms), *(len(value) for value in scalars.values())])
    # Scalars come out of every part's forward; each part carries an equal share of their gradient.
    shares = {name: mean / len(outputs) for name, mean in zip(scalars, means, strict=True)}
    gradients = []
    for part, output in enumerate(outputs):
        whole = {name: split[name][part] for name in names} | shares
        gradients.append({name: value.to(output[name].dtype) for name, value in whole.items()})
    return dict(zip(terms, losses, strict=True)), gradients


def row_ids(micro_batches: Sequence[MicroBatch], config: LossConfig) -> tuple[Tensor | None, Tensor | None]:
    """Numbers [B] int64 that are equal for rows with the same sample key, and for rows with the same caption tokens."""
    if not config.mask_duplicates:
        return None, None
    captions, images = [], []
    for batch in micro_batches:
        for ids, mask in zip(batch.ids_BL.tolist(), batch.mask_BL.tolist(), strict=True):
            captions.append(_digest(repr(ids[: sum(mask)]).encode()))
        images += [_digest(name_bytes(key)) for key in batch.keys]
    device = micro_batches[0].images_BCHW.device
    own = [torch.tensor(values, dtype=torch.int64, device=device) for values in (images, captions)]
    return distributed.all_gather_rows(own[0]), distributed.all_gather_rows(own[1])


def micro_batch_seed(seed: int, step: int, index: int) -> int:
    """The dropout seed of one micro-batch: the same wherever, and how often, it runs."""
    return _digest(f"{seed}/{step}/{index}".encode())


def batch_digest(micro_batches: Sequence[MicroBatch], micro_batch: int) -> int:
    """A number of which the sum over ranks (modulo 2^64) tells which sample stood in which row of the global batch."""
    total = 0
    for batch in micro_batches:
        for row, key in enumerate(batch.keys, start=batch.index * micro_batch):
            total += _digest(name_bytes(f"{row} {key}"))
    return (total + 2**63) % 2**64 - 2**63


def _digest(data: bytes) -> int:
    """63 bits of a hash."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1
