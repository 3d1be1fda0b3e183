"""What a stage is given: the device, its time, and where its rows go."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.gpu.results import last_lines, write_json

Row = dict[str, Any]
SOFT = 0.9
"""Share of a stage's time after which it begins no further row."""


class Bench:
    """One stage of the run, in a process of its own.

    Args:
        path: the file that holds the rows; written again after each of them.
        seconds: how long the stage may take; then its process is ended.
        tiny: the small sizes that try the script on a CPU.
    """

    def __init__(self, path: Path, seconds: float, tiny: bool) -> None:
        self.path, self.tiny = path, tiny
        self.deadline = time.monotonic() + SOFT * seconds
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.rows: dict[str, Row] = {}

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def row(self, name: str, measure: Callable[[], Row]) -> Row:
        """Keep what `measure` returns under this name; of its failure, the last lines of the traceback."""
        began = time.monotonic()
        if began > self.deadline:
            self.rows[name] = {"error": "no time was left"}
        else:
            try:
                if self.on_gpu:
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                self.rows[name] = measure()
            except Exception:
                self.rows[name] = {"error": last_lines(traceback.format_exc())}
            self.rows[name]["took_s"] = time.monotonic() - began
        write_json(self.path, self.rows)
        if "error" in self.rows[name] and self.on_gpu:
            # What did not fit is not to keep the next from fitting. Where the GPU itself fails, this ends the stage.
            torch.cuda.empty_cache()
        return self.rows[name]

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def peak_gb(self) -> float | None:
        """Most memory that tensors have taken on the device since the row began, in 1e9 bytes."""
        return torch.cuda.max_memory_allocated() / 1e9 if self.on_gpu else None

    def time(self, run: Callable[[], Any], budget: float = 1.0, most: int = 100, warm: int = 2) -> tuple[float, float]:
        """Seconds of a call, of calls that follow each other without a wait; and how far two halves of them differ.

        Args:
            budget: about how many seconds all calls together take.
            most: largest number of calls of each half.
            warm: calls beforehand, the last of which says how many fit into the budget.
        """
        if self.tiny:
            budget, warm = 0.0, 1
        for _ in range(warm):
            self.wait()
            began = time.perf_counter()
            run()
            self.wait()
            once = time.perf_counter() - began
        count = max(1, min(most, int(budget / 2 / once)))
        halves = []
        for _ in range(2):
            began = time.perf_counter()
            for _ in range(count):
                run()
            self.wait()
            halves.append((time.perf_counter() - began) / count)
        mean = sum(halves) / 2
        return mean, abs(halves[0] - halves[1]) / mean
