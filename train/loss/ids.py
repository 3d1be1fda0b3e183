"""Which rows of the global batch a rank owns, and which of all rows show the same image or caption.

B: pairs of the global batch, r and c: rows and columns of a part of the similarity matrix.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """One rank's rows [start, stop) of the global batch; the arguments of that name of `contrastive_loss`."""

    start: int = 0
    stop: int | None = None
    image_ids_B: Tensor | None = None
    text_ids_B: Tensor | None = None


class Ids(NamedTuple):
    """Which images and which captions of the global batch are the same: equal numbers mean equal content."""

    image_B: Tensor
    text_B: Tensor

    def duplicates(self, rows: slice, columns: slice) -> Tensor:
        """[r, c], true for pairs that are no true negatives: the same image or caption, but not the pair itself."""
        same_rc = self.image_B[rows, None] == self.image_B[None, columns]
        same_rc |= self.text_B[rows, None] == self.text_B[None, columns]
        offset = rows.start - columns.start
        if -same_rc.shape[0] < offset < same_rc.shape[1]:
            same_rc.diagonal(offset).fill_(False)
        return same_rc

    def kept(self) -> Tensor:
        """[B], how many pairs remain in each row, the positive among them; by inclusion and exclusion."""
        B = self.image_B.shape[0]
        images_B, texts_B = (torch.unique(ids_B, return_inverse=True)[1] for ids_B in self)
        both_B = torch.unique(images_B * B + texts_B, return_inverse=True)[1]
        same_image_B, same_text_B, same_both_B = (torch.bincount(group)[group] for group in (images_B, texts_B, both_B))
        return B + 1 - (same_image_B + same_text_B - same_both_B)
