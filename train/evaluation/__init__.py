"""The table of evaluations: one file and one row each, for `python -m train.evaluate` and in training alike."""

from __future__ import annotations

import difflib
import importlib
from dataclasses import fields
from typing import TYPE_CHECKING

from train.config import EvalTask
from train.evaluation.beside import completed

if TYPE_CHECKING:
    from train.evaluation.task import Task

TASKS: dict[str, str | type[Task]] = {
    "retrieval": "train.evaluation.retrieval.Retrieval",
    "zeroshot": "train.evaluation.zeroshot.Zeroshot",
    "knn": "train.evaluation.knn.Neighbours",
    "probe": "train.evaluation.probe.Probe",
}
"""Name -> a subclass of train.evaluation.task.Task, or its dotted path, which is imported when it is used."""


def find_task(name: str) -> type[Task]:
    """The class of a row. Raises ValueError, with the nearest names, where there is none."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=2)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"task {name}: there is none of that name, only {', '.join(TASKS)}{hint}")
    row = TASKS[name]
    if isinstance(row, str):
        module, _, attribute = row.rpartition(".")
        row = getattr(importlib.import_module(module), attribute)
        assert isinstance(row, type)
    return row


def check_options(given: EvalTask) -> type[Task]:
    """The class of the task that `given` describes.

    Raises:
        ValueError: there is no such task, it has no data, or it does not read an option that is given.
    """
    kind = find_task(given.task)
    if not given.data:
        raise ValueError(f"{given.task} has no `data`: give the manifest of a held-out set")
    common = {"name", "task", "data", "every"}
    for item in fields(EvalTask):
        value = getattr(given, item.name)
        if item.name not in common and item.name not in kind.options and value != item.default:
            readers = [name for name in TASKS if item.name in find_task(name).options]
            raise ValueError(f"{item.name} {value} is for the task {' or '.join(readers)}, not for {given.task}")
    return kind


def build_task(given: EvalTask) -> Task:
    """The evaluation that `given` and what is beside its data describe, with its data and its options checked.

    Raises:
        ValueError: as `check_options`, or what the task itself refuses.
    """
    given = completed(given)
    return check_options(given)(given)
