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

from train.engine import precision
from train.engine.launcher import Launcher, check_world_size, find_launcher, positive_int

if TYPE_CHECKING:
    from accelerate import Accelerator, DeepSpeedPlugin

TIMEOUT_SECONDS = 600
ENGINES = ("NO", "MULTI_GPU", "MULTI_CPU", "DEEPSPEED")


def start() -> Accelerator:
    """Joins the process group and makes the Accelerator of the engine that the launcher names; raises as these do."""
    join()
    return make_accelerator()


def join() -> torch.device:
    """Joins the process group, and says where this process computes.

    Where there is no autocast, fp32 is fp32 in this process from here on: no TF32.

    Environment: DUET_TIMEOUT, seconds after which a collective that misses a rank fails (default 600).
    Raises ValueError when the world is not the size that was asked for, or the precision is unknown.
    """
    from accelerate import PartialState

    if precision.asked() == "no":
        # Convolutions use TF32 unless told otherwise, and matrix products do in images whose environment asks for it.
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
    timeout = timedelta(seconds=timeout_seconds())
    launcher = find_launcher()
    if _use_cpu(launcher):
        # DeepSpeed takes part on CPU only if the state exists before the Accelerator, which is then not told `cpu`.
        os.environ["DS_ACCELERATOR"] = "cpu"
        PartialState(cpu=True, timeout=timeout)
        os.environ.pop("ACCELERATE_USE_CPU", None)
    else:
        PartialState(timeout=timeout)
    if dist.is_initialized() and dist.get_backend() == "gloo":
        # However this process ends: gloo's threads that outlive the interpreter abort it, in 3 of 50 exits measured,
        # with 134 in place of its exit status. NCCL's would wait for ranks that may be gone.
        atexit.register(stop)
    check_world_size(launcher)
    return PartialState().device


def engine_is_open() -> bool:
    """Whether the launcher leaves it to the run which engine it takes: DUET_ENGINE is auto, and no ZeRO stage given."""
    asked = os.environ.get("DUET_ENGINE", "")
    if asked not in ("", "auto"):
        raise ValueError(f"DUET_ENGINE={asked}: auto has the run choose; any other engine is given by --config_file")
    return bool(asked) and not _deepspeed_named()


def make_accelerator(stage: int = 0) -> Accelerator:
    """What places and wraps models, and does nothing to data; in a process that has joined.

    Args:
        stage: of ZeRO, 1 to 3; 0 for the engine that the launcher names, which is DDP where it is left open.

    Raises:
        ValueError: the engine is unknown.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    if os.environ.get("DS_ACCELERATOR") == "cpu" and (stage or _deepspeed_named()):
        import deepspeed

        # Else it probes every extension with a compiler and builds one, an all-reduce, which gloo does here.
        deepspeed.ops.__compatible_ops__ = {}
    accelerator = Accelerator(
        gradient_accumulation_steps=1,
        step_scheduler_with_optimizer=False,
        deepspeed_plugin=zero_plugin(stage) if stage else None,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_seconds())),
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


def zero_plugin(stage: int) -> DeepSpeedPlugin:
    """What launch/accelerate/zero<stage>.yaml makes of a process."""
    from accelerate import DeepSpeedPlugin

    return DeepSpeedPlugin(
        zero_stage=stage, offload_optimizer_device="none", offload_param_device="none", zero3_init_flag=False
    )


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


def _deepspeed_named() -> bool:
    """By the launcher, or by the run itself in this process before."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def _use_cpu(launcher: Launcher | None) -> bool:
    # `accelerate launch` with MULTI_GPU or DEEPSPEED does not hand `use_cpu: true` on to its processes.
    asked = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes", "on", "y", "t")
    return asked or (launcher is not None and launcher.cpu) or not torch.accelerator.is_available()
