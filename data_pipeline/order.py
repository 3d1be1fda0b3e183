"""Which sample is in which row of which step: a pure function of (seed, shard sizes, batch, lanes), without I/O.

An epoch: the shards are permuted; the concatenated samples are cut into `lanes` equal spans; inside a lane, samples are
permuted within groups of `shuffle_shards` shards. A step takes the next batch / lanes samples of every lane, one lane
after the other. World size, loader workers and restarts are no inputs, so they cannot change what a step sees.

Permutations come from the raw output of numpy's PCG64, which numpy promises never to change (Generator.permutation may
change). An `offset` counts the samples of a lane in permuted order, a `place` the samples of the permuted shards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_pipeline.seeds import group_key, shards_key
from data_pipeline.storage.manifest import Manifest

PART = 1 << 14
"""Values of a group's permutation that are kept of each lane, or up to twice as many; more make less work in all."""


class Position(NamedTuple):
    """One row of a batch."""

    source: int
    """Which source it comes from."""
    epoch: int
    """Which pass over that source."""
    position: int
    """Index within that epoch's order of that source."""
    shard: int
    """Shard of the source, as its manifest counts them."""
    index: int  # type: ignore[assignment]  # the name of a method of tuples that nobody calls here
    """Sample within the shard."""


def permutation(size: int, seed: int, *key: int) -> np.ndarray:
    """A permutation of range(size), int64 [size]: the same one for the same (seed, key) on every numpy and machine."""
    raw = _random(size, seed, key)
    return _sorted(raw, np.arange(size, dtype=np.uint64), size)


