"""The world-size guard, with real launches."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from train.engine.launcher import Launcher, check_world_size, launch_options
from train.engine.start import start

ROOT = Path(__file__).parents[3]

REPORT = """
import atexit, os, sys, torch
from train import distributed
from train.engine.start import start
atexit.register(lambda: os.write(1, f"LEFT {not torch.distributed.is_initialized()}\\n".encode()))
try:
    accelerator = start()
except ValueError as error:
    print("error:", error)
    sys.exit(2)
total = distributed.all_reduce_sum(torch.ones(1))
words = ("RESULT", accelerator.distributed_type.value, accelerator.device.type, distributed.rank(), int(total))
os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # in one piece, or two ranks share a line
"""
FAILS = """
import time, torch
from train import distributed
from train.engine.start import start
start()
distributed.all_reduce_sum(torch.ones(1))
if distributed.rank() == 1:
    print("FAILS AT", time.time(), flush=True)
    raise RuntimeError("rank 1 fails")
distributed.all_reduce_sum(torch.ones(1))
"""


def launch(tmp_path, program, *options, config=None, timeout=300, **environment):
    script = tmp_path / "program.py"
    script.write_text(program)
    if config is not None:
        path = tmp_path / "accelerate.yaml"
        path.write_text(
            "compute_environment: LOCAL_MACHINE\nmixed_precision: 'no'\nmain_process_port: 0\n"
            + "".join(f"{key}: {value}\n" for key, value in config.items())
        )
        options = ("--config_file", path.name, *options)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "SLURM_", "DUET_"))}
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *options, str(script)],
        cwd=tmp_path,  # the config file is named relative to it
        env=inherited
        | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    done.ended = time.time()
    done.results = sorted(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    return done


CPU = {"distributed_type": "MULTI_GPU", "use_cpu": "true", "num_machines": 1, "num_processes": 2}


@pytest.mark.parametrize("engine", ["MULTI_GPU", "DEEPSPEED"])
def test_two_processes_on_cpu(tmp_path, engine):
    config = CPU | {"distributed_type": engine}
    if engine == "DEEPSPEED":
        config |= {"deepspeed_config": "{zero_stage: 2}"}
    done = launch(tmp_path, REPORT, config=config)
    assert done.returncode == 0, done.stderr
    name = "MULTI_CPU" if engine == "MULTI_GPU" else engine
    assert done.results == [f"RESULT {name} cpu 0 2", f"RESULT {name} cpu 1 2"]
    assert done.stdout.count("LEFT True") == 2, "gloo's threads are alive while the interpreter goes"


def test_command_line_wins_over_the_config_file(tmp_path):
    done = launch(tmp_path, REPORT, "--num_processes", "1", config=CPU)
    assert done.returncode == 0, done.stderr
    assert done.results == ["RESULT MULTI_CPU cpu 0 1"]


@pytest.mark.parametrize(
    ("options", "config"),
    [
        (("--cpu", "--num_processes", "2"), None),
        (("--cpu", "--num_processes=2", "--num_machines", "1"), None),
        ((), CPU | {"distributed_type": "MULTI_CPU"}),
    ],
)
def test_a_world_that_is_too_small_is_refused(tmp_path, options, config):
    done = launch(tmp_path, REPORT, *options, config=config)
    assert done.returncode != 0
    assert "num_processes 2" in done.stdout and "1 process" in done.stdout, done.stdout
    assert "launch/accelerate/cpu.yaml" in done.stdout
    assert not done.results


def test_the_default_config_file_counts(tmp_path):
    default = tmp_path / "accelerate" / "default_config.yaml"
    default.parent.mkdir()
    default.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nuse_cpu: true\nnum_machines: 1\n"
        "num_processes: 3\nmixed_precision: 'no'\n"
    )
    done = launch(tmp_path, REPORT)
    assert done.returncode != 0
    assert "num_processes 3" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    "name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE", "DUET_PROCESSES"]
)
def test_the_environment_asks_too(monkeypatch, name):
    monkeypatch.setenv(name, "2")
    with pytest.raises(ValueError, match=f"{name}=2.* 1 process"):
        check_world_size()
    monkeypatch.setenv(name, "1")
    check_world_size()


def test_a_range_of_processes_may_be_asked_for(monkeypatch):
    monkeypatch.setenv("DUET_PROCESSES", "1:4")
    check_world_size()
    monkeypatch.setenv("DUET_PROCESSES", "2:4")
    with pytest.raises(ValueError, match=r"DUET_PROCESSES=2:4.* 1 process"):
        check_world_size()


def test_machines_that_do_not_divide_the_world_are_refused():
    with pytest.raises(ValueError, match="num_machines 2"):
        check_world_size(Launcher(None, 2, False, "in a file"))


def test_duet_processes_overrules(tmp_path):
    done = launch(tmp_path, REPORT, "--cpu", "--num_processes", "2", DUET_PROCESSES="1")
    assert done.returncode == 0 and done.results == ["RESULT NO cpu 0 1"], done.stdout + done.stderr


def test_case_14_a_failing_rank_ends_all(tmp_path):
    done = launch(tmp_path, FAILS, config=CPU)
    assert done.returncode != 0
    assert "rank 1 fails" in done.stderr
    failed = float(done.stdout.split("FAILS AT")[1].split()[0])
    assert done.ended - failed < 30, "the launcher had to kill the other rank"


def test_other_precisions_are_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="mixed_precision: fp16"):
        start()


def test_fp32_is_fp32_in_convolutions_and_matrix_products(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    try:
        start()
        assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("value", ["0", "two", "-1", "2:two"])
def test_a_bad_number_is_refused(monkeypatch, value):
    monkeypatch.setenv("DUET_PROCESSES", value)
    with pytest.raises(ValueError, match=f"DUET_PROCESSES={value.split(':')[-1]}"):
        check_world_size()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            "/venv/bin/python /venv/bin/accelerate launch --num_processes 2 train.py",
            ["--num_processes", "2", "train.py"],
        ),
        ("python -m accelerate.commands.launch --cpu x.py", ["--cpu", "x.py"]),
        ("python -m accelerate.commands.accelerate_cli launch x.py", ["x.py"]),
        ("python /site/accelerate/commands/launch.py x.py", ["x.py"]),
        ("accelerate-launch x.py", ["x.py"]),
        ("accelerate config", None),
        ("bash -c 'accelerate launch'", None),
        ("python -m train --config accelerate launch", None),
        ("", None),
    ],
)
def test_launch_options(arguments, expected):
    assert launch_options(arguments.split()) == expected
