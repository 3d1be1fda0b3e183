"""Where a run begins: at its own newest checkpoint, at another run's, at a pair trained elsewhere, or at fresh weights.

Each kind answers the same questions, in this order: `model`, `begin`, `restore`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from train import checkpoint
from train.checkpoint import TrainState
from train.config import RunConfig
from train.engine.base import Engine
from train.engine.ema import WeightAverage
from train.feed import Feed
from train.init.fit import fill
from train.init.origin import open_origin
from train.model.pair import PairModel, build_model
from train.model.text_files import with_own_text
from train.parent import Parent
from train.run.directory import onward


class Beginning(Protocol):
    """What the loop asks of each kind.

    Attributes:
        source: the configuration whose text encoder and tokenizer the run is built with.
        lines: what to say of it when the run starts; complete after `restore`.
        resumes: whether the run has begun before.
        saved_text: the text encoder's and tokenizer's files that its checkpoints hold; empty where it begins.
    """

    source: RunConfig
    lines: list[str]
    resumes: bool
    saved_text: Mapping[str, bytes]

    def model(self, feed: Feed) -> PairModel:
        """The model with the weights that it begins with, the same on every rank. Raises ValueError on all ranks."""

    def begin(self, own: TrainState, feed: Feed) -> TrainState:
        """The step and the position in the data; `own` is the state of a run that has seen nothing."""

    def restore(self, engine: Engine, average: WeightAverage) -> None:
        """Put moments and averages into a prepared engine, which has the weights; a collective."""

    def record(self) -> dict[str, Any]:
        """What train.run.lineage keeps of a run's parent; empty where it has none."""


def beginning(config: RunConfig, directory: Path) -> Beginning:
    """Where the run in a directory begins; a collective.

    Raises:
        ValueError: on all ranks, where no checkpoint is whole, or what the run is to start from cannot be used.
    """
    found = checkpoint.newest(directory)
    if found is not None:
        return Resumed(config, found, directory)
    return Parent(config, directory) if config.parent.run else Fresh(config)


class Resumed:
    """The run's own newest checkpoint."""

    resumes = True

    def __init__(self, config: RunConfig, found: Path, directory: Path):
        checkpoint.check_text(found, config)
        self.source = with_own_text(config, found)
        self.lines = [f"resumes from {found}"]
        self.saved_text: Mapping[str, bytes] = checkpoint.saved_text_files(found)
        self.found, self.directory, self.state = found, directory, checkpoint.load_state(found)

    def model(self, feed: Feed) -> PairModel:
        if self.state.data_hash != feed.identity:
            raise ValueError(
                f"data.train: {self.found} was trained on other data ({self.state.data_hash}, now {feed.identity}). "
                f"Give the data that it was trained on, or choose another `name`{onward(self.directory)}"
            )
        model = build_model(self.source, feed.mean, feed.std, pretrained=False)
        checkpoint.load_weights(self.found, model)
        return model

    def begin(self, own: TrainState, feed: Feed) -> TrainState:
        return self.state

    def restore(self, engine: Engine, average: WeightAverage) -> None:
        restore(self.found, engine, average, self.state)

    def record(self) -> dict[str, Any]:
        return {}


class Fresh:
    """Fresh and pretrained weights as the configuration says, or the pair that `init` names."""

    resumes = False

    def __init__(self, config: RunConfig):
        self.source = config
        self.lines: list[str] = []
        self.saved_text: Mapping[str, bytes] = {}
        self.origin = open_origin(config) if config.init else None

    def model(self, feed: Feed) -> PairModel:
        return self.built(feed.mean, feed.std)

    def built(self, mean: Sequence[float], std: Sequence[float]) -> PairModel:
        """The model for images with these statistics, 0..1 per channel; for who has no data of the run to read."""
        model = build_model(self.source, mean, std, pretrained=self.origin is None)
        if self.origin is not None:
            self.lines += fill(model, self.origin, self.source)
        return model

    def begin(self, own: TrainState, feed: Feed) -> TrainState:
        own.init = self.origin.sha256 if self.origin is not None else own.init
        return own

    def restore(self, engine: Engine, average: WeightAverage) -> None:
        """There are no moments yet, and the average starts at the weights."""

    def record(self) -> dict[str, Any]:
        return {}


def restore(found: Path, engine: Engine, average: WeightAverage, state: TrainState) -> None:
    """Put a checkpoint's moments and averages into a prepared engine, which has its weights; a collective."""
    engine.load_moments(checkpoint.load_part(found, "optimizer"), state.updates)
    average.load(checkpoint.load_part(found, "ema"))