def permutation_part(size: int, seed: int, key: Sequence[int], offset: int) -> tuple[int, np.ndarray]:
    """The part of permutation(size, seed, *key) that holds `offset`: where it begins, and its values.

    Parts have about PART values. Those of one part are the values whose random bits begin alike, so that the others
    need not be sorted: of 800,000 a part takes a tenth of the time, and a fiftieth of the memory.
    """
    raw = _random(size, seed, key)
    top = (raw >> np.uint64(56)).astype(np.uint8)
    top >>= max(0, 8 - max(size // PART, 1).bit_length() + 1)
    ends = np.cumsum(np.bincount(top, minlength=1))
    part = int(np.searchsorted(ends, offset, side="right"))
    index = np.flatnonzero(top == part)
    return int(ends[part]) - len(index), _sorted(raw[index], index.astype(np.uint64), size)


def _random(size: int, seed: int, key: Sequence[int]) -> np.ndarray:
    return np.random.PCG64(np.random.SeedSequence(seed, spawn_key=tuple(key))).random_raw(size)


def _sorted(raw: np.ndarray, index: np.ndarray, size: int) -> np.ndarray:
    """Indices below `size`, uint64, in the order of their random bits, as int64."""
    # Sorting by the upper bits, with the index in the lower ones: no two are equal, so any sorting algorithm agrees.
    bits = np.uint64(max(size - 1, 1).bit_length())
    keys = (raw >> bits << bits) | index
    keys.sort()
    return (keys & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)


class _Epoch:
    """The shards of one epoch in permuted order, cut into lanes."""

    def __init__(self, shard_sizes: np.ndarray, lanes: int, seed: int, source: int, epoch: int):
        self.shards = permutation(len(shard_sizes), seed, *shards_key(source, epoch))
        self.starts = np.concatenate(([0], np.cumsum(shard_sizes[self.shards])))
        samples = int(self.starts[-1])
        self.lane_starts = [lane * samples // lanes for lane in range(lanes + 1)]


class Order:
    """The order of one source's samples, epoch after epoch.

    shard_sizes: samples of each shard. batch: rows that one step takes of this source. lanes: see above; divides batch.
    The last samples of an epoch, too few for a batch, are left out and counted in `remainder`; each epoch leaves out
    others. Finding a step costs the same anywhere: a permutation of the shards, and part of a group of each lane.
    Raises ValueError where lanes does not divide batch, or where an epoch has no full batch.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        *,
        batch: int,
        lanes: int,
        seed: int,
        shuffle_shards: int,
        source: int = 0,
    ):
        _check(batch, lanes, seed, shuffle_shards)
        self.shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.batch, self.lanes, self.seed, self.source = batch, lanes, seed, source
        self.shuffle_shards = shuffle_shards
        self.samples = int(self.shard_sizes.sum())
        self.steps_per_epoch = self.samples // batch
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"data.train: the {self.samples} samples of source {source} are fewer than the {batch} rows that one "
                f"step takes of them: lower `global_batch` (and `micro_batch`, which divides it), or add data"
            )
        self.remainder = self.samples - self.steps_per_epoch * batch
        group = min(shuffle_shards * self.samples / len(self.shard_sizes), self.samples / lanes)
        self.steps_per_group = group * lanes / batch
        """How many steps read from one group of shards of each lane, on average."""
        self._epochs: dict[int, _Epoch] = {}
        self._parts: dict[int, tuple[int, int, np.ndarray]] = {}

    def rows(self, step: int, start: int, stop: int) -> list[Position]:
        """Rows [start, stop) of the batch of `step`, which counts through all epochs; any step may be asked for."""
        if step < 0 or not 0 <= start <= stop <= self.batch:
            raise IndexError(f"rows [{start}, {stop}) of step {step}: a batch has {self.batch} rows")
        if start == stop:
            return []
        number, step_in_epoch = divmod(step, self.steps_per_epoch)
        epoch = self._epoch(number)
        share = self.batch // self.lanes
        places = []
        for lane in range(start // share, (stop - 1) // share + 1):
            first = step_in_epoch * share + max(start - lane * share, 0)
            last = step_in_epoch * share + min(stop - lane * share, share)
            places.append(self._places(epoch, number, lane, first, last))
        place = np.concatenate(places)
        slot = np.searchsorted(epoch.starts, place, side="right") - 1
        shards = epoch.shards[slot].tolist()
        indices = (place - epoch.starts[slot]).tolist()
        position = step_in_epoch * self.batch + start
        return [
            Position(self.source, number, position + row, shard, index)
            for row, (shard, index) in enumerate(zip(shards, indices, strict=True))
        ]

    def step_after(self, steps: int, batch: int) -> int:
        """The step that comes next after so many steps of another batch size in the same order.

        Where they end inside of a batch of this order, its rest is left out.
        """
        epoch, inside = divmod(steps, self.samples // batch)
        return epoch * self.steps_per_epoch + -(-inside * batch // self.batch)

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            # Two, because a reader may switch between them where one epoch ends and the next begins.
            while len(self._epochs) >= 2:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[number] = _Epoch(self.shard_sizes, self.lanes, self.seed, self.source, number)
        return self._epochs[number]

    def _places(self, epoch: _Epoch, number: int, lane: int, first: int, last: int) -> np.ndarray:
        """Places of the samples at offsets [first, last) of a lane, int64 [last - first]."""
        parts = []
        while first < last:
            begin, places = self._part(epoch, number, lane, first)
            parts.append(places[first - begin : last - begin])
            first += len(parts[-1])
        return np.concatenate(parts)

    def _part(self, epoch: _Epoch, number: int, lane: int, offset: int) -> tuple[int, np.ndarray]:
        """The part of a group's permutation that holds a lane's offset: where it begins in the lane, and its places."""
        if (kept := self._parts.get(lane)) and kept[0] == number and 0 <= offset - kept[1] < len(kept[2]):
            return kept[1:]
        lane_start, lane_stop = epoch.lane_starts[lane : lane + 2]
        first_shard, shard = np.searchsorted(epoch.starts, [lane_start, lane_start + offset], side="right") - 1
        group = int(shard - first_shard) // self.shuffle_shards
        shard = int(first_shard) + group * self.shuffle_shards
        begin = max(int(epoch.starts[shard]), lane_start) - lane_start
        end = min(int(epoch.starts[min(shard + self.shuffle_shards, len(epoch.shards))]), lane_stop) - lane_start
        key = group_key(self.source, number, lane, group)
        first, values = permutation_part(end - begin, self.seed, key, offset - begin)
        self._parts[lane] = number, begin + first, values + (lane_start + begin)
        return self._parts[lane][1:]


class Mixture:
    """Several sources in one order, each with its own epochs: the same interface as Order.

    Every batch has the same number of rows of each source: batch times its part of the weights, rounded by largest
    remainder in units of `lanes` rows, so that all lanes are alike. Inside a lane the sources are interleaved evenly,
    so that micro-batches are mixed too. An epoch of the mixture is as many full batches as all sources together have
    samples for; `remainder` counts what all sources leave out of their own epochs.
    Raises ValueError where a source gets no rows, or has no full batch of them.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[int]],
        weights: Sequence[float],
        *,
        batch: int,
        lanes: int,
        seed: int,
        shuffle_shards: int,
    ):
        _check(batch, lanes, seed, shuffle_shards)
        self.batch, self.lanes, self.share = batch, lanes, batch // lanes
        self.quotas = _quotas(weights, self.share)
        self.orders = [
            Order(sizes, batch=quota * lanes, lanes=lanes, seed=seed, shuffle_shards=shuffle_shards, source=source)
            for source, (sizes, quota) in enumerate(zip(sources, self.quotas, strict=True))
        ]
        self.samples = sum(order.samples for order in self.orders)
        self.steps_per_epoch = self.samples // batch
        self.remainder = sum(order.remainder for order in self.orders)
        # A lane's rows: the k-th of a source's n rows is at (k + 1/2) / n of the lane, ties by source.
        slots = [((2 * k + 1) / quota, source, k) for source, quota in enumerate(self.quotas) for k in range(quota)]
        self._pattern = [(source, k) for _, source, k in sorted(slots)]

    def rows(self, step: int, start: int, stop: int) -> list[Position]:
        """Rows [start, stop) of the batch of `step`, which counts through all epochs; any step may be asked for."""
        if step < 0 or not 0 <= start <= stop <= self.batch:
            raise IndexError(f"rows [{start}, {stop}) of step {step}: a batch has {self.batch} rows")
        wanted: list[tuple[int, int]] = []
        for row in range(start, stop):
            lane, slot = divmod(row, self.share)
            source, k = self._pattern[slot]
            wanted.append((source, lane * self.quotas[source] + k))
        streams = []
        for source, order in enumerate(self.orders):
            own = [row for of, row in wanted if of == source]
            streams.append(iter(order.rows(step, own[0], own[-1] + 1) if own else ()))
        return [next(streams[source]) for source, _ in wanted]


@dataclass(frozen=True)
class Moved:
    """An order of which step s is step s + `by` of another one: that of a run which began elsewhere in it."""

    order: Order | Mixture
    by: int

    @property
    def batch(self) -> int:
        return self.order.batch

    @property
    def lanes(self) -> int:
        return self.order.lanes

    def rows(self, step: int, start: int, stop: int) -> list[Position]:
        """Rows [start, stop) of the batch of `step`."""
        return self.order.rows(step + self.by, start, stop)


def order_identity(
    manifests: Sequence[Manifest], weights: Sequence[float], lanes: int, seed: int, shuffle_shards: int
) -> str:
    """Equal where samples come in the same order, whatever is in them and into what batches they are cut."""
    sizes = [[shard.nsamples for shard in manifest.shards] for manifest in manifests]
    shares = [weight / sum(weights) for weight in weights]
    return hashlib.sha256(json.dumps([sizes, shares, lanes, seed, shuffle_shards]).encode()).hexdigest()


def build_order(
    manifests: Sequence[Manifest],
    weights: Sequence[float],
    batch: int,
    lanes: int,
    seed: int,
    shuffle_shards: int,
) -> Order | Mixture:
    """The order of a training run over one manifest, or over several with weights. Raises as Order and Mixture do."""
    sizes = [[shard.nsamples for shard in manifest.shards] for manifest in manifests]
    if len(sizes) == 1:
        return Order(sizes[0], batch=batch, lanes=lanes, seed=seed, shuffle_shards=shuffle_shards)
    return Mixture(sizes, weights, batch=batch, lanes=lanes, seed=seed, shuffle_shards=shuffle_shards)


def sequential(shard_sizes: Sequence[int]) -> list[Position]:
    """Every sample once, in the order of the shards: for evaluation."""
    shards = ((shard, index) for shard, size in enumerate(shard_sizes) for index in range(size))
    return [Position(0, 0, position, shard, index) for position, (shard, index) in enumerate(shards)]


def _quotas(weights: Sequence[float], share: int) -> list[int]:
    """Rows per lane of each source: `share` divided by weight, largest remainder first, ties to the earlier source."""
    if any(not weight > 0 or weight == float("inf") for weight in weights):
        raise ValueError(f"data.train: the weights {list(weights)} must be finite numbers above 0")
    exact = [weight / sum(weights) * share for weight in weights]
    quotas = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda source: (quotas[source] - exact[source], source))
    for source in by_remainder[: share - sum(quotas)]:
        quotas[source] += 1
    if 0 in quotas:
        source = quotas.index(0)
        raise ValueError(
            f"data.train: source {source} with weight {weights[source]} gets none of the {share} rows of a lane in a "
            f"batch: raise its weight or `global_batch`, or lower data.lanes"
        )
    return quotas


def _check(batch: int, lanes: int, seed: int, shuffle_shards: int) -> None:
    for name, value, least in (
        ("global_batch", batch, 1),
        ("data.lanes", lanes, 1),
        ("data.shuffle_shards", shuffle_shards, 1),
        ("seed", seed, 0),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}: it must be {least} or more")
    if batch % lanes:
        raise ValueError(
            f"global_batch {batch} is not divisible by data.lanes {lanes}: the nearest above is "
            f"{(batch // lanes + 1) * lanes}; or choose lanes that divide it"
        )
