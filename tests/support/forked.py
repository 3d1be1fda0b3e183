"""The ranks of a real run without the seconds that a launcher and imports take, for tests that start many.

Each is forked from a server that has the libraries imported, and runs what `python -m train` runs. Nobody watches over
them, so what ends the others where one is lost is their own doing.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.support.distributed import rank_variables, start_context
from tests.support.exactness import engine_environment
from train import cli
from train.config import RunConfig


class Ranks:
    """Processes of one run, by rank; with what tests use of a Popen."""

    def __init__(self, processes: list[Any]):
        self.processes = processes

    @property
    def returncode(self) -> int | None:
        """That of the first rank that did not end well, else 0; None while one runs."""
        codes = [process.exitcode for process in self.processes]
        return None if None in codes else next((code for code in codes if code), 0)

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float) -> list[int]:
        """Exit codes by rank. Raises TimeoutError."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        if self.poll() is None:
            codes = [process.exitcode for process in self.processes]
            raise TimeoutError(f"after {timeout} s the ranks have ended with {codes}")
        return [process.exitcode for process in self.processes]


@contextmanager
def forked(config: RunConfig, directory: Path, engine: str = "ddp", world: int = 2) -> Iterator[Ranks]:
    """The run on so many ranks, with its output in run.log; what is left of it at the end is killed."""
    path = directory / f"{config.name}.yaml"
    path.write_text(cli.to_yaml(config))
    context, processes = start_context(), []
    with TemporaryDirectory() as meeting:
        for rank in range(world):
            variables = dict(os.environ) | rank_variables(rank, world) | engine_environment(engine, directory)
            arguments = (variables, f"file://{meeting}/store", str(directory / "run.log"), str(path))
            processes.append(context.Process(target=_main, args=arguments))
            processes[-1].start()
        try:
            yield Ranks(processes)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _main(variables: dict[str, str], meeting: str, log: str, config: str) -> None:
    os.environ.clear()  # the server's
    os.environ.update(variables)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import torch

    from train.__main__ import main
    from train.engine.start import timeout_seconds

    # As in a run that a launcher starts; else loader processes come from a server of their own.
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=meeting,
        rank=int(variables["RANK"]),
        world_size=int(variables["WORLD_SIZE"]),
        timeout=timedelta(seconds=timeout_seconds()),
    )
    sys.exit(main(["--config", config]))
