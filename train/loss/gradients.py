"""The gradient of a loss over the global batch, for each part of the batch that a rank runs by itself.

A model sees a part of the rows at a time; the loss sees all rows of all ranks. What the model puts out for each part is
therefore cut off from its graph, gathered where the loss needs it of all ranks, and differentiated here; the caller
carries the result into the model (GradCache, arXiv 2101.06983). See train/examples/own_trainer.py for a whole step.

B: rows of the global batch, b: rows of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from train import distributed
from train.config import LossConfig
from train.loss.full import CLIP, contrastive_loss, towers_gathered
from train.loss.ids import Rows

Outputs = dict[str, Tensor]
Objective = Callable[[Outputs, Rows], tuple[Tensor, Outputs]]
"""Outputs and this rank's rows of the global batch -> this rank's loss, and parts of it by their names: scalars.

The mean of this rank's loss over ranks is the loss of the global batch. Every rank calls it at once."""
SCALARS = ("logit_scale", "logit_bias")
"""Outputs that do not belong to a row: they are the same for every part."""


def loss_gradients(
    outputs: Sequence[Mapping[str, Tensor]],
    objective: Objective | LossConfig = CLIP,
    *,
    scalars: Sequence[str] = SCALARS,
    gathers: Callable[[str], bool] = lambda _: True,
    image_ids_b: Tensor | None = None,
    text_ids_b: Tensor | None = None,
) -> tuple[Outputs, list[Outputs]]:
    """The losses of the global batch, and the gradient with respect to every output of every part; a collective.

    Accumulate exactly: run each part without a graph; call this; run each part again, with the same dropout, and give
    its outputs these gradients with `torch.autograd.backward`. Gradients are then to be averaged over ranks, as DDP
    does. With a single part its graph can be kept instead of a second run.

    Args:
        outputs: what the model put out for each part of this rank's rows, the same names in each. Every rank has the
            same number of rows.
        objective: a function of the outputs and this rank's rows; or a LossConfig, for which the outputs are image and
            text, unit vectors [rows, D], logit_scale [1] and, if the loss has a bias, logit_bias [1].
        scalars: names of the outputs that do not belong to a row; they are the same in every part.
        gathers: by the name of an output, whether the objective needs its rows of all ranks; of the others it gets
            this rank's. By default of all outputs; for a LossConfig it is known.
        image_ids_b, text_ids_b: int64, equal numbers for the same image or caption, for LossConfig.mask_duplicates.

    Returns:
        Losses by name: means over ranks, scalars that are still on the device, since reading a number here would keep a
        GPU from going straight on to the backward pass. And per part, a gradient for each of its outputs.

    Raises:
        ValueError: the outputs of a part do not have the same number of rows, or do not fit the objective.
    """
    if isinstance(objective, LossConfig):
        gathers, objective = towers_gathered(objective).__contains__, partial(pair_loss, objective)
    names = [name for name in outputs[0] if name not in scalars]
    sizes = [_rows_of(output, names) for output in outputs]
    # On a CPU float64 costs nothing beside the towers: rounded to float32 after the sums over ranks, gradients are the
    # same to the last bit whoever owned which rows.
    dtype = torch.float64 if outputs[0][names[0]].device.type == "cpu" else torch.float32
    shared = {name: outputs[0][name].detach().to(dtype).requires_grad_() for name in scalars if name in outputs[0]}
    own = {name: torch.cat([output[name].detach() for output in outputs]).to(dtype) for name in names}
    seen = {name: distributed.all_gather_rows(value) if gathers(name) else value for name, value in own.items()}
    images_B, texts_B = (None if b is None else distributed.all_gather_rows(b) for b in (image_ids_b, text_ids_b))

    start = sum(sizes) * distributed.rank()
    inputs = {name: value.requires_grad_() for name, value in seen.items()} | shared
    total, losses = objective(inputs, Rows(start, start + sum(sizes), images_B, texts_B, collective=True))
    found = torch.autograd.grad(total, list(inputs.values()), materialize_grads=True)
    grads = dict(zip(inputs, found, strict=True))

    # Features get the sum of all ranks' gradients, which averaging over ranks makes the gradient of the mean. Of rows
    # that no other rank has seen, it is this rank's.
    summed = {name: distributed.reduce_scatter_rows(grads[name]) if gathers(name) else grads[name] for name in names}
    split = {name: grad_bD.split(sizes) for name, grad_bD in summed.items()}
    # Scalars and losses are averaged here, before rounding: rounded first, ranks would not add up to the same bits.
    values = [value.detach().reshape(1) for value in losses.values()] + [grads[name].reshape(-1) for name in shared]
    means = distributed.all_reduce_sum(torch.cat(values)) / distributed.world_size()
    of_losses, *of_shared = means.split([len(losses), *(value.numel() for value in shared.values())])
    # A scalar comes out of every part's forward, so each part carries an equal share of its gradient.
    shares = {
        name: (mean / len(outputs)).view_as(value)
        for (name, value), mean in zip(shared.items(), of_shared, strict=True)
    }
    gradients = []
    for part, output in enumerate(outputs):
        whole = {name: split[name][part] for name in names} | shares
        gradients.append({name: value.to(output[name].dtype) for name, value in whole.items()})
    return dict(zip(losses, of_losses, strict=True)), gradients


def pair_loss(config: LossConfig, outputs: Mapping[str, Tensor], rows: Rows) -> tuple[Tensor, Outputs]:
    """The contrastive loss of the outputs image, text, logit_scale and, if there is one, logit_bias; an Objective.

    Raises:
        ValueError: one of them is missing, or they do not fit each other.
    """
    if missing := [name for name in ("image", "text", "logit_scale") if name not in outputs]:
        raise ValueError(
            f"outputs have no {missing[0]}: a LossConfig needs image, text and logit_scale; for other outputs give an "
            "objective of your own"
        )
    loss = contrastive_loss(
        outputs["image"],
        outputs["text"],
        outputs["logit_scale"],
        bias=outputs.get("logit_bias"),
        config=config,
        **rows._asdict(),
    )
    return loss, {"loss": loss}


def _rows_of(output: Mapping[str, Tensor], names: Sequence[str]) -> int:
    counts = {name: len(output[name]) if output[name].ndim else 0 for name in names}
    if len(set(counts.values())) != 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(
            f"outputs of one part differ in their number of rows ({listed}): name those that do not belong to a row "
            "in the argument scalars"
        )
    return next(iter(counts.values()))
