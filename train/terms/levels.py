"""Alignment at several depths of the towers, not at their tops alone.

Level i pairs the i-th chosen stage of the image tower with the i-th chosen layer of the text tower. Attention pooling
makes one vector of each, a projection brings it into the shared space, and the contrastive loss aligns the two over the
global batch (train/terms/objective.py). That peers of like depth are aligned is PyramidCLIP's (arXiv 2204.14095), that
positions carry the alignment FILIP's (arXiv 2111.07783), the pooling that of CLIP's ResNets (arXiv 2103.00020,
section 2.4).

Shape suffixes: B samples, N positions (pixels of a map, or tokens), C channels, h heads, n levels, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.config import MultiscaleConfig
from train.model.image import ImageTower
from train.model.text import TextTower

STAGES = 3
"""Stages that are aligned where none are named: C3, C4 and C5 of a ResNet."""


class AttentionPool(nn.Module):
    """Multi-head attention of one learned query over positions: [B, N, C] -> [B, D].

    With a query that does not depend on the input, a head's scores (W_k x_n) . q are x_n . (W_k^T q), and its output
    W_v (sum of a_n x_n); so a head is one vector in the space of the positions, values are taken of the pooled position
    alone, and no projection runs over all N. The query starts at zero, which is average pooling.

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
        widths: channels C of each level.
        embed_dim: D.
        config: heads; cross_level; fuse: the embedding is the top vector plus a learned multiple of every level's.
    """

    def __init__(self, widths: Sequence[int], embed_dim: int, config: MultiscaleConfig) -> None:
        super().__init__()
        self.pools = nn.ModuleList(AttentionPool(width, embed_dim, config.heads) for width in widths)
        self.cross = CrossLevelAttention(embed_dim, config.heads) if config.cross_level else nn.Identity()
        # From zero: the embedding starts as the top vector.
        self.gates_n = nn.Parameter(torch.zeros(len(widths))) if config.fuse else None

    def forward(self, levels: Sequence[Tensor], top_BD: Tensor, mask_BN: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Positions [B, N, C] of each level, the projected top -> embedding [B, D], levels [B, n, D]: unit, fp32."""
        pooled = [pool(x_BNC, mask_BN) for pool, x_BNC in zip(self.pools, levels, strict=True)]
        levels_BnD = F.normalize(self.cross(torch.stack(pooled, 1)).float(), dim=-1)
        embedding_BD = F.normalize(top_BD.float(), dim=-1)
        if self.gates_n is not None:
            fused_BD = embedding_BD + (self.gates_n.float()[:, None] * levels_BnD).sum(1)
            embedding_BD = F.normalize(fused_BD, dim=-1)
        return embedding_BD, levels_BnD


def tapped(tower: ImageTower | TextTower, names: Sequence[str], *inputs: Tensor) -> tuple[list[Tensor], Tensor]:
    """One forward of a tower: positions [B, N, C] that its modules `names` put out, and its features [B, D]."""
    outputs: dict[str, Tensor | tuple] = {}

    def keep(name: str):
        return lambda _module, _inputs, output: outputs.update({name: output})

    handles = [tower.get_submodule(name).register_forward_hook(keep(name)) for name in dict.fromkeys(names)]
    try:
        features_BD = tower(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    channels_last = getattr(tower, "channels_last", False)
    return [_positions(outputs[name], channels_last) for name in names], features_BD


def _positions(output: Tensor | tuple, channels_last: bool) -> Tensor:
    x = output[0] if isinstance(output, tuple) else output
    if x.ndim == 4:
        return x.flatten(1, 2) if channels_last else x.flatten(2).mT
    return x


def image_taps(tower: ImageTower, config: MultiscaleConfig, model: str) -> list[str]:
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
            f"--model.multiscale.image_stages: {model} is not made of {STAGES} stages or more; "
            f"name the modules of its levels, such as {examples}"
        )
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"--model.multiscale.image_stages {unknown[0]}: {model} has no such module; "
            f"its stages are {', '.join(tower.stages)}"
        )
    return [f"backbone.{name}" for name in names]


def text_taps(tower: TextTower, config: MultiscaleConfig, levels: int) -> list[str]:
    """Names, within the tower, of the layers that are levels: those of the config, or evenly spaced up to the last.

    Raises:
        ValueError: a number is none of the tower's layers, or there are not as many as levels.
    """
    count = len(tower.blocks)
    numbers = config.text_layers or [-(-level * count // levels) for level in range(1, levels + 1)]
    if len(numbers) != levels:
        raise ValueError(
            f"--model.multiscale.text_layers has {len(numbers)} layers for {levels} image stages: "
            "level i is stage i with layer i, so give as many"
        )
    if wrong := [number for number in numbers if not 1 <= number <= count]:
        raise ValueError(f"--model.multiscale.text_layers {wrong[0]}: the text tower has layers 1 to {count}")
    return [tower.blocks[number - 1] for number in numbers]


@torch.no_grad()
def widths(tower: ImageTower | TextTower, names: Sequence[str], *inputs: Tensor) -> list[int]:
    """Channels C of every tap, from a forward of the tower in evaluation mode.

    Raises:
        ValueError: a tap does not put out positions.
    """
    levels, _ = tapped(tower.eval(), names, *inputs)
    for name, x in zip(names, levels, strict=True):
        if x.ndim != 3:
            raise ValueError(
                f"--model.multiscale.image_stages {name.removeprefix('backbone.')} puts out {list(x.shape)}: "
                "a map [B, C, H, W] or tokens [B, N, C] are needed; choose a stage or a block"
            )
    return [x.shape[2] for x in levels]


def check(config: MultiscaleConfig, embed_dim: int) -> None:
    """Raises ValueError where the fields do not fit each other."""
    for name in ("fuse", "cross_level"):
        if getattr(config, name) and not config.enabled:
            raise ValueError(f"--model.multiscale.{name} needs --model.multiscale.enabled true")
    if not config.enabled:
        return
    if config.heads < 1 or embed_dim % config.heads:
        raise ValueError(
            f"--model.multiscale.heads {config.heads} does not divide --model.embed_dim {embed_dim}; "
            f"try {max(heads for heads in range(1, 9) if embed_dim % heads == 0)}"
        )
    for name in ("weight", "evenness"):
        if not getattr(config, name) > 0:
            raise ValueError(f"--model.multiscale.{name} {getattr(config, name)} must be above 0")
