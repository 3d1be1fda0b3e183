"""train.sbatch and submit.py on a real SLURM with two nodes, with a program in place of training."""

from pathlib import Path

import pytest

from tests.support.slurm import wait_for
from train import cli


def counting(directory: Path, steps: int) -> tuple[str, ...]:
    """Arguments of train.sbatch that run the stand-in for a training run."""
    launcher = ("--engine", "cpu", "--processes", "1", "--module", "tests.support.counting")
    return (*launcher, str(directory), str(steps))


def steps(directory: Path) -> list[tuple[int, int]]:
    """(step, world size) of every step made."""
    log = directory / "log"
    lines = log.read_text().splitlines() if log.exists() else []
    return [(int(step), int(world)) for step, world in map(str.split, lines)]


def test_a_finished_job_is_completed_and_a_mistake_fails(cluster, tmp_path):
    done = cluster.submit("--nodes=1", f"--output={tmp_path}/done", arguments=counting(tmp_path, 3))
    wrong = cluster.submit("--nodes=1", f"--output={tmp_path}/wrong", arguments=("--engine", "nope"))
    assert cluster.wait(done, "COMPLETED", "FAILED") == "COMPLETED", (tmp_path / "done").read_text()
    assert cluster.wait(wrong, "COMPLETED", "FAILED") == "FAILED"
    assert cluster.field(wrong, "ExitCode") == "2:0"
    assert "--engine nope" in (tmp_path / "wrong").read_text()


@pytest.mark.slow
def test_the_real_time_limit_requeues(cluster, tmp_path):
    options = ("--nodes=2", "--time=2", "--signal=B:USR1@40", f"--output={tmp_path}/out")
    job = cluster.submit(*options, arguments=counting(tmp_path, 10**9))
    cluster.wait(job, "PENDING", seconds=5)
    wait_for(lambda: cluster.field(job, "Restarts") == "1", "requeue by the time limit", 180)
    assert int((tmp_path / "checkpoint").read_text()) == steps(tmp_path)[-1][0]


def test_a_dry_run_shows_the_command_and_submits_nothing(cluster, submit, tmp_path):
    run = ("--name=first", f"--runs_dir={tmp_path}", "--data.train=shards")
    status, said = submit("--nodes=1-2", "--time=2:00:00", "--engine=zero3", "--gpus_per_node=4", "--dry_run", *run)
    assert status == 0, said
    assert f"new run in {tmp_path}/first" in said
    assert "sbatch --job-name=duet-first --nodes=1-2 --time=2:00:00 --signal=B:USR1@300 --gpus-per-node=4" in said
    assert f"launch/slurm/train.sbatch --engine zero3 {' '.join(run)}" in said
    assert "warning: no --cpus_per_task" in said
    assert "\nmemory: " in said
    assert cluster.ask("squeue", "-h") == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--time=1-00:00:00", "--partition=short"], "--time 1-00:00:00: partition short allows 0 h 10 min"),
        (["--time=soon"], "--time soon: expected"),
        (["--time=4:00"], "--time 4:00: must be longer than --grace 300 s"),
        (["--grace=0"], "--grace 0: expected the seconds"),
        (["--engine=zero4"], "--engine zero4: there is no such file, and launch/accelerate has: cpu cpu_zero2"),
        (["--engine=cpu"], "--engine cpu: say how many --processes"),
        (["--processes=-2"], "--processes -2: expected a whole number"),
        (["--container=gone.sif"], "--container gone.sif: no such file"),
        (["--nodes=3"], "--nodes 3: partition main has 2"),
        (["--nodes=2-1"], "--nodes 2-1: expected"),
        (["--partition=gpu"], "--partition gpu: there is none; choose one of main, short"),
        (
            ["--partition=gpu,short"],
            "choose one of main, short; --time 10:00:00: partition short",
        ),
        (["--data.train="], "--data.train is empty"),
        (["--gpus_per_node=a100:3"], "--train.global_batch 1024 is not divisible by 3 processes x"),
        (["--train.global_bach=4"], "did you mean --train.global_batch"),
    ],
)
def test_what_the_cluster_cannot_do_is_said_before_submitting(cluster, submit, tmp_path, arguments, message):
    run = (f"--runs_dir={tmp_path}", "--data.train=shards")
    status, said = submit("--nodes=1", "--time=10:00:00", *run, *arguments)
    assert status == 2
    assert message in said
    assert cluster.ask("squeue", "-h") == ""


def test_one_of_several_partitions_is_enough(submit, tmp_path):
    status, said = submit(
        "--nodes=1",
        "--time=2:00:00",
        "--partition=short,main",
        "--dry_run",
        f"--runs_dir={tmp_path}",
        "--data.train=shards",
    )
    assert status == 0, said
    assert "--partition=short,main" in said and "warning: no --gpus_per_node" in said


def test_an_existing_run_is_resumed_or_refused(submit, tmp_path):
    run = tmp_path / "again"
    run.mkdir()
    arguments = ["--dry_run", "--time=1:00:00", f"--runs_dir={tmp_path}", "--name=again", "--data.train=shards"]
    (run / "config.yaml").write_text(cli.to_yaml(cli.parse(arguments[2:])))
    assert "new run in" in submit(*arguments, "--train.seed=7")[1], "nothing was trained there"
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    assert "no checkpoint there" in submit(*arguments)[1]
    status, said = submit(*arguments, "--train.seed=7")
    assert status == 2
    assert "train.seed: 0 -> 7" in said
    (run / "results.json").write_text('{"steps": 1}')
    status, said = submit(*arguments)
    assert status == 2
    assert "is finished" in said


def test_the_same_run_is_not_submitted_twice(cluster, submit, tmp_path):
    held = ("--hold", "--job-name=duet-twice", f"--output={tmp_path}/out")
    job = cluster.submit(*held, arguments=("--help",))
    status, said = submit("--time=1:00:00", f"--runs_dir={tmp_path}", "--name=twice", "--data.train=shards")
    assert status == 2
    assert f"job {job} (pending) is this run already" in said
