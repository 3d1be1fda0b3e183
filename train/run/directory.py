"""The run directory: who may resume the run in it, and whether it is finished.

runs/<name>/  config.yaml  parent.json  metrics.jsonl  ledger.jsonl  results.json  checkpoints/  report/  wandb/
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from data_pipeline.storage.files import own_lock, write_atomically
from train import cli, distributed
from train.config import RunConfig
from train.run.lineage import as_recorded, first_step
from train.run.records import METRICS, RESULTS, read_records

CONFIG = "config.yaml"
# Fields that may be spelled in another way: what they name is compared with what the checkpoint holds.
BY_CONTENT = ("model.text.name:", "model.text.tokenizer:")
# Fields with which a tower may have other parameters.
OF_TOWERS = ("model.image.name", "data.image_size")
LOCK = ".lock"
LOCK_SECONDS = 10
"""How long a run waits for another process, which may be about to end, to leave its directory."""


@contextmanager
def open_run(config: RunConfig) -> Iterator[Path]:
    """Make the run's directory, or resume the run in it where that is the same experiment; a collective.

    While the block runs, no other process may open it.

    Raises:
        ValueError: on all ranks, where the directory holds a run with another configuration (with the differences)
            that has made a step, where another process is training in it, or where it cannot be written.
    """
    run_dir = Path(config.runs_dir) / config.name
    problem = None
    with ExitStack() as stack:
        if distributed.is_main():
            try:
                run_dir.mkdir(parents=True, exist_ok=True)
                if stack.enter_context(own_lock(run_dir / LOCK, LOCK_SECONDS)):
                    problem = _claim(run_dir, config)
                else:
                    problem = f"name {config.name}: another process is training in {run_dir}: stop it or wait for it"
            except (OSError, ValueError) as error:
                problem = f"runs_dir, `name`: {run_dir} cannot be used: {error}"
        if problem := distributed.broadcast_object(problem):
            raise ValueError(problem)
        yield run_dir


def read_results(run_dir: Path) -> dict | None:
    """The results of a finished run; None where it is not finished."""
    path = run_dir / RESULTS
    return json.loads(path.read_text()) if path.is_file() else None


def write_results(run_dir: Path, results: dict) -> None:
    """Mark the run as finished; complete or not there."""
    write_atomically(run_dir / RESULTS, json.dumps(results, indent=2) + "\n")


def record_config(run_dir: Path, config: RunConfig) -> None:
    """Write the resolved configuration of a run that starts or resumes; once nothing can refuse it any more.

    Raises:
        ValueError: on all ranks, where it cannot be written.
    """
    distributed.on_main(lambda: write_atomically(run_dir / CONFIG, cli.to_yaml(config)))


def _claim(run_dir: Path, config: RunConfig) -> str | None:
    """Why this configuration may not use the directory; None where it may."""
    if conflict := conflict_with(run_dir, config):
        further = onward(run_dir, other_towers=any(f"\n  {field}: " in conflict for field in OF_TOWERS))
        return f"{conflict}\nSet these fields back to resume that run, or choose another `name`{further}."
    return _lost_checkpoints(run_dir, config)


def onward(run_dir: Path, other_towers: bool = False) -> str:
    """How to start from what a run has learned, for the end of a message; empty where it has saved nothing.

    other_towers: whether its optimizer state may not fit.
    """
    if not any(run_dir.glob("checkpoints/step_*")):
        return ""
    if other_towers:
        return f", under which parent.take weights, parent.run {run_dir} starts from those towers of that run that fit"
    longer = ", with more train.steps" if read_results(run_dir) else ""
    return f", under which parent.run {run_dir} starts from where that run has come{longer}"


def conflict_with(run_dir: Path, config: RunConfig) -> str:
    """How the run that has started there differs from this one; empty where there is none, or it is the same."""
    path = run_dir / CONFIG
    if not path.is_file() or not has_started(run_dir):
        return ""
    before = cli.load(path)
    changed = cli.differences(before, as_recorded(config, before))
    shown = (line for line in changed if not line.startswith(BY_CONTENT))
    lines = "\n  ".join(re.sub(r"^(\w+):", r"`\1`:", line) for line in shown)
    return f"name {config.name}: {run_dir} holds a run with another configuration:\n  {lines}" if lines else ""


def _lost_checkpoints(run_dir: Path, config: RunConfig) -> str | None:
    """What to say where a run's checkpoints are all gone, since beginning again would erase its metrics; else None."""
    checkpoints, path = run_dir / "checkpoints", run_dir / CONFIG
    if read_results(run_dir) or any(checkpoints.glob("step_*")) or not path.is_file():
        return None
    step = max((record["step"] for record in read_records(run_dir / METRICS)), default=0)
    before = cli.load(path)
    every = before.checkpoint.every
    # A step is logged before it is saved, so that the one after it shows that there was a checkpoint, or one begun.
    is_past = every > 0 and step > (first_step(run_dir, before) // every + 1) * every
    if not ((checkpoints / "latest").is_file() or (is_past and not any(checkpoints.glob(".step_*.part")))):
        return None
    return (
        f"name {config.name}: {run_dir / METRICS} has {step} steps, but there is no checkpoint in {checkpoints}. Put "
        f"the checkpoints back to resume, choose another `name`, or move {run_dir} away to begin again under this one"
    )


def has_started(run_dir: Path) -> bool:
    """Whether a step has been made there: what was refused before its first step has no claim to the name."""
    finished = (run_dir / RESULTS).is_file()
    return finished or any(run_dir.glob("checkpoints/step_*")) or bool(read_records(run_dir / METRICS))
