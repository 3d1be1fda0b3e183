"""The shell scripts: the environment is made once, wrong use is said, hosts find their places."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ["launch/quickstart.sh", "launch/local.sh", "launch/multinode.sh"]


def bash(command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    clean = {
        k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "DUET", "PET_", "MASTER", "NODE", "NNODES"))
    }
    return subprocess.run(
        ["bash", "-c", command], cwd=cwd, env=clean | environment, capture_output=True, text=True, timeout=300
    )


def test_the_environment_is_made_once_and_for_all_callers(tmp_path):
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch/venv.sh", tmp_path / "launch")
    (tmp_path / "requirements.txt").write_text("# nothing to install\n")
    install = "source launch/venv.sh && ensure_venv requirements.txt && $PYTHON -c 'import sys; print(sys.prefix)'"
    both = bash(f"({install}) & ({install}) & wait", tmp_path, DUET_BASE_PYTHON=sys.executable)
    assert both.stdout.count("Making") == 1, both.stdout + both.stderr
    assert both.stdout.count("Installing requirements.txt") == 1
    assert both.stdout.count(f"{tmp_path}/.venv\n") >= 2
    again = bash(install, tmp_path)
    assert again.stdout.strip() == f"{tmp_path}/.venv"
    (tmp_path / "requirements.txt").write_text("# other contents\n")
    assert "Installing requirements.txt" in bash(install, tmp_path).stdout
    broken = tmp_path / "requirements.txt"
    broken.write_text("./no-such-package\n")
    failed = bash(install, tmp_path)
    assert failed.returncode == 2
    assert "run the same command again" in failed.stderr


def test_an_interpreter_that_has_everything_is_taken_as_it_is(tmp_path):
    done = bash(
        'source launch/venv.sh && ensure_venv requirements.txt && echo "$PYTHON"', DUET_PYTHON="/opt/some/python"
    )
    assert done.stdout == "/opt/some/python\n"


def test_threads_are_the_share_of_the_cores():
    assert (
        bash("source launch/venv.sh && share_cores 1000 && echo $OMP_NUM_THREADS", OMP_NUM_THREADS="").stdout == "1\n"
    )
    assert bash("source launch/venv.sh && take_engine cpu && processes_here ''").stdout == "1\n", "with or without GPUs"
    assert bash("source launch/venv.sh && share_cores 1 && echo $OMP_NUM_THREADS", OMP_NUM_THREADS="3").stdout == "3\n"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script):
    done = bash(f"./{script} --help")
    assert done.returncode == 0
    assert "--processes N" in done.stdout


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("./launch/local.sh --port x", "--port x: expected the number of a free port"),
        ("./launch/quickstart.sh --processes two", "--processes two: expected a whole number"),
        ("./launch/quickstart.sh --precision fp16", "--precision fp16: expected bf16 or fp32"),
        ("./launch/local.sh --engine none", "launch/accelerate has: cpu cpu_zero2"),
        ("./launch/local.sh --engine", "--engine needs a value"),
        ("./launch/local.sh --train.steps=1 --engine=none", "--engine none: there is no such file"),
        ("./launch/multinode.sh --nodes=2 --node_rank=2", "--node_rank '2': expected this host's number, 0 to 1"),
        ("./launch/multinode.sh", "--nodes '': expected the number of hosts"),
        ("./launch/multinode.sh --nodes 2 --node_rank 2", "--node_rank '2': expected this host's number, 0 to 1"),
        (
            "./launch/multinode.sh --nodes 2:1 --node_rank 0",
            "--nodes '2:1': expected the number of hosts, or",
        ),
        ("./launch/multinode.sh --nodes 1: --node_rank 0", "--nodes '1:': expected the number of hosts, or"),
        ("./launch/multinode.sh --nodes 1:4 --node_rank 4", "--node_rank '4': expected this host's number, 0 to 3"),
        ("./launch/multinode.sh --nodes 2 --node_rank 0", "--address: the name or address of host 0"),
        ("./launch/multinode.sh --nodes 1 --node_rank 0 --address x --port 0", "--port 0: expected"),
        (
            "./launch/multinode.sh --nodes 1 --node_rank 0 --address no.such.host.invalid --engine cpu --processes 1",
            "--address no.such.host.invalid: this host has no way to it",
        ),
    ],
)
def test_wrong_use_is_said(command, message):
    done = bash(command, DUET_PYTHON=sys.executable)
    assert done.returncode == 2 or done.returncode == 1
    assert message in done.stderr


@pytest.mark.parametrize("script", ["local.sh", "multinode.sh --nodes 2 --node_rank 0 --address 127.0.0.1"])
def test_the_run_chooses_its_engine_where_none_is_named(tmp_path, script):
    """By what the Python is asked to run: a stand-in that says it."""
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\necho "DUET_ENGINE=${DUET_ENGINE-} $*"\n')
    python.chmod(0o755)

    def launched(*options: str) -> str:
        command = f"./launch/{script} --processes 4 {' '.join(options)} --config run.yaml"
        done = bash(command, DUET_PYTHON=str(python), DUET_ENGINE="auto", GLOO_SOCKET_IFNAME="lo")
        assert done.returncode == 0, done.stderr
        return done.stdout

    for options in ((), ("--engine", "auto")):
        assert launched(*options).startswith(
            f"DUET_ENGINE=auto -m launch.start --config_file {ROOT}/launch/accelerate/ddp.yaml "
        )
    assert launched("--engine", "zero2").startswith(
        f"DUET_ENGINE= -m launch.start --config_file {ROOT}/launch/accelerate/zero2.yaml "
    )
    assert launched("--engine", "accelerate_config.yaml").startswith(
        "DUET_ENGINE= -m launch.start --config_file accelerate_config.yaml "
    )
    assert "--mixed_precision no" in launched("--precision", "fp32")


def test_two_hosts_meet_by_flags_and_by_the_environment(tmp_path):
    """Both on this machine; one has its place from flags, the other from SkyPilot's variables."""
    counting = f"--engine cpu --processes 1 --module tests.support.counting {tmp_path} 3"
    port = 20_000 + os.getpid() % 9_000
    first = f"./launch/multinode.sh --nodes 2 --node_rank 0 --address 127.0.0.1 --port {port} {counting}"
    sky = "SKYPILOT_NODE_RANK=1 SKYPILOT_NUM_NODES=2 SKYPILOT_NODE_IPS=$'127.0.0.1\\n127.0.0.1'"
    second = f"{sky} ./launch/multinode.sh --port {port} {counting}"
    done = bash(f"{first} & {second}; wait", DUET_PYTHON=sys.executable, OMP_NUM_THREADS="1")
    assert (tmp_path / "log").read_text().split("\n")[:3] == ["1 2", "2 2", "3 2"], done.stderr
