"""The order is checked against its definition: exact partitions, independence of who asks, a frozen example."""

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.order import (
    Mixture,
    Moved,
    Order,
    Position,
    build_order,
    order_identity,
    permutation,
    permutation_part,
    sequential,
)
from data_pipeline.storage.manifest import Manifest, Shard


@st.composite
def orders(draw):
    lanes = draw(st.integers(1, 6))
    batch = lanes * draw(st.integers(1, 5))
    sizes = draw(st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) >= batch))
    seed, shuffle_shards = draw(st.integers(0, 2**40)), draw(st.integers(1, 5))
    return Order(sizes, batch=batch, lanes=lanes, seed=seed, shuffle_shards=shuffle_shards)


@st.composite
def mixtures(draw):
    lanes = draw(st.integers(1, 4))
    count = draw(st.integers(2, 4))
    share = draw(st.integers(3 * count, 12))
    weights = draw(st.lists(st.floats(1.0, 2.0), min_size=count, max_size=count))
    sizes = [[*draw(st.lists(st.integers(1, 40), min_size=3, max_size=6)), lanes * share] for _ in range(count)]
    seed = draw(st.integers(0, 1000))
    return Mixture(sizes, weights, batch=lanes * share, lanes=lanes, seed=seed, shuffle_shards=2)


def epoch_of(order, number):
    """All rows of one epoch."""
    first = number * order.steps_per_epoch
    return [row for step in range(first, first + order.steps_per_epoch) for row in order.rows(step, 0, order.batch)]


@given(orders(), st.integers(0, 3))
def test_every_sample_once_per_epoch_minus_the_counted_remainder(order, epoch):
    rows = epoch_of(order, epoch)
    samples = Counter((row.shard, row.index) for row in rows)
    assert set(samples.values()) == {1}
    assert len(rows) + order.remainder == order.samples == sum(order.shard_sizes)
    assert all(0 <= row.index < order.shard_sizes[row.shard] for row in rows)
    assert [row.position for row in rows] == list(range(len(rows)))
    assert {row.epoch for row in rows} == {epoch}
    assert 0 <= order.remainder < order.batch


@pytest.mark.parametrize("size", [1, 2, 1000, 16_384, 32_767, 32_768, 100_003, 5_000_000])
def test_parts_of_a_permutation_make_it(size):
    whole = permutation(size, 7, 1, 2)
    begin, parts = 0, []
    while begin < size and len(parts) < 20:
        first, part = permutation_part(size, 7, (1, 2), begin + (1 if parts and size > begin + 1 else 0))
        assert first == begin and len(part) <= 32_768
        parts.append(part)
        begin += len(part)
    assert np.array_equal(np.concatenate(parts), whole[:begin])
    assert (len(parts) > 1) == (size >= 32_768)


@given(st.one_of(orders(), mixtures()), st.integers(0, 12), st.data())
def test_parts_of_a_batch_make_the_batch_however_it_is_cut(order, step, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, order.batch), max_size=6)))
    parts = [order.rows(step, start, stop) for start, stop in zip([0, *cuts], [*cuts, order.batch], strict=True)]
    assert [row for part in parts for row in part] == order.rows(step, 0, order.batch)


@given(st.one_of(orders(), mixtures()), st.data())
def test_seeking_equals_reading_on(order, data):
    read = [order.rows(step, 0, order.batch) for step in range(2 * order.steps_per_epoch + 2)]
    for step in data.draw(st.lists(st.integers(0, len(read) - 1), max_size=8)):
        assert order.rows(step, 0, order.batch) == read[step]


