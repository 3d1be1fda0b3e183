"""Evaluation of a run by hand, by the code that evaluates in training.

python -m train.evaluate --run runs/quickstart --task retrieval --data data/val --json
python -m train.evaluate --run runs/quickstart --step best --corrupt noise,blur
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

from train import cli
from train.checkpoint import find, load_model, load_state
from train.config import EvalTask, RunConfig
from train.distributed import is_main
from train.engine.precision import autocast
from train.engine.start import start
from train.evaluation import TASKS, build_task, find_task
from train.evaluation.encode import Encoder
from train.evaluation.robustness import CORRUPTIONS, Curves, chosen, curves
from train.evaluation.suite import given_tasks
from train.evaluation.task import Task
from train.model.text_files import own_tokenizer


@dataclass
class Found:
    """What an evaluation has found, the same on every process."""

    task: Task
    metrics: dict[str, float]
    precision: str
    """Of the forward passes."""
    checkpoint: Path
    curves: Curves
    """Of corrupted images, where they are asked for."""


def run_task(options: argparse.Namespace) -> Found:
    """Evaluate a model of the run.

    Raises:
        ValueError: naming the option that is missing or wrong, or what the data lacks.
    """
    kinds = chosen(options.corrupt) if options.corrupt else []
    if options.workers is not None and options.workers < 0:
        raise ValueError(f"workers {options.workers}: 0 (load in this process) or more")
    accelerator = start()
    path = find(options.run, options.step)
    model, config = load_model(path)
    precision, why = chosen_precision(options.precision, load_state(path).precision, accelerator.mixed_precision)
    task = build_task(described(options, config))
    if options.workers is not None:
        config.data.workers = options.workers
    tokenizer = own_tokenizer(model, config)
    model.to(accelerator.device)
    encoder = Encoder(model, config, tokenizer, autocast=partial(autocast, accelerator.device, precision))
    if is_main():
        print(f"{path}, in {precision}{why}", file=sys.stderr)
    metrics = task.measure(encoder).metrics
    return Found(task, metrics, precision, path, curves(task, encoder, kinds, options.seed))


def chosen_precision(asked: str, recorded: str, launched: str) -> tuple[str, str]:
    """fp32 or bf16, and in words why: as asked, else as the run was trained, else as the launcher says.

    recorded, launched: in accelerate's words, in which fp32 is `no`; empty where it is not known.
    """
    names = {"no": "fp32"}
    trained = names.get(recorded, recorded)
    if asked:
        return asked, f" (--precision; the run was trained in {trained})" if trained not in ("", asked) else ""
    if trained:
        return trained, ", as the run was trained (--precision for another)"
    return names.get(launched, launched), " (the checkpoint does not say how it was trained; --precision for another)"


def described(options: argparse.Namespace, config: RunConfig) -> EvalTask:
    """The evaluation that the command line asks for: one of the run's by its name, or a kind of TASKS; then options."""
    known = given_tasks(config)
    if options.task not in ("", *TASKS, *known):
        raise ValueError(f"task {options.task}: give one of {', '.join([*TASKS, *known])}")
    given = known.get(options.task) or EvalTask(name=options.task, task=options.task, data=config.data.val)
    own = {name: getattr(options, name) for name in ("data", *own_options())}
    return replace(given, **{name: value for name, value in own.items() if value is not None})


def make_parser() -> argparse.ArgumentParser:
    """The options that all tasks share, and those that each row of TASKS reads."""
    parser = argparse.ArgumentParser(
        prog="python -m train.evaluate", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--run", required=True, help="run directory, or one checkpoint of it")
    parser.add_argument("--step", default="", help="best, or a number of steps; default: the newest checkpoint")
    kinds = ", ".join(TASKS)
    parser.add_argument(
        "--task",
        default="",
        help=f"{kinds}, or the name of one of the run's eval.tasks; default: as dataset_type.txt beside the data says, "
        "else retrieval",
    )
    parser.add_argument("--data", help="manifest of the data, or its directory; default: the run's data.val")
    for name, readers in own_options().items():
        kind = type(next(item.default for item in fields(EvalTask) if item.name == name))
        parser.add_argument(f"--{name}", type=kind, help="; ".join(f"{task}: {text}" for task, text in readers.items()))
    parser.add_argument("--workers", type=int, help="loader processes; default: as in the run")
    parser.add_argument(
        "--precision",
        default="",
        choices=["bf16", "fp32"],
        help="of the forward passes; default: as the run was trained",
    )
    parser.add_argument(
        "--corrupt",
        nargs="?",
        const="all",
        default="",
        metavar="KINDS",
        help=f"also under corruptions, in five severities each: {','.join(CORRUPTIONS)}, or all (the default); data to "
        "`fit` to stay as they are",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise of --corrupt (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


def own_options() -> Mapping[str, Mapping[str, str]]:
    """Option -> {task that reads it: what it is}."""
    found: dict[str, dict[str, str]] = {}
    for task in TASKS:
        for name, text in find_task(task).options.items():
            found.setdefault(name, {})[task] = text
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 the user's mistake."""
    options = cli.expanded(make_parser().parse_args(argv))
    flags = ["run", "step", "task", "data", "workers", "corrupt", *own_options()]
    return cli.exit_status(lambda: _evaluate(options), flags)


def _evaluate(options: argparse.Namespace) -> None:
    with cli.stdout_kept():
        found = run_task(options)
        page = show(found, options) if found.curves and is_main() else None
    if not is_main():
        return
    if options.json:
        named = {"task": options.task or found.task.given.task, "run": options.run, "precision": found.precision}
        corrupted = {"corrupted": found.curves} if found.curves else {}
        print(json.dumps(named | found.metrics | corrupted))
    else:
        print(found.task.table(found.metrics))
        if found.curves:
            print(table(found.curves, drawn(found.task)))
    if page:
        print(f"Curves: {page}", file=sys.stderr)


def drawn(task: Task) -> list[str]:
    """The metrics that are shown of corrupted images: those that fall as a model gets worse."""
    return [name for name, better in task.scores.items() if better is max]


def table(curves: Curves, kept: Sequence[str]) -> str:
    """Each corruption and severity, for the terminal."""
    lines = ["".join(f"{name:>12}" for name in ("corruption", "severity", *kept))]
    for name, found in curves.items():
        for severity, metrics in enumerate(found, start=1):
            lines.append(f"{name:>12}{severity:>12}" + "".join(f"{metrics[metric]:12.1f}" for metric in kept))
    return "\n".join(lines)


def show(found: Found, options: argparse.Namespace) -> Path:
    """Write the page of corrupted images into the run's report."""
    # Plots need matplotlib, which is slow to import.
    from train.report.robustness import write_robustness

    run, name = found.checkpoint.parent.parent, options.task or found.task.given.task
    words = f"{found.checkpoint.name} of {run.name} on {found.task.manifest.path}, seed {options.seed}"
    try:
        return write_robustness(run, name, drawn(found.task), found.metrics, found.curves, words)
    except OSError as error:
        raise ValueError(f"run {run}: the curves could not be written into its report: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
