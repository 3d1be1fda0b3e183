"""The training data of a run: its length, its identity, its statistics, and its micro-batches from any step on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from data_pipeline.config import Source
from data_pipeline.loader import Extras, MicroBatch, stream_loader, train_loader
from data_pipeline.order import Moved, Order, build_order, order_identity
from data_pipeline.statistics import normalization
from data_pipeline.storage.manifest import Manifest, load_manifest
from data_pipeline.tokenizer import Tokenizer
from train import distributed, terms
from train.config import RunConfig


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
            self.steps, self.identity = config.train.steps, f"stream {data.train}"
            self.order_identity = ""
            self.mean, self.std = normalization(data.normalize)
            return
        sources = data.train if isinstance(data.train, list) else [Source(data.train)]
        self.manifests = [load_manifest(source.data) for source in sources]
        weights = [source.weight for source in sources]
        how = data.lanes, config.train.seed, data.shuffle_shards
        self.order = build_order(self.manifests, weights, batch, *how)
        self.order_identity = order_identity(self.manifests, weights, *how)
        self.steps = config.train.steps or max(1, round(config.train.epochs * self.order.steps_per_epoch))
        self.identity = " ".join(f"{one.hash} x{weight:g}" for one, weight in zip(self.manifests, weights, strict=True))
        self.mean, self.std = normalization(data.normalize, *(manifest.statistics for manifest in self.manifests))

    def batches(self, tokenizer: Tokenizer, start_step: int, moved_by: int = 0) -> Iterable[MicroBatch]:
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
        }
        if self.config.data.mode == "stream":
            return stream_loader(self.config.data, tokenizer, global_batch=train.global_batch, **share)
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
        if batch == self.order.batch:
            return data_step - step
        return self.order.step_after(data_step, batch) - step if isinstance(self.order, Order) else None
