"""What an optional term of the loss is: everything that the model, the step, the optimizer and the loader ask of it.

Shape suffixes: B samples, b rows of a rank, N positions (pixels of a map, or tokens), C channels, L tokens, D features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from data_pipeline.batch import MicroBatch
from train.config import LossConfig, ModelConfig
from train.loss.ids import Rows

Outputs = dict[str, Tensor]
Heads = Mapping[str, nn.Module | nn.Parameter | None]


class Encoded(NamedTuple):
    """What one tower made of a micro-batch."""

    embedding_BD: Tensor
    """float32 unit vectors, as changed by the terms before this one."""
    features_BD: Tensor
    """The tower's own features, before the projection."""
    taps: dict[str, Tensor]
    """Positions [B, N, C] that the tower's inner modules put out, by the names that `Term.taps` asks for."""
    mask_BL: Tensor | None = None
    """Of captions: 1 for a token, 0 for padding."""


class Term(ABC):
    """An optional term of the loss. It holds no tensors: what it learns is part of the model, under the term's names.

    A term is made from the config alone, wherever something is asked of it. The methods below that take `pair` are
    called by that model (train.model.pair.PairModel): its towers are `pair.image` and `pair.text`, the temperature is
    `pair.log_scale`, and the term's heads are attributes of it. Everything but `enabled` and `loss` has a default: all
    outputs are gathered, and nothing else is done. A term is added by its class, a dataclass in ModelConfig and a row
    of train.terms.TERMS.
    """

    scalars: ClassVar[tuple[str, ...]] = ()
    """Names of the outputs that do not belong to a row; they are the same for every micro-batch."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    @property
    @abstractmethod
    def enabled(self) -> bool:
        """Whether the config asks for this term."""

    @property
    def changes_embedding(self) -> bool:
        """Whether `from_image` and `from_text` give back another "image" and "text", so that evaluation needs them."""
        return False

    def check(self) -> None:  # noqa: B027
        """Raises ValueError where fields of the config do not fit each other; called for terms that are off, too."""

    def extras(self) -> dict[str, Any]:
        """Fields of data_pipeline's Extras: what the loader has to add to a micro-batch."""
        return {}

    def blank_inputs(self, batch: MicroBatch) -> dict[str, Any]:
        """The fields of a micro-batch that those extras fill, for a blank one."""
        return {}

    def heads(self, pair: Any) -> dict[str, Heads]:
        """Fresh modules and parameters by the names that they get in the model, for each branch of it.

        Branches: "image" and "text", which learn as the projection of that tower; "shared", as the temperature.

        Raises:
            ValueError: the towers do not have what the config asks for.
        """
        return {}

    def log_scales(self, pair: Any) -> list[nn.Parameter]:
        """Heads that are logarithms of a scale and have to stay within the range of the temperature's."""
        return []

    def taps(self, pair: Any, tower: str) -> Sequence[str]:
        """Names of modules within the tower "image" or "text" whose outputs `from_image` or `from_text` needs."""
        return ()

    def from_image(self, pair: Any, encoded: Encoded) -> Outputs:
        """More outputs of the pass of the image tower."""
        return {}

    def from_text(self, pair: Any, encoded: Encoded) -> Outputs:
        """More outputs of the pass of the text tower."""
        return {}

    def after_images(self, pair: Any, batches: Sequence[MicroBatch]) -> Outputs:
        """Outputs of further passes; after the pair's own, whose dropout is then that of a run without the term."""
        return {}

    def after_text(self, pair: Any, batch: MicroBatch) -> Outputs:
        """The same for captions."""
        return {}

    def scalar_outputs(self, pair: Any) -> Outputs:
        """The outputs that `scalars` names; 1-D, since DeepSpeed fails on tensors without dimensions."""
        return {}

    def gathers(self, output: str, config: LossConfig) -> bool:
        """Whether `loss` needs the rows of all ranks of this output; asked for every output of the model, by its name.

        Of an output that no part of the loss needs of all ranks, `loss` gets this rank's rows alone.
        """
        return True

    @abstractmethod
    def loss(self, outputs: Mapping[str, Tensor], rows: Rows, config: LossConfig) -> tuple[Tensor, Outputs]:
        """What is added to this rank's loss, and parts of it by the names of their metrics.

        Args:
            outputs: rows of all ranks of the outputs that `gathers` asks for, and scalars.
            rows: this rank's; the mean over ranks of what is returned is the term of the global batch.
            config: the loss of the pair.
        """


def check_weight(field: str, weight: float, tower: str, locked_until: int) -> None:
    """Raises ValueError where a term's weight is below 0, or the only tower that the term trains never learns."""
    if weight < 0:
        raise ValueError(f"{field} is {weight}: a weight, 0 is off")
    if weight and locked_until < 0:
        raise ValueError(
            f"{field} is {weight}, but model.{tower}.locked_until -1 keeps the tower from learning: set one of them "
            "to 0"
        )
