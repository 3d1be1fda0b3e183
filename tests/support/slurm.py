"""A real SLURM of two nodes on this machine: its own munge, controller and node daemons in a temporary directory."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")


def why_not() -> str:
    """Why no SLURM can be started here; empty where one can."""
    missing = [name for name in PROGRAMS if not find(name)]
    if missing:
        return f"{', '.join(missing)} not installed (apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "node daemons of SLURM need root"


def find(program: str) -> str | None:
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def free_ports(count: int) -> list[int]:
    """Free ports below the range of outgoing connections, so that they stay free."""
    ports: list[int] = []
    for port in range(17000 + os.getpid() % 1000, 30000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                ports.append(port)
        if len(ports) == count:
            return ports
    raise AssertionError("no free ports")


class Cluster:
    """Nodes n1 and n2 with the cores of this machine each; partitions `main` (default) and `short` (n1, 10 minutes).

    Job numbers begin anywhere: the rendezvous port comes of them, and other clusters on this machine have theirs.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.daemons: dict[str, subprocess.Popen] = {}
        controller, n1, n2 = free_ports(3)
        host = socket.gethostname().split(".")[0]
        self.munge = directory / "munge"
        self.munge.mkdir(mode=0o755)
        key = self.munge / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self.configuration = directory / "slurm.conf"
        cores = os.cpu_count()
        self.configuration.write_text(
            f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={self.munge}/socket
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
KillWait=30
SlurmdTimeout=20
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
JobRequeue=1
FirstJobId={1 + os.getpid() % 9000}
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs={cores} State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs={cores} State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE OverSubscribe=NO State=UP
PartitionName=short Nodes=n1 MaxTime=10 State=UP
"""
        )
        (directory / "state").mkdir()
        # What a login node's user has; none of a surrounding job.
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PYTEST_"))}
        self.environment |= {"SLURM_CONF": str(self.configuration), "OMP_NUM_THREADS": "1"}
        self.environment["PATH"] = os.environ["PATH"] + ":/usr/sbin:/sbin"

    def __enter__(self) -> Cluster:
        options = [f"--socket={self.munge}/socket", f"--key-file={self.munge}/key", f"--pid-file={self.munge}/pid"]
        options += [f"--log-file={self.munge}/log", f"--seed-file={self.munge}/seed", "--foreground", "--force"]
        self.start("munged", options)
        wait_for(lambda: (self.munge / "socket").exists(), "munged")
        self.start("slurmctld", ["-D"])
        for node in ("n1", "n2"):
            self.start_node(node)
        wait_for(lambda: self.idle() == {"n1", "n2"}, "idle nodes")
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(subprocess.TimeoutExpired):  # a controller that does not answer ends like the others
            self.ask("scancel", "--me", check=False)
            deadline = time.monotonic() + 30
            while self.ask("squeue", "-h", check=False) and time.monotonic() < deadline:
                time.sleep(0.5)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def idle(self) -> set[str]:
        return set(self.ask("sinfo", "-h", "-N", "-t", "idle", "-o", "%N", check=False).split())

    def start(self, program: str, options: list[str], name: str = "") -> None:
        log = (self.directory / f"{name or program}.out").open("ab")
        command = [str(find(program)), *options]
        self.daemons[name or program] = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)

    def start_node(self, node: str) -> None:
        (self.directory / f"spool-{node}").mkdir(exist_ok=True)
        self.start("slurmd", ["-D", "-N", node], name=f"slurmd-{node}")

    def ask(self, *command: str, check: bool = True) -> str:
        """Output of a command of SLURM."""
        done = subprocess.run(command, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, *options: str, script: str = "launch/slurm/train.sbatch", arguments: tuple[str, ...] = ()) -> str:
        """sbatch; returns the job's number."""
        return self.ask("sbatch", "--parsable", *options, script, *arguments)

    def state(self, job: str) -> str:
        return self.field(job, "JobState")

    def field(self, job: str, name: str) -> str:
        shown = self.ask("scontrol", "--oneliner", "show", "job", job)
        return dict(part.split("=", 1) for part in shown.split() if "=" in part)[name]

    def restart(self, job: str, times: int) -> None:
        """Have a job that is requeued for the n-th time start: SLURM may let it wait for two minutes; not here.

        But it may not start in the second in which its last start ended: node daemons compare whole seconds, and
        refuse that launch as one of the ended start ("Job credential revoked", state FAILED).
        """
        wait_for(lambda: self.field(job, "Restarts") == str(times), f"requeue of job {job}", 300)
        if self.wait(job, "PENDING", "CONFIGURING", "RUNNING", seconds=300) == "PENDING":
            self.ask("scontrol", "update", f"JobId={job}", "StartTime=now+2seconds", check=False)  # fails once it runs

    def wait(self, job: str, *states: str, seconds: float = 120) -> str:
        """Wait until the job is in one of the states; returns it."""
        wait_for(lambda: self.state(job) in states, f"job {job} in {states}", seconds)
        return self.state(job)


def wait_for(condition, what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.2)
