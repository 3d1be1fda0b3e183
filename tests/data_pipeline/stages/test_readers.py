"""Readers of remote shards whose cache is too small for all that is read, in one process and in several."""

import multiprocessing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.config import DataConfig
from data_pipeline.order import build_order
from data_pipeline.stages.readers import Readers
from data_pipeline.stages.slots import share_of
from data_pipeline.storage.manifest import Manifest
from tests.support.server import serve
from tests.support.tars import describe, write_tar

SHARDS, SIZE = 4, 10240
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def manifest(tmp_path: Path) -> Iterator[Manifest]:
    """Shards of one sample each, on a server."""
    (tmp_path / "remote").mkdir()
    with serve(tmp_path / "remote") as server:
        paths = [write_tar(server.directory / f"{n}.tar", [(f"{n}.txt", b"text")]) for n in range(SHARDS)]
        yield Manifest(tuple(replace(describe(path), url=f"{server.url}/{path.name}") for path in paths), {}, "here")


def readers(manifest: Manifest, cache: Path) -> Readers:
    return Readers([manifest], DataConfig(cache_dir=str(cache), cache_gb=SIZE / 1e9))


def deleted_but_open(folder: Path) -> int:
    found = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return sum(name.startswith(str(folder)) and name.endswith("(deleted)") for name in found)


def test_shards_that_left_the_cache_leave_the_disk(manifest: Manifest, tmp_path: Path) -> None:
    several = readers(manifest, tmp_path / "cache")
    for shard in [*range(SHARDS)] * 2:
        assert several.raw(0, shard, 0)["__key__"] == str(shard)
        assert deleted_but_open(tmp_path / "cache") <= 1  # the one that made room for the newest


def read_all(manifest: Manifest, cache: Path, start: int) -> None:
    for number in range(start, start + 20 * SHARDS):
        assert readers(manifest, cache).raw(0, number % SHARDS, 0)["__key__"] == str(number % SHARDS)


def test_processes_that_push_each_others_shards_out_of_the_cache(manifest: Manifest, tmp_path: Path) -> None:
    processes = [FORK.Process(target=read_all, args=(manifest, tmp_path / "cache", start)) for start in (0, 1, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]


def test_case_11_a_missing_local_shard_is_named_at_once(tmp_path: Path) -> None:
    shard = describe(write_tar(tmp_path / "a.tar", [("a.txt", b"text")]))
    Path(shard.url).unlink()
    with pytest.raises(ValueError, match=r"a\.tar of the manifest does not exist"):
        readers(Manifest((shard,), {}, "here"), tmp_path / "cache").raw(0, 0, 0)


def test_a_rank_keeps_the_shards_of_its_own_lanes_open_and_opens_each_once(tmp_path: Path) -> None:
    lanes, group, samples, world = 8, 2, 6, 4
    tars = [[(f"{n}.txt", b"text") for n in range(samples)]] * (lanes * group * 2)
    shards = tuple(describe(write_tar(tmp_path / f"{n}.tar", pairs)) for n, pairs in enumerate(tars))
    manifest = Manifest(shards, {}, "here")
    order = build_order([manifest], [1.0], lanes, lanes, 0, group)
    for rank in range(world):
        share = share_of(rank, world, lanes, 1, 0, order.steps_per_epoch)
        own = Readers([manifest], DataConfig(lanes=lanes, shuffle_shards=group), share.lanes(lanes, lanes))
        assert own.most_open == lanes // world * (group + 1)
        read, seen, opened = [], set(), 0
        for step, _, rows in share.micro_batches():
            for place in order.rows(step, rows.start, rows.stop):
                before = set(own._open)
                own.raw(place.source, place.shard, place.index)
                opened += len(set(own._open) - before)
                seen.add(place.shard)
                read.append(len(own._open))
        assert opened == len(seen) == lanes // world * group * 2
        assert max(read) == own.most_open
