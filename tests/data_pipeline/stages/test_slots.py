"""Shares of ranks: together every row of every step once, in whole micro-batches."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.stages.slots import check_batch, shard_names, share_of
from data_pipeline.storage.manifest import Manifest, Shard


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.integers(0, 3), st.integers(0, 3))
def test_ranks_share_every_row_of_every_step(world: int, micro_batch: int, count: int, start: int, steps: int) -> None:
    batch, stop = world * micro_batch * count, start + steps
    shares = [share_of(rank, world, batch, micro_batch, start, stop) for rank in range(world)]
    ranks = [list(share.micro_batches()) for share in shares]
    for step, rank in itertools.product(range(start, stop), range(world)):
        own = [(index, rows) for at, index, rows in ranks[rank] if at == step]
        assert [index for index, _ in own] == list(range(rank * count, (rank + 1) * count))
        rows = [row for _, of in own for row in of]
        assert rows == list(range(rank * batch // world, (rank + 1) * batch // world))
    assert sum(map(len, ranks)) == steps * world * count


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.integers(1, 6))
def test_a_share_knows_how_many_lanes_it_reads(world: int, micro_batch: int, count: int, lanes: int) -> None:
    batch = world * micro_batch * count * lanes
    for rank in range(world):
        share = share_of(rank, world, batch, micro_batch, 0, 1)
        rows = [row for _, _, rows in share.micro_batches() for row in rows]
        assert share.lanes(batch, lanes) == len({row // (batch // lanes) for row in rows})


@pytest.mark.parametrize(
    ("batch", "micro_batch", "world", "message"),
    [
        (8, 3, 1, r"^global_batch 8 is not divisible by micro_batch 3: give a multiple of 3, such as 6$"),
        (8, 2, 3, r"^global_batch 8 is not divisible by 3 processes x micro_batch 2: give a multiple of 6, such as 6$"),
        (8, 4, 3, r"multiple of 12, such as 12$"),
        (8, 0, 1, r"^global_batch 8 is not divisible by micro_batch 0"),
        (0, 2, 1, r"^global_batch 0 .* such as 2$"),
    ],
)
def test_a_batch_that_cannot_be_shared_is_refused(batch: int, micro_batch: int, world: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_batch(batch, micro_batch, world)


@pytest.mark.parametrize(("batch", "micro_batch", "world", "lanes"), [(99, 25, 1, 8), (100, 25, 2, 8), (12, 4, 1, 8)])
def test_the_batch_that_is_advised_is_not_refused(batch: int, micro_batch: int, world: int, lanes: int) -> None:
    with pytest.raises(ValueError, match=r"is not divisible by .*, such as \d+$") as error:
        check_batch(batch, micro_batch, world, lanes)
    check_batch(int(str(error.value).rpartition(" ")[2]), micro_batch, world, lanes)


def test_case_08_shards_are_called_by_as_much_of_their_address_as_tells_them_apart() -> None:
    def manifest(*urls: str) -> Manifest:
        return Manifest(tuple(Shard(url, 1, 1, "0" * 64) for url in urls), {}, "/m.json")

    assert shard_names([manifest("/data/00.tar", "https://host/01.tar?signature=a/b")]) == [["00.tar", "01.tar"]]
    several = [manifest("/a/x/00.tar", "/a/y/00.tar", "/a/01.tar"), manifest("/b/x/00.tar"), manifest("/a/x/00.tar")]
    assert shard_names(several) == [["a/x/00.tar", "y/00.tar", "01.tar"], ["b/x/00.tar"], ["a/x/00.tar"]]
