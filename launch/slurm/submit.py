"""Check a run and submit it: python -m launch.slurm.submit --nodes 4 --time 24:00:00 --config RUN.yaml [--field ...]

Fields of the run are those of `python -m train`. --dry_run shows everything and submits nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from train import checkpoint, checks, cli
from train.config import RunConfig
from train.parent import settled
from train.run.directory import conflict_with, has_started, onward, read_results

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "launch/slurm/train.sbatch"
ALIVE = ("PENDING", "RUNNING", "SUSPENDED", "CONFIGURING", "COMPLETING", "REQUEUED")


@dataclass(frozen=True)
class Partition:
    """A partition as sinfo reports it; limits that do not exist are None."""

    name: str
    up: bool
    nodes: int
    max_seconds: int | None


def seconds(text: str) -> int:
    """SLURM's time format: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Raises:
        ValueError: it is none of these, or no time at all.
    """
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdigit() for part in [*parts, days or "0"]) or len(parts) > 3:
        raise ValueError(f"--time {text}: expected minutes, HH:MM:SS or DAYS-HH:MM:SS")
    numbers = [int(part) for part in parts]
    if dash:  # hours first
        hours, minutes, secs = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, minutes, secs = numbers
    else:  # minutes first
        hours, minutes, secs = 0, *[*numbers, 0][:2]
    total = int(days or 0) * 86400 + hours * 3600 + minutes * 60 + secs
    if total == 0:
        raise ValueError(f"--time {text}: this is no time at all")
    return total


def node_range(text: str) -> tuple[int, int]:
    """`4` or `2-4` as (least, most).

    Raises:
        ValueError: it is neither.
    """
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= least <= most:
        raise ValueError(f"--nodes {text}: expected a number of nodes, or the least and the most of them such as 2-4")
    return least, most


def partitions() -> dict[str, Partition]:
    """What the cluster has, by name; the default partition also under the empty name."""
    listing = _ask(["sinfo", "--noheader", "--format=%P|%a|%D|%l"])
    found: dict[str, Partition] = {}
    for line in listing.splitlines():
        name, state, nodes, limit = line.split("|")
        most = None if limit in ("infinite", "n/a") else seconds(limit)
        before = found.get(name.rstrip("*"))
        total = int(nodes) + (before.nodes if before else 0)
        found[name.rstrip("*")] = partition = Partition(name.rstrip("*"), state == "up", total, most)
        if name.endswith("*"):
            found[""] = partition
    return found


def check_partition(options: argparse.Namespace, name: str, known: dict[str, Partition]) -> None:
    """Raises ValueError where this partition cannot run it as asked, with what it can."""
    if name not in known:
        names = ", ".join(sorted(name for name in known if name))
        asked = f"--partition {name}: there is none" if name else "--partition: no default here"
        raise ValueError(f"{asked}; choose one of {names}")
    partition = known[name]
    if not partition.up:
        raise ValueError(f"--partition {partition.name} is not up; `sinfo` shows the state of the others")
    if node_range(options.nodes)[0] > partition.nodes:
        raise ValueError(f"--nodes {options.nodes}: partition {partition.name} has {partition.nodes}")
    if partition.max_seconds is not None and seconds(options.time) > partition.max_seconds:
        limit = partition.max_seconds
        raise ValueError(
            f"--time {options.time}: partition {partition.name} allows {limit // 3600} h {limit // 60 % 60} min"
        )


def check_cluster(options: argparse.Namespace) -> None:
    """Raises ValueError where the cluster cannot run it as asked, with what it can."""
    known, mistakes = partitions(), []
    asked = options.partition.split(",")
    for name in asked:  # SLURM takes the first of several that can
        try:
            check_partition(options, name, known)
        except ValueError as mistake:
            mistakes.append(str(mistake))
    if len(mistakes) == len(asked):
        raise ValueError("; ".join(mistakes))
    if options.grace < 1:
        raise ValueError(
            f"--grace {options.grace}: expected the seconds that a step and a checkpoint take, such as 300"
        )
    if seconds(options.time) <= options.grace:
        raise ValueError(f"--time {options.time}: must be longer than --grace {options.grace} s, or it never trains")
    if queue := _ask(["squeue", "--noheader", f"--name={options.job_name}", "--me", "--format=%A %T"]).split("\n")[0]:
        job, state = queue.split()
        if state in ALIVE:
            raise ValueError(
                f"job {job} ({state.lower()}) is this run already; `scancel {job}` first, or give another --name"
            )


def check_run(options: argparse.Namespace, config: RunConfig) -> None:
    """Raises ValueError where the run would refuse to start with this engine, container or number of processes."""
    checks.check(config)
    engines = sorted(path.stem for path in Path("launch/accelerate").glob("*.yaml"))
    if options.engine not in ("", "auto", *engines) and not Path(options.engine).is_file():
        known = " ".join(engines)
        raise ValueError(f"--engine {options.engine}: there is no such file, and launch/accelerate has: {known}")
    if options.container.endswith((".sif", ".sqsh")) and not Path(options.container).is_file():
        raise ValueError(f"--container {options.container}: no such file, as seen from {ROOT}")
    if options.processes < 0:
        raise ValueError(f"--processes {options.processes}: expected a whole number of at least 1")
    processes = options.processes or gpus(options.gpus_per_node)
    if options.engine.startswith("cpu") and not processes:
        raise ValueError(f"--engine {options.engine}: say how many --processes each node trains with on its cores")
    least, most = node_range(options.nodes)
    for nodes in range(least, most + 1) if processes else ():
        try:
            checks.check(config, nodes * processes)
        except ValueError as error:
            raise ValueError(f"{error} (on {nodes} nodes x {processes} processes)") from error


def memory_plan(options: argparse.Namespace, config: RunConfig) -> list[str]:
    """What each process will need on the fewest nodes; nothing where it is not known how many there are."""
    processes = node_range(options.nodes)[0] * (options.processes or gpus(options.gpus_per_node))
    if not processes:
        return []
    from train.memory import plan  # which takes torch, for seconds

    bf16 = options.precision == "bf16" or not (options.precision or options.engine.startswith("cpu"))
    try:
        needs = plan(config, processes, bf16)
        lines = [f"memory: {needs.in_words()}"]
        if options.engine in ("", "auto"):
            lines.append(needs.choice_in_words())
        return lines
    except Exception as error:  # such as weights that only compute nodes have
        return [f"memory: no plan can be made here: {cli.with_flags(str(error))}"]


def gpus(text: str) -> int:
    """How many `--gpus_per_node` asks for: `8` or `a100:8`; 0 where it does not say."""
    number = text.rpartition(":")[2]
    return int(number) if number.isdigit() else 0


def describe_run(config: RunConfig) -> str:
    """What the job will do in its run directory.

    Raises:
        ValueError: it is finished, or holds a run with another configuration.
    """
    directory = Path(config.runs_dir) / config.name
    config = settled(config)
    if not has_started(directory):
        parent = config.parent
        return f"new run in {directory}{f' from step {parent.step} of {parent.run}' if parent.run else ''}"
    if conflict := conflict_with(directory, config):
        raise ValueError(conflict)
    if read_results(directory):
        raise ValueError(
            f"name {config.name}: the run in {directory} is finished; choose another `name` to train again"
            f"{onward(directory)}"
        )
    if (found := checkpoint.newest(directory)) is not None:
        checkpoint.check_text(found, config)
    return f"resumes in {directory} from {found.name}" if found else f"starts again in {directory}: no checkpoint there"


def sbatch_command(options: argparse.Namespace, train: list[str]) -> list[str]:
    """The sbatch command line."""
    command = ["sbatch", f"--job-name={options.job_name}", f"--nodes={options.nodes}", f"--time={options.time}"]
    command.append(f"--signal=B:USR1@{options.grace}")
    for name in ("partition", "account", "qos", "gpus_per_node", "cpus_per_task", "mem"):
        if value := getattr(options, name):
            command.append(f"--{name.replace('_', '-')}={value}")
    launcher = [
        part
        for name in ("engine", "precision", "processes")
        if (value := getattr(options, name))
        for part in (f"--{name}", str(value))
    ]
    return [*command, *options.sbatch, SCRIPT, *launcher, *train]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch.slurm.submit", description=__doc__, allow_abbrev=False)
    parser.add_argument("--nodes", default="1", help="nodes, or the least and the most, such as 2-4 (default 1)")
    parser.add_argument(
        "--time", default="24:00:00", help="time limit of one start; the run resumes after it (24:00:00)"
    )
    parser.add_argument("--partition", default="", help="partition; default: the cluster's")
    parser.add_argument("--account", default="", help="account that is charged")
    parser.add_argument("--qos", default="", help="quality of service")
    parser.add_argument("--gpus_per_node", default="", help="GPUs of each node; one training process each")
    parser.add_argument("--cpus_per_task", default="", help="cores of each node")
    parser.add_argument("--mem", default="", help="memory of each node, such as 200G")
    parser.add_argument(
        "--engine", default="", help="launch/accelerate/ENGINE.yaml; default: auto, by the GPUs' memory"
    )
    parser.add_argument(
        "--precision", default="", choices=["", "bf16", "fp32"], help="default: what the engine's file says"
    )
    parser.add_argument(
        "--processes", type=int, default=0, help="training processes of each node; default: one per GPU"
    )
    parser.add_argument(
        "--grace", type=int, default=300, help="seconds before the limit when it saves and requeues (300)"
    )
    parser.add_argument(
        "--container", default="", help=".sif file or docker:// url (Apptainer), else an image for pyxis"
    )
    parser.add_argument(
        "--mounts", default="", help="paths that the container sees besides the checkout: /data,/scratch"
    )
    parser.add_argument(
        "--sbatch", action="append", default=[], help="another option for sbatch, such as --sbatch=--exclusive"
    )
    parser.add_argument("--dry_run", action="store_true", help="say what would be done, and do nothing")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 submitted (or shown), 2 the user's mistake."""
    options, train = make_parser().parse_known_args(argv)
    return cli.exit_status(lambda: _submit(options, train))


