"""How fast a run is, and where its time goes: the split of a step, MFU, peak memory, profiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.batch import MicroBatch
from train.config import RunConfig
from train.model.flops import PairFlops, peak_tflops
from train.model.pair import PairModel
from train.run.profiler import StepProfiler
from train.run.watch import peak_memory
from train.timing import StepClock


class Speed:
    """Measures steps of this process. Every `tracking.log_every` steps it adds to a step's metrics, of this rank:

    time/<part>: seconds of the step before, by train.timing's parts. peak_memory_gb: the most that the process has
    taken until then, in 1e9 bytes: on a GPU of tensors, else of all. mfu: the share of the stated peak that the
    model's FLOPs are.

    Args:
        precision: bf16 or no, for the peak.
        total_steps: of the run.
        say: shows a line on the screen.

    Raises:
        ValueError: `tracking.profile` is beyond the run.
    """

    def __init__(
        self,
        config: RunConfig,
        directory: Path,
        clock: StepClock,
        model: PairModel,
        precision: str,
        total_steps: int,
        say: Callable[[str], None],
    ):
        tracking, device = config.tracking, model.mean.device
        self.every, self.clock, self.device = tracking.log_every, clock, device
        self.profiler = StepProfiler(directory, tracking.profile, tracking.profile_ranks, device, say)
        if self.profiler.last > total_steps:
            raise ValueError(
                f"tracking.profile {tracking.profile}: the run has {total_steps} steps; give steps of it, or more "
                "train.steps"
            )
        self.peak = 1e12 * (tracking.peak_tflops or peak_tflops(precision) or 0.0)
        self.flops = PairFlops(model) if self.peak else None
        if self.peak:
            named = "as tracking.peak_tflops says" if tracking.peak_tflops else torch.cuda.get_device_name(device)
            say(f"mfu is the share of {self.peak / 1e12:g} TFLOP/s ({named})")

    def begin(self, step: int) -> None:
        """Step number `step`, from 1, begins."""
        self.clock.begin(self.shown(step + 1))
        self.profiler.before(step)

    def count(self, step: int, micro_batches: Sequence[MicroBatch]) -> dict[str, Tensor]:
        """What `end` needs of a step's data, on their device, to be read together with what else is read."""
        return {"mfu": self.flops.of(micro_batches)} if self.flops and self.shown(step) else {}

    def end(self, step: int, metrics: dict[str, Any], seconds: float) -> dict[str, float]:
        """Step number `step` is over.

        Args:
            metrics: with what `count` counted; seconds: of the step.

        Returns:
            What is to be logged of it.
        """
        split = self.clock.end()
        self.profiler.after(step)
        if not self.shown(step):
            return {}
        found = {f"time/{part}": value for part, value in split.items()} | {"peak_memory_gb": self._peak_memory() / 1e9}
        if "mfu" in metrics:
            found["mfu"] = metrics["mfu"] / (seconds * self.peak)
        return found

    def shown(self, step: int) -> bool:
        """Whether the metrics of step number `step` have more than every step's."""
        return step % self.every == 0

    def _peak_memory(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return peak_memory()