@given(orders())
def test_lanes_are_equal_spans_of_the_permuted_shards(order):
    """Against a plain statement of the contract: spans in samples, groups in shards, lane after lane in the batch."""
    shards = permutation(len(order.shard_sizes), order.seed, 0, 0)
    concatenated = [(int(shard), index) for shard in shards for index in range(order.shard_sizes[shard])]
    share = order.batch // order.lanes
    rows = epoch_of(order, 0)
    for lane in range(order.lanes):
        span = concatenated[lane * order.samples // order.lanes : (lane + 1) * order.samples // order.lanes]
        seen = [
            (row.shard, row.index)
            for step in range(order.steps_per_epoch)
            for row in rows[step * order.batch + lane * share :][:share]
        ]
        slots = {int(shard): slot for slot, shard in enumerate(shards)}
        first = slots[span[0][0]]
        groups: dict[int, list] = {}
        for shard, index in span:
            groups.setdefault((slots[shard] - first) // order.shuffle_shards, []).append((shard, index))
        for _, group in sorted(groups.items()):
            part, seen = seen[: len(group)], seen[len(group) :]
            assert set(part) <= set(group) and (len(part) == len(group) or not seen)
        assert seen == []


def test_epochs_seeds_and_sources_differ():
    def first(seed, source, epoch):
        order = Order([50] * 4, batch=40, lanes=2, seed=seed, shuffle_shards=2, source=source)
        return [(row.shard, row.index) for row in epoch_of(order, epoch)]

    variants = [first(0, 0, 0), first(0, 0, 1), first(1, 0, 0), first(0, 1, 0), first(0, 1, 1)]
    assert len({tuple(variant) for variant in variants}) == len(variants)
    # What is left out of an epoch differs, too.
    order = Order([7], batch=6, lanes=1, seed=3, shuffle_shards=1)
    left_out = {next(iter(set(range(7)) - {row.index for row in epoch_of(order, epoch)})) for epoch in range(60)}
    assert left_out == set(range(7))


def test_permutations_are_uniform():
    counts = Counter(tuple(permutation(4, 7, number)) for number in range(24_000))
    assert len(counts) == 24
    # Chi-squared with 23 degrees of freedom: above 49.7 with probability 0.001.
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 49.7


@given(st.integers(0, 3000), st.integers(0, 2**64))
@settings(max_examples=50)
def test_permutation_is_a_permutation(size, seed):
    assert np.array_equal(np.sort(permutation(size, seed, 1)), np.arange(size))


GOLDEN_PERMUTATION = [6, 2, 10, 4, 5, 0, 1, 7, 11, 9, 3, 8]
# A step each, of 4 rows: shard and sample; the second epoch begins with the fifth.
GOLDEN_ORDER = ["04 02 11 21", "01 31 25 10", "33 30 22 20", "32 00 23 24", "10 22 32 01", "24 20 33 02"]
# Steps 0 and 3, of 6 rows: source, shard and sample.
GOLDEN_MIXTURE = ["005 110 001 011 114 014", "012 112 014 001 102 002"]


def test_the_order_of_earlier_versions_is_kept():
    """Frozen: a change here would make resumed runs see other samples than uninterrupted ones."""
    assert permutation(12, 2026, 3, 4).tolist() == GOLDEN_PERMUTATION
    order = Order([5, 3, 6, 4], batch=4, lanes=2, seed=11, shuffle_shards=2)
    steps = [" ".join(f"{row.shard}{row.index}" for row in order.rows(step, 0, 4)) for step in range(6)]
    assert steps == GOLDEN_ORDER
    mixture = Mixture([[6, 6], [4, 5]], [2, 1], batch=6, lanes=2, seed=11, shuffle_shards=1)
    steps = [" ".join(f"{row.source}{row.shard}{row.index}" for row in mixture.rows(step, 0, 6)) for step in (0, 3)]
    assert steps == GOLDEN_MIXTURE


@given(mixtures())
@settings(max_examples=50)
def test_mixture_quotas_are_exact_in_every_lane_and_sources_have_their_own_epochs(mixture):
    share = mixture.batch // mixture.lanes
    assert sum(mixture.quotas) == share
    streams: dict[int, list[Position]] = {source: [] for source in range(len(mixture.quotas))}
    for step in range(2 * max(order.steps_per_epoch for order in mixture.orders)):
        rows = mixture.rows(step, 0, mixture.batch)
        for lane in range(mixture.lanes):
            counts = Counter(row.source for row in rows[lane * share : (lane + 1) * share])
            assert [counts[source] for source in streams] == mixture.quotas
        for row in rows:
            streams[row.source].append(row)
    for source, stream in streams.items():
        order = mixture.orders[source]
        for epoch in range(2):
            rows = [row for row in stream if row.epoch == epoch]
            assert len(rows) == order.steps_per_epoch * order.batch
            assert len({(row.shard, row.index) for row in rows}) == len(rows)
            assert [row.position for row in rows] == list(range(len(rows)))


@pytest.mark.parametrize(
    ("weights", "share", "quotas"),
    [
        ([1, 1], 8, [4, 4]),
        ([3, 1], 8, [6, 2]),
        ([2, 1, 1], 6, [3, 2, 1]),
        ([0.7, 0.3], 16, [11, 5]),
        ([5, 5, 5], 4, [2, 1, 1]),
    ],
)
def test_quotas_by_largest_remainder(weights, share, quotas):
    sizes = [[1000]] * len(weights)
    assert Mixture(sizes, weights, batch=2 * share, lanes=2, seed=0, shuffle_shards=1).quotas == quotas


def test_micro_batches_of_a_mixture_are_mixed():
    mixture = Mixture([[4000], [4000]], [3, 1], batch=256, lanes=4, seed=0, shuffle_shards=1)
    for start in range(0, 256, 16):
        assert Counter(row.source for row in mixture.rows(5, start, start + 16)) == {0: 12, 1: 4}


def test_sequential_reads_every_sample_in_the_order_of_the_shards():
    rows = sequential([2, 0, 3])
    assert [(row.shard, row.index) for row in rows] == [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2)]
    assert [row.position for row in rows] == list(range(5))


def test_an_epoch_of_400_million_samples_opens_at_once_and_seeks_in_milliseconds():
    begin = time.perf_counter()
    order = Order([10_000] * 40_000, batch=32_768, lanes=64, seed=0, shuffle_shards=8)
    opened = time.perf_counter()
    seeks = []
    for step in (7_000, 11 * order.steps_per_epoch - 1, 3):
        order.rows(step, 0, 1)  # the epoch's shards, permuted
        seek = time.perf_counter()
        rows = order.rows(max(step - 900, 0) if step != 3 else 5_000, 16_384, 16_384 + 128)
        seeks.append(time.perf_counter() - seek)
        assert len(rows) == 128
    assert opened - begin < 0.5
    # Typically 5 ms; the best of three, because the machine may be busy.
    assert min(seeks) < 0.1


@given(orders(), st.integers(1, 4), st.integers(0, 9))
def test_another_batch_size_takes_over_at_the_next_sample(order, rows, steps):
    batch = rows * order.lanes
    if order.samples < batch:
        return
    options = {"lanes": order.lanes, "seed": order.seed, "shuffle_shards": order.shuffle_shards}
    before = Order(order.shard_sizes, batch=batch, **options)
    seen = {row[1:2] + row[3:] for step in range(steps) for row in before.rows(step, 0, batch)}
    moved = Moved(order, order.step_after(steps, batch) - steps)
    first = moved.rows(steps, 0, order.batch)
    assert moved.batch == order.batch and not seen & {row[1:2] + row[3:] for row in first}, "none is seen twice"
    epoch, inside = divmod(steps, before.steps_per_epoch)
    skipped = first[0].epoch * order.samples + first[0].position - (epoch * order.samples + inside * batch)
    at_an_end = inside * batch > order.steps_per_epoch * order.batch - order.batch
    assert 0 <= skipped < order.batch or (at_an_end and skipped < order.batch + order.remainder)


def test_the_identity_of_an_order_is_all_but_the_batch_and_what_is_in_the_shards():
    def identity(*manifests, weights=(1.0,), lanes=2, seed=0, shuffle_shards=1):
        return order_identity(manifests, weights, lanes, seed, shuffle_shards)

    other = [manifest(9, 9), manifest(9, 8)]
    assert identity(manifest(9, 9)) == identity(manifest(9, 9), weights=(2.0,))
    changed = [identity(other[1]), identity(manifest(9, 9), lanes=1), identity(manifest(9, 9), seed=1)]
    changed += [identity(manifest(9, 9), shuffle_shards=2), identity(*other, weights=(1, 2)), identity(manifest(18))]
    assert len({identity(manifest(9, 9)), *changed}) == 7


def manifest(*sizes):
    return Manifest(tuple(Shard(f"/{i}.tar", size, 10240, "0" * 64) for i, size in enumerate(sizes)), {}, "/m")


def test_build_order_makes_one_source_or_a_mixture():
    one = build_order([manifest(9, 9)], [1.0], batch=4, lanes=2, seed=5, shuffle_shards=1)
    assert isinstance(one, Order)
    assert one.rows(2, 0, 4) == Order([9, 9], batch=4, lanes=2, seed=5, shuffle_shards=1).rows(2, 0, 4)
    two = build_order([manifest(9), manifest(9)], [1.0, 1.0], batch=4, lanes=2, seed=5, shuffle_shards=1)
    assert isinstance(two, Mixture) and two.steps_per_epoch == 4 and two.remainder == 2


@pytest.mark.parametrize(
    ("manifests", "weights", "options", "words"),
    [
        ([manifest(90)], [1], {"batch": 10, "lanes": 4}, ["global_batch 10", "data.lanes 4", "12"]),
        ([manifest(9, 6)], [1], {"batch": 16}, ["global_batch", "15 samples", "16 rows"]),
        ([manifest(99)], [1], {"lanes": 0}, ["data.lanes is 0"]),
        ([manifest(99)], [1], {"seed": -1}, ["seed is -1"]),
        ([manifest(99)], [1], {"shuffle_shards": 0}, ["data.shuffle_shards is 0"]),
        ([manifest(99), manifest(99)], [1, 0], {}, ["data.train", "weights [1, 0]"]),
        ([manifest(99), manifest(99)], [1, float("nan")], {}, ["data.train", "nan"]),
        ([manifest(99), manifest(99)], [100, 1], {}, ["data.train", "source 1", "weight 1"]),
        ([manifest(99), manifest(3)], [1, 1], {}, ["data.train", "3 samples of source 1", "4 rows"]),
    ],
)
def test_what_cannot_be_is_refused_with_the_flag_and_the_numbers(manifests, weights, options, words):
    with pytest.raises(ValueError) as error:
        build_order(manifests, weights, **{"batch": 8, "lanes": 2, "seed": 0, "shuffle_shards": 1, **options})
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(("step", "start", "stop"), [(-1, 0, 4), (0, -1, 2), (0, 0, 5), (0, 3, 2)])
def test_rows_outside_a_batch_are_refused(step, start, stop):
    for order in (
        Order([9], batch=4, lanes=2, seed=0, shuffle_shards=1),
        Mixture([[9], [9]], [1, 1], batch=4, lanes=2, seed=0, shuffle_shards=1),
    ):
        with pytest.raises(IndexError):
            order.rows(step, start, stop)
        assert order.rows(0, 2, 2) == []
