"""The training data of a run: its length, its identity, its statistics, and its micro-batches from any step on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from data_pipeline.config import Source
from data_pipeline.loader import Extras, LoaderFailure, MicroBatch, Patience, stream_loader, train_loader
from data_pipeline.order import Mixture, Moved, Order, build_order, order_identity
from data_pipeline.statistics import normalization
from data_pipeline.storage.manifest import Manifest, named_manifest
from data_pipeline.storage.redaction import redact_urls
from data_pipeline.tokenizer import Tokenizer
from train import distributed, terms
from train.arrival import landed
from train.config import RunConfig
from train.run.signals import Interrupted, StopRequest
from train.timing import section


class Feed:
    """Opens the manifests that `data.train` names, or in stream mode leaves the shards to webdataset.

    steps: optimizer steps of the run. mean, std: per channel, 0..1. For the checkpoint, identity: what the data are;
    order_identity: in what order they come, whatever the batch; empty for a stream.

    Raises:
        ValueError: the data cannot be used as configured.
    """

    def __init__(self, config: RunConfig):
        self.config = config
        data, batch = config.data, config.train.global_batch
        if data.mode == "stream":
            assert config.train.steps, "train.checks refuses a stream without a number of steps"
            self.manifests: list[Manifest] = []
            self.order: Order | Mixture | None = None
            self.steps, self.identity = config.train.steps, redact_urls(f"stream {data.train}")
            self.order_identity = ""
            self.mean, self.std = normalization(data.normalize)
            return
        sources = data.train if isinstance(data.train, list) else [Source(data.train)]
        self.manifests = [named_manifest("data.train", source.data) for source in sources]
        weights = [source.weight for source in sources]
        how = data.lanes, config.train.seed, data.shuffle_shards
        self.order = build_order(self.manifests, weights, batch, *how)
        self.order_identity = order_identity(self.manifests, weights, *how)
        self.steps = config.train.steps or max(1, round(config.train.epochs * self.order.steps_per_epoch))
        self.identity = " ".join(f"{one.hash} x{weight:g}" for one, weight in zip(self.manifests, weights, strict=True))
        self.mean, self.std = normalization(data.normalize, *(manifest.statistics for manifest in self.manifests))

    def batches(
        self, tokenizer: Tokenizer, start_step: int, patience: Patience, moved_by: int = 0
    ) -> Iterable[MicroBatch]:
        """This process's micro-batches of the steps from `start_step` on, in order.

        moved_by: a step of the run is this many steps further in the order.
        """
        train = self.config.train
        share: dict[str, Any] = {
            "seed": train.seed,
            "micro_batch": train.micro_batch,
            "rank": distributed.rank(),
            "world": distributed.world_size(),
            "start_step": start_step,
            "stop_step": self.steps,
            "extras": Extras(**terms.extras(self.config.model)),
            "patience": patience,
        }
        if self.config.data.mode == "stream":
            return stream_loader(self.config.data, tokenizer, global_batch=train.global_batch, **share)
        assert self.order is not None
        order = Moved(self.order, moved_by) if moved_by else self.order
        return train_loader(self.config.data, order, self.manifests, tokenizer, **share)

    def moved_by(self, step: int, data_step: int, order: str, batch: int) -> int | None:
        """By how much this order is moved for a run that starts at `step` where another run has come in its data.

        Args:
            data_step: steps of the other run's order that it has made.
            order, batch: the other run's `order_identity` and global batch.

        Returns:
            What `batches` takes; None where its place in the data is none in these, and they start at their beginning.
        """
        if not order or order != self.order_identity:
            return None
        assert self.order is not None
        if batch == self.order.batch:
            return data_step - step
        return self.order.step_after(data_step, batch) - step if isinstance(self.order, Order) else None


@section("wait")
def fetch(
    batches: Iterator[MicroBatch], share: int, device: torch.device, stop: StopRequest, at_once: bool
) -> list[MicroBatch] | None:
    """This rank's share of the next step, on its device; None, on all ranks, where a signal came to one that waited.

    So all ranks begin a step or none does: what goes wrong with one rank's data ends all of them where they can still
    save, in place of leaving the others in a step that cannot be finished. A collective.

    Args:
        at_once: whether a signal ends the waiting wherever it is; for data that are loaded in this process.

    Raises:
        ValueError: on all ranks, what is wrong with the data.
        LoaderFailure: on all ranks, where a loader process died or hangs.
    """
    own: list[MicroBatch] = []
    error: BaseException | None = None
    try:
        with stop.at_once(at_once):
            for _ in range(share):
                batch = next(batches)
                with section("copy"):
                    own.append(landed(batch, device))
    except (Exception, Interrupted) as caught:  # whatever it is, the other ranks must hear of it
        error = caught
    trouble = 0 if error is None else 1 if isinstance(error, Interrupted) else 2
    worst = int(distributed.all_reduce_max(torch.tensor([trouble])))
    if worst < 2:
        return own if worst == 0 else None
    failures = distributed.all_gather_objects(None if trouble < 2 else (isinstance(error, ValueError), str(error)))
    if error is not None and trouble == 2:
        raise error
    rank, (is_data, text) = next((rank, failure) for rank, failure in enumerate(failures) if failure)
    raise ValueError(text) if is_data else LoaderFailure(f"rank {rank}: {text}")
