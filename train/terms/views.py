"""Heads of the terms inside one modality: two views of an image, hidden words of a caption.

Shape suffixes: B samples, L tokens, D features, M hidden words, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.samples.masking import UNMASKED
from train.config import ModelConfig
from train.model.text import TextTower


class ViewHead(nn.Module):
    """Two layers, as in SimCLR (arXiv 2002.05709): features [B, D] -> float32 unit vectors of length `dim`.

    LayerNorm stands in for its BatchNorm, so that a row does not depend on its neighbours.
    """

    def __init__(self, width: int, hidden: int, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, dim)
        )

    def forward(self, features_BD: Tensor) -> Tensor:
        return F.normalize(self.layers(features_BD).float(), dim=-1)


class WordHead(nn.Module):
    """BERT's masked-language head (arXiv 1810.04805): a layer, then scores by the tower's own token embeddings.

    The embeddings are a parameter of this module, too, so that ZeRO-3 gathers them for it; not so in its state.
    """

    def __init__(self, tower: TextTower) -> None:
        super().__init__()
        embeddings = tower.encoder.get_input_embeddings()
        assert isinstance(embeddings, nn.Embedding), type(embeddings)
        self.layer = nn.Linear(tower.width, embeddings.embedding_dim)
        self.norm = nn.LayerNorm(embeddings.embedding_dim)
        self.tied_VD = embeddings.weight
        self.bias_V = nn.Parameter(torch.zeros(len(embeddings.weight)))

    def forward(self, hidden_BLD: Tensor, targets_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Per caption the sum of the cross-entropies of its hidden words, float32 [B], and their number, [B]."""
        hidden_BL = targets_BL != UNMASKED
        words_MD = self.norm(F.gelu(self.layer(hidden_BLD[hidden_BL])))
        scores_MV = F.linear(words_MD, self.tied_VD, self.bias_V)
        losses_M = F.cross_entropy(scores_MV.float(), targets_BL[hidden_BL], reduction="none")
        rows_M = hidden_BL.nonzero()[:, 0]
        return losses_M.new_zeros(len(targets_BL)).index_add(0, rows_M, losses_M), hidden_BL.sum(1).float()

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(f"{prefix}tied_VD")

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if f"{prefix}tied_VD" in missing:
            missing.remove(f"{prefix}tied_VD")


def check(config: ModelConfig) -> None:
    """Raises ValueError where a term cannot be had."""
    options = config.self_supervision
    for name, tower in (("image", config.image), ("text", config.text)):
        weight = getattr(options, name)
        if weight < 0:
            raise ValueError(f"--model.self_supervision.{name} is {weight}: a weight, 0 is off")
        if weight and tower.locked_until < 0:
            raise ValueError(
                f"--model.self_supervision.{name} is {weight}, but --model.{name}.locked_until -1 keeps the tower "
                "from learning: set one of them to 0"
            )
    for name in ("hidden", "dim", "temperature"):
        if not getattr(options, name) > 0:
            raise ValueError(f"--model.self_supervision.{name} is {getattr(options, name)}: it must be above 0")
