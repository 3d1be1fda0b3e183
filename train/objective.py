"""What a step minimizes: the contrastive loss of the embedding, and the terms that the config adds to it.

Shape suffixes: B global batch, n levels, D embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from train.config import RunConfig
from train.loss import contrastive_loss


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
        the embedding; with more than that, loss/total, loss/level<i> and level_weight/<i>.
    """
    options: dict[str, Any] = {"start": start, "stop": stop, "config": config.loss}
    options |= {"image_ids_B": image_ids_B, "text_ids_B": text_ids_B}
    loss = contrastive_loss(
        outputs["image"], outputs["text"], outputs["logit_scale"], bias=outputs.get("logit_bias"), **options
    )
    parts = {"loss": loss}
    if "level_shares" not in outputs:
        return loss, parts

    image_nBD, text_nBD = (outputs[f"{tower}_levels"].transpose(0, 1) for tower in ("image", "text"))
    scales = outputs["level_scales"]
    biases = outputs["level_biases"] if "level_biases" in outputs else [None] * len(scales)
    losses = [
        contrastive_loss(image_BD, text_BD, scale, bias=bias, **options)
        for image_BD, text_BD, scale, bias in zip(image_nBD, text_nBD, scales, biases, strict=True)
    ]
    shares = outputs["level_shares"]
    levels = weighed(torch.stack(losses), shares, config.model.multiscale.evenness)
    total = loss + config.model.multiscale.weight * levels
    for number, (level, share) in enumerate(zip(losses, shares, strict=True), start=1):
        parts |= {f"loss/level{number}": level, f"level_weight/{number}": share}
    return total, parts | {"loss/total": total}


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
