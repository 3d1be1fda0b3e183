"""Encoding a data set once, over all processes, for evaluation.

Shape suffixes: N images and M texts of the data set, n and m of this process; B, L, C, H, W as in a batch; D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data_pipeline.loader import EvalBatch, eval_loader
from data_pipeline.storage.manifest import Manifest
from data_pipeline.tokenizer import Tokenizer
from train.config import RunConfig
from train.distributed import (
    all_gather_rows,
    all_reduce_max,
    any_rank,
    broadcast_object,
    gather_objects,
    rank,
    world_size,
)
from train.model.pair import PairModel

Autocast = Callable[[], AbstractContextManager]


@dataclass
class Features:
    """What the model makes of a data set, in the order of its manifest; the same on every process."""

    image_ND: Tensor
    """Unit vectors, float32, on the model's device."""
    text_MD: Tensor
    """Unit vectors of all captions of all images, float32."""
    image_of_text_M: Tensor
    """int64: for each text the row of its image."""
    keys: list[str]
    """Per image "shard basename/sample key"."""
    captions: list[str]
    """The texts."""
    classes: list[str | None]
    """Per image the content of its `cls` member, None where it has none."""
    bad: list[dict]
    """Records of samples that could not be read and so are not among the images: shard, key, cause."""


@dataclass
class Evaluation:
    """Metrics of held-out data, and the features that they were computed from."""

    metrics: dict[str, float]
    features: Features


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode and no gradients inside; afterwards each module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # Not inference_mode: whatever a module keeps from such a forward pass, such as a cached buffer, could not take
        # part in the next training step.
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def encode(
    model: PairModel,
    config: RunConfig,
    tokenizer: Tokenizer,
    manifest: Manifest,
    *,
    autocast: Autocast = nullcontext,
) -> Features:
    """Encode every sample of `manifest` once: each process its share, the result on every process.

    All processes make the same number of forward passes, because ZeRO-3 gathers parameters in each of them.

    Raises:
        ValueError: not one sample could be read.
    """
    device = next(model.parameters()).device
    size = config.eval.batch
    loader = eval_loader(config.data, manifest, tokenizer, batch=size, rank=rank(), world=world_size())
    blank = _blank(config)
    images: list[Tensor] = []
    texts: list[Tensor] = []
    owners: list[int] = []
    keys: list[str] = []
    captions: list[str] = []
    classes: list[str | None] = []
    bad: list[dict] = []
    with evaluating(model):
        for batch in _in_step(loader, blank):
            shown = batch if batch.keys else blank
            with autocast():
                image_BD = model.encode_image(shown.images_BCHW.to(device))
            text_BD = encode_texts(model, shown.ids_ML.to(device), shown.mask_ML.to(device), size, autocast)
            images.append(image_BD[: len(batch.keys)].float())
            texts.append(text_BD[: len(batch.captions)])
            owners += [len(keys) + row for row in batch.caption_row]
            keys += batch.keys
            captions += batch.captions
            classes += batch.classes
            bad += batch.bad
    parts = broadcast_object(gather_objects((owners, keys, captions, classes, bad)))
    if not any(part[1] for part in parts):
        raise ValueError(f"{manifest.path}: not one of its {manifest.nsamples} samples could be read")
    owners, keys, captions, classes, bad = [], [], [], [], []
    for part in parts:
        owners += [len(keys) + row for row in part[0]]
        keys += part[1]
        captions += part[2]
        classes += part[3]
        bad += part[4]
    return Features(
        image_ND=_gather_uneven(torch.cat(images), [len(part[1]) for part in parts]),
        text_MD=_gather_uneven(torch.cat(texts), [len(part[2]) for part in parts]),
        image_of_text_M=torch.tensor(owners, device=device),
        keys=keys,
        captions=captions,
        classes=classes,
        bad=bad,
    )


def encode_texts(model: PairModel, ids_ML: Tensor, mask_ML: Tensor, size: int, autocast: Autocast) -> Tensor:
    """float32 features of M texts, `size` at a time; every process makes as many forward passes as the busiest one."""
    passes = int(all_reduce_max(torch.tensor([-(-len(ids_ML) // size)], device=ids_ML.device)))
    features = []
    for start in range(0, passes * size, size):
        done = start >= len(ids_ML)
        rows = slice(0, 1) if done else slice(start, start + size)
        with autocast():
            text_BD = model.encode_text(ids_ML[rows], mask_ML[rows])
        if not done:
            features.append(text_BD.float())
    return torch.cat(features)


def _in_step(batches: Iterable[EvalBatch], blank: EvalBatch) -> Iterator[EvalBatch]:
    """`batches`, then blanks for as long as any process still has a batch; at least one on each process."""
    iterator = iter(batches)
    batch = next(iterator, None)
    yield batch or blank
    while True:
        batch = next(iterator, None)
        if not any_rank(batch is not None):
            return
        yield batch or blank


def _blank(config: RunConfig) -> EvalBatch:
    """One black image and one empty caption that stand for no sample."""
    side = config.data.image_size
    return EvalBatch(
        images_BCHW=torch.zeros(1, 3, side, side, dtype=torch.uint8),
        ids_ML=torch.zeros(1, 8, dtype=torch.int64),
        mask_ML=torch.ones(1, 8, dtype=torch.int64),
        caption_row=[],
        captions=[],
        classes=[],
        keys=[],
    )


def _gather_uneven(rows_nD: Tensor, counts: list[int]) -> Tensor:
    """The rows of all processes, in their order; process r has counts[r] of them."""
    padded_PD = rows_nD.new_zeros(max(counts), rows_nD.shape[1])
    padded_PD[: len(rows_nD)] = rows_nD
    parts = all_gather_rows(padded_PD).split(max(counts))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
