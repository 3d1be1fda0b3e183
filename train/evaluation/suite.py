"""The evaluations of a run: which there are, when each is due, and what they have found."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace

from data_pipeline.storage.manifest import Manifest
from train.config import EvalTask, RunConfig
from train.evaluation import build_task, check_options
from train.evaluation.beside import completed
from train.evaluation.encode import Encoder
from train.evaluation.task import Evaluation, Task

HELD_OUT = "val"
"""Name of retrieval on `data.val`."""
NO_HELD_OUT = (
    "The run has no held-out data, so nothing is evaluated. Keep some samples out of training, make a manifest of them "
    "(python -m data_pipeline pack, or index) and give it as --data.val"
)
"""What to say of a run that evaluates nothing."""


def given_tasks(config: RunConfig) -> dict[str, EvalTask]:
    """What a run evaluates, by name: retrieval on `data.val` where there is one, then `eval.tasks`, as they are given.

    Raises:
        ValueError: a task without a name, or with the name of another one.
    """
    held_out = EvalTask(name=HELD_OUT, task="retrieval", data=config.data.val)
    given = {HELD_OUT: held_out} if config.data.val else {}
    for number, task in enumerate(config.eval.tasks):
        if not task.name or set(task.name) & set("/ \t\n"):
            raise ValueError(f"eval.tasks: name {task.name!r} of entry {number}: give one word, such as birds")
        if task.name in given:
            raise ValueError(f"eval.tasks: two are called {task.name}; give each a name of its own")
        given[task.name] = replace(task, data=task.data or config.data.val)
    return given


def check_tasks(config: RunConfig) -> None:
    """Raises ValueError where tasks cannot be told apart, are of no known kind, or have options that they do not read.

    Opens no data; `Suite` does.
    """
    for name, given in given_tasks(config).items():
        try:
            check_options(completed(given))
        except ValueError as error:
            raise ValueError(f"eval.tasks, {name}: {error}") from error


class Suite:
    """The evaluations of a run, built and checked.

    Raises:
        ValueError: naming the task, and what is missing or wrong.
    """

    def __init__(self, config: RunConfig):
        self.tasks: dict[str, Task] = {}
        self._every: dict[str, int] = {}
        for name, given in given_tasks(config).items():
            try:
                self.tasks[name] = build_task(given)
            except ValueError as error:
                if name == HELD_OUT:
                    raise ValueError(f"data.val: {str(error).removeprefix('data: ')}") from error
                raise ValueError(f"eval.tasks, {name}: {error}") from error
            self._every[name] = given.every or config.eval.every

    def manifests(self) -> dict[str, Manifest]:
        """The data of each evaluation, by its name."""
        return {name: task.manifest for name, task in self.tasks.items()}

    def due(self, step: int) -> list[str]:
        """Names of the evaluations that are to be made after this step, which is not the last one."""
        return [name for name, every in self._every.items() if every > 0 and step % every == 0]

    def measure(self, encoder: Encoder, names: Iterable[str]) -> dict[str, Evaluation]:
        """What these evaluations find with the weights as they are; all processes call it together."""
        encoder.forget()
        found = {}
        for name in names:
            began = time.perf_counter()
            found[name] = self.tasks[name].measure(encoder)
            found[name].seconds = time.perf_counter() - began
        encoder.forget()
        return found
