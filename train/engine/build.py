"""Which engine a run gets: the only place that asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from train.engine import optim
from train.engine.base import Clamped, Engine
from train.engine.plain import PlainEngine
from train.engine.zero import ZeroEngine

if TYPE_CHECKING:
    from accelerate import Accelerator

    from train.config import RunConfig
    from train.model.pair import PairModel


def build_engine(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    blank: Callable[[], Any],
    clamped: Sequence[Clamped] = (),
    clip_grad: float = 0.0,
    micro_batch: int = 1,
) -> Engine:
    """The engine that the Accelerator's config names, around any model; the arguments are those of `Engine`.

    Raises:
        ValueError: a ZeRO stage or a part of the DeepSpeed config that does not go with Duet.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 0:
        raise ValueError("zero_stage 0 is DDP through DeepSpeed: take launch/accelerate/ddp.yaml, or stage 1 to 3")
    kind = PlainEngine if plugin is None else ZeroEngine
    return kind(
        accelerator, model, optimizer, blank=blank, clamped=clamped, clip_grad=clip_grad, micro_batch=micro_batch
    )


def engine_of_run(accelerator: Accelerator, model: PairModel, config: RunConfig) -> Engine:
    """The engine of a run's own model, with AdamW over its parameter groups; compiled where the config says so.

    Raises:
        ValueError: as `build_engine`; a model, or a ZeRO stage, that cannot be compiled.
    """
    if config.train.compile:
        plugin = accelerator.state.deepspeed_plugin
        if plugin is not None and plugin.zero_stage == 3:
            raise ValueError("train.compile true: zero_stage 3 gathers weights inside of the towers; take 1, 2 or DDP")
        model.compile_towers()
    return build_engine(
        accelerator,
        model,
        optim.build_optimizer(model, config),
        blank=model.blank_micro_batch,
        clamped=[(parameter, *model.log_scale_range) for parameter in model.log_scales()],
        clip_grad=config.optim.clip_grad,
        micro_batch=config.train.micro_batch,
    )
