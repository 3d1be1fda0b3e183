"""The process group: how it starts, how many processes were asked for, and the collectives that training needs.

All collectives also work without a process group, where the world is one process. When a rank fails, its launcher
(torchrun's agent, inside `accelerate launch`) sends TERM to the other ranks of the host at once and KILL after 30
seconds; ranks on other hosts fail in the collective that misses the dead one, after DUET_TIMEOUT seconds at the latest.

b: rows of this rank, B: rows of all ranks, D: features.
"""

from __future__ import annotations

import atexit
import os
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from train.engine.precision import PRECISIONS

if TYPE_CHECKING:
    from accelerate import Accelerator

TIMEOUT_SECONDS = 600
ENGINES = ("NO", "MULTI_GPU", "MULTI_CPU", "DEEPSPEED")
REMEDY = (
    "On CPU use an accelerate config with distributed_type MULTI_GPU and use_cpu true (launch/accelerate/cpu.yaml): "
    "`--cpu` and MULTI_CPU start one process. On several machines give every machine --num_machines, --machine_rank, "
    "--num_processes (of all machines) and --main_process_ip. Set DUET_PROCESSES to the number that you do want if "
    "the one above was not meant for this run."
)


class Launcher(NamedTuple):
    """What an `accelerate launch` above this process was told."""

    processes: int | None
    machines: int | None
    cpu: bool
    source: str


def start() -> Accelerator:
    """Joins the process group and returns the Accelerator, which places and wraps models and does nothing to data.

    Environment: DUET_TIMEOUT, seconds after which a collective that misses a rank fails (default 600).
    Raises ValueError when the world is not the size that was asked for, or precision or engine are unknown.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs, PartialState

    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in PRECISIONS:
        raise ValueError(f"mixed_precision: {precision} is not supported; set it to one of {', '.join(PRECISIONS)}")
    timeout = timedelta(seconds=_positive_int("DUET_TIMEOUT", TIMEOUT_SECONDS))
    launcher = find_launcher()
    if _use_cpu(launcher):
        # DeepSpeed takes part on CPU only if the state exists before the Accelerator, which is then not told `cpu`.
        os.environ["DS_ACCELERATOR"] = "cpu"
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            import deepspeed

            # Else it probes every extension with a compiler and builds one, an all-reduce for which there is gloo.
            deepspeed.ops.__compatible_ops__ = {}
        PartialState(cpu=True, timeout=timeout)
        os.environ.pop("ACCELERATE_USE_CPU", None)
    else:
        PartialState(timeout=timeout)
    if dist.is_initialized() and dist.get_backend() == "gloo":
        # However this process ends: gloo's threads that outlive the interpreter abort it, in 3 of 50 exits measured,
        # with 134 in place of its exit status. NCCL's would wait for ranks that may be gone.
        atexit.register(stop)
    check_world_size(launcher)
    accelerator = Accelerator(
        gradient_accumulation_steps=1,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timeout),
            # train.model.norm keeps the running statistics of BatchNorm equal: DDP need not send them at every forward.
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        ],
    )
    if (kind := accelerator.distributed_type.value) not in ENGINES:
        raise ValueError(f"distributed_type: {kind} is not supported; take an accelerate config of launch/accelerate")
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        # With this reference alive, transformers builds models partitioned under ZeRO-3; ours are whole until prepare.
        plugin.dschf = None
    return accelerator


def stop() -> None:
    """Leave the process group; all ranks call it when they have nothing more to say to each other."""
    if dist.is_initialized():
        dist.destroy_process_group()


def check_world_size(launcher: Launcher | None = None) -> None:
    """Raises ValueError when the world is not the size that the launcher was asked for.

    DUET_PROCESSES, where set, is the number that was asked for, or LEAST:MOST of a run on a range of hosts. Else it is
    what stands on the command line or in the config file of an `accelerate launch` above this process, and in the
    environment of torchrun, SLURM's srun or MPI.
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
        _require(world == _positive_int("WORLD_SIZE", 1), world, f"WORLD_SIZE={os.environ['WORLD_SIZE']}")
    # A task of srun or mpirun is one process of the run, or one launcher that starts several.
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        tasks = _positive_int(name, 1)
        _require(world % tasks == 0, world, f"{name}={tasks}")


