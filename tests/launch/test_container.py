"""train.sbatch with a container: the command line that srun gets; the image's lock; the linters' word on both."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
# This SLURM has no pyxis and this machine no Apptainer: programs of their names say what they were asked to do.
ASKED = 'case "$*" in *hostnames*) echo n1 ;; *) echo "NodeName=n1 NodeAddr=10.0.0.1 Port=6818" ;; esac'
PROGRAMS = {"srun": 'echo "srun $*"', "scontrol": ASKED}


def install(directory: Path, programs: dict[str, str]) -> None:
    """Programs of these names, with these lines of bash."""
    for name, text in programs.items():
        (directory / name).write_text(f"#!/bin/bash\n{text}\n")
        (directory / name).chmod(0o755)


def batch(tmp_path: Path, **variables: str) -> str:
    """What train.sbatch prints, with the checkout's path as ROOT."""
    install(tmp_path, PROGRAMS)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "DUET_ROOT": str(ROOT)}
    done = subprocess.run(
        ["bash", "launch/slurm/train.sbatch", "--config", "train/configs/seed.yaml"],
        cwd=ROOT,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", **job, **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.replace(str(ROOT), "ROOT")


def test_a_failure_that_comes_back_is_not_requeued_for_ever(tmp_path):
    requeue = f'case "$1" in requeue) echo requeued ;; *) {ASKED} ;; esac'
    install(tmp_path, {"srun": "exit 7", "scontrol": requeue})
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1", "DUET_RETRY_AFTER": "0"}
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DUET_ROOT": str(tmp_path), **job}

    def start() -> tuple[int, str]:
        script = ROOT / "launch/slurm/train.sbatch"
        done = subprocess.run(["bash", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    for count in (1, 2, 3):
        code, said = start()
        assert code == 0 and "requeued" in said and f"{count} in a row" in said, said
    code, said = start()
    assert code == 7 and "requeued\n" not in said and "failed 4 times in a row, not requeued" in said
    assert "1 in a row" in start()[1], "a job submitted again starts counting again"


STEP = "srun --kill-on-bad-exit=0 --nodes=2 --ntasks=2 --cpu-bind=none --wait=900 "
TRAIN = "./launch/multinode.sh --config train/configs/seed.yaml\n"


@pytest.mark.parametrize(
    ("container", "mounts", "expected"),
    [
        ("", "", ""),
        ("duet.sif", "", "apptainer exec --nv --bind ROOT --pwd ROOT duet.sif "),
        ("docker://duet", "/a,/b", "apptainer exec --nv --bind ROOT,/a,/b --pwd ROOT docker://duet "),
        ("duet:1", "", "--container-image=duet:1 --container-mounts=ROOT:ROOT --container-workdir=ROOT "),
        (
            "/duet.sqsh",
            "/a,/b",
            "--container-image=/duet.sqsh --container-mounts=ROOT:ROOT,/a:/a,/b:/b --container-workdir=ROOT ",
        ),
    ],
)
def test_a_container_is_one_variable(tmp_path, container, mounts, expected):
    assert STEP + expected + TRAIN in batch(tmp_path, DUET_CONTAINER=container, DUET_MOUNTS=mounts)


def test_apptainer_runs_the_launcher_inside(tmp_path):
    """A srun and an Apptainer that do run what they are given: rank, address and the container's Python arrive."""
    task = "SLURM_STEP_ID=0 SLURM_STEP_NUM_NODES=2 SLURM_NODEID=1 SLURM_GPUS_ON_NODE=8"
    programs = {
        "srun": f'while [[ $1 == --* ]]; do shift; done; {task} exec "$@"',
        "apptainer": 'while [ "$1" != duet.sif ]; do shift; done; shift; exec "$@"',
        "python3": 'case "$*" in *launch.network*) echo eth0 ;; *) echo "inside: $*" ;; esac',
    }
    (tmp_path / "run").mkdir()
    install(tmp_path / "run", programs)
    said = batch(tmp_path, DUET_CONTAINER="duet.sif", PATH=f"{tmp_path}/run:{tmp_path}:{os.environ['PATH']}")
    assert "inside: -m launch.start" in said
    place = "--num_machines 2 --machine_rank 1 --main_process_ip 10.0.0.1 --main_process_port 20007 --num_processes 16"
    assert place in said


def test_health_is_counted_from_the_newest_step_or_the_start_of_the_container(tmp_path):
    install(tmp_path, {"python3": f'exec "{sys.executable}" "$@"'})
    script = (ROOT / "docker/entrypoint.sh").read_text().replace("cd /work\n", f"cd '{tmp_path}'\n")
    metrics = tmp_path / "runs/old/metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    metrics.touch()
    minutes = int(time.time() - psutil.Process(1).create_time()) // 60

    def healthy(stale: int) -> bool:
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DUET_STALE_MINUTES": str(stale)}
        return subprocess.run(["bash", "-c", script, "duet", "healthy"], env=environment).returncode == 0

    assert healthy(1), "a step of now"
    os.utime(metrics, (0, 0))
    assert healthy(minutes + 5), "an old run that has only just been started again"
    assert not healthy(max(0, minutes - 1)), "no step since"


def test_the_lock_has_all_requirements_with_hashes():
    """Whoever widens or raises requirements.txt makes the lock again; docker/Dockerfile has the command."""
    lock = (ROOT / "docker/requirements.lock").read_text()
    pinned = dict(re.findall(r"^([a-z0-9._-]+)==(\S+) \\\n    --hash=sha256:[0-9a-f]{64}\b", lock, re.MULTILINE))
    assert len(pinned) == len(re.findall(r"^\w", lock, re.MULTILINE)), "every package has a version and a hash"
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if text := line.partition("#")[0].strip():
            wanted = Requirement(text)
            version = pinned.get(canonicalize_name(wanted.name), "missing")
            assert version != "missing" and wanted.specifier.contains(version), f"{text}: the lock has {version}"


SCRIPTS = [*Path(ROOT).glob("launch/*.sh"), ROOT / "launch/slurm/train.sbatch", ROOT / "docker/entrypoint.sh"]
SCRIPTS += [*Path(ROOT).glob("tests/*.sh"), ROOT / ".ci/run"]


@pytest.mark.parametrize(
    ("linter", "arguments"), [("hadolint", ["docker/Dockerfile"]), ("shellcheck", ["-x", *map(str, SCRIPTS)])]
)
def test_linters_are_clean(linter, arguments):
    program = Path(sys.executable).with_name(linter)
    done = subprocess.run([program, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
