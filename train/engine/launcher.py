"""How many processes were asked for, and the refusal to train with another number.

`accelerate launch` can start fewer processes than it was asked for and not say so: two nodes launched like that would
train two separate models.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from train.distributed import world_size

REMEDY = (
    "On CPU use an accelerate config with distributed_type MULTI_GPU and use_cpu true (launch/accelerate/cpu.yaml): "
    "`--cpu` and MULTI_CPU start one process. On several machines give every machine --num_machines, --machine_rank, "
    "--num_processes (of all machines) and --main_process_ip. Set DUET_PROCESSES to the number that you do want if "
    "the one above was not meant for this run."
)
ANCESTORS = 4


class Launcher(NamedTuple):
    """What an `accelerate launch` above this process was told."""

    processes: int | None
    machines: int | None
    cpu: bool
    source: str


def check_world_size(launcher: Launcher | None = None) -> None:
    """Raises ValueError when the world is not the size that the launcher was asked for.

    DUET_PROCESSES, where set, is the number that was asked for, or LEAST:MOST of a run on a range of hosts. Else it is
    what an `accelerate launch` above this process was given on its command line or in its config file, and what
    torchrun, SLURM's srun or MPI say in the environment.
    """
    world = world_size()
    if asked := os.environ.get("DUET_PROCESSES"):
        least, most = (_count("DUET_PROCESSES", part) for part in (asked.split(":", 1) * 2)[:2])
        _require(least <= world <= most, world, f"DUET_PROCESSES={asked}")
        return
    if launcher is not None and launcher.processes is not None:
        _require(world == launcher.processes, world, f"num_processes {launcher.processes} ({launcher.source})")
    if launcher is not None and launcher.machines is not None:
        machines = launcher.machines
        _require(world % machines == 0, world, f"num_machines {machines} ({launcher.source})")
    if "WORLD_SIZE" in os.environ:
        _require(world == positive_int("WORLD_SIZE", 1), world, f"WORLD_SIZE={os.environ['WORLD_SIZE']}")
    # A task of srun or mpirun is one process of the run, or one launcher that starts several.
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        tasks = positive_int(name, 1)
        _require(world % tasks == 0, world, f"{name}={tasks}")


def find_launcher() -> Launcher | None:
    """The nearest `accelerate launch` among the next ANCESTORS of this process, or None."""
    process = psutil.Process()
    for _ in range(ANCESTORS):
        options = None
        with suppress(psutil.Error):  # gone, or of a user whose processes are hidden
            process = process.parent() or process
            directory = Path(process.cwd())
            options = launch_options(process.cmdline())
        if options is not None:
            return _read_launcher(options, directory)
    return None


def launch_options(arguments: list[str]) -> list[str] | None:
    """What follows `accelerate launch` on a command line; None where the command line is not one."""
    for i, argument in enumerate(arguments[:4]):
        name = Path(argument).name
        following = arguments[i + 1] if i + 1 < len(arguments) else ""
        if name in ("accelerate-launch", "launch.py") or argument == "accelerate.commands.launch":
            return arguments[i + 1 :]
        if name in ("accelerate", "accelerate_cli.py") or argument == "accelerate.commands.accelerate_cli":
            return arguments[i + 2 :] if following == "launch" else None
    return None


def _read_launcher(options: list[str], directory: Path) -> Launcher:
    """Read the launcher's options with its own parser, then its config file, as the launcher does."""
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    asked, _ = launch_command_parser().parse_known_args(options)
    processes, machines, cpu = asked.num_processes, asked.num_machines, asked.cpu
    source = "on the command line of accelerate launch"
    path = asked.config_file or (default_config_file if Path(default_config_file).is_file() and not cpu else None)
    if path is not None:
        config = load_config_from_file(str(directory / path))
        if processes is None:
            source = f"in {path}"
        processes = processes if processes is not None else config.num_processes
        machines = machines if machines is not None else config.num_machines
        cpu = cpu or config.use_cpu
    return Launcher(processes or None, machines or None, cpu, source)


def _require(condition: bool, world: int, asked: str) -> None:
    if not condition:
        raise ValueError(f"the launcher was asked for {asked}, but this run has {world} process(es). {REMEDY}")


def positive_int(name: str, default: int) -> int:
    """A whole number of at least 1 from the environment; raises ValueError for anything else."""
    return _count(name, os.environ.get(name) or str(default))


def _count(name: str, value: str) -> int:
    if not value.isdigit() or int(value) < 1:
        raise ValueError(f"{name}={value}: expected a whole number of at least 1")
    return int(value)
