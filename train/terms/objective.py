"""What a step minimizes: the contrastive loss of the embedding, and the terms that the config adds to it.

Shape suffixes: B global batch, n levels, D embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from train.config import RunConfig
from train.loss.full import contrastive_loss


def objective(
    outputs: Mapping[str, Tensor],
    config: RunConfig,
    *,
    start: int,
    stop: int,
    image_ids_B: Tensor | None = None,
    text_ids_B: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The share of rows [start, stop) in what the global batch is to minimize.

    Args:
        outputs: what the model puts out, features of all ranks' rows: see PairModel.forward.
        image_ids_B, text_ids_B: as for `contrastive_loss`.

    Returns:
        A scalar of which the mean over ranks is meant, and parts of it by the names of their metrics: `loss`, that of
        the embedding; with more than that, loss/total, loss/level<i>, level_weight/<i>, loss/views and loss/words.
    """
    options: dict[str, Any] = {"start": start, "stop": stop, "config": config.loss}
    options |= {"image_ids_B": image_ids_B, "text_ids_B": text_ids_B}
    loss = contrastive_loss(
        outputs["image"], outputs["text"], outputs["logit_scale"], bias=outputs.get("logit_bias"), **options
    )
    parts, total = {"loss": loss}, loss
    if "level_shares" in outputs:
        levels, terms = _levels(outputs, config, options)
        total, parts = total + config.model.multiscale.weight * levels, parts | terms
    if "view" in outputs:
        parts["loss/views"] = _views(outputs, config, options)
        total = total + config.model.self_supervision.image * parts["loss/views"]
    if "words_loss" in outputs:
        # The mean over the hidden words of the global batch: the same on every rank, whoever has how many of them.
        parts["loss/words"] = outputs["words_loss"].sum() / outputs["words_count"].sum().clamp_min(1)
        total = total + config.model.self_supervision.text * parts["loss/words"]
    return total, parts if total is loss else parts | {"loss/total": total}


def _levels(outputs: Mapping[str, Tensor], config: RunConfig, options: dict) -> tuple[Tensor, dict[str, Tensor]]:
    image_nBD, text_nBD = (outputs[f"{tower}_levels"].transpose(0, 1) for tower in ("image", "text"))
    scales = outputs["level_scales"]
    biases = outputs["level_biases"] if "level_biases" in outputs else [None] * len(scales)
    losses = [
        contrastive_loss(image_BD, text_BD, scale, bias=bias, **options)
        for image_BD, text_BD, scale, bias in zip(image_nBD, text_nBD, scales, biases, strict=True)
    ]
    shares = outputs["level_shares"]
    terms: dict[str, Tensor] = {}
    for number, (level, share) in enumerate(zip(losses, shares, strict=True), start=1):
        terms |= {f"loss/level{number}": level, f"level_weight/{number}": share}
    return weighed(torch.stack(losses), shares, config.model.multiscale.evenness), terms


def _views(outputs: Mapping[str, Tensor], config: RunConfig, options: dict) -> Tensor:
    """NT-Xent (SimCLR, arXiv 2002.05709; beside captions: SLIP, arXiv 2112.12750) of two views of every image.

    Each of 2B views has its twin as the positive and the 2B - 2 views of other images as negatives. As a contrastive
    loss: rows are all views, columns their twins; the one column that is the row itself has the row's image, too, and
    is left out as a duplicate.
    """
    rows_D, columns_D = (
        torch.stack([outputs[name] for name in names], 1).flatten(0, 1)
        for names in (("view", "other_view"), ("other_view", "view"))
    )
    ids_B = options["image_ids_B"]
    ids_B = torch.arange(len(outputs["view"]), device=rows_D.device) if ids_B is None else ids_B
    ids = ids_B.repeat_interleave(2)
    plain = replace(config.loss, kind="softmax", mask_duplicates=True, label_smoothing=0.0)
    scale = rows_D.new_tensor([1 / config.model.self_supervision.temperature])
    start, stop = 2 * options["start"], 2 * options["stop"]
    return contrastive_loss(
        rows_D, columns_D, scale, start=start, stop=stop, config=plain, image_ids_B=ids, text_ids_B=ids
    )


def weighed(losses_n: Tensor, shares_n: Tensor, evenness: float) -> Tensor:
    """Losses weighed by learned shares that cannot leave any of them out.

    sum of w_i L_i + evenness * KL(uniform || w), with w a softmax of learned numbers. The sum alone is least where all
    weight is on the smallest loss. The divergence is a barrier about that: at the minimum over w,
    w_i = evenness / (n (L_i + c)) with the c that makes them sum to one, so that
    w_i >= evenness / (n (evenness + L_i - min L)). Weights by uncertainty (Kendall et al., arXiv 1705.07115) fall with
    1 / L_i as well, but rise without bound as a loss goes to zero, as it does where data are memorized: a finished
    level would keep its full gradient. These sum to one.
    """
    return (shares_n * losses_n).sum() - evenness * (shares_n * len(shares_n)).log().mean()
