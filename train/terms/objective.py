"""What a step minimizes: the contrastive loss of the embedding, and the terms that the config adds to it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from train.config import RunConfig
from train.loss.full import towers_gathered
from train.loss.gradients import SCALARS, pair_loss
from train.loss.ids import Rows
from train.terms import enabled
from train.terms.base import Outputs


class Objective:
    """The loss of a run as a function of the model's outputs, for `loss_gradients`.

    scalars: names of the outputs that do not belong to a row.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config.loss
        self.terms = enabled(config.model)
        self.scalars = (*SCALARS, *(name for term in self.terms for name in term.scalars))

    def gathers(self, output: str) -> bool:
        """Whether any part of the loss needs the rows of all ranks of this output of the model."""
        return output in towers_gathered(self.config) or any(term.gathers(output, self.config) for term in self.terms)

    def __call__(self, outputs: Mapping[str, Tensor], rows: Rows) -> tuple[Tensor, Outputs]:
        """This rank's loss, whose mean over ranks is the loss of the global batch, and parts of it by their metrics.

        The parts: `loss`, that of the embedding; with terms also what each of them names, and the sum, loss/total.
        """
        total, parts = pair_loss(self.config, outputs, rows)
        if not self.terms:
            return total, parts
        for term in self.terms:
            added, more = term.loss(outputs, rows, self.config)
            total, parts = total + added, parts | more
        return total, parts | {"loss/total": total}
