"""Real training by train.sbatch on a real SLURM of two nodes: one curve through requeue, scancel and a lost node."""

import signal
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.support import running, wandb_files
from tests.support.running import assert_same_curve, curve, metrics, run_dir
from tests.support.slurm import wait_for
from tests.support.training import finish, saved_step, small_run, wait_for_step
from train import cli
from train.config import RunConfig

STEPS = 16


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    config = small_run(tmp_path, STEPS)
    config.tracking.wandb = "offline"
    return config


@pytest.fixture
def single(config: RunConfig) -> list[tuple[int, str, float]]:
    """The curve of this run in one process, this one."""
    alone = replace(config, name="single", tracking=replace(config.tracking, wandb="disabled"))
    return finish(alone)


def arguments(config: RunConfig, directory: Path) -> tuple[str, ...]:
    """Of train.sbatch, for this run with one process per node."""
    path = directory / "submitted.yaml"
    path.write_text(cli.to_yaml(config))
    return ("--engine", "cpu", "--processes", "1", "--config", str(path))


def test_requeued_then_cancelled_then_finished_it_is_one_run(cluster, submit, config, single, tmp_path):
    """submit.py, two nodes as one world, USR1, queue, resumption, scancel; then the rest in one process."""
    straight = replace(config, name="straight")
    local = ["./launch/local.sh", "--engine", "cpu", "--processes", "2"]
    undisturbed = running.start([*local, *running.command(straight, tmp_path)[-2:]], tmp_path / "straight.log")
    out = tmp_path / "out"
    status, said = submit("--nodes=2", "--time=1:00:00", f"--sbatch=--output={out}", *arguments(config, tmp_path))
    assert status == 0, said
    job = said.split("Submitted batch job ")[1].split()[0]
    wait_for_step(config, 2, out)
    cluster.ask("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1 sends before the limit
    cluster.restart(job, 1)
    requeued = saved_step(config)
    assert 2 <= requeued == metrics(config)[-1]["step"] < STEPS - 3, "saved at the step where it stopped"
    wait_for_step(config, requeued + 2, out)

    cluster.ask("scancel", job)
    cluster.wait(job, "CANCELLED")
    wait_for(lambda: not cluster.ask("squeue", "-h"), "an empty queue")
    assert cluster.state(job) == "CANCELLED", "and stays cancelled"
    assert "start 2" in out.read_text()
    cancelled = saved_step(config)
    joined = curve(config)
    assert len(joined) == cancelled > requeued, "scancel saves as well"

    assert undisturbed.wait(180) == 0, (tmp_path / "straight.log").read_text()
    assert joined == curve(straight)[:cancelled], "bit for bit"
    assert_same_curve(finish(config), single)
    sessions = wandb_files.offline_runs(run_dir(config))
    assert len(sessions) == 3
    assert len({wandb_files.run_of(session).run_id for session in sessions}) == 1, "one W&B run"


@pytest.mark.slow
def test_a_lost_node_has_the_run_go_on_with_the_other_and_grow_again(cluster, config, tmp_path):
    """The daemon of a node and all of its processes die at once; the job asked for one to two nodes."""
    config.train.steps, config.checkpoint.every = 160, 2
    out = tmp_path / "out"
    options = ("--nodes=1-2", "--export=ALL,DUET_RETRY_AFTER=1,DUET_STEP_WAIT=20", f"--output={out}")
    job = cluster.submit(*options, arguments=arguments(config, tmp_path))
    wait_for_step(config, 3, out)
    assert f"job {job} on n[1-2], start 1" in out.read_text()
    lost = [psutil.Process(cluster.daemons["slurmd-n2"].pid)]
    lost += [p for p in psutil.process_iter(["environ"]) if (p.info["environ"] or {}).get("SLURMD_NODENAME") == "n2"]
    for process in lost:
        process.send_signal(signal.SIGKILL)
    try:
        wait_for(lambda: cluster.field(job, "Restarts") == "1", "requeue after the loss", 180)
        wait_for(lambda: "n2" not in cluster.idle(), "notice of the loss", 90)
        before = saved_step(config)
        cluster.restart(job, 1)
        wait_for_step(config, before + 3, out)
        assert f"job {job} on n1, start 2" in out.read_text()
    finally:
        cluster.start_node("n2")
    wait_for(lambda: "n2" in cluster.idle(), "return of the node", 90)
    cluster.ask("scancel", "--batch", "--signal=USR1", job)
    cluster.restart(job, 2)
    assert cluster.wait(job, "COMPLETED", "FAILED", seconds=300) == "COMPLETED", out.read_text()
    assert f"job {job} on n[1-2], start 3" in out.read_text()
    grown = curve(config)
    config.name, config.tracking.wandb = "single", "disabled"
    assert_same_curve(grown, finish(config))
