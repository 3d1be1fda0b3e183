"""Two views: a contrastive loss between two augmentations of every image, beside the pairs' (SLIP, arXiv 2112.12750).

Shape suffixes: B samples, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.batch import MicroBatch
from train.config import LossConfig
from train.loss.full import contrastive_loss
from train.loss.ids import Rows
from train.terms.base import Encoded, Heads, Outputs, Term, check_weight


class Views(Term):
    """model.self_supervision.image: a second pass of the image tower, over a second view of every image.

    Outputs: view, other_view: unit vectors of the two views of every image.
    """

    @property
    def enabled(self) -> bool:
        return self.config.self_supervision.image > 0

    def check(self) -> None:
        options = self.config.self_supervision
        check_weight("model.self_supervision.image", options.image, "image", self.config.image.locked_until)
        for name in ("hidden", "dim", "temperature"):
            if not getattr(options, name) > 0:
                raise ValueError(f"model.self_supervision.{name} is {getattr(options, name)}: it must be above 0")

    def extras(self) -> dict[str, Any]:
        return {"second_view": True}

    def blank_inputs(self, batch: MicroBatch) -> dict[str, Any]:
        return {"views_BCHW": batch.images_BCHW}

    def heads(self, pair: Any) -> dict[str, Heads]:
        options = self.config.self_supervision
        return {"image": {"image_ssl": ViewHead(pair.image.width, options.hidden, options.dim)}}

    def from_image(self, pair: Any, encoded: Encoded) -> Outputs:
        return {"view": pair.image_ssl(encoded.features_BD)}

    def after_images(self, pair: Any, batches: Sequence[MicroBatch]) -> Outputs:
        views = [batch.views_BCHW for batch in batches if batch.views_BCHW is not None]
        assert len(views) == len(batches), "the loader makes second views by its Extras"
        return {"other_view": pair.image_ssl(pair.other_image_features(views))}

    def gathers(self, output: str, config: LossConfig) -> bool:
        return output in ("view", "other_view")  # each view's columns are the others

    def loss(self, outputs: Mapping[str, Tensor], rows: Rows, config: LossConfig) -> tuple[Tensor, Outputs]:
        """NT-Xent (SimCLR, arXiv 2002.05709) of two views of every image.

        Each of 2B views has its twin as the positive and the 2B - 2 views of other images as negatives. As a
        contrastive loss: rows are all views, columns their twins; the one column that is the row itself has the row's
        image, too, and is left out as a duplicate.
        """
        rows_D, columns_D = (
            torch.stack([outputs[name] for name in names], 1).flatten(0, 1)
            for names in (("view", "other_view"), ("other_view", "view"))
        )
        B = len(outputs["view"])
        ids_B = torch.arange(B, device=rows_D.device) if rows.image_ids_B is None else rows.image_ids_B
        ids = ids_B.repeat_interleave(2)
        options = self.config.self_supervision
        loss = contrastive_loss(
            rows_D,
            columns_D,
            rows_D.new_full((1,), 1 / options.temperature),
            start=2 * rows.start,
            stop=2 * (B if rows.stop is None else rows.stop),
            config=replace(config, kind="softmax", mask_duplicates=True, label_smoothing=0.0),
            image_ids_B=ids,
            text_ids_B=ids,
            collective=rows.collective,
        )
        return options.image * loss, {"loss/views": loss}


class ViewHead(nn.Module):
    """Two layers, as in SimCLR (arXiv 2002.05709): features [B, D] -> float32 unit vectors of length `dim`.

    LayerNorm takes the place of its BatchNorm, so that a row does not depend on its neighbours.
    """

    def __init__(self, width: int, hidden: int, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, dim)
        )

    def forward(self, features_BD: Tensor) -> Tensor:
        return F.normalize(self.layers(features_BD).float(), dim=-1)
