"""Small runs of the real command, in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from tests.support.pictures import rich_picture
from tests.support.small import small_config, write_data
from train import cli
from train.config import RunConfig

if TYPE_CHECKING:
    from tests.support.forked import Ranks

ROOT = Path(__file__).resolve().parents[2]
BATCH, MICRO_BATCH, STEPS = 32, 8, 8


def prepare(directory: Path, **train: int) -> RunConfig:
    """Data of 70 training and 12 held-out samples, and the configuration of a run of 8 steps over 4 epochs of it."""
    config = small_config(directory)
    config.data.train = str(write_data(directory / "train", (20, 30, 20), draw=rich_picture))
    config.data.val = str(write_data(directory / "val", (12,), draw=rich_picture))
    # Large enough for the last BatchNorms to have more than a few values each: less would amplify rounding.
    config.data.lanes, config.data.image_size = 4, 64
    # Small, because rounding grows from step to step in a network with kinks, and does so with the learning rate.
    config.optim.lr, config.optim.warmup_steps = 3e-5, 2
    config.train.global_batch, config.train.micro_batch, config.train.steps = BATCH, MICRO_BATCH, STEPS
    config.checkpoint.every, config.checkpoint.keep = 3, 0
    config.tracking.log_every = 1
    for name, value in train.items():
        setattr(config.train, name, value)
    return config


def command(config: RunConfig, directory: Path, *, engine: str = "plain", processes: int = 1) -> list[str]:
    """What starts this run, from a YAML file in `directory`."""
    path = directory / f"{config.name}.yaml"
    path.write_text(cli.to_yaml(config))
    run = ["-m", "train", "--config", str(path)]
    if engine == "plain":
        return [sys.executable, *run]
    launcher = directory / f"accelerate_{engine}.yaml"
    content = {"use_cpu": True, "mixed_precision": "no", "num_machines": 1, "rdzv_backend": "static"}
    if engine == "ddp":
        content |= {"distributed_type": "MULTI_GPU"}
    else:
        content |= {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": int(engine[-1])}}
    launcher.write_text(yaml.safe_dump(content))
    options = ["--config_file", str(launcher), "--num_processes", str(processes), "--main_process_port", "0"]
    return [sys.executable, "-m", "launch.start", *options, *run]


def start(arguments: list[str], log: Path) -> subprocess.Popen:
    """The command in a process group of its own, with its output in a file."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled"}
    with log.open("ab") as file:
        return subprocess.Popen(
            arguments, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def run(config: RunConfig, directory: Path, *, engine: str = "plain", processes: int = 1, status: int = 0) -> str:
    """The run to its end, which must have this exit status; returns what it printed."""
    log = directory / f"{config.name}.log"
    process = start(command(config, directory, engine=engine, processes=processes), log)
    try:
        code = process.wait(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    text = log.read_text()
    assert code == status, f"exit status {code}:\n{text[-4000:]}"
    return text


def run_dir(config: RunConfig) -> Path:
    return Path(config.runs_dir) / config.name


def metrics(config: RunConfig) -> list[dict]:
    """One record per training step, in order."""
    path = run_dir(config) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in records if "loss" in record]


def curve(config: RunConfig) -> list[tuple[int, str, float]]:
    """Step, digest of the samples in their order, and loss, of every step."""
    return [(record["step"], record["batch_digest"], record["loss"]) for record in metrics(config)]


def assert_same_curve(curve: list, expected: list, tolerance: float = 1e-12) -> None:
    """The same samples in the same order, and losses that differ by this share at most.

    The default is for one or two processes of one thread each, which round alike.
    """
    assert [entry[:2] for entry in curve] == [entry[:2] for entry in expected]
    for (step, _, loss), (_, _, wanted) in zip(curve, expected, strict=True):
        assert abs(loss - wanted) <= tolerance * wanted, f"step {step}: {loss} instead of {wanted}"


def wait_for_step(config: RunConfig, step: int, process: subprocess.Popen | Ranks, seconds: float = 600) -> None:
    """Until the run has logged this step."""
    deadline = time.monotonic() + seconds
    while not any(record["step"] >= step for record in metrics(config)):
        assert process.poll() is None, f"the run ended with {process.returncode} before step {step}"
        assert time.monotonic() < deadline, f"no step {step} in {seconds} s"
        time.sleep(0.02)
