"""Parameter groups and AdamW; the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from train.config import OptimConfig, RunConfig
from train.model.pair import PairModel


def lr_at(step: int, total: int, config: OptimConfig, unlocked_at: int = 0) -> float:
    """Learning rate of a step as a share of the peak, in [0, 1].

    Linear warm-up to the peak over `warmup_steps`, then a half cosine down to `min_lr` at `total` (arXiv 1608.03983),
    or constant until the last `cooldown_steps`, in which it falls to `min_lr` as 1 - sqrt (arXiv 2405.18392).

    Args:
        step: from 0.
        total: steps of the run.
        unlocked_at: step at which the tower starts to learn: the share is 0 before that step, and warms up from there.
            -1: never.
    """
    if unlocked_at < 0 or step < unlocked_at:
        return 0.0
    share = 1.0
    if config.schedule == "cosine" and step >= config.warmup_steps:
        progress = min(1.0, (step - config.warmup_steps) / max(1, total - config.warmup_steps))
        share = config.min_lr + (1 - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2
    elif config.cooldown_steps and config.schedule == "constant" and step > total - config.cooldown_steps:
        progress = min(1.0, (step - total + config.cooldown_steps) / config.cooldown_steps)
        share = config.min_lr + (1 - config.min_lr) * (1 - math.sqrt(progress))
    return share * min(1.0, (step - unlocked_at + 1) / max(1, config.warmup_steps))


def param_groups(model: PairModel, config: RunConfig) -> list[dict]:
    """Parameters that learn, grouped by tower, peak learning rate and weight decay.

    A group has, beside what AdamW reads: names, base_lr (its peak), tower (image, text or shared: the logit scale and
    bias), part (tower, projection or scale), unlocked_at.

    No decay on vectors (norms, biases, layer scales, class tokens, the logit scale) and on relative position biases.
    Layer-wise decay (as in ELECTRA, arXiv 2003.10555): a tower's layer that is k layers below its top has the peak
    lr * layer_decay^k. Projections, heads of terms and scale have optim.lr.

    A tower with locked_until -1 has no groups. One that unlocks later has the rate 0 until then, so that AdamW
    neither changes nor decays it, and zero gradients (train.model), so that its moments and the clipped norm do not
    see it; in every engine.
    """
    groups: dict[tuple, dict] = {}
    for name, values in _values_by_parameter(model, config).items():
        parameter = model.get_parameter(name)
        if not parameter.requires_grad:
            continue
        values["weight_decay"] = 0.0 if _is_vector(name, parameter) else config.optim.weight_decay
        group = groups.setdefault(tuple(values.values()), {"params": [], "names": [], **values})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def _values_by_parameter(model: PairModel, config: RunConfig) -> dict[str, dict]:
    """What a parameter's place in the model says about its group, by parameter name."""
    peak = config.optim.lr
    values: dict[str, dict] = {}
    for tower, module, options in (
        ("image", model.image, config.model.image),
        ("text", model.text, config.model.text),
    ):
        layers = module.layers()
        for depth, names in enumerate(reversed(layers)):
            lr = (peak if options.lr is None else options.lr) * options.layer_decay**depth
            values |= {f"{tower}.{name}": _values(tower, "tower", lr, options.locked_until) for name in names}
        heads = [name for name in _named(model, tower) if name not in values]
        values |= {name: _values(tower, "projection", peak, 0) for name in heads}
    return values | {name: _values("shared", "scale", peak, 0) for name in _named(model, "shared")}


def _named(model: PairModel, branch: str) -> list[str]:
    return [name for name, _ in model.named_parameters() if model.branches[name.partition(".")[0]] == branch]


def _values(tower: str, part: str, lr: float, unlocked_at: int) -> dict:
    return {"tower": tower, "part": part, "lr": lr, "base_lr": lr, "unlocked_at": unlocked_at}


def _is_vector(name: str, parameter: nn.Parameter) -> bool:
    return max(parameter.shape) == parameter.numel() or "bias" in name.rpartition(".")[2]


def build_optimizer(model: PairModel, config: RunConfig) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over the parameter groups; fused where the device has it."""
    optim = config.optim
    groups = param_groups(model, config)
    fused = groups[0]["params"][0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=fused)


def set_lrs(
    optimizer: torch.optim.Optimizer,
    step: int,
    total: int,
    config: OptimConfig,
    multipliers: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Sets every group's learning rate for a step, and returns that of the top of each tower: {"image", "text"}.

    Args:
        step: from 0.
        total: steps of the run.
        multipliers: factors on the rates of "image" and "text", projections included; absent ones are 1.

    A tower that does not learn at this step has the rate 0.
    """
    rates = {"image": 0.0, "text": 0.0}
    for group in optimizer.param_groups:
        factor = (multipliers or {}).get(group["tower"], 1.0)
        group["lr"] = group["base_lr"] * factor * lr_at(step, total, config, group["unlocked_at"])
        if group["part"] == "tower":
            rates[group["tower"]] = max(rates[group["tower"]], group["lr"])
    return rates