def _submit(options: argparse.Namespace, train: list[str]) -> None:
    if not shutil.which("sbatch"):
        raise ValueError("sbatch is not installed here: run this on a login node of the cluster")
    os.chdir(ROOT)
    config = cli.parse(train)
    options.job_name = f"duet-{config.name}"
    plan = describe_run(config)
    check_run(options, config)
    check_cluster(options)
    command = sbatch_command(options, train)
    environment = {**os.environ, "DUET_ROOT": str(ROOT)}
    if options.container:
        environment |= {"DUET_CONTAINER": options.container, "DUET_MOUNTS": options.mounts}
    print(f"run: {plan}")
    for line in memory_plan(options, config):
        print(line)
    print(f"saves and requeues {options.grace} s before each time limit of {options.time}")
    print(shlex.join(command))
    if not options.processes and not re.search("--(exclusive|gres|gpus)", shlex.join(command)):
        print("warning: no --gpus_per_node: unless the cluster has another default, SLURM gives each node no GPU")
    if options.gpus_per_node and not re.search("--(exclusive|cpus-per)", shlex.join(command)):
        print("warning: no --cpus_per_task: unless the cluster has another default, SLURM gives each node one core")
    if options.dry_run:
        print("dry run: nothing submitted")
        return
    print(_ask(command, environment).strip())


def _ask(command: list[str], environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise ValueError(f"{command[0]} says: {(done.stderr or done.stdout).strip()}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
