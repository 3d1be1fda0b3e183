"""What goes over the wire between real ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

from train import distributed

COLLECTIVES = ("all_gather_into_tensor", "all_reduce")
"""torch's; the first argument of each is the whole buffer: rows of all ranks, or what is added up."""


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Bytes of the buffers that train.distributed hands to torch's collectives in it, by their names."""
    sent: Counter[str] = Counter()

    def counting(name: str) -> Any:
        collective = getattr(distributed.dist, name)

        def call(buffer: Any, *arguments: Any, **options: Any) -> Any:
            sent[name] += buffer.nbytes
            return collective(buffer, *arguments, **options)

        return call

    dist = SimpleNamespace(**vars(distributed.dist) | {name: counting(name) for name in COLLECTIVES})
    with mock.patch.object(distributed, "dist", dist):
        yield sent
