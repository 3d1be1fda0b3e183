"""Which samples of a shard a data set has, where it has not all of them."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Selection:
    """Some samples of a tar, which stays as it is: one bit each, so that a shard of 10,000 takes 1.7 kB of JSON."""

    of: int
    """Samples in the tar."""
    mask: bytes
    """A bit for each of them, the first one highest in the first byte: 1 for a sample that the data set has."""

    @classmethod
    def where(cls, kept: np.ndarray) -> Selection:
        """The samples for which a bool array [of] is true."""
        return cls(len(kept), np.packbits(kept).tobytes())

    @cached_property
    def indices(self) -> np.ndarray:
        """Their numbers in the tar, int64, ascending."""
        return np.flatnonzero(np.unpackbits(np.frombuffer(self.mask, np.uint8), count=self.of))

    def to_json(self) -> dict[str, Any]:
        return {"of": self.of, "mask": base64.b64encode(self.mask).decode()}

    @classmethod
    def from_json(cls, content: Any) -> Selection:
        """Raises ValueError for what `to_json` does not write."""
        try:
            of, mask = content["of"], base64.b64decode(content["mask"], validate=True)
        except (TypeError, KeyError, binascii.Error) as error:
            raise ValueError("it is not a number of samples and a mask") from error
        if type(of) is not int or len(mask) != -(-of // 8) or (mask and mask[-1] & ((1 << (-of % 8)) - 1)):
            raise ValueError(f"its mask of {len(mask)} bytes is not one of {of} samples")
        return cls(of, mask)
