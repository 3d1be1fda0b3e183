"""A run's checkpoints: a snapshot in the thread that trains, the rest in a thread of its own."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path

import psutil

from train import distributed
from train.checkpoint import Tensors, TrainState
from train.config import RunConfig
from train.engine.base import Engine
from train.engine.ema import WeightAverage
from train.engine.host import HostMemory
from train.run.watch import FULL, memory, peak_memory
from train.saving.write import Content, begin, contents, write

LONG_SECONDS = 1.0
"""From which on it is said that a save had to wait for the one before it."""
Memory = Mapping[str, HostMemory]


class Saver:
    """Writes a run's checkpoints while it trains; one at a time. A context: a save is over when it is left.

    All ranks call its methods together, in the thread that trains.

    Args:
        text_files: of the text encoder and its tokenizer, from `train.model.text_files` or `saved_text_files`.
        say: shows a line on the screen.
    """

    def __init__(
        self, run_dir: Path, config: RunConfig, text_files: Mapping[str, bytes], say: Callable[[str], None]
    ) -> None:
        self.run_dir, self.config, self.text_files, self.say = run_dir, config, text_files, say
        self._memory: Memory = {}
        self._in_foreground = False
        self._step: int | None = None
        self._thread: threading.Thread | None = None
        self._problem = ""

    @property
    def failed(self) -> bool:
        """Whether this rank knows of a save that has failed: for what ranks agree on after a step; then `check`."""
        return bool(self._problem)

    def save(self, engine: Engine, average: WeightAverage, state: TrainState, best: bool = False) -> None:
        """Take a snapshot, and have it written; where memory has no room for it beside training, wait for that.

        Args:
            best: whether this step's is to be named the best one.

        Raises:
            ValueError: on all ranks, where this save cannot be begun or the one before it has failed.
        """
        before, began = self._step, time.monotonic()
        self.wait()
        if (waited := time.monotonic() - began) > LONG_SECONDS:
            self.say(
                f"step {state.step} waited {waited:.1f} s for the checkpoint of step {before} to be written: "
                "with a larger checkpoint.every it need not"
            )
        room = self._room(engine, average)
        tensors = collect(engine, average, state, room)
        problem = begin(self.run_dir, state.step) if distributed.is_main() else ""
        problem, beside = distributed.broadcast_object((problem, bool(room)))
        if problem:
            raise ValueError(problem)
        self._step = state.step
        if distributed.is_main():
            content = contents(tensors, state, self.config, self.text_files)
            arguments = (state.step, content, best, [part.arrival() for part in room.values()])
            # A daemon: whoever sends a second INT does not want to wait for it.
            self._thread = threading.Thread(target=self._write, args=arguments, name="duet-save", daemon=True)
            self._thread.start()
        if not beside:
            self.wait()

    def wait(self) -> None:
        """Until the save that is under way is over. Raises ValueError on all ranks, where it has failed."""
        if self._step is None:
            return
        self._join()
        self._step = None
        self.check()

    def check(self) -> None:
        """Raises ValueError on all ranks, where a save has failed; earlier checkpoints are as they were."""
        if problem := distributed.broadcast_object(self._problem):
            self._problem = ""
            raise ValueError(problem)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, Exception):
            self._join()
            if self._problem:  # the ranks end for another reason
                print(self._problem, file=sys.stderr, flush=True)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, step: int, content: Content, best: bool, arrival: list[Callable[[], None]]) -> None:
        problem = f"checkpoint of step {step} could not be written: see above"  # unless it turns out otherwise
        try:
            for wait in arrival:
                wait()
            problem = write(self.run_dir, step, content, self.config.checkpoint.keep, best)
        finally:
            self._problem = problem

    def _room(self, engine: Engine, average: WeightAverage) -> Memory:
        """Where a snapshot goes; nowhere, on ranks other than 0 and where there is no room."""
        if not distributed.is_main() or self._memory:
            return self._memory
        needed = engine.saved_bytes(copies=2 if average.decay else 1)
        if fits(needed):
            self._memory = {part.name: HostMemory() for part in fields(Tensors)}
        elif not self._in_foreground:
            self._in_foreground = True
            self.say(
                f"training waits until each checkpoint is written: memory has no room for another {needed / 1e9:.1f} GB"
            )
        return self._memory


def fits(needed: int) -> bool:
    """Whether this host has room for so many bytes, when its ranks take what they took at their peak."""
    used, whole = memory()
    more = max(0, peak_memory() - psutil.Process().memory_info().rss)
    return used + needed + int(os.environ.get("LOCAL_WORLD_SIZE", "1")) * more < FULL * whole


def collect(engine: Engine, average: WeightAverage, state: TrainState, room: Memory | None = None) -> Tensors:
    """What a checkpoint holds of a prepared engine; notes its updates in `state`; a collective.

    room: what it is copied into, by field of Tensors; what is absent there gets memory of its own.
    """
    room = room or {}
    state.updates = engine.updates()
    return Tensors(
        engine.weights(room.get("model")), engine.moments(room.get("optimizer")), average.state(room.get("ema"))
    )
