"""Where samples come from in the exact order: the first stage of a training loader."""

from __future__ import annotations

from collections.abc import Iterator

from data_pipeline.order import Mixture, Moved, Order
from data_pipeline.seeds import sample_seed
from data_pipeline.stages.ahead import fetching_ahead
from data_pipeline.stages.readers import Readers
from data_pipeline.stages.slots import SLOT, Share, Slot
from data_pipeline.stages.workers import of_this_worker


class IndexedSource:
    """First stage: the raw samples of this loader process's micro-batches, in the exact order."""

    def __init__(self, readers: Readers, order: Order | Mixture | Moved, share: Share, seed: int):
        self.readers, self.order, self.share, self.seed = readers, order, share, seed

    def __call__(self) -> Iterator[dict]:
        with fetching_ahead(self.readers, self.order, self.share) as reached:
            for step, index, rows in of_this_worker(self.share.micro_batches()):
                reached(step)
                for row, place in zip(rows, self.order.rows(step, rows.start, rows.stop), strict=True):
                    raw = self.readers.raw(place.source, place.shard, place.index)
                    seed = sample_seed(self.seed, place.source, place.epoch, place.position)
                    yield {**raw, SLOT: Slot(step, index, row, seed, place)}
