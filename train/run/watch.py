"""What is known of ranks that hang: each says now and then that it lives and what it does, and writes its stacks.

    <run>/stacks/rank_00000.json   host, pid and what the rank does; written again every few seconds while it lives
    <run>/stacks/rank_00000.txt    its stacks, from when it was stuck; those of its loader processes in ..._loader.txt

Files, since ranks that wait in a collective can say nothing by another one, and a run directory is shared by all hosts.
They leave with the process, but for stacks that were written.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import resource
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil

from train import distributed
from train.run.signals import StopRequest

BEAT_SECONDS = 5.0
STALE_SECONDS = 4 * BEAT_SECONDS
HEED_BEATS = 3
"""Beats after which a signal that is not heeded has the stacks written; torchrun kills 30 s after a TERM."""
PATIENCE = 0.75
"""Of the time limit of collectives: what a rank has for its data before it is said that it hangs, and not that it is
lost; then all ranks can still save."""
STUCK = 0.9
"""Of the same limit: stacks of what takes so long are written."""
FULL = 0.97
"""Share of the memory that is used, from which on a warning is due."""
AGAIN = 0.9
"""Share under which it has to fall for another one."""


class Watch:
    """Watches over this rank from now on until `close`.

    Args:
        run_dir: shared by all ranks.
        limit: seconds after which a collective that misses a rank fails; stacks are written a little before.
        stop: where a signal is noted; stacks are written as well where it is not heeded soon.
    """

    def __init__(self, run_dir: Path, limit: float, stop: StopRequest):
        self.directory, self.limit, self.stop = run_dir / "stacks", limit, stop
        self.directory.mkdir(parents=True, exist_ok=True)
        self.rank, self.doing = distributed.rank(), "starting"
        self._beat = self._path(self.rank, ".json")
        self._stacks = open(self._path(self.rank, ".txt"), "a", encoding="utf-8")  # noqa: SIM115
        self._full = False
        self._closed = threading.Event()
        self.now("starting")
        self._write()
        self._arm()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @property
    def loader_stacks(self) -> str:
        """The file for the stacks of this rank's loader processes."""
        return str(self._path(self.rank, "_loader.txt"))

    def now(self, doing: str) -> None:
        """What this rank does from now on; if for nearly as long as the limit, its stacks are written."""
        self.doing, self._due = doing, time.monotonic() + STUCK * self.limit

    def suspects(self) -> str:
        """Which ranks do not say any more that they live, and what the others do; for a rank that has lost them."""
        lines = []
        now = self._age(self._beat, 0.0)
        for rank in range(distributed.world_size()):
            with suppress(OSError, ValueError):
                path = self._path(rank, ".json")
                age, said = self._age(path, now), json.loads(path.read_text())
                who = f"rank {rank} (host {said['host']}, pid {said['pid']})"
                if rank != self.rank:
                    lines.append(f"{who} {_state(said, age)} {said['doing']}")
        return "\n".join(lines)

    def close(self) -> None:
        """Stop watching; leaves no file but stacks that were written."""
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._stacks.close()
        with suppress(OSError):
            self._beat.unlink(missing_ok=True)
            for path in (Path(self._stacks.name), Path(self.loader_stacks)):
                if path.is_file() and not path.stat().st_size:
                    path.unlink()
            self.directory.rmdir()  # where no other rank has anything in it

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError) and distributed.world_size() > 1:
            error.add_note(self.suspects())
        self.close()

    def _watch(self) -> None:
        waiting, beat = 0, time.monotonic() + BEAT_SECONDS
        while not self._closed.wait(max(0.0, min(beat, self._due) - time.monotonic())):
            if time.monotonic() >= self._due:
                self._due = math.inf
                faulthandler.dump_traceback(self._stacks)
            if time.monotonic() < beat:
                continue
            beat = time.monotonic() + BEAT_SECONDS
            self._arm()
            with suppress(OSError):  # a full disk is told by what matters
                self._write()
            self._warn()
            waiting += bool(self.stop.name)
            if waiting == HEED_BEATS:
                faulthandler.dump_traceback(self._stacks)

    def _arm(self) -> None:
        """Have the stacks written by a thread in C where this one cannot run, since something keeps Python's lock.

        Nowhere else: the stack of a thread that runs meanwhile changes while it is read, and that may crash it.
        """
        faulthandler.dump_traceback_later(STUCK * self.limit + BEAT_SECONDS, file=self._stacks)

    def _write(self) -> None:
        said = {"host": socket.gethostname(), "pid": os.getpid(), "doing": self.doing}
        self._beat.write_text(json.dumps(said) + "\n")

    def _warn(self) -> None:
        """Say once that memory runs out, and who has it: the kernel kills without a word."""
        used, whole = memory()
        if used < FULL * whole or self._full:
            self._full = self._full and used >= AGAIN * whole
            return
        self._full = True
        own = psutil.Process()
        with suppress(psutil.Error):
            loaders = sum(child.memory_info().rss for child in own.children(recursive=True))
            print(
                f"warning: {used / 1e9:.1f} of {whole / 1e9:.1f} GB of memory are used: rank {self.rank} has "
                f"{own.memory_info().rss / 1e9:.1f} GB, its loader processes {loaders / 1e9:.1f} GB. Where it runs "
                "out, the kernel kills one: lower data.workers or data.prefetch, which may differ when a run resumes",
                file=sys.stderr,
                flush=True,
            )

    def _path(self, rank: int, suffix: str) -> Path:
        return self.directory / f"rank_{rank:05d}{suffix}"

    @staticmethod
    def _age(path: Path, now: float) -> float:
        """Seconds by the file system's clock, which all ranks share; `now` is the age of something just written."""
        return time.time() - path.stat().st_mtime - now


def _state(said: dict, age: float) -> str:
    """What is known of a rank that said this so many seconds ago."""
    if said["host"] == socket.gethostname():
        with suppress(psutil.AccessDenied):
            try:
                status = psutil.Process(said["pid"]).status()
            except psutil.NoSuchProcess:
                status = psutil.STATUS_ZOMBIE
            if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED):
                return f"is {'stopped' if status == psutil.STATUS_STOPPED else 'gone'}; it was"
    return f"has said nothing for {age:.0f} s; it was" if age > STALE_SECONDS else "is"


def peak_memory() -> int:
    """Bytes that this process had in memory at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory() -> tuple[float, float]:
    """Bytes of memory in use, and how many there are: of the container where it has a limit, else of the machine."""
    machine = psutil.virtual_memory()
    with suppress(OSError, ValueError, StopIteration):
        group = Path("/sys/fs/cgroup")
        most = float((group / "memory.max").read_text())
        stat = (group / "memory.stat").read_text().splitlines()
        cached = next(float(line.split()[1]) for line in stat if line.startswith("inactive_file "))
        if most < machine.total:
            return float((group / "memory.current").read_text()) - cached, most
    return float(machine.total - machine.available), float(machine.total)
