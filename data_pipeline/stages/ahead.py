"""Remote shards of the groups that come next, fetched into the node's cache while the present ones are read.

The order is known, so each loader process looks half a group ahead in its own micro-batches. A shard of the next group
is so fetched by the time that its samples are due, and no more than two groups of every lane are on the disk.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from torch.utils.data import get_worker_info

from data_pipeline.order import Mixture, Moved, Order
from data_pipeline.stages.readers import Readers
from data_pipeline.stages.slots import Share
from data_pipeline.stages.workers import of_this_worker
from data_pipeline.storage.remote import is_remote


@contextmanager
def fetching_ahead(readers: Readers, order: Order | Mixture | Moved, share: Share) -> Iterator[Callable[[int], None]]:
    """In a loader process, and where shards are remote and two groups of them fit into the cache, fetch them ahead.

    Gives what is to be called with every step that the process begins.
    """
    if get_worker_info() is None or not has_room(readers, order):
        yield lambda step: None
        return
    ahead = FetchAhead(readers, order, share)
    ahead.start()
    try:
        yield ahead.reached
    finally:
        ahead.stop()


def has_room(readers: Readers, order: Order | Mixture | Moved) -> bool:
    """Whether any shard is remote, and the cache holds as many as two groups of all lanes have."""
    needed = 0.0
    for manifest, one in zip(readers.manifests, orders(order), strict=True):
        remote = [shard.filesize for shard in manifest.shards if is_remote(shard.url)]
        if remote:
            # A lane may begin and end within a shard, so that a group has a part of one shard more.
            needed += min(len(remote), 2 * one.lanes * (one.shuffle_shards + 1)) * max(remote)
    return 0 < needed <= readers.cache_bytes


def orders(order: Order | Mixture | Moved) -> list[Order]:
    """The order of each source."""
    while isinstance(order, Moved):
        order = order.order
    return order.orders if isinstance(order, Mixture) else [order]


class FetchAhead(threading.Thread):
    """See fetching_ahead. What cannot be fetched is left to the reader, which says what is wrong with it."""

    def __init__(self, readers: Readers, order: Order | Mixture | Moved, share: Share):
        super().__init__(daemon=True)
        # An order of its own: one keeps the groups that it was asked for last.
        self.readers, self.order = readers, copy.deepcopy(order)
        self.micro_batches = of_this_worker(share.micro_batches())
        self.horizon = max(1, int(min(one.steps_per_group for one in orders(order)) / 2))
        self._step, self._stopped = share.start_step, False
        self._changed = threading.Condition()

    def reached(self, step: int) -> None:
        """The process begins this step."""
        with self._changed:
            self._step = max(self._step, step)
            self._changed.notify()

    def stop(self) -> None:
        """Fetch no more; what is being fetched is not waited for."""
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def run(self) -> None:
        asked: dict[tuple[int, int], None] = {}
        for step, _, rows in self.micro_batches:
            with self._changed:
                while step > self._step + self.horizon and not self._stopped:
                    self._changed.wait()
            for place in self.order.rows(step, rows.start, rows.stop):
                if self._stopped:
                    return
                shard = place.source, place.shard
                if shard in asked:
                    continue
                while len(asked) >= 2 * self.readers.most_open:  # of the present groups, and of the next ones
                    del asked[next(iter(asked))]
                asked[shard] = None
                with suppress(Exception):
                    self.readers.fetch(*shard)
