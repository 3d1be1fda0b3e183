"""launch.start with real launchers and workers: exit codes, signals to one or all, nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from train.preemption import EXIT_PREEMPTED

ROOT = Path(__file__).parents[2]
CPU = ROOT / "launch/accelerate/cpu.yaml"
# A worker that stops at a "step boundary" when it was asked to, and says so; no torch, so it starts at once.
WORKER = """
import os, pathlib, sys, time
from train.preemption import StopRequest
time.sleep({before})
request = StopRequest()
pathlib.Path(sys.argv[1], os.environ["RANK"]).write_text(str(os.getpid()))
while not request.name:
    time.sleep(0.01)
time.sleep(0.5)
print("stopped by", request.name, flush=True)
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


def wait_for(condition, seconds: float = 60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@pytest.mark.parametrize("code", [0, 7, EXIT_PREEMPTED])
def test_the_workers_exit_code_is_the_exit_code(tmp_path, code):
    launcher = start(worker(tmp_path, f"raise SystemExit({code})"), processes=1 if code == 0 else 2)
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == code, output
    assert ("exitcode" in output) == (code == 7), "only an unexpected end gets torchrun's failure report"


def test_a_killed_worker_is_reported_with_its_signal(tmp_path):
    launcher = start(worker(tmp_path, "import os; os.kill(os.getpid(), 9)"))
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 128 + 9, output


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_every_worker_gets_the_signal_and_may_finish_its_step(tmp_path, name):
    launcher = start(worker(tmp_path, WORKER.format(before=0)), tmp_path)
    wait_for(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists())
    launcher.send_signal(getattr(signal, name))
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == EXIT_PREEMPTED, output
    assert output.count(f"stopped by {name}") == 2, output


def test_a_signal_to_every_process_at_once_does_not_kill_the_launcher(tmp_path):
    """What SLURM does to a step: the same signal to all of its processes."""
    launcher = start(worker(tmp_path, WORKER.format(before=0)), tmp_path)
    wait_for(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists())
    for process in [psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children(recursive=True)]:
        process.send_signal(signal.SIGUSR2)
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == EXIT_PREEMPTED, output


def test_a_signal_before_the_workers_listen_is_not_lost(tmp_path):
    launcher = start(worker(tmp_path, WORKER.format(before=3)), tmp_path)
    wait_for(lambda: len(psutil.Process(launcher.pid).children(recursive=True)) >= 3)
    launcher.send_signal(signal.SIGUSR1)
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == EXIT_PREEMPTED, output
    assert output.count("stopped by SIGUSR1") == 2, output


def test_nothing_is_left_when_it_is_killed(tmp_path):
    launcher = start(worker(tmp_path, WORKER.format(before=0)), tmp_path)
    wait_for(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists())
    children = psutil.Process(launcher.pid).children(recursive=True)
    assert len(children) >= 3
    launcher.kill()
    launcher.communicate(timeout=60)
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive


def test_wrong_use_is_an_error_message(tmp_path):
    launcher = start(worker(tmp_path, "pass"), processes=-1)
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 2
    assert "error:" in output and "num_processes" in output and "Traceback" not in output
