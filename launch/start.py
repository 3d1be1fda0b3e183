"""`accelerate launch` that can be interrupted: python -m launch.start [arguments of accelerate launch] -m train ...

Plain `accelerate launch` kills its workers 30 s after a TERM, dies of a USR1 or USR2 and leaves them behind, and ends
with code 1 whatever its workers ended with. Here TERM, INT, HUP, USR1 and USR2 go to the workers alone, which save at a
step boundary, and the exit code is the first worker's: 0 done, 2 wrong input, 85 preempted (checkpoint saved, start me
again). A second Ctrl-C kills at once. Where the launcher itself is killed, as by the kernel when memory runs out, its
workers are told to save and then ended: no process of a run outlives this one.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from train.run.signals import EXIT_PREEMPTED

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
POLL_SECONDS = 0.5
ORPHAN_SECONDS = 30
"""How long workers whose launcher was killed have for their step and a checkpoint."""
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def main(arguments: list[str]) -> int:
    """Start the launcher, pass signals on to its workers, and return the exit code."""
    received: list[tuple[int, float]] = []
    told: set[int] = set()
    launcher: subprocess.Popen | None = None
    stop_fd, told_fd = os.pipe()

    def pass_on(number: int, _frame: object) -> None:
        interrupts = [moment for kind, moment in received if kind == signal.SIGINT]
        received.append((number, time.monotonic()))
        os.write(told_fd, b"!")
        if launcher is None:
            return
        if number == signal.SIGINT and interrupts and time.monotonic() - interrupts[-1] > 1:
            print("second Ctrl-C: killing the run; the newest complete checkpoint stays", file=sys.stderr)
            _kill_all(launcher.pid)

    for number in SIGNALS:
        signal.signal(number, pass_on)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
        signal.signal(signal.SIGHUP, pass_on)
    if sys.platform == "linux":  # workers whose launcher is gone become children of this process
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    launcher = subprocess.Popen(
        # By the name after the code train.engine.launcher finds this command line, and with it what was asked for.
        [sys.executable, "-c", "from launch.start import launch; launch()", "accelerate.commands.launch", *arguments],
        env={**os.environ, "PYTHONPATH": path, "DUET_STOP_FD": str(stop_fd)},
        pass_fds=[stop_fd],
        start_new_session=True,  # a Ctrl-C of the terminal reaches this process alone
        preexec_fn=_ignore_signals,
    )
    while True:
        try:
            code = launcher.wait(POLL_SECONDS)
            break
        except subprocess.TimeoutExpired:
            if received:
                _tell_workers(launcher.pid, received[0][0], told)
    if code < 0:
        _end_orphans()
    return 128 - code if code < 0 else code


def _end_orphans() -> None:
    """End what a launcher that was killed has left: TERM, on which workers save, and KILL after ORPHAN_SECONDS."""
    orphans = psutil.Process().children(recursive=True)
    if not orphans:
        return
    print(f"the launcher is gone, {len(orphans)} of its processes are not: ending them", file=sys.stderr, flush=True)
    for process in orphans:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(orphans, timeout=ORPHAN_SECONDS)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _kill_all(launcher: int) -> None:
    """Kill the launcher first, or it would start workers again; they are in sessions of their own."""
    family = []
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(launcher).children(recursive=True)
    with suppress(ProcessLookupError):
        os.killpg(launcher, signal.SIGKILL)
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _ignore_signals() -> None:
    """Ignored signals stay ignored in the launcher and in workers that have no handler yet; HUP if we are killed."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGHUP)


def _tell_workers(launcher: int, number: int, told: set[int]) -> None:
    """Send the signal once to each worker that listens: not before it has a handler, nor while it is leaving."""
    with suppress(psutil.NoSuchProcess, OSError, ValueError):  # it has just ended
        for worker in psutil.Process(launcher).children():
            status = Path(f"/proc/{worker.pid}/status").read_text()
            caught = int(status.split("SigCgt:")[1].split()[0], 16)
            if worker.pid not in told and caught >> (number - 1) & 1:
                worker.send_signal(number)
                told.add(worker.pid)


def launch() -> None:
    """In the launcher's process: `accelerate launch` itself; leaves with the exit code of the first worker to fail."""
    # Its errors repeat, with a banner, what the workers have said and what is printed below.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    if not torch.accelerator.is_available():
        # Else DeepSpeed tells stdout that it has found none, in front of what a command prints for other programs.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    options = launch_command_parser().parse_args(sys.argv[2:])
    # torchrun must leave these signals to us; it still ends its workers on HUP and QUIT.
    options.signals_to_handle = "SIGHUP,SIGQUIT"
    try:
        if nodes := os.environ.get("DUET_NODES"):
            from launch import elastic

            elastic.prepare(nodes, options)
        launch_command(options)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        if code not in (2, EXIT_PREEMPTED):
            print(error, file=sys.stderr)
    except subprocess.CalledProcessError as error:  # one process without torchrun
        code = error.returncode
    except (RendezvousError, DistError) as error:
        print(f"error: the hosts did not meet, or host 0 is lost: {error}", file=sys.stderr)
        print("start the same command on every host again; a run resumes from its newest checkpoint", file=sys.stderr)
        code = 1
    except (ValueError, ConnectionError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    else:
        code = 0
    sys.exit(128 - code if code < 0 else code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
