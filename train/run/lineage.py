"""Which run a run started from, and what was changed: `parent` of its config, and parent.json in its directory.

A run is a function of its config and, where it has a parent, of one checkpoint of that: config.yaml names its step
even where the newest or the best one was asked for, and parent.json holds the hash of its files. Once the run has a
checkpoint of its own, nothing reads the parent again.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.storage.files import write_atomically
from train import distributed
from train.config import ParentConfig, RunConfig

RECORD = "parent.json"


def in_full(parent: ParentConfig) -> ParentConfig:
    """The same with `run` as a run directory, where it was one of its checkpoints."""
    path = Path(parent.run)
    if path.parent.name == "checkpoints" and re.fullmatch(r"step_\d{8}", path.name):
        return replace(parent, run=str(path.parent.parent), step=str(int(path.name.removeprefix("step_"))))
    return parent


def as_recorded(config: RunConfig, recorded: RunConfig) -> RunConfig:
    """The configuration with the parent as `recorded` has it, where it means the same one; else unchanged.

    The newest or best checkpoint of a parent is the one that was taken when the run began.
    """
    given, kept = in_full(config.parent), recorded.parent
    if not given.run or not kept.run or Path(given.run).resolve() != Path(kept.run).resolve():
        return config
    if not given.step.isdecimal() or int(given.step) == int(kept.step or -1):
        given = replace(given, run=kept.run, step=kept.step)
    return replace(config, parent=given)


def read_record(run_dir: Path) -> dict[str, Any]:
    """What was recorded of the parent when the run began; empty for a run without one.

    run: its directory; step: of the checkpoint; checkpoint: sha256 over the hashes of its files; wandb: its W&B run;
    differences: one line for every field of the experiment that is another one.
    """
    path = run_dir / RECORD
    return json.loads(path.read_text()) if path.is_file() else {}


def write_record(run_dir: Path, record: dict[str, Any]) -> None:
    """Put the record into the run's directory; without one, drop what a start that was refused has left.

    Raises:
        ValueError: on all ranks, where it cannot be written.
    """

    def write() -> None:
        if record:
            write_atomically(run_dir / RECORD, json.dumps(record, indent=2) + "\n")
        else:
            (run_dir / RECORD).unlink(missing_ok=True)

    distributed.on_main(write)


def first_step(run_dir: Path, config: RunConfig) -> int:
    """The step at which the run in a directory began: that of its parent, or 0."""
    return int(read_record(run_dir).get("step", 0)) if config.parent.run and config.parent.take == "all" else 0
