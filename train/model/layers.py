"""What both towers are made of, bottom to top: blocks, stages, layers of parameters; and how blocks are recomputed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.regnet import AnyStage
from torchvision.models.vision_transformer import Encoder

CONTAINERS = (nn.Sequential, nn.ModuleList, AnyStage, Encoder)


def find_blocks(module: nn.Module, prefix: str = "") -> list[str]:
    """Names of the repeated blocks, bottom to top: what a container holds that itself is made of several modules."""
    names = []
    for name, child in module.named_children():
        if type(child) in CONTAINERS:
            names += find_blocks(child, f"{prefix}{name}.")
        elif any(True for _ in child.children()):
            names.append(f"{prefix}{name}")
    return names


def find_stages(module: nn.Module, blocks: list[str]) -> list[str]:
    """Names of the innermost sequences of blocks, such as a ResNet's layer1 to layer4."""
    parents = list(dict.fromkeys(name.rpartition(".")[0] for name in blocks))
    innermost = [name for name in parents if not any(other.startswith(f"{name}.") for other in parents)]
    return [name for name in innermost if isinstance(module.get_submodule(name), nn.Sequential)]


def group_by_layer(module: nn.Module, blocks: list[str]) -> list[list[str]]:
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


def recompute_blocks(module: nn.Module, blocks: list[str]) -> None:
    """Lets these blocks keep only their inputs for the backward pass (arXiv 1604.06174)."""
    for name in blocks:
        block = module.get_submodule(name)
        block.forward = partial(_recompute, block.forward)


def _recompute(forward: Callable, *inputs, **options):
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    return checkpoint(forward, *inputs, use_reentrant=False, **options)
