"""The run directory: who may go on in it, and whether its run is finished.

runs/<name>/  config.yaml  metrics.jsonl  ledger.jsonl  results.json  checkpoints/  report/  wandb/
"""

from __future__ import annotations

import json
from pathlib import Path

from train import cli, distributed
from train.config import RunConfig

RESULTS = "results.json"


def open_run(config: RunConfig) -> Path:
    """Make the run's directory, or go on in it where it holds the same experiment; a collective.

    Raises:
        ValueError: on all ranks, where the directory holds a run with another configuration (with the differences),
            or cannot be written.
    """
    run_dir = Path(config.runs_dir) / config.name
    problem = None
    if distributed.is_main():
        try:
            problem = _claim(run_dir, config)
        except (OSError, ValueError) as error:
            problem = f"--runs_dir, --name: {run_dir} cannot be used: {error}"
    if problem := distributed.broadcast_object(problem):
        raise ValueError(problem)
    return run_dir


def read_results(run_dir: Path) -> dict | None:
    """The results of a finished run; None where it is not finished."""
    path = run_dir / RESULTS
    return json.loads(path.read_text()) if path.is_file() else None


def write_results(run_dir: Path, results: dict) -> None:
    """Mark the run as finished; complete or not there."""
    temporary = run_dir / f"{RESULTS}.part"
    temporary.write_text(json.dumps(results, indent=2) + "\n")
    temporary.replace(run_dir / RESULTS)


def _claim(run_dir: Path, config: RunConfig) -> str | None:
    """Why this configuration may not go on in the directory; None where it may."""
    path = run_dir / "config.yaml"
    if path.is_file():
        changed = cli.differences(cli.load(path), config)
        if changed:
            lines = "\n  ".join(changed)
            return (
                f"--name {config.name}: {run_dir} holds a run with another configuration:\n  {lines}\n"
                "Choose another --name, or give the fields their values of before to go on with that run."
            )
    run_dir.mkdir(parents=True, exist_ok=True)
    temporary = run_dir / "config.yaml.part"
    temporary.write_text(cli.to_yaml(config))
    temporary.replace(path)
    return None
