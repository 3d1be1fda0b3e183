"""Masked captions for the masked-language loss. Shape suffixes: B captions, L tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence

from torch import Tensor

from data_pipeline.seeds import mask_seed
from data_pipeline.tokenizer import Tokenizer

UNMASKED = -100
"""Target of a position that is not to be predicted; what torch's cross-entropy ignores."""
TO_MASK, TO_RANDOM = 0.8, 0.1


class Masking:
    """BERT's masking (arXiv 1810.04805, appendix A.1): of the tokens that are chosen, 80% become the mask token, 10% a
    random one, and 10% stay. Special tokens and padding are never chosen.

    share: probability that a token is chosen.

    Raises:
        ValueError: the tokenizer has no mask token, or the share is not above 0 and at most 1.
    """

    def __init__(self, tokenizer: Tokenizer, share: float):
        if not 0 < share <= 1:
            raise ValueError(f"model.self_supervision.mask is {share}: a share of the tokens, above 0 and at most 1")
        if tokenizer.mask_id is None:
            raise ValueError(
                f"model.self_supervision.text: the tokenizer {tokenizer.name} has no mask token; set it to 0"
            )
        self.mask_id, self.vocab_size, self.share = tokenizer.mask_id, tokenizer.vocab_size, share
        self.special_ids = tokenizer.special_ids

    def __call__(self, ids_BL: Tensor, seeds: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids with masks, and the ids to be predicted or UNMASKED, int64 [B, L].

        seeds: one per caption, that of its sample; so neither neighbours nor padding change what is hidden.
        """
        masked_BL, targets_BL = ids_BL.clone(), ids_BL.new_full(ids_BL.shape, UNMASKED)
        for row, (ids, seed) in enumerate(zip(ids_BL.tolist(), seeds, strict=True)):
            rng = random.Random(mask_seed(seed))
            for place, token in enumerate(ids):
                if token in self.special_ids or rng.random() >= self.share:
                    continue
                targets_BL[row, place] = token
                kind = rng.random()
                if kind < TO_MASK:
                    masked_BL[row, place] = self.mask_id
                elif kind < TO_MASK + TO_RANDOM:
                    masked_BL[row, place] = rng.randrange(self.vocab_size)
        return masked_BL, targets_BL
