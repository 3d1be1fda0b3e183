"""The manifests of clouds and compose: read by their own clients and schemas, and what they have each host run."""

import os
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

from train import cli

ROOT = Path(__file__).parents[2]
JOBSET = yaml.safe_load((ROOT / "launch/cloud/kubernetes.yaml").read_text())
JOB = JOBSET["spec"]["replicatedJobs"][0]
POD = JOB["template"]["spec"]["template"]["spec"]
COMPOSE = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
SKYPILOT = ROOT / "launch/cloud/skypilot.yaml"
# Stands in for a Python on a host with eight GPUs; says what it was asked to run.
PYTHON = """#!/bin/bash
case "$*" in
*device_count*) echo 8 ;;
*launch.network*) echo eth0 ;;
*) echo "$@" ;;
esac
"""


@pytest.fixture
def host(tmp_path):
    """host(command, variables): the accelerate launch that a host with these variables makes of a shell command."""
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)

    def run(command: str, variables: dict[str, str]) -> str:
        environment = {"PATH": os.environ["PATH"], "DUET_PYTHON": str(python), **variables}
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


def assert_can_be_dealt(processes: int) -> None:
    """The batch of the config that the manifests and the README start has a micro-batch for every process."""
    config = cli.load(ROOT / "train/configs/seed.yaml")
    assert config.train.global_batch % (config.train.micro_batch * processes) == 0


def test_the_jobset_is_one_by_its_own_models():
    """Models made from JobSet's published schema keep the fields that it knows, and only those."""
    assert JobsetV1alpha2JobSet.from_dict(JOBSET).to_dict() == JOBSET


def test_its_job_is_one_by_the_schema_of_kubernetes():
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "train"}, "spec": JOB["template"]["spec"]}
    kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
    job["spec"]["paralellism"] = 2
    with pytest.raises(kubernetes_validate.ValidationError, match="paralellism"):
        kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)


def test_its_pods_are_the_hosts_of_one_run(host):
    container = POD["containers"][0]
    variables = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
    nodes = variables["NODES"]
    assert JOB["template"]["spec"]["parallelism"] == JOB["template"]["spec"]["completions"] == int(nodes)
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    name = f"{JOBSET['metadata']['name']}-{JOB['name']}-0-0.{JOBSET['spec']['network']['subdomain']}"
    assert variables["MASTER_ADDR"] == name, "JobSet's name of pod 0"
    variables["NNODES"] = variables["NNODES"].replace("$(NODES)", nodes)
    command = " ".join([*container["command"], *container["args"]])
    launch = host(command, {**variables, "JOB_COMPLETION_INDEX": "1"})
    assert f"--num_machines {nodes} --machine_rank 1 --main_process_ip {name} --main_process_port 29500" in launch
    assert launch.endswith(
        "--num_processes 16 -m train --config train/configs/seed.yaml --data.train /work/data/train --name duet"
    )
    assert_can_be_dealt(16)


def test_skypilots_hosts_are_one_run(host):
    task = yaml.safe_load(SKYPILOT.read_text())
    place = {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": str(task["num_nodes"])}
    place |= {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    launch = host(task["run"], {**task["envs"], **place})
    assert "--num_machines 2 --machine_rank 1 --main_process_ip 10.0.0.1 --main_process_port 29500" in launch
    expected = "--num_processes 16 -m train --config train/configs/seed.yaml --data.train /data/train --name duet"
    assert launch.endswith(f"{expected} --runs_dir /runs")
    assert_can_be_dealt(16)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_two_containers_of_compose_are_one_run(host, rank):
    service = COMPOSE["services"][f"node{rank}"]
    assert service["profiles"] == ["two"] and service["hostname"] == f"node{rank}"
    shell, option, script = service["command"]
    assert (shell, option) == ("bash", "-c")
    launch = host(script.replace("$$", "$"), {"DUET_NODE_CONFIG": "train/configs/quickstart.yaml"})
    assert f"--num_machines 2 --machine_rank {rank} --main_process_ip node0 --main_process_port 29500" in launch
    assert launch.endswith("--num_processes 2 -m train --config train/configs/quickstart.yaml")


def test_skypilot_reads_its_task():
    """By SkyPilot's own client, where it is installed (pip install skypilot); it is too large for every test run."""
    task = pytest.importorskip("sky.task").Task.from_yaml(str(SKYPILOT))
    assert task.num_nodes == 2
    (resources,) = task.resources
    assert resources.use_spot and resources.accelerators == {"A100": 8}
    assert resources.job_recovery["recover_on_exit_codes"] == [85]
