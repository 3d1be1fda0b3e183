"""run_parallel: every item once, in order or not, bounded ahead, and errors surface as themselves."""

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.commands.parallel import AHEAD, interrupts_held, run_parallel


def work(item: int) -> tuple[int, int]:
    """Later items take less time; the second value says which process it was."""
    time.sleep(0.02 * (item % 3 == 0))
    return item * item, os.getpid()


def fail_at(bad: int, item: int) -> int:
    if item == bad:
        raise ValueError(f"item {item} is damaged")
    return item


def die_at(bad: int, item: int) -> int:
    if item == bad:
        os._exit(9)
    return item


def echo(data: bytes) -> bytes:
    return data


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("in_order", [True, False])
def test_every_item_once(workers, in_order):
    found = list(run_parallel(work, range(40), workers, in_order=in_order))
    order = [item for item, _ in found]
    assert order == list(range(40)) if in_order else sorted(order) == list(range(40))
    assert all(result[0] == item * item for item, result in found)
    processes = {pid for _, (_, pid) in found}
    assert processes == {os.getpid()} if workers == 1 else len(processes) == 3
    assert not multiprocessing.active_children()


def test_items_are_taken_only_as_needed():
    taken = []

    def items() -> Iterator[int]:
        for item in range(1000):
            taken.append(item)
            yield item

    results = run_parallel(work, items(), 2)
    for _ in range(5):
        next(results)
    assert len(taken) <= 5 + 2 * AHEAD
    results.close()
    assert not multiprocessing.active_children()


def test_large_items_and_results_do_not_block_each_other():
    data = [os.urandom(1_000_000) for _ in range(12)]
    assert [result for _, result in run_parallel(echo, data, 2)] == data


def test_an_exception_surfaces_as_itself():
    with pytest.raises(ValueError, match="item 5 is damaged"):
        list(run_parallel(functools.partial(fail_at, 5), range(20), 2))
    assert not multiprocessing.active_children()


def test_a_dead_worker_is_noticed():
    with pytest.raises(ChildProcessError, match="a worker process died"):
        list(run_parallel(functools.partial(die_at, 5), range(20), 2))
    assert not multiprocessing.active_children()


def test_no_items():
    assert list(run_parallel(work, [], 2)) == []


def test_ctrl_c_is_held_and_then_comes():
    """Another thread exists, as tqdm's does, that the signal may be sent to."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        steps = []
        with pytest.raises(KeyboardInterrupt):
            with interrupts_held():
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.05)
                steps.append("the end")
            steps.append("beyond")
        assert steps == ["the end"]
    finally:
        done.set()
        thread.join()


FIRST_WORKERS = """
import math, multiprocessing, pathlib
from data_pipeline.commands.parallel import run_parallel
results = run_parallel(math.sqrt, range(50), 2)
next(results)
for process in multiprocessing.active_children():
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    print(status.partition("SigBlk:")[2].split()[0])
results.close()
"""


def test_workers_do_not_see_ctrl_c():
    """In a fresh process: the first worker is the one that starts more than itself."""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc")
    masks = subprocess.run(
        [sys.executable, "-c", FIRST_WORKERS], capture_output=True, text=True, check=True
    ).stdout.split()
    assert len(masks) == 2
    assert all(int(mask, 16) >> (signal.SIGINT - 1) & 1 for mask in masks)
