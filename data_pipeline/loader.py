"""All of the data pipeline, assembled: positions -> micro-batches.

A loader is one webdataset.DataPipeline (a source, webdataset's map and batched, stages of your own between them) inside
torch's DataLoader. Every loader process makes whole micro-batches, every n-th one of its rank, so that torch's taking
turns keeps the order for any number of processes; what is in a micro-batch depends on its position alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import webdataset

from data_pipeline.batch import EvalBatch, MicroBatch
from data_pipeline.config import DataConfig
from data_pipeline.order import Mixture, Order, Position, sequential
from data_pipeline.samples.image import BadSample, split
from data_pipeline.samples.transforms import eval_transform
from data_pipeline.stages.decode import (
    Collate,
    Decode,
    DecodeOrReplace,
    Extras,
    IndexedSource,
    Readers,
    Share,
    UserStage,
    dealt,
    sample_name,
    shard_name,
    stacked,
)
from data_pipeline.stages.stream import StreamDecode, StreamSource
from data_pipeline.stages.workers import Loaded
from data_pipeline.storage.manifest import Manifest
from data_pipeline.storage.remote import expand
from data_pipeline.tokenizer import Tokenizer

__all__ = ["EvalBatch", "Extras", "MicroBatch", "eval_loader", "stream_loader", "train_loader"]

NO_EXTRAS = Extras()


def train_loader(
    config: DataConfig,
    order: Order | Mixture,
    manifests: Sequence[Manifest],
    tokenizer: Tokenizer,
    *,
    seed: int,
    global_batch: int,
    micro_batch: int,
    rank: int = 0,
    world: int = 1,
    start_step: int = 0,
    stop_step: int,
    stages: Sequence[Callable[[dict], dict]] = (),
    extras: Extras = NO_EXTRAS,
) -> Iterable[MicroBatch]:
    """The micro-batches of this rank for steps [start_step, stop_step), in order.

    Rank r of W gets micro-batches [r k, (r + 1) k) of every step, k = global_batch / (micro_batch W): the same rows,
    bit for bit, for any number of ranks and loader processes, and wherever `start_step` is.
    stages: callables that take and give back a decoded sample: a dict with "image" (uint8 tensor [3, H, W]), "caption"
    (str), "__key__", "cls", and "rng", the random.Random to draw all chance from.
    extras: second views and hidden words, by chance of their own: all else stays as it is without.
    Raises ValueError where the batch cannot be dealt; while iterating, for a shard that is not the manifest's.
    """
    share = _share(global_batch, micro_batch, rank, world, start_step, stop_step)
    readers = Readers(manifests, config)
    return _loaded(
        config,
        Collate(tokenizer, extras),
        micro_batch,
        stages,
        IndexedSource(readers, order, share, seed),
        webdataset.map(DecodeOrReplace(Decode(config, extras), readers)),
    )


def stream_loader(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    seed: int,
    global_batch: int,
    micro_batch: int,
    rank: int = 0,
    world: int = 1,
    start_step: int = 0,
    stop_step: int,
    stages: Sequence[Callable[[dict], dict]] = (),
    extras: Extras = NO_EXTRAS,
) -> Iterable[MicroBatch]:
    """As train_loader, for shards without a manifest: data.train is a pattern of shard urls, read from front to back.

    Not exact: which samples a step sees depends on the number of ranks and loader processes, damage to a tar may go
    unnoticed, and a resumed run starts over with shards in another order. A bad sample is left out and recorded.
    Raises ValueError where there are fewer shards than loader processes.
    """
    if not isinstance(config.train, str):
        raise ValueError("--data.train: stream mode reads one pattern of shards, not a list of sources")
    urls = expand([config.train])
    processes = world * max(config.workers, 1)
    if len(urls) < processes:
        raise ValueError(
            f"--data.train {config.train} has {len(urls)} shards for {processes} loader processes ({world} ranks with "
            f"--data.workers {config.workers}), each of which streams shards of its own: lower --data.workers, or use "
            f"--data.mode indexed"
        )
    share = _share(global_batch, micro_batch, rank, world, start_step, stop_step)
    source = StreamSource(urls, f"{seed}/{start_step}", rank, world)
    decode = StreamDecode(Decode(config, extras), share, source.seed)
    return _loaded(config, Collate(tokenizer, extras), micro_batch, stages, source, decode)


def _loaded(
    config: DataConfig, collate: Collate, micro_batch: int, stages: Sequence[Callable], *decoded: Callable
) -> Loaded:
    """`decoded` (a source and the stages that decode), the stages of the user, and batching, as one pipeline."""
    pipeline = webdataset.DataPipeline(
        *decoded,
        *[webdataset.map(UserStage(stage)) for stage in stages],
        webdataset.batched(micro_batch, collation_fn=collate, partial=False),
    )
    return Loaded(pipeline, workers=config.workers, prefetch=config.prefetch)


def _share(global_batch: int, micro_batch: int, rank: int, world: int, start_step: int, stop_step: int) -> Share:
    if global_batch < 1 or micro_batch < 1 or global_batch % (micro_batch * world):
        raise ValueError(
            f"--train.global_batch {global_batch} cannot be dealt to {world} processes in micro-batches of "
            f"--train.micro_batch {micro_batch}: it must be a multiple of {micro_batch * world}"
        )
    count = global_batch // (micro_batch * world)
    return Share(micro_batch, rank * count, count, start_step, stop_step)


def eval_loader(
    config: DataConfig, manifest: Manifest, tokenizer: Tokenizer, *, batch: int, rank: int = 0, world: int = 1
) -> Iterable[EvalBatch]:
    """Every sample of a manifest once over all ranks, with all its captions, in order and without chance.

    Rank r of W gets samples [r N / W, (r + 1) N / W), in batches of `batch`, the last one smaller. A bad sample is left
    out and recorded in `bad`.
    """
    if batch < 1:
        raise ValueError(f"--eval.batch is {batch}: at least 1")
    positions = sequential([shard.nsamples for shard in manifest.shards])
    own = positions[rank * len(positions) // world : (rank + 1) * len(positions) // world]
    source = EvalSource(Readers([manifest], config), own, config, tokenizer, batch)
    return Loaded(webdataset.DataPipeline(source), workers=config.workers, prefetch=config.prefetch)


class EvalSource:
    """Reads, decodes and batches for evaluation."""

    def __init__(
        self, readers: Readers, positions: Sequence[Position], config: DataConfig, tokenizer: Tokenizer, batch: int
    ):
        self.readers, self.tokenizer, self.transform = readers, tokenizer, eval_transform(config)
        self.batches = [positions[start : start + batch] for start in range(0, len(positions), batch)]
        self.empty_BCHW = torch.empty((0, 3, config.image_size, config.image_size), dtype=torch.uint8)

    def __call__(self) -> Iterator[EvalBatch]:
        for positions in dealt(self.batches):
            yield self._batch(positions)

    def _batch(self, positions: Sequence[Position]) -> EvalBatch:
        images: list[torch.Tensor] = []
        captions: list[str] = []
        caption_row: list[int] = []
        classes: list[str | None] = []
        keys, bad = [], []
        for place in positions:
            raw = self.readers.raw(place.source, place.shard, place.index)
            try:
                data, texts, label = split(raw)
                image = self.transform(data)
            except BadSample as error:
                bad.append({"shard": shard_name(raw["__shard__"]), "key": raw["__key__"], "cause": error.cause})
                continue
            captions.extend(texts)
            caption_row.extend([len(images)] * len(texts))
            images.append(image)
            classes.append(label)
            keys.append(sample_name(raw))
        ids_ML, mask_ML = self.tokenizer(captions)
        images_BCHW = stacked(images) if images else self.empty_BCHW
        return EvalBatch(images_BCHW, ids_ML, mask_ML, caption_row, captions, classes, keys, bad)
