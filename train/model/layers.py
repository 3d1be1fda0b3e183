"""What both towers are made of, bottom to top: blocks, stages, layers of parameters; and how blocks are recomputed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint
from torchvision.models.regnet import AnyStage
from torchvision.models.vision_transformer import Encoder
from torchvision.ops import StochasticDepth

SEQUENCES = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm)

DROPOUT_RATES = ("drop_prob", "drop_rate", "dropout", "attention_dropout")
"""Where modules that drop by a function keep how much: timm's DropPath and models, torch's attention."""


def is_container(module: nn.Module) -> bool:
    """Whether it holds blocks and is not one itself, in torchvision's models."""
    return type(module) in (nn.Sequential, nn.ModuleList, AnyStage, Encoder)


def is_stage(module: nn.Module) -> bool:
    """Whether it holds blocks and is not one itself, in anybody's model.

    That is a sequence, a module with a sequence named `blocks`, or one whose class is named a stage.
    """
    if isinstance(module, SEQUENCES) or isinstance(getattr(module, "blocks", None), SEQUENCES):
        return True
    return type(module).__name__.endswith("Stage")


def find_blocks(module: nn.Module, holds_blocks: Callable[[nn.Module], bool], prefix: str = "") -> list[str]:
    """Names of the blocks, bottom to top: what containers hold, where it is made of several modules."""
    names = []
    for name, child in module.named_children():
        if holds_blocks(child):
            names += find_blocks(child, holds_blocks, f"{prefix}{name}.")
        elif _is_made_of_several(child):
            names.append(f"{prefix}{name}")
    return names


def _is_made_of_several(module: nn.Module) -> bool:
    # A norm of timm's holds an activation.
    return any(True for _ in module.children()) and not isinstance(module, NORMS)


def find_stages(module: nn.Module, blocks: Sequence[str]) -> list[str]:
    """Names of the innermost modules whose output is that of a sequence of blocks: a ResNet's layer1 to layer4."""
    parents = list(dict.fromkeys(name.rpartition(".")[0] for name in blocks))
    innermost = [name for name in parents if not any(other.startswith(f"{name}.") for other in parents)]
    stages = []
    for name in innermost:
        # A list does not run: what runs is the module that owns it.
        while name and type(module.get_submodule(name)).forward is nn.Module.forward:
            name = name.rpartition(".")[0]
        if name and name not in stages:
            stages.append(name)
    return stages


def group_by_layer(module: nn.Module, blocks: Sequence[str]) -> list[list[str]]:
    """Parameter names in order, where every block opens a new layer; what follows a block belongs to its layer."""
    layers: list[list[str]] = [[]]
    current = None
    for name, _ in module.named_parameters():
        block = next((block for block in blocks if name.startswith(f"{block}.")), None)
        if block is not None and block != current:
            layers.append([])
            current = block
        layers[-1].append(name)
    return [layer for layer in layers if layer]


def lock(module: nn.Module, parts: Sequence[str]) -> None:
    """Keeps every parameter from learning up to the last one of `parts`, names of modules inside `module`."""
    names = [name for name, _ in module.named_parameters()]
    inside = [number for number, name in enumerate(names) if name.startswith(tuple(f"{part}." for part in parts))]
    for name in names[: max(inside, default=-1) + 1]:
        module.get_parameter(name).requires_grad_(False)


def mlp(width: int, hidden: int, out: int, bias: bool) -> nn.Sequential:
    """Two linear maps with a GELU between them: [..., width] -> [..., out]; `bias` is that of the second.

    It is timm's Mlp in shape and names, which is the projection `mlp` of open_clip's image towers.
    """
    first, second = nn.Linear(width, hidden), nn.Linear(hidden, out, bias=bias)
    return nn.Sequential(OrderedDict(fc1=first, act=nn.GELU(), fc2=second))


def has_dropout(module: nn.Module) -> bool:
    """Whether training drops something at random: values, or whole blocks."""
    for part in module.modules():
        if isinstance(part, (_DropoutNd, StochasticDepth)) and part.p > 0:
            return True
        rates = (getattr(part, name, None) for name in DROPOUT_RATES)
        if any(isinstance(rate, float) and rate > 0 for rate in rates):
            return True
    return False


def recompute_blocks(module: nn.Module, blocks: Sequence[str]) -> None:
    """Lets these blocks keep only their inputs for the backward pass (arXiv 1604.06174)."""
    for name in blocks:
        block = module.get_submodule(name)
        block.forward = partial(_recompute, block.forward)


def _recompute(forward: Callable, *inputs, **options):
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    return checkpoint(forward, *inputs, use_reentrant=False, **options)
