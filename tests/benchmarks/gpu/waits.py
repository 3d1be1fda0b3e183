"""Where the host waits for the device in a training step, by the line that makes it wait."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.gpu.bench import Bench, Row
from tests.benchmarks.gpu.towers import Shape, make_config, make_engine, make_step
from tests.support.syncs import Syncs
from train.config import RunConfig
from train.engine.base import Engine
from train.step import training_step

ROOT = str(Path(__file__).parents[3])
MESSAGE = "called a synchronizing CUDA operation"


class DeviceSyncs:
    """As tests.support.syncs.Syncs, on a GPU: torch itself warns where it waits, and the stack says where that is."""

    def __init__(self) -> None:
        self.at: Counter[str] = Counter()

    def __enter__(self) -> DeviceSyncs:
        self.catch = warnings.catch_warnings()
        self.catch.__enter__()
        warnings.simplefilter("always")
        warnings.showwarning = self._note
        torch.cuda.set_sync_debug_mode("warn")
        return self

    def __exit__(self, *error: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self.catch.__exit__(*error)

    def _note(self, message: Warning | str, category: type, filename: str, line: int, *_: Any) -> None:
        if MESSAGE not in str(message):
            return
        ours = [frame for frame in traceback.extract_stack() if _is_ours(frame.filename)]
        within = f" in {Path(filename).name}:{line}" if not _is_ours(filename) else ""
        # A thread of autograd has no line of the repository.
        place = f"{Path(ours[-1].filename).relative_to(ROOT)}:{ours[-1].lineno}" if ours else "backward"
        self.at[place + within] += 1


def _is_ours(filename: str) -> bool:
    return filename.startswith(ROOT) and "/.venv/" not in filename and filename != __file__


def run(bench: Bench) -> None:
    config = make_config(bench)
    engine = make_engine(config, "bf16")
    size = 4 if bench.tiny else 64
    cases = {
        "resident": (Shape(size, 2, 2), False, False),
        "cached": (Shape(size, 2, 1), False, False),
        "cached, mask_duplicates": (Shape(size, 2, 1), True, False),
        "cached, measured": (Shape(size, 2, 1), False, True),
    }
    for name, case in cases.items():
        bench.row(name, lambda case=case: count(bench, engine, config, *case))
    if bench.on_gpu:
        bench.row("of a product's .item(), as a check", check)


def count(bench: Bench, engine: Engine, config: RunConfig, shape: Shape, mask_duplicates: bool, measure: bool) -> Row:
    config.loss.mask_duplicates = mask_duplicates
    batches = make_step(config, shape, True, engine.device)
    training_step(engine, batches, config, measure)
    with DeviceSyncs() if bench.on_gpu else Syncs() as syncs:
        training_step(engine, batches, config, measure)
    return {"waits": sum(syncs.at.values()), "at": dict(syncs.at.most_common())}


def check() -> Row:
    """That a wait is seen at all: two of them, and none of the addition."""
    x = torch.ones(4, device="cuda")
    with DeviceSyncs() as syncs:
        x = x + 1
        x.sum().item()
        x.cpu()
    return {"waits": sum(syncs.at.values())}
