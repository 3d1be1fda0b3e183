"""Putting the tensors of an `Origin` into a model, and saying what was taken, what is fresh and what was left."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from train.config import RunConfig
from train.init.origin import Origin
from train.init.vits import activation_of
from train.model.image import adapted
from train.model.names import some
from train.model.pair import PairModel
from train.model.text import first_position, is_position_table, resampled

IMAGE, TEXT = "image.backbone.", "text.encoder."
PARTS = {"image.": "the image tower", "text.": "the text tower", "image_projection.": "", "text_projection.": ""}
SAME = 1e-6


def fill(model: PairModel, origin: Origin, config: RunConfig) -> list[str]:
    """Put all that fits into a model with fresh weights; what was done, in lines.

    Raises:
        ValueError: a tensor of a tower or a projection is missing or of another shape, or the scale is out of range.
    """
    own = model.state_dict()
    _check_towers(model, origin, config)
    given, moved = _fitted(model, origin, config)
    if "logit_bias" not in own:
        given.pop("logit_bias", None)
    taken = {name: tensor for name, tensor in given.items() if name in own and tensor.shape == own[name].shape}
    lacking = [name for name in own if name not in taken and not _may_be_fresh(name)]
    if lacking:
        first = lacking[0]
        found = f"is {list(given[first].shape)}, here {list(own[first].shape)}" if first in given else "is not there"
        raise ValueError(
            f"init {config.init}: {len(lacking)} of the {len(own)} tensors of this model do not fit it: {first} "
            f"{found}. Set model.image.name and model.text.name to towers of its shape"
        )
    scale, most = float(taken["log_scale"]), config.model.max_logit_scale
    if scale > math.log(most) + SAME:
        raise ValueError(
            f"init {config.init}: its logit scale is {math.exp(scale):.4g}. Set\n  "
            f"model.max_logit_scale {math.ceil(math.exp(scale) - SAME)}    (now it is {most:g})"
        )
    model.load_state_dict(taken, strict=False)
    fresh = [name for name in own if name not in taken and name not in ("mean", "std") and "num_batches" not in name]
    left = [*origin.left, *(name for name in origin.tensors if name.startswith(("image", "text")) and name not in own)]
    return [
        f"starts from {config.init} (sha256 {origin.sha256[:12]})",
        f"taken: {_counted(taken)}, logit scale {math.exp(scale):.4g}",
        *moved,
        *([f"fresh: {some(fresh)}"] if fresh else []),
        *([f"left there: {some(left)}"] if left else []),
        *_other_inputs(model, origin, config),
    ]


def _fitted(model: PairModel, origin: Origin, config: RunConfig) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors with positions interpolated to the model's, and lines that say of which."""
    given, moved = dict(origin.tensors), []
    image = {name.removeprefix(IMAGE): given.pop(name) for name in list(given) if name.startswith(IMAGE)}
    before = _grid(image)
    image = adapted(config.model.image, config.data.image_size, model.image.backbone, image)
    if before and (after := _grid(image)) != before:
        moved.append(f"positions of the image tower are interpolated bicubically, from {before} to {after}")
    given |= {f"{IMAGE}{name}": tensor for name, tensor in image.items()}
    for name, tensor in model.text.encoder.state_dict().items():
        key = f"{TEXT}{name}"
        if is_position_table(name) and key in given and len(given[key]) != len(tensor):
            moved.append(
                f"positions of the text tower are interpolated linearly, from {len(given[key])} to {len(tensor)}"
            )
            given[key] = resampled(given[key], len(tensor), first_position(model.text.encoder))
    return given, moved


def _grid(image: dict[str, Tensor]) -> int:
    """How many positions an image tower has; 0 where it has no table of them."""
    names = ("pos_embed", "visual.positional_embedding", "visual.trunk.pos_embed", "encoder.pos_embedding")
    return next((image[name].shape[-2] for name in names if name in image), 0)


def _check_towers(model: PairModel, origin: Origin, config: RunConfig) -> None:
    """What shapes do not tell. Raises ValueError."""
    blocks = getattr(model.image.backbone, "blocks", None)
    if not origin.heads or blocks is None or not hasattr(blocks[0], "attn"):
        return
    heads, act = blocks[0].attn.num_heads, activation_of(model.image.backbone)
    near = {act, origin.activation} <= {"gelu", "gelu_pytorch_tanh"}
    if heads != origin.heads or not (act == origin.activation or near):
        raise ValueError(
            f"init {config.init}: its image tower has {origin.heads} heads and {origin.activation}, model.image.name "
            f"{config.model.image.name} has {heads} and {act}; take one that has the same"
        )


def _may_be_fresh(name: str) -> bool:
    """Whether it need not come from anywhere: counters, and what is neither tower, projection nor scale."""
    if name.endswith("num_batches_tracked"):
        return True
    return not name.startswith((*PARTS, "log_scale"))


def _counted(names: Sequence[str] | dict) -> str:
    count = {part: sum(name.startswith(prefix) for name in names) for prefix, part in PARTS.items() if part}
    projections = [name for name in names if name.startswith(("image_projection.", "text_projection."))]
    text = " and ".join(f"{number} tensors of {part}" for part, number in count.items())
    return f"{text}, {len(projections)} of the projections"


def _other_inputs(model: PairModel, origin: Origin, config: RunConfig) -> list[str]:
    """What it was trained to see that this run shows otherwise, in lines."""
    here = {
        "data.image_size": config.data.image_size,
        "data.max_tokens": config.data.max_tokens,
        "data.eval_crop": config.data.eval_crop,
        "data.normalize": [model.mean.flatten().tolist(), model.std.flatten().tolist()],
    }
    lines = []
    for name, value in origin.inputs.items():
        same = torch.allclose(torch.tensor(value).float(), torch.tensor(here[name]).float(), atol=1e-4)
        if not same:
            written = [[round(number, 4) for number in row] for row in value] if name == "data.normalize" else value
            lines.append(f"it was trained with {name} {written}, which is otherwise in this run")
    return lines
