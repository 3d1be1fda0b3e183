"""Where the time of a step goes: its parts, measured in one of many steps.

Any function says which part it is by `with section("gather"):` or as a decorator; while no step is measured, that costs
about as much as a call. Time counts for the innermost section, so that the parts add up to the step. On a GPU they are
measured by events on its stream, which are read a step later: nobody waits for them.
"""

from __future__ import annotations

import threading
import time
from contextlib import ContextDecorator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable, _profiler_enabled  # type: ignore[attr-defined]
from torch.profiler import record_function

PARTS = ("wait", "copy", "forward", "gather", "loss", "backward", "exchange", "optimizer", "other")
"""wait: for data. copy: of the batch to the device. gather: features of all ranks, and their gradients back. exchange:
what is left of the exchange of gradients and statistics once the backward pass has computed its last; what a backward
pass exchanges while it computes is in `backward`."""
REST = "other"

_clock: StepClock | None = None
_regions: list[record_function] = []


class StepClock:
    """Measures steps of this process; within it, as a context, sections are its parts.

    Args:
        device: where the steps compute.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._open: list[str] = []
        self._marks: list[tuple[str, Any]] = []
        self._before: list[tuple[str, Any]] = []
        self._thread = 0

    def __enter__(self) -> StepClock:
        return self

    def __exit__(self, *_: Any) -> None:
        self._listen(False)

    def begin(self, measure: bool) -> None:
        """A step begins in this thread; measure: take its time apart."""
        self._open, self._marks, self._thread = [REST], [], threading.get_ident()
        self._listen(measure)
        if measure:
            self.mark(REST)

    def end(self) -> dict[str, float]:
        """The step ends.

        Returns:
            Seconds by part of the step before it, if that was measured: on a GPU it is over by now.
        """
        if self._marks:
            self.mark("")
        self._listen(False)
        before, self._before = self._before, self._marks
        self._marks = []
        return self._seconds(before)

    def enter(self, part: str) -> None:
        """Another part begins inside of the one that is open."""
        if threading.get_ident() == self._thread:  # no other thread is a part of the step
            self._open.append(part)
            self.mark(part)

    def leave(self) -> None:
        """The innermost part ends."""
        if threading.get_ident() == self._thread:
            self._open.pop()
            self.mark(self._open[-1])

    def turn(self, part: str) -> None:
        """What is left of the innermost part counts as another one."""
        self._open[-1] = part
        self.mark(part)

    def mark(self, part: str) -> None:
        """From now on time counts for this part."""
        if not self.on_gpu:
            self._marks.append((part, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((part, event))

    def _listen(self, on: bool) -> None:
        global _clock
        if on or _clock is self:
            _clock = self if on else None

    def _seconds(self, marks: list[tuple[str, Any]]) -> dict[str, float]:
        if not marks:
            return {}
        seconds = dict.fromkeys(PARTS, 0.0)
        for (part, first), (_, last) in pairwise(marks):
            seconds[part] += first.elapsed_time(last) / 1e3 if self.on_gpu else last - first
        return seconds


class section(ContextDecorator):
    """A part of the step: one of PARTS. In a profile it is a region of that name."""

    def __init__(self, part: str) -> None:
        assert part in PARTS, part
        self.part = part

    def __enter__(self) -> None:
        if _clock is not None:
            _clock.enter(self.part)
        if _profiler_enabled():
            _regions.append(record_function(self.part))
            _regions[-1].__enter__()

    def __exit__(self, *error: Any) -> None:
        if _regions:
            _regions.pop().__exit__(*error)
        if _clock is not None:
            _clock.leave()


def exchange_from_end_of(loss: Tensor) -> None:
    """Before the backward pass of `loss`, inside of its section: what it still does when all gradients are computed
    counts as exchange. There DDP and DeepSpeed wait for what they have sent."""
    clock = _clock
    if clock is None:
        return

    def queue(_: Tensor) -> None:
        # Callbacks run in their order at the end of the pass; DDP's own comes with its last gradient.
        Variable._execution_engine.queue_callback(lambda: clock.turn("exchange"))

    loss.register_hook(queue)