def find_launcher(pid: int | None = None, ancestors: int = 4) -> Launcher | None:
    """The nearest `accelerate launch` among the ancestors of a process (this one: None), or None."""
    pid = os.getpid() if pid is None else pid
    for _ in range(ancestors):
        options = None
        with suppress(OSError, ValueError):  # no /proc, or the process is gone or not ours
            stat = Path(f"/proc/{pid}/stat").read_text()
            pid = int(stat.rsplit(")", 1)[1].split()[1])
            directory = Path(f"/proc/{pid}/cwd").resolve()
            options = launch_options(Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1])
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
    """Reads the launcher's own options with its own parser, then its config file as it does."""
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


def _use_cpu(launcher: Launcher | None) -> bool:
    # `accelerate launch` with MULTI_GPU or DEEPSPEED does not hand `use_cpu: true` on to its processes.
    asked = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes", "on", "y", "t")
    return asked or (launcher is not None and launcher.cpu) or not torch.accelerator.is_available()


def _require(condition: bool, world: int, asked: str) -> None:
    if not condition:
        raise ValueError(f"the launcher was asked for {asked}, but this run has {world} process(es). {REMEDY}")


def _positive_int(name: str, default: int) -> int:
    return _count(name, os.environ.get(name) or str(default))


def _count(name: str, value: str) -> int:
    if not value.isdigit() or int(value) < 1:
        raise ValueError(f"{name}={value}: expected a whole number of at least 1")
    return int(value)


def world_size() -> int:
    """Processes of the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Index of this process, 0 to world_size() - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this is rank 0."""
    return rank() == 0


def barrier() -> None:
    """Returns when every rank has called it."""
    if world_size() > 1:
        all_reduce_sum(torch.zeros(1))


def all_gather_rows(x_bD: Tensor) -> Tensor:
    """[b, ...] of every rank -> [B, ...] in rank order, without gradient. Every rank has the same b."""
    x_bD = x_bD.detach().contiguous()
    if world_size() == 1:
        return x_bD.clone()
    x_BD = x_bD.new_empty(world_size() * x_bD.shape[0], *x_bD.shape[1:])
    dist.all_gather_into_tensor(x_BD, x_bD)
    return x_BD


def reduce_scatter_rows(grad_BD: Tensor) -> Tensor:
    """[B, ...] on every rank -> [b, ...]: the sum over ranks, of which each rank gets its own rows."""
    world = world_size()
    assert grad_BD.shape[0] % world == 0, f"{grad_BD.shape[0]} rows over {world} ranks"
    rows = grad_BD.shape[0] // world
    if world == 1:
        return grad_BD.detach().clone()
    if dist.get_backend() == "nccl":
        grad_bD = grad_BD.new_empty(rows, *grad_BD.shape[1:])
        dist.reduce_scatter_tensor(grad_bD, grad_BD.detach().contiguous())
        return grad_bD
    # Not every gloo has reduce_scatter.
    return all_reduce_sum(grad_BD)[rank() * rows : (rank() + 1) * rows].clone()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over ranks, on every rank, without gradient; the argument stays as it is."""
    return _all_reduce(tensor, dist.ReduceOp.SUM)


def all_reduce_max(tensor: Tensor) -> Tensor:
    """The elementwise largest value over ranks, on every rank, without gradient; the argument stays as it is."""
    return _all_reduce(tensor, dist.ReduceOp.MAX)


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank: one decision for all."""
    return bool(all_reduce_max(torch.tensor([int(flag)])).item())


def broadcast_object(value: Any) -> Any:
    """Rank 0's object, on every rank (pickled)."""
    if world_size() == 1:
        return value
    box = [value if is_main() else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's object in rank order on rank 0 (pickled); an empty list on the others."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size() if is_main() else []
    dist.gather_object(value, values if is_main() else None, dst=0)
    return values


def _all_reduce(tensor: Tensor, operation: Any) -> Tensor:
    if world_size() == 1:
        return tensor.detach().clone()
    device = torch.accelerator.current_accelerator() if dist.get_backend() == "nccl" else torch.device("cpu")
    reduced = tensor.detach().to(device, copy=True, memory_format=torch.contiguous_format)
    dist.all_reduce(reduced, op=operation)
    return reduced.to(tensor.device)
