"""Runs a function in several real processes that form one process group.

The processes are forked from a server that has imported the libraries and nothing more, once per test session: an
import takes a process longer than most functions do.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

PRELOADED = ["train.loop", "accelerate", "transformers.models.bert.modeling_bert"]


class RankError(Exception):
    """Carries the traceback of a rank's exception, as its cause."""


def run_distributed(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 300,
    environment: Mapping[str, str] | None = None,
) -> list[Any]:
    """fn(*args) in `world_size` spawned processes; returns each rank's result, in rank order.

    fn and args are pickled: fn is a function of a module. Results are pickled, too. What a process writes to stdout
    goes to stderr. Every process has this one's
    environment, the variables that torchrun would set, those of `environment`, one thread, and a group that is
    initialized already: gloo's, or that of GPUs where `environment` has ACCELERATE_USE_CPU false and there are some.
    Raises the exception of the rank that failed first (its traceback is the cause), or TimeoutError after `timeout`
    seconds; no process outlives the call.
    """
    context = start_context()
    with tempfile.TemporaryDirectory() as directory:
        pipes, processes = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            variables = dict(os.environ) | rank_variables(rank, world_size) | dict(environment or {})
            process = context.Process(
                target=_run_rank, args=(sender, variables, str(Path(directory) / "rendezvous"), timeout, fn, args)
            )
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            results = _collect(pipes, time.monotonic() + timeout)
            for process in processes:
                process.join(timeout=10)
            return results
        finally:
            for process in processes:
                process.kill()
                process.join()


def run_alone(fn: Callable[..., Any], *args: Any) -> Any:
    """fn(*args) in a process of its own, without a group; what is pickled, and where it writes, as above."""
    with ProcessPoolExecutor(1, start_context(), initializer=_leave_stdout) as pool:
        return pool.submit(fn, *args).result()


def start_context() -> Any:
    """Starts processes that have the libraries imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def rank_variables(rank: int, world_size: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",  # DeepSpeed wants it set; the group meets in a file
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    results: list[Any] = [None] * len(pipes)
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(waiting.values())} have not finished in time")
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                failed, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise RuntimeError(f"rank {rank} died without an exception") from None
            if failed:
                error, text = value
                raise error from RankError(f"in rank {rank}:\n{text}")
            results[rank] = value
    return results


def _leave_stdout() -> None:
    """Results come by a pipe: stdout is the caller's, whatever a run or DeepSpeed writes there, also from C."""
    os.dup2(2, 1)


def _run_rank(
    sender: Connection, variables: dict[str, str], rendezvous: str, timeout: float, fn: Callable[..., Any], args: Any
) -> None:
    os.environ.clear()  # the server's
    os.environ.update(variables)
    _leave_stdout()
    import torch

    torch.set_num_threads(1)
    try:
        backend = "gloo"
        # torch's CUDA build names an accelerator where there is none.
        if variables["ACCELERATE_USE_CPU"] == "false" and torch.accelerator.is_available():
            torch.accelerator.set_device_index(int(variables["RANK"]))
            backend = torch.distributed.get_default_backend_for_device(torch.accelerator.current_accelerator())
        torch.distributed.init_process_group(
            backend,
            init_method=f"file://{rendezvous}",
            rank=int(variables["RANK"]),
            world_size=int(variables["WORLD_SIZE"]),
            timeout=timedelta(seconds=timeout),
        )
        message = _pickle(False, fn(*args))
    except BaseException as error:  # the caller gets it, whatever it is
        text = traceback.format_exc()
        try:
            message = _pickle(True, (error, text))
            pickle.loads(message)
        except Exception:
            message = _pickle(True, (RuntimeError(f"{type(error).__name__}: {error}"), text))
    sender.send_bytes(message)
    sender.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # leaves a group in which peers may be stuck, without waiting for them


def _pickle(failed: bool, value: Any) -> bytes:
    return pickle.dumps((failed, value))
