"""Hidden words: the masked-language loss on the captions, beside the contrastive one (DeCLIP, arXiv 2110.05208).

Shape suffixes: B samples, L tokens, D features, M hidden words, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.batch import MicroBatch
from data_pipeline.samples.masking import UNMASKED
from train.config import LossConfig
from train.loss.ids import Rows
from train.terms.base import Heads, Outputs, Term, check_weight


class Words(Term):
    """model.self_supervision.text: a second pass of the text tower, over captions with hidden words.

    Outputs: words_loss, words_count: [B], the sum of the losses of a caption's hidden words, and their number.
    """

    @property
    def enabled(self) -> bool:
        return self.config.self_supervision.text > 0

    def check(self) -> None:
        weight = self.config.self_supervision.text
        check_weight("model.self_supervision.text", weight, "text", self.config.text.locked_until)

    def extras(self) -> dict[str, Any]:
        return {"mask": self.config.self_supervision.mask}

    def blank_inputs(self, batch: MicroBatch) -> dict[str, Any]:
        targets_BL = torch.full_like(batch.ids_BL, UNMASKED)
        targets_BL[:, ::7] = 0  # about as many as are hidden in training
        return {"masked_BL": batch.ids_BL, "targets_BL": targets_BL}

    def heads(self, pair: Any) -> dict[str, Heads]:
        return {"text": {"text_ssl": WordHead(pair.text)}}

    def after_text(self, pair: Any, batch: MicroBatch) -> Outputs:
        assert batch.masked_BL is not None, "the loader hides words by its Extras"
        hidden_BLD = pair.text.hidden_states(batch.masked_BL, batch.mask_BL)
        loss_B, count_B = pair.text_ssl(hidden_BLD, batch.targets_BL)
        return {"words_loss": loss_B, "words_count": count_B}

    def gathers(self, output: str, config: LossConfig) -> bool:
        return output in ("words_loss", "words_count")

    def loss(self, outputs: Mapping[str, Tensor], rows: Rows, config: LossConfig) -> tuple[Tensor, Outputs]:
        # The mean over the hidden words of the global batch: the same on every rank, however many are in its rows.
        loss = outputs["words_loss"].sum() / outputs["words_count"].sum().clamp_min(1)
        return self.config.self_supervision.text * loss, {"loss/words": loss}


class WordHead(nn.Module):
    """BERT's masked-language head (arXiv 1810.04805): a layer, then scores by the tower's own token embeddings.

    The embeddings are a parameter of this module, too, so that ZeRO-3 gathers them for it, but no part of its state.

    Args:
        tower: the text tower.
    """

    def __init__(self, tower: Any) -> None:
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
        rows_M, columns_M = hidden_BL.nonzero().unbind(1)  # the only thing here for which a GPU is waited for
        words_MD = self.norm(F.gelu(self.layer(hidden_BLD[rows_M, columns_M])))
        scores_MV = F.linear(words_MD, self.tied_VD, self.bias_V)
        losses_M = F.cross_entropy(scores_MV.float(), targets_BL[rows_M, columns_M], reduction="none")
        return losses_M.new_zeros(len(targets_BL)).index_add(0, rows_M, losses_M), hidden_BL.sum(1).float()

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(f"{prefix}tied_VD")

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if f"{prefix}tied_VD" in missing:
            missing.remove(f"{prefix}tied_VD")
