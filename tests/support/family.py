"""The processes of a run that is started by launch.start: its ranks and their loader processes."""

from __future__ import annotations

import subprocess
import time
from contextlib import suppress

import psutil


def family(launcher: subprocess.Popen) -> list[psutil.Process]:
    """The launcher, and all that it has started."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(launcher.pid)
        return [process, *process.children(recursive=True)]
    return []


def ranks(launcher: subprocess.Popen) -> dict[int, psutil.Process]:
    """The ranks that run, without their loader processes."""
    found: dict[int, psutil.Process] = {}
    for process in family(launcher):
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if _is_rank(process) and not _is_rank(process.parent()):
                found[int(process.environ()["RANK"])] = process
    return found


def loaders(rank: psutil.Process) -> list[psutil.Process]:
    """The loader processes of a rank."""
    return [process for process in rank.children() if _is_rank(process)]


def _is_rank(process: psutil.Process | None) -> bool:
    return (
        process is not None
        and "RANK" in process.environ()
        and process.cmdline()[1:3] in ([], ["-u", "-m"], ["-m", "train"])
    )


def gone(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that are still there after so many seconds, but for zombies that nobody has asked for."""
    deadline = time.monotonic() + seconds
    while alive := [process for process in processes if process.is_running() and _lives(process)]:
        if time.monotonic() > deadline:
            return alive
        time.sleep(0.1)
    return []


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False
