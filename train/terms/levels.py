"""Alignment at several depths of the towers, not at their tops alone.

Level i pairs the i-th chosen stage of the image tower with the i-th chosen layer of the text tower. Attention pooling
makes one vector of each, a projection brings it into the shared space, and the contrastive loss aligns the two over the
global batch. Aligning levels of like depth is PyramidCLIP's idea (arXiv 2204.14095), aligning by positions FILIP's
(arXiv 2111.07783); the pooling is that of CLIP's ResNets (arXiv 2103.00020, section 2.4).

Shape suffixes: B samples, N positions (pixels of a map, or tokens), C channels, h heads, n levels, D embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.config import LossConfig, MultiscaleConfig
from train.loss.full import contrastive_loss, towers_gathered
from train.loss.ids import Rows
from train.terms.base import Encoded, Heads, Outputs, Term
from train.terms.taps import tapped

STAGES = 3
"""Stages that are aligned where none are named: C3, C4 and C5 of a ResNet."""


class Levels(Term):
    """model.multiscale: side heads at several depths of both towers, and a contrastive loss for each depth.

    Outputs: image_levels, text_levels: float32 unit vectors [B, n, D]; level_scales, and with the sigmoid loss
    level_biases: [n], as for the embedding; level_shares: [n], the levels' weights, which sum to one.
    """

    scalars = ("level_scales", "level_biases", "level_shares")

    @property
    def enabled(self) -> bool:
        return self.config.multiscale.enabled

    @property
    def changes_embedding(self) -> bool:
        return self.config.multiscale.fuse

    def check(self) -> None:
        config, embed_dim = self.config.multiscale, self.config.embed_dim
        for name in ("fuse", "cross_level"):
            if getattr(config, name) and not config.enabled:
                raise ValueError(f"model.multiscale.{name} needs model.multiscale.enabled true")
        if not config.enabled:
            return
        if config.heads < 1 or embed_dim % config.heads:
            raise ValueError(
                f"model.multiscale.heads {config.heads} does not divide model.embed_dim {embed_dim}; "
                f"try {max(heads for heads in range(1, 9) if embed_dim % heads == 0)}"
            )
        for name in ("weight", "evenness"):
            if not getattr(config, name) > 0:
                raise ValueError(f"model.multiscale.{name} {getattr(config, name)} must be above 0")

    def heads(self, pair: Any) -> dict[str, Heads]:
        """Side heads, and what their losses learn: weights, and scales of their own.

        A level's cosines spread less than the top's. With one scale for all, the levels would soften the embedding's.
        """
        config, embed_dim, blank = self.config.multiscale, self.config.embed_dim, pair.blank_micro_batch()
        images = image_taps(pair.image, config, self.config.image.name)
        texts = text_taps(pair.text, config, len(images))
        image_widths = widths(pair.image, images, pair.normalized(blank.images_BCHW))
        text_widths = widths(pair.text, texts, blank.ids_BL, blank.mask_BL)
        count = len(images)
        bias = pair.logit_bias
        return {
            "image": {"image_levels": LevelHeads(images, image_widths, embed_dim, config)},
            "text": {"text_levels": LevelHeads(texts, text_widths, embed_dim, config)},
            "shared": {
                "level_log_scales": nn.Parameter(pair.log_scale.detach().repeat(count)),
                "level_biases": None if bias is None else nn.Parameter(bias.detach().repeat(count)),
                "level_logits": nn.Parameter(torch.zeros(count)),
            },
        }

    def log_scales(self, pair: Any) -> list[nn.Parameter]:
        return [pair.level_log_scales]

    def taps(self, pair: Any, tower: str) -> Sequence[str]:
        return getattr(pair, f"{tower}_levels").taps

    def from_image(self, pair: Any, encoded: Encoded) -> Outputs:
        embedding_BD, levels_BnD = pair.image_levels(encoded)
        return {"image": embedding_BD, "image_levels": levels_BnD}

    def from_text(self, pair: Any, encoded: Encoded) -> Outputs:
        embedding_BD, levels_BnD = pair.text_levels(encoded)
        return {"text": embedding_BD, "text_levels": levels_BnD}

    def scalar_outputs(self, pair: Any) -> Outputs:
        outputs = {"level_scales": pair.level_log_scales.float().exp()}
        outputs["level_shares"] = pair.level_logits.float().softmax(0)
        if pair.level_biases is not None:
            outputs["level_biases"] = pair.level_biases.float().clone()
        return outputs

    def gathers(self, output: str, config: LossConfig) -> bool:
        return output in [f"{tower}_levels" for tower in towers_gathered(config)]

    def loss(self, outputs: Mapping[str, Tensor], rows: Rows, config: LossConfig) -> tuple[Tensor, Outputs]:
        image_nBD, text_nBD = (outputs[f"{tower}_levels"].transpose(0, 1) for tower in ("image", "text"))
        scales, shares = outputs["level_scales"], outputs["level_shares"]
        biases = outputs["level_biases"] if "level_biases" in outputs else [None] * len(scales)
        losses = [
            contrastive_loss(image_BD, text_BD, scale, bias=bias, config=config, **rows._asdict())
            for image_BD, text_BD, scale, bias in zip(image_nBD, text_nBD, scales, biases, strict=True)
        ]
        parts: Outputs = {}
        for number, (level, share) in enumerate(zip(losses, shares, strict=True), start=1):
            parts |= {f"loss/level{number}": level, f"level_weight/{number}": share}
        options = self.config.multiscale
        return options.weight * weighed(torch.stack(losses), shares, options.evenness), parts


class AttentionPool(nn.Module):
    """Multi-head attention of one learned query over positions: [B, N, C] -> [B, D].

    With a query that does not depend on the input, a head's scores (W_k x_n) . q are x_n . (W_k^T q), and its output
    W_v (sum of a_n x_n); so a head is one vector in the space of the positions, values are made from the pooled
    position alone, and no projection runs over all N. The query starts at zero, which is average pooling.

    Args:
        width: C. embed_dim: D. heads: divides D.
    """

    def __init__(self, width: int, embed_dim: int, heads: int) -> None:
        super().__init__()
        self.query_hC = nn.Parameter(torch.zeros(heads, width))
        self.value_hCd = nn.Parameter(torch.randn(heads, width, embed_dim // heads) * width**-0.5)
        self.projection = nn.Linear(embed_dim, embed_dim, bias=False)

    def forward(self, x_BNC: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        """mask_BN: 1 where there is a position, 0 for padding."""
        scores_BNh = x_BNC @ (self.query_hC * self.query_hC.shape[1] ** -0.5).T
        if mask_BN is not None:
            scores_BNh = scores_BNh.masked_fill(mask_BN.unsqueeze(-1) == 0, -torch.inf)
        pooled_BhC = scores_BNh.softmax(1, dtype=torch.float32).to(x_BNC.dtype).mT @ x_BNC
        return self.projection(torch.einsum("bhc,hcd->bhd", pooled_BhC, self.value_hCd).flatten(1))


class CrossLevelAttention(nn.Module):
    """Self-attention of one sample's levels over each other (arXiv 1706.03762), with a residual: [B, n, D]."""

    def __init__(self, embed_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(embed_dim)
        self.query_key_value = nn.Linear(embed_dim, 3 * embed_dim, bias=False)
        self.projection = nn.Linear(embed_dim, embed_dim, bias=False)

    def forward(self, levels_BnD: Tensor) -> Tensor:
        B, n, _ = levels_BnD.shape
        parts_3Bhnd = self.query_key_value(self.norm(levels_BnD)).view(B, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed_Bhnd = F.scaled_dot_product_attention(*parts_3Bhnd)
        return levels_BnD + self.projection(mixed_Bhnd.transpose(1, 2).flatten(2))


class LevelHeads(nn.Module):
    """The side heads of one tower.

    Args:
        taps: names of the tower's modules, one per level.
        widths: channels C of each level.
        embed_dim: D.
        config: heads; cross_level; fuse: the embedding is the top vector plus a learned multiple of every level's.
    """

    def __init__(self, taps: Sequence[str], widths: Sequence[int], embed_dim: int, config: MultiscaleConfig) -> None:
        super().__init__()
        self.taps = taps
        self.pools = nn.ModuleList(AttentionPool(width, embed_dim, config.heads) for width in widths)
        self.cross = CrossLevelAttention(embed_dim, config.heads) if config.cross_level else nn.Identity()
        # From zero: the embedding starts as the top vector.
        self.gates_n = nn.Parameter(torch.zeros(len(widths))) if config.fuse else None

    def forward(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """The embedding [B, D], fused with the levels where the config says so, and the levels [B, n, D]: float32."""
        levels = [encoded.taps[name] for name in self.taps]
        pooled = [pool(x_BNC, encoded.mask_BL) for pool, x_BNC in zip(self.pools, levels, strict=True)]
        levels_BnD = F.normalize(self.cross(torch.stack(pooled, 1)).float(), dim=-1)
        embedding_BD = encoded.embedding_BD
        if self.gates_n is not None:
            fused_BD = embedding_BD + (self.gates_n.float()[:, None] * levels_BnD).sum(1)
            embedding_BD = F.normalize(fused_BD, dim=-1)
        return embedding_BD, levels_BnD


def image_taps(tower: Any, config: MultiscaleConfig, model: str) -> list[str]:
    """Names, within the tower, of the modules whose outputs are levels: those of the config, or the last three stages.

    Raises:
        ValueError: a name is not the tower's, or none is given and the tower has fewer stages.
    """
    names = config.image_stages or tower.stages[-STAGES:]
    known = [name for name, _ in tower.backbone.named_modules() if name]
    if not config.image_stages and len(names) < STAGES:
        parts = [name.removeprefix("backbone.") for name in tower.blocks] or known
        examples = ", ".join(parts[i * len(parts) // STAGES - 1] for i in range(1, STAGES + 1))
        raise ValueError(
            f"model.multiscale.image_stages: {model} is not made of {STAGES} stages or more; "
            f"name the modules of its levels, such as {examples}"
        )
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"model.multiscale.image_stages {unknown[0]}: {model} has no such module; "
            f"its stages are {', '.join(tower.stages)}"
        )
    return [f"backbone.{name}" for name in names]


def text_taps(tower: Any, config: MultiscaleConfig, levels: int) -> list[str]:
    """Names, within the tower, of the layers that are levels: those of the config, or evenly spaced up to the last.

    Raises:
        ValueError: a number is not one of the tower's layers, or there are not as many as levels.
    """
    count = len(tower.blocks)
    numbers = config.text_layers or [-(-level * count // levels) for level in range(1, levels + 1)]
    if len(numbers) != levels:
        raise ValueError(
            f"model.multiscale.text_layers has {len(numbers)} layers for {levels} image stages: "
            "level i is stage i with layer i, so give as many"
        )
    if wrong := [number for number in numbers if not 1 <= number <= count]:
        raise ValueError(f"model.multiscale.text_layers {wrong[0]}: the text tower has layers 1 to {count}")
    return [tower.blocks[number - 1] for number in numbers]


def weighed(losses_n: Tensor, shares_n: Tensor, evenness: float) -> Tensor:
    """Losses weighed by learned shares that cannot leave any of them out.

    sum of w_i L_i + evenness * KL(uniform || w), with w a softmax of learned numbers. The sum alone is least where all
    weight is on the smallest loss; the divergence is a barrier against that. At the minimum over w,
    w_i = evenness / (n (L_i + c)) with the c that makes them sum to one, so that
    w_i >= evenness / (n (evenness + L_i - min L)). Weights by uncertainty (Kendall et al., arXiv 1705.07115) fall with
    1 / L_i as well, but rise without bound as a loss goes to zero, as it does where data are memorized: a finished
    level would keep its full gradient. These sum to one.
    """
    return (shares_n * losses_n).sum() - evenness * (shares_n * len(shares_n)).log().mean()


@torch.no_grad()
def widths(tower: Any, names: Sequence[str], *inputs: Tensor) -> list[int]:
    """Channels C of what each of these modules puts out, from a forward of the tower in evaluation mode.

    Raises:
        ValueError: a module's output is not one vector per position.
    """
    positions, _ = tapped(tower.eval(), names, *inputs)
    for name, x in positions.items():
        if x.ndim != 3:
            raise ValueError(
                f"model.multiscale.image_stages {name.removeprefix('backbone.')} puts out {list(x.shape)}: "
                "a map [B, C, H, W] or tokens [B, N, C] are needed; choose a stage or a block"
            )
    return [positions[name].shape[2] for name in names]
