"""Evaluation of a run by hand, by the code that evaluates in training.

python -m train.evaluate --run runs/quickstart --task retrieval --data data/val --json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial

from data_pipeline.tokenizer import Tokenizer
from train import cli
from train.checkpoint import load_model
from train.config import EvalTask, RunConfig
from train.distributed import is_main
from train.engine import precision
from train.engine.start import start
from train.evaluation import TASKS, build_task, find_task
from train.evaluation.encode import Encoder
from train.evaluation.suite import given_tasks
from train.evaluation.task import Task
from train.model.text_files import tokenizer_name


def run_task(options: argparse.Namespace) -> tuple[Task, dict[str, float]]:
    """A task, and its metrics for the newest model of a run; the same on every process.

    Raises:
        ValueError: naming the option that is missing or wrong, or what the data lacks.
    """
    if options.workers is not None and options.workers < 0:
        raise ValueError(f"workers {options.workers}: 0 (load in this process) or more")
    accelerator = start()
    model, config = load_model(options.run)
    task = build_task(described(options, config))
    if options.workers is not None:
        config.data.workers = options.workers
    tokenizer = Tokenizer(tokenizer_name(config), config.data.max_tokens)
    model.to(accelerator.device)
    autocast = partial(precision.autocast, accelerator.device, accelerator.mixed_precision)
    encoder = Encoder(model, config, tokenizer, autocast=autocast)
    return task, task.measure(encoder).metrics


def described(options: argparse.Namespace, config: RunConfig) -> EvalTask:
    """The evaluation that the command line asks for: one of the run's by its name, or a kind of TASKS; then options."""
    known = given_tasks(config)
    if options.task not in TASKS and options.task not in known:
        raise ValueError(f"task {options.task}: give one of {', '.join([*TASKS, *known])}")
    given = known.get(options.task) or EvalTask(name=options.task, task=options.task, data=config.data.val)
    own = {name: getattr(options, name) for name in ("data", *own_options())}
    return replace(given, **{name: value for name, value in own.items() if value is not None})


@contextmanager
def stdout_kept() -> Iterator[None]:
    """Sends to stderr what libraries write to stdout inside, also from C: only the result goes there."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def make_parser() -> argparse.ArgumentParser:
    """The options that all tasks share, and those that each row of TASKS reads."""
    parser = argparse.ArgumentParser(
        prog="python -m train.evaluate", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--run", required=True, help="run directory, or one checkpoint of it")
    kinds = ", ".join(TASKS)
    parser.add_argument("--task", default="retrieval", help=f"{kinds}, or the name of one of the run's eval.tasks")
    parser.add_argument("--data", help="manifest of the data, or its directory; default: the run's data.val")
    for name, readers in own_options().items():
        kind = type(next(item.default for item in fields(EvalTask) if item.name == name))
        parser.add_argument(f"--{name}", type=kind, help="; ".join(f"{task}: {text}" for task, text in readers.items()))
    parser.add_argument("--workers", type=int, help="loader processes; default: as in the run")
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
    options = make_parser().parse_args(argv)
    try:
        with stdout_kept():
            task, metrics = run_task(options)
    except ValueError as error:
        print(f"error: {cli.with_flags(str(error), ['task', 'data', 'workers', *own_options()])}", file=sys.stderr)
        return 2
    if is_main():
        if options.json:
            print(json.dumps({"task": options.task, "run": options.run, **metrics}))
        else:
            print(task.table(metrics))
    return 0


if __name__ == "__main__":
    sys.exit(main())
