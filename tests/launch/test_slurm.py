"""train.sbatch and submit.py on a real SLURM with two nodes: one world, requeue, cancel, a lost node."""

import signal
from pathlib import Path

import psutil
import pytest

from launch.slurm.submit import main
from tests.launch.slurm import ROOT, Cluster, wait_for, why_not
from train import cli
from train.config import RunConfig

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def both_nodes_idle(cluster):
    yield
    cluster.ask("scancel", "--me")
    wait_for(lambda: cluster.idle() == {"n1", "n2"} and not cluster.ask("squeue", "-h"), "idle nodes", 90)


def counting(directory: Path, steps: int) -> tuple[str, ...]:
    """Arguments of train.sbatch that run the stand-in for a training run."""
    launcher = ("--engine", "cpu", "--processes", "1", "--module", "tests.launch.counting")
    return (*launcher, str(directory), str(steps))


def steps(directory: Path) -> list[tuple[int, int]]:
    """(step, world size) of every step made."""
    log = directory / "log"
    lines = log.read_text().splitlines() if log.exists() else []
    return [(int(step), int(world)) for step, world in map(str.split, lines)]


def test_requeued_before_the_time_limit_then_cancelled(cluster, tmp_path):
    """The whole life of a job: two nodes as one world, USR1 to the batch script, queue, going on, scancel."""
    out = tmp_path / "out"
    job = cluster.submit("--nodes=2", f"--output={out}", arguments=counting(tmp_path, 10**9))
    wait_for(lambda: len(steps(tmp_path)) > 3, "steps", 120)
    assert {world for _, world in steps(tmp_path)} == {2}

    cluster.ask("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1 sends before the limit
    cluster.start_now(job)
    saved = int((tmp_path / "checkpoint").read_text())
    assert saved == steps(tmp_path)[-1][0]
    wait_for(lambda: steps(tmp_path)[-1][0] > saved + 3, "steps after the requeue", 120)
    assert [step for step, _ in steps(tmp_path)] == list(range(1, len(steps(tmp_path)) + 1)), "no step twice, none lost"
    assert cluster.field(job, "Restarts") == "1"

    cluster.ask("scancel", job)
    cluster.wait(job, "CANCELLED")
    wait_for(lambda: not cluster.ask("squeue", "-h"), "an empty queue")
    assert int((tmp_path / "checkpoint").read_text()) == steps(tmp_path)[-1][0], "scancel saves as well"
    assert cluster.state(job) == "CANCELLED", "and stays cancelled"
    assert "start 2" in out.read_text()


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


@pytest.mark.slow
def test_a_lost_node_has_the_job_go_on_with_the_other(cluster, tmp_path):
    """The daemon of a node and all of its processes die at once; the job asked for one to two nodes."""
    options = ("--nodes=1-2", "--export=ALL,DUET_RETRY_AFTER=1,DUET_STEP_WAIT=20", f"--output={tmp_path}/out")
    job = cluster.submit(*options, arguments=counting(tmp_path, 10**9))
    wait_for(lambda: len(steps(tmp_path)) > 3, "steps", 120)
    assert steps(tmp_path)[-1][1] == 2
    lost = [psutil.Process(cluster.daemons["slurmd-n2"].pid)]
    lost += [p for p in psutil.process_iter(["environ"]) if (p.info["environ"] or {}).get("SLURMD_NODENAME") == "n2"]
    for process in lost:
        process.send_signal(signal.SIGKILL)
    try:
        wait_for(lambda: cluster.field(job, "Restarts") == "1", "requeue after the loss", 180)
        before = len(steps(tmp_path))
        wait_for(lambda: "n2" not in cluster.idle(), "notice of the loss", 90)
        cluster.start_now(job)
        wait_for(lambda: len(steps(tmp_path)) > before + 3, "steps on the other node", 120)
        assert steps(tmp_path)[-1][1] == 1
    finally:
        cluster.start_node("n2")


@pytest.fixture
def submit(cluster, monkeypatch, capsys):
    """submit.py in this process, on the cluster: (exit status, what it says)."""
    monkeypatch.chdir(ROOT)
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, cluster.environment[name])

    def call(*arguments: str) -> tuple[int, str]:
        status = main(list(arguments))
        said = capsys.readouterr()
        return status, said.out + said.err

    return call


def test_a_dry_run_shows_the_command_and_submits_nothing(cluster, submit, tmp_path):
    runs = f"--runs_dir={tmp_path}"
    status, said = submit("--nodes=1-2", "--time=2:00:00", "--engine=zero3", "--dry_run", "--name=first", runs)
    assert status == 0, said
    assert f"new run in {tmp_path}/first" in said
    assert "sbatch --job-name=duet-first --nodes=1-2 --time=2:00:00 --signal=B:USR1@300" in said
    assert f"launch/slurm/train.sbatch --engine zero3 --name=first {runs}" in said
    assert cluster.ask("squeue", "-h") == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--time=1-00:00:00", "--partition=short"], "--time 1-00:00:00: partition short allows 0 h 10 min"),
        (["--time=soon"], "--time soon: expected"),
        (["--time=4:00"], "--time 4:00: must be longer than --grace 300 s"),
        (["--nodes=3"], "--nodes 3: partition main has 2"),
        (["--nodes=2-1"], "--nodes 2-1: expected"),
        (["--partition=gpu"], "--partition gpu: there is none; choose one of main, short"),
        (["--train.global_bach=4"], "did you mean --train.global_batch"),
    ],
)
def test_what_the_cluster_cannot_do_is_said_before_submitting(cluster, submit, tmp_path, arguments, message):
    status, said = submit("--nodes=1", "--time=10:00:00", f"--runs_dir={tmp_path}", *arguments)
    assert status == 2
    assert message in said
    assert cluster.ask("squeue", "-h") == ""


def test_an_existing_run_goes_on_or_is_refused(submit, tmp_path):
    run = tmp_path / "again"
    run.mkdir()
    (run / "config.yaml").write_text(cli.to_yaml(RunConfig(name="again", runs_dir=str(tmp_path))))
    arguments = ["--time=1:00:00", "--dry_run", f"--runs_dir={tmp_path}", "--name=again"]
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
    status, said = submit("--time=1:00:00", f"--runs_dir={tmp_path}", "--name=twice")
    assert status == 2
    assert f"job {job} (pending) is this run already" in said


def test_a_submitted_run_starts(cluster, submit, tmp_path):
    """The whole way: submit.py, sbatch, srun, launcher, train; the run's mistake is the job's exit code."""
    arguments = ["--time=1:00:00", "--engine=cpu", "--processes=1", f"--sbatch=--output={tmp_path}/out"]
    status, said = submit(*arguments, f"--runs_dir={tmp_path}", "--name=whole", "--data.train=/nowhere")
    assert status == 0, said
    job = said.split("Submitted batch job ")[1].split()[0]
    assert cluster.wait(job, "FAILED", "COMPLETED", seconds=180) == "FAILED"
    assert cluster.field(job, "ExitCode") == "2:0"
    assert "/nowhere" in (tmp_path / "out").read_text()
