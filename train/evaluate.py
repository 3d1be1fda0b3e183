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
from train.checkpoint import find, load_model, load_state
from train.config import EvalTask, RunConfig
from train.distributed import is_main
from train.engine.precision import autocast
from train.engine.start import start
from train.evaluation import TASKS, build_task, find_task
from train.evaluation.encode import Encoder
from train.evaluation.suite import given_tasks
from train.evaluation.task import Task
from train.model.text_files import tokenizer_name


def run_task(options: argparse.Namespace) -> tuple[Task, dict[str, float], str]:
    """A task, its metrics for a model of the run, and the precision of the forward passes; the same on every process.

    Raises:
        ValueError: naming the option that is missing or wrong, or what the data lacks.
    """
    if options.workers is not None and options.workers < 0:
        raise ValueError(f"workers {options.workers}: 0 (load in this process) or more")
    accelerator = start()
    path = find(options.run, options.step)
    model, config = load_model(path)
    precision, why = chosen_precision(options.precision, load_state(path).precision, accelerator.mixed_precision)
    task = build_task(described(options, config))
    if options.workers is not None:
        config.data.workers = options.workers
    tokenizer = Tokenizer(tokenizer_name(config), config.data.max_tokens)
    model.to(accelerator.device)
    encoder = Encoder(model, config, tokenizer, autocast=partial(autocast, accelerator.device, precision))
    if is_main():
        print(f"{path}, in {precision}{why}", file=sys.stderr)
    return task, task.measure(encoder).metrics, precision


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
    parser.add_argument("--step", default="", help="best, or a number of steps; default: the newest checkpoint")
    kinds = ", ".join(TASKS)
    parser.add_argument("--task", default="retrieval", help=f"{kinds}, or the name of one of the run's eval.tasks")
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
            task, metrics, precision = run_task(options)
    except ValueError as error:
        print(
            f"error: {cli.with_flags(str(error), ['run', 'step', 'task', 'data', 'workers', *own_options()])}",
            file=sys.stderr,
        )
        return 2
    if is_main():
        if options.json:
            print(json.dumps({"task": options.task, "run": options.run, "precision": precision, **metrics}))
        else:
            print(task.table(metrics))
    return 0


if __name__ == "__main__":
    sys.exit(main())
