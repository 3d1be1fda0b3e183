"""All of the data pipeline, assembled: positions -> micro-batches.

A loader is one webdataset.DataPipeline inside torch's DataLoader. A sample passes its stages in one direction:

    IndexedSource (order, shard) -> Decode (text, image, augmentation) -> stages of the user -> Collate (tokenizer)

Every loader process makes whole micro-batches, every n-th one of its rank. torch takes from the processes in turn,
which keeps the order for any number of them. What is in a micro-batch depends on its place in the run alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import webdataset

from data_pipeline.batch import EvalBatch, MicroBatch
from data_pipeline.config import DataConfig
from data_pipeline.order import Mixture, Moved, Order, Position, sequential
from data_pipeline.seeds import stream_seed
from data_pipeline.stages.collate import Collate
from data_pipeline.stages.decode import Decode, DecodeOrReplace, Extras, UserStage
from data_pipeline.stages.evaluation import EvalSource
from data_pipeline.stages.readers import RawReader, Readers
from data_pipeline.stages.slots import Share, share_of
from data_pipeline.stages.source import IndexedSource
from data_pipeline.stages.stream import StreamDecode, StreamSource
from data_pipeline.stages.workers import LoaderFailure, Patience, WorkerLoader, number_of_workers
from data_pipeline.storage.manifest import Manifest
from data_pipeline.storage.remote import expand
from data_pipeline.tokenizer import Tokenizer

__all__ = [
    "EvalBatch",
    "Extras",
    "LoaderFailure",
    "MicroBatch",
    "Patience",
    "eval_loader",
    "sample_loader",
    "stream_loader",
    "train_loader",
]

NO_EXTRAS, FOR_EVER = Extras(), Patience()
STEPS_AHEAD = 2
"""Steps whose micro-batches are prepared ahead, so that the next ones are ready when a step is done, whatever a step's
share is."""


def train_loader(
    config: DataConfig,
    order: Order | Mixture | Moved,
    manifests: Sequence[Manifest],
    tokenizer: Tokenizer,
    *,
    seed: int,
    micro_batch: int,
    rank: int = 0,
    world: int = 1,
    start_step: int = 0,
    stop_step: int,
    stages: Sequence[Callable[[dict], dict]] = (),
    extras: Extras = NO_EXTRAS,
    patience: Patience = FOR_EVER,
) -> Iterable[MicroBatch]:
    """The micro-batches of this rank for steps [start_step, stop_step), in order.

    The order says how many rows a global batch has. Rank r of W gets micro-batches [r k, (r + 1) k) of every step,
    k = order.batch / (micro_batch W): the same rows, bit for bit, for any number of ranks and loader processes, and
    wherever `start_step` is.
    stages: callables that take and give back a decoded sample: a dict with "image" (uint8 tensor [3, H, W]), "caption"
    (str), "__key__", "cls", and "rng", the random.Random to draw from. Where "colors" is not None, colour jitter is
    still to come: see MicroBatch.colors.
    extras: second views and hidden words, by seeds of their own: all else is as without them.
    patience: how long is waited for a micro-batch; where its loader process hangs or dies, LoaderFailure is raised.
    Raises ValueError where the batch cannot be shared out; while iterating, for a shard that is not the manifest's.
    """
    share = share_of(rank, world, order.batch, micro_batch, start_step, stop_step)
    readers = Readers(manifests, config, share.lanes(order.batch, order.lanes))
    return _pipeline(
        config,
        Collate(tokenizer, extras),
        share,
        stages,
        patience,
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
    patience: Patience = FOR_EVER,
) -> Iterable[MicroBatch]:
    """As train_loader, for shards without a manifest: data.train is a pattern of shard urls, read from front to back.

    Not exact: which samples a step sees depends on the number of ranks and loader processes, damage to a tar may go
    unnoticed, and a resumed run starts again with its shards in another order. A bad sample is left out and recorded.
    Raises ValueError where there are fewer shards than loader processes.
    """
    if not isinstance(config.train, str):
        raise ValueError("data.train: stream mode reads one pattern of shards, not a list of sources")
    urls = expand([config.train])
    workers = number_of_workers(config.workers)
    processes = world * max(workers, 1)
    if len(urls) < processes:
        raise ValueError(
            f"data.train {config.train} has {len(urls)} shards for {processes} loader processes ({world} ranks with "
            f"data.workers {workers}), and each needs shards of its own: lower data.workers, or use "
            f"data.mode indexed"
        )
    share = share_of(rank, world, global_batch, micro_batch, start_step, stop_step)
    source = StreamSource(urls, stream_seed(seed, start_step), rank, world)
    decode = StreamDecode(Decode(config, extras), share, source.seed)
    return _pipeline(config, Collate(tokenizer, extras), share, stages, patience, source, decode)


def _pipeline(
    config: DataConfig,
    collate: Collate,
    share: Share,
    stages: Sequence[Callable],
    patience: Patience,
    *decoded: Callable,
) -> WorkerLoader:
    """`decoded` (a source and the stages that decode), the stages of the user, and batching, as one pipeline."""
    pipeline = webdataset.DataPipeline(
        *decoded,
        *[webdataset.map(UserStage(stage)) for stage in stages],
        webdataset.batched(share.micro_batch, collation_fn=collate, partial=False),
    )
    ahead = STEPS_AHEAD * share.count
    return WorkerLoader(pipeline, workers=config.workers, prefetch=config.prefetch, ahead=ahead, patience=patience)


def eval_loader(
    config: DataConfig,
    manifest: Manifest,
    tokenizer: Tokenizer,
    *,
    batch: int,
    rank: int = 0,
    world: int = 1,
    keep: bool = False,
) -> Iterable[EvalBatch]:
    """Every sample of a manifest once over all ranks, with all its captions, in order and without randomness.

    Rank r of W gets samples [r N / W, (r + 1) N / W), in batches of `batch`, the last one smaller. A bad sample is left
    out and recorded in `bad`. With `keep` its processes stay for the next iteration.
    """
    positions = sequential([shard.nsamples for shard in manifest.shards])
    own = positions[rank * len(positions) // world : (rank + 1) * len(positions) // world]
    return sample_loader(config, Readers([manifest], config, lanes=1), own, tokenizer, batch=batch, keep=keep)


def sample_loader(
    config: DataConfig,
    readers: RawReader,
    positions: Sequence[Position],
    tokenizer: Tokenizer,
    *,
    batch: int,
    keep: bool = False,
) -> Iterable[EvalBatch]:
    """These samples, in this order, as eval_loader gives them; every `batch` of them are one item, even if all are bad.

    readers: opens them: `Readers`, or what has the same `raw`.
    """
    if batch < 1:
        raise ValueError(f"batch is {batch}: at least 1")
    source = EvalSource(readers, positions, config, tokenizer, batch)
    return WorkerLoader(webdataset.DataPipeline(source), workers=config.workers, prefetch=config.prefetch, keep=keep)
