"""What every family of image towers hands over, and how it is found out where the family does not say.

Shapes: B samples, H height, W width of an image; D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from train.model.layers import find_blocks, find_stages, is_stage

EDGES = ("stem", "conv_stem", "patch_embed", "downsample", "head", "global_pool")
"""Names of what is below, between or above the repeated blocks."""


@dataclass
class Backbone:
    """An image encoder without its classifier.

    Args:
        module: normalized images, float [B, 3, H, W] -> features [B, D].
        width: D.
        blocks, stages: names of modules inside it, bottom to top: the repeated blocks, and the groups that these form.
        channels_last: whether maps that its modules put out are [B, H, W, C].
    """

    module: nn.Module
    width: int
    blocks: list[str]
    stages: list[str]
    channels_last: bool = False


def describe(
    module: nn.Module,
    image_size: int,
    name: str,
    blocks: Sequence[str] | None = None,
    stages: Sequence[str] | None = None,
    channels_last: bool = False,
) -> Backbone:
    """A module as a backbone: its width from one blank forward, its blocks and stages unless they are given.

    Parameters that its features do not depend on are kept from learning: no gradient would ever reach them, and DDP
    waits for all that learn.

    Args:
        image_size: height and width of the images, in pixels.
        name: `model.image.name`.

    Raises:
        ValueError: images of this size do not go through, or what comes out is not [B, D].
    """
    parameters = dict(module.named_parameters())
    try:
        features, tensors = _blank_forward(module, image_size)
    except Exception as error:  # each model has its own kinds of failure
        raise ValueError(
            f"data.image_size {image_size}: such images do not go through model.image.name {name} ({error}); "
            "set the size that it is made for"
        ) from error
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != 2:
        shape = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"model.image.name {name} makes {shape} of two images: it has to return features [B, D]")
    used = _reached(features)
    for parameter_name, parameter in parameters.items():
        if id(tensors[parameter_name]) not in used:
            parameter.requires_grad_(False)
    if blocks is None:
        blocks = _repeated(find_blocks(module, is_stage))
    if stages is None:
        stages = find_stages(module, blocks)
    return Backbone(module, features.shape[1], list(blocks), list(stages), channels_last)


def check_eval_size(module: nn.Module, image_size: int, name: str) -> None:
    """Raises ValueError where images of that height and width do not go through; `name` is `model.image.name`."""
    try:
        _blank_forward(module, image_size)
    except Exception as error:  # each model has its own kinds of failure
        raise ValueError(
            f"data.eval_size {image_size}: such images do not go through model.image.name {name} ({error}); "
            "set it to 0, which is data.image_size"
        ) from error


def _repeated(blocks: list[str]) -> list[str]:
    """Without blocks at the edges, and, where a tower has sequences, without single blocks beside these."""
    blocks = [name for name in blocks if not set(name.split(".")) & set(EDGES)]
    inner = [name for name in blocks if "." in name]
    return inner if len(inner) > 1 else blocks


def _blank_forward(module: nn.Module, image_size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Features of two black images, and the tensors that took the place of the parameters.

    On the meta device, which costs next to nothing; on the CPU where a module needs values. The module's own tensors
    and the caller's random state stay as they are.
    """
    failure: Exception | None = None
    for device in ("meta", "cpu"):
        parameters = {
            name: value.detach().to(device).requires_grad_(value.requires_grad)
            for name, value in module.named_parameters()
        }
        buffers = {name: value.detach().to(device, copy=True) for name, value in module.named_buffers()}
        images = torch.zeros(2, 3, image_size, image_size, device=device)
        try:
            with torch.random.fork_rng(devices=[]), torch.device(device):
                return functional_call(module, parameters | buffers, (images,)), parameters
        except Exception as error:  # modules that look at values, or have tensors that they did not register
            failure = error
    assert failure is not None
    raise failure


def _reached(features: Tensor) -> set[int]:
    """Ids of the leaves that a backward pass from here would reach."""
    found, seen, pending = set(), set(), [features.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        pending += [following for following, _ in node.next_functions]
    return found
