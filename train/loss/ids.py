"""Which rows of the global batch a rank owns, and which of all rows show the same image or caption.

B: pairs of the global batch, r and c: rows and columns of a part of the similarity matrix.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """One rank's rows [start, stop) of the global batch; the arguments of those names of `contrastive_loss`."""

    start: int = 0
    stop: int | None = None
    image_ids_B: Tensor | None = None
    text_ids_B: Tensor | None = None
    collective: bool = False


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
        (image_B, same_image_B), (text_B, same_text_B) = (_groups(ids_B) for ids_B in self)
        same_both_B = _groups(image_B * B + text_B)[1]
        return B + 1 - (same_image_B + same_text_B - same_both_B)


def _groups(ids_B: Tensor) -> tuple[Tensor, Tensor]:
    """[B] and [B]: a number below B for each id, and how often the id occurs. Of shapes that the host knows."""
    ordered_B = ids_B.sort().values
    first_B = torch.searchsorted(ordered_B, ids_B)
    return first_B, torch.searchsorted(ordered_B, ids_B, right=True) - first_B
