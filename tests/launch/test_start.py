"""launch.start with real launchers and workers: exit codes, signals to one or all, nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from launch.start import POLL_SECONDS
from tests.support import slurm
from train.run.signals import EXIT_PREEMPTED

SECONDS = 120
ROOT = Path(__file__).parents[2]
CPU = ROOT / "launch/accelerate/cpu.yaml"
# A worker that stops at a "step boundary" when it was asked to, and says so; no torch, so it starts at once.
WORKER = """
import os, pathlib, sys, time
from train.run.signals import StopRequest
while "{late}" and not pathlib.Path(sys.argv[1], "go").exists():
    time.sleep(0.01)
request = StopRequest()
pathlib.Path(sys.argv[1], os.environ["RANK"]).write_text(str(os.getpid()))
while not request.name:
    time.sleep(0.01)
time.sleep(0.5)
# One string is one write, also where output is unbuffered: two workers share the pipe.
print(f"stopped by {{request.name}}\\n", end="", flush=True)
sys.exit(85)
"""


def command(script: Path, *arguments: object, processes: int = 2) -> list[str]:
    options = ["--config_file", str(CPU), "--num_processes", str(processes), "--main_process_port", "0"]
    return [sys.executable, "-m", "launch.start", *options, str(script), *map(str, arguments)]


def start(script: Path, *arguments: object, processes: int = 2) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(script, *arguments, processes=processes),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def worker(tmp_path: Path, text: str) -> Path:
    script = tmp_path / "worker.py"
    script.write_text(text)
    return script


def wait_for(condition: Callable[[], bool]) -> None:
    slurm.wait_for(condition, "listening workers", SECONDS)


# Stuck in a step, as in a collective whose other ranks are gone.
STUCK = WORKER.replace("while not request.name", "while True")

# Worker, and its processes, of every launcher that the tests below look at.
LAUNCHERS = {
    "0": ("pass", 1),
    "7": ("raise SystemExit(7)", 2),
    "85": ("raise SystemExit(85)", 2),
    "killed worker": ("import os; os.kill(os.getpid(), 9)", 2),
    "wrong use": ("pass", -1),
    "SIGTERM": (WORKER.format(late=""), 2),
    "SIGINT": (WORKER.format(late=""), 2),
    "SIGUSR2": (WORKER.format(late=""), 2),
    "SIGUSR1": (WORKER.format(late="late"), 2),
    "SIGHUP": (WORKER.format(late=""), 2),
    "killed launcher": (WORKER.format(late=""), 2),
    "killed agent": (WORKER.format(late=""), 2),
    "second Ctrl-C": (STUCK.format(late=""), 2),
}


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable]:
    """launched(name): a launcher and the directory to which its workers write; all run side by side, to save time."""
    directory = tmp_path_factory.mktemp("launchers")
    running = {}
    for name, (text, processes) in LAUNCHERS.items():
        (directory / name).mkdir()
        running[name] = start(worker(directory / name, text), directory / name, processes=processes)
    yield lambda name: (running[name], directory / name)
    for name, launcher in running.items():
        launcher.kill()
        for pid in (directory / name).glob("[01]"):
            with suppress(ProcessLookupError):
                os.kill(int(pid.read_text()), signal.SIGKILL)
        launcher.communicate()


def listening(directory: Path) -> bool:
    return (directory / "0").exists() and (directory / "1").exists()


def end(launcher: subprocess.Popen) -> tuple[int, str]:
    output, _ = launcher.communicate(timeout=SECONDS)
    return launcher.returncode, output


@pytest.mark.parametrize("code", [0, 7, EXIT_PREEMPTED])
def test_the_workers_exit_code_is_the_exit_code(launched, code):
    found, output = end(launched(str(code))[0])
    assert found == code, output
    assert ("exitcode" in output) == (code == 7), "only an unexpected end gets torchrun's failure report"


def test_a_killed_worker_is_reported_with_its_signal(launched):
    code, output = end(launched("killed worker")[0])
    assert code == 128 + 9, output


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_case_03_every_worker_gets_the_signal_and_may_finish_its_step(launched, name):
    launcher, directory = launched(name)
    wait_for(lambda: listening(directory))
    launcher.send_signal(getattr(signal, name))
    code, output = end(launcher)
    assert code == EXIT_PREEMPTED, output
    assert output.count(f"stopped by {name}") == 2, output


def test_a_signal_to_every_process_at_once_does_not_kill_the_launcher(launched):
    """What SLURM does to a step: the same signal to all of its processes."""
    launcher, directory = launched("SIGUSR2")
    wait_for(lambda: listening(directory))
    for process in [psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children(recursive=True)]:
        process.send_signal(signal.SIGUSR2)
    code, output = end(launcher)
    assert code == EXIT_PREEMPTED, output


def test_a_signal_before_the_workers_listen_is_not_lost(launched):
    launcher, directory = launched("SIGUSR1")
    wait_for(lambda: len(psutil.Process(launcher.pid).children(recursive=True)) >= 3)
    launcher.send_signal(signal.SIGUSR1)
    time.sleep(3 * POLL_SECONDS)
    (directory / "go").touch()
    code, output = end(launcher)
    assert code == EXIT_PREEMPTED, output
    assert output.count("stopped by SIGUSR1") == 2, output


def test_case_14_nothing_is_left_when_it_is_killed(launched):
    launcher, directory = launched("killed launcher")
    wait_for(lambda: listening(directory))
    children = psutil.Process(launcher.pid).children(recursive=True)
    assert len(children) >= 3
    launcher.kill()
    end(launcher)
    _, alive = psutil.wait_procs(children, timeout=SECONDS)
    assert not alive


def test_case_14_workers_whose_agent_is_killed_save_and_end(launched):
    """As by the kernel when memory runs out: torchrun's agent is gone, and nobody tells its workers."""
    launcher, directory = launched("killed agent")
    wait_for(lambda: listening(directory))
    family = psutil.Process(launcher.pid).children(recursive=True)
    psutil.Process(launcher.pid).children()[0].kill()
    code, output = end(launcher)
    assert code == 128 + 9, output
    assert output.count("stopped by SIGTERM") == 2, output
    assert not psutil.wait_procs(family, timeout=1)[1]


def test_case_04_a_second_ctrl_c_kills_the_workers_too(launched):
    launcher, directory = launched("second Ctrl-C")
    wait_for(lambda: listening(directory))
    children = psutil.Process(launcher.pid).children(recursive=True)
    assert len(children) >= 3
    launcher.send_signal(signal.SIGINT)
    time.sleep(1.5)
    launcher.send_signal(signal.SIGINT)
    code, output = end(launcher)
    assert code == 128 + 9 and "second Ctrl-C" in output
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def test_wrong_use_is_an_error_message(launched):
    code, output = end(launched("wrong use")[0])
    assert code == 2
    assert "error:" in output and "num_processes" in output and "Traceback" not in output
