"""How a process joins its run, and how it leaves.

When a rank fails, its launcher (torchrun's agent, inside `accelerate launch`) sends TERM to the other ranks of the host
at once and KILL after 30 seconds; ranks on other hosts fail in the collective that misses the dead one, after
DUET_TIMEOUT seconds at the latest.
"""

from __future__ import annotations

import atexit
import os
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import distributed as dist
from torch.distributed import distributed_c10d as c10d

from train.engine.launcher import Launcher, check_world_size, find_launcher, positive_int
from train.engine.precision import PRECISIONS

if TYPE_CHECKING:
    from accelerate import Accelerator

TIMEOUT_SECONDS = 600
ENGINES = ("NO", "MULTI_GPU", "MULTI_CPU", "DEEPSPEED")


def start() -> Accelerator:
    """Joins the process group and returns the Accelerator, which places and wraps models and does nothing to data.

    Where there is no autocast, fp32 is fp32 in this process from here on: no TF32.

    Environment: DUET_TIMEOUT, seconds after which a collective that misses a rank fails (default 600).
    Raises ValueError when the world is not the size that was asked for, or precision or engine are unknown.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs, PartialState

    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in PRECISIONS:
        raise ValueError(f"mixed_precision: {precision} is not supported; set it to one of {', '.join(PRECISIONS)}")
    if precision == "no":
        # Convolutions use TF32 unless told otherwise, and matrix products do in images whose environment asks for it.
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
    timeout = timedelta(seconds=timeout_seconds())
    launcher = find_launcher()
    if _use_cpu(launcher):
        # DeepSpeed takes part on CPU only if the state exists before the Accelerator, which is then not told `cpu`.
        os.environ["DS_ACCELERATOR"] = "cpu"
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            import deepspeed

            # Else it probes every extension with a compiler and builds one, an all-reduce, which gloo does here.
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


def own_device() -> torch.device:
    """Where a command of one process computes: the accelerator that there is, else the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def bound_groups() -> None:
    """Give every process group the time limit of the first, where torch and DeepSpeed give those that ZeRO makes for
    itself one of their own: in those, a rank that hangs would hold up the others for half an hour."""
    if not dist.is_initialized():
        return
    timeout = timedelta(seconds=timeout_seconds())
    # Public under the first name since torch 2.12.
    set_timeout = getattr(c10d, "set_timeout", None) or c10d._set_pg_timeout
    for group in list(c10d._world.pg_map):
        set_timeout(timeout, group)


def timeout_seconds() -> int:
    """Seconds after which a collective that misses a rank fails. Raises ValueError for a DUET_TIMEOUT that is none."""
    return positive_int("DUET_TIMEOUT", TIMEOUT_SECONDS)


def stop() -> None:
    """Leave the process group; all ranks call it when they have nothing more to say to each other."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _use_cpu(launcher: Launcher | None) -> bool:
    # `accelerate launch` with MULTI_GPU or DEEPSPEED does not hand `use_cpu: true` on to its processes.
    asked = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes", "on", "y", "t")
    return asked or (launcher is not None and launcher.cpu) or not torch.accelerator.is_available()
