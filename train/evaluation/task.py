"""What every evaluation is: built from its options, it measures one held-out set with a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from data_pipeline.storage.manifest import named_manifest
from train.config import EvalTask

if TYPE_CHECKING:
    from train.evaluation.encode import Encoder, Features


@dataclass
class Predictions:
    """Which class each image was taken for; rows of `names`."""

    names: list[str]
    keys: list[str]
    """Of the images, as in their features."""
    right: list[int]
    predicted: list[int]


@dataclass
class Evaluation:
    """Metrics of held-out data, and the features that they were computed from."""

    metrics: dict[str, float]
    features: Features
    predictions: Predictions | None = None
    """Of a task that gives each image one of several named classes."""
    seconds: float = 0.0
    """How long it took. Where several share a data set, the first one has encoded it."""


class Task(ABC):
    """One kind of evaluation: its options, its checks, its metrics and its printed table.

    To add one: a subclass in a file of its own, and a row of train.evaluation.TASKS. All processes build it alike,
    before anything is encoded, so that a wrong option is refused before any time is spent.

    Raises:
        ValueError: naming the option that is missing or wrong.
    """

    options: ClassVar[Mapping[str, str]] = {}
    """Fields of EvalTask that it reads beside name, task, data and every -> what the command's help says of them."""
    scores: ClassVar[Mapping[str, Callable[..., Any]]] = {}
    """Metrics by which the best model can be chosen -> `max` where more is better, `min` where less is."""

    def __init__(self, given: EvalTask):
        self.given = given
        self.manifest = named_manifest("data", given.data)
        bad = self.manifest.statistics.get("bad", {}).get("count", 0)
        if self.manifest.nsamples <= bad:
            raise ValueError(
                f"{self.manifest.path}: none of its {self.manifest.nsamples} samples can be read; "
                "`python -m data_pipeline inspect` says why"
            )

    @abstractmethod
    def measure(self, encoder: Encoder) -> Evaluation:
        """The metrics of the model that `encoder` holds; all processes call it together and get the same.

        Raises:
            ValueError: naming what the data lacks, or that features are not finite.
        """

    @staticmethod
    def table(metrics: Mapping[str, float]) -> str:
        """The metrics for the terminal."""
        return "\n".join(f"{name:16}{value:10.4g}" for name, value in metrics.items())
