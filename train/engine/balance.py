"""Modality balance: the learning rates of the two branches adapt to the gradients that the loss sends into each.

Which form, and why. OGM-GE (CVPR 2022) and GradNorm (ICML 2018) multiply a branch's gradient, or its loss, by a
coefficient. Under AdamW that cancels: the update is the mean gradient over the root of its mean square, so both are
multiplied alike, and only eps and clipping would notice. So the coefficient goes onto the learning rate, as the trust
ratio of LARS (arXiv 1708.03888) does, one for each branch instead of one for each layer. From GradNorm are the aim,
equal magnitudes up to an exponent, and that the coefficients are normalized (here: their product is 1, so that the
geometric mean of the rates stays what the schedule says); from OGM-GE, that it is done on the fly, against the branch
that dominates. There is no second loss and no learned coefficient.

With s the measure of a branch (`balance.kind`) and q = s_image / s_text, smoothed as a logarithm, the image branch has
the multiplier (q / reference)^(-strength / 2), the text branch its inverse, both within [1/max, max]. The rate of a
branch is the schedule, a pure function of the step, times its multiplier, which is part of the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from train.config import TOWERS, RunConfig


class Balance:
    """The controller. A branch is a tower with its projection: what the loss sends into the tower goes through it.

    Args:
        config: the run's.
        state: what a resumed run starts from, changed in place; empty at the start of a run.

    Where a tower is locked, there is nothing to balance: both multipliers are 1 and nothing is measured.
    """

    def __init__(self, config: RunConfig, state: dict[str, float]):
        self.config, self.state = config.balance, state
        locked = (config.model.image.locked_until, config.model.text.locked_until)
        self.start = math.inf if min(locked) < 0 else max(locked)
        # The gradients of the first steps say little of those to come.
        self.settled = self.start + config.optim.warmup_steps

    def due(self, step: int) -> bool:
        """Whether the towers are to be measured in this step, counted from 0."""
        return self.config.kind != "off" and step >= self.start and (step + 1) % self.config.every == 0

    def multipliers(self) -> dict[str, float]:
        """Factors on the learning rates of "image" and "text" in the next step; empty where balance is off."""
        if self.config.kind == "off":
            return {}
        return {tower: self.state.get(tower, 1.0) for tower in TOWERS}

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take what was measured in this step into the multipliers of the next ones.

        A step that was skipped, or in which a tower got no gradient or made no update, is left out.
        """
        if not self.due(step) or "grad_norm/image" not in metrics:
            return
        measures = [self._measure(tower, metrics) for tower in TOWERS]
        if not all(0 < value < math.inf for value in measures):
            return
        state, keep = self.state, self.config.smoothing
        state["weight"] = keep * state.get("weight", 0.0) + (1 - keep)
        state["sum"] = keep * state.get("sum", 0.0) + (1 - keep) * (math.log(measures[0]) - math.log(measures[1]))
        ratio = state["sum"] / state["weight"]
        if self.config.reference == "start" and "reference" not in state:
            if step + 1 < self.settled:
                return
            state["reference"] = ratio
        bound = math.log(self.config.max)
        share = -self.config.strength * (ratio - state.get("reference", 0.0)) / 2
        image = math.exp(min(bound, max(-bound, share)))
        state["image"], state["text"] = _within(image, self.config.max), _within(1 / image, self.config.max)

    def _measure(self, tower: str, metrics: Mapping[str, float]) -> float:
        gradient, weight = metrics[f"grad_norm/{tower}"], metrics[f"weight_norm/{tower}"]
        update = metrics[f"update_ratio/{tower}"] / self.state.get(tower, 1.0)  # what it would be without balance
        if self.config.kind == "gradient":
            return gradient / weight if weight else 0.0
        return update if self.config.kind == "update" else gradient * update * weight


def _within(multiplier: float, largest: float) -> float:
    """Rounding included."""
    return min(largest, max(1 / largest, multiplier))
