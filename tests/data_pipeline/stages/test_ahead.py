"""Remote shards are fetched half a group before their samples are due, and never more than the next group."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.loader import train_loader
from data_pipeline.order import Moved, Order, build_order
from data_pipeline.stages.ahead import FetchAhead, has_room
from data_pipeline.stages.readers import Readers
from data_pipeline.stages.slots import share_of
from data_pipeline.storage.manifest import Manifest
from data_pipeline.tokenizer import Tokenizer
from tests.support.pictures import tiny_image
from tests.support.server import Server, serve
from tests.support.tars import describe, write_tar
from tests.support.vocabulary import write_tokenizer

SHARDS, SAMPLES, GROUP = 12, 8, 2  # of which a step takes two samples: eight steps read a group
BATCH, GROUP_STEPS = 2, GROUP * SAMPLES // 2


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[tuple[Server, Manifest]]:
    (tmp_path / "remote").mkdir()
    with serve(tmp_path / "remote") as server:
        paths = []
        for shard in range(SHARDS):
            pairs = [(f"{n}.png", tiny_image(n)) for n in range(SAMPLES)]
            pairs += [(f"{n}.txt", f"of {shard}".encode()) for n in range(SAMPLES)]
            paths.append(write_tar(server.directory / f"{shard}.tar", sorted(pairs)))
        yield server, Manifest(tuple(replace(describe(p), url=f"{server.url}/{p.name}") for p in paths), {}, "here")


def made(tmp_path: Path, manifest: Manifest, cache_gb: float = 1.0) -> tuple[DataConfig, Order, Readers]:
    config = DataConfig(
        image_size=8, lanes=1, shuffle_shards=GROUP, cache_dir=str(tmp_path / "cache"), cache_gb=cache_gb, workers=1
    )
    config.augment = AugmentConfig(policy="none")
    return config, build_order([manifest], [1.0], BATCH, 1, 0, GROUP), Readers([manifest], config)


def due(order: Order, steps: int) -> set[str]:
    return {f"/{place.shard}.tar" for step in range(steps) for place in order.rows(step, 0, BATCH)}


def settled(server: Server, expected: set[str]) -> bool:
    """Whether exactly these shards come to be fetched, each once."""
    deadline = time.monotonic() + 30
    while len(server.requests) < len(expected) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    return sorted(server.requests) == sorted(expected)


def test_the_next_group_comes_when_half_of_the_present_one_is_read(remote, tmp_path: Path) -> None:
    server, manifest = remote
    _, order, readers = made(tmp_path, manifest)
    assert order.steps_per_group == GROUP_STEPS
    ahead = FetchAhead(readers, order, share_of(0, 1, BATCH, BATCH, 0, SHARDS * SAMPLES // BATCH))
    ahead.start()
    assert settled(server, due(order, GROUP_STEPS)), "the first group alone"
    ahead.reached(GROUP_STEPS // 2 - 1)
    assert settled(server, due(order, GROUP_STEPS)), "nothing more before half of it is read"
    ahead.reached(GROUP_STEPS - 1)
    assert settled(server, due(order, 2 * GROUP_STEPS)), "the next one too"
    ahead.stop()
    ahead.join(10)
    assert not ahead.is_alive()


def test_a_loader_process_finds_its_next_shards_fetched(remote, tmp_path: Path) -> None:
    server, manifest = remote
    config, order, _ = made(tmp_path, manifest)
    tokenizer = Tokenizer(str(write_tokenizer(tmp_path / "tokenizer")), 24)
    config.prefetch, steps = 1, GROUP_STEPS - 2

    def waits(sample: dict) -> dict:
        time.sleep(0.05)
        return sample

    options = {"seed": 0, "micro_batch": BATCH, "stop_step": 3 * GROUP_STEPS, "stages": [waits]}
    batches = iter(train_loader(config, order, [manifest], tokenizer, **options))
    for _ in range(steps - 2):  # and two are prepared ahead
        next(batches)
    assert due(order, 2 * GROUP_STEPS) >= set(server.requests) > due(order, GROUP_STEPS)


@pytest.mark.parametrize("change", [lambda order: order, lambda order: Moved(order, 3)])
def test_there_must_be_room_for_two_groups(remote, tmp_path: Path, change: Callable) -> None:
    _, manifest = remote
    size = manifest.shards[0].filesize
    for shards, fits in ((2 * (GROUP + 1) + 0.1, True), (2 * (GROUP + 1) - 0.1, False)):
        _, order, readers = made(tmp_path, manifest, shards * size / 1e9)
        assert has_room(readers, change(order)) is fits
    local = replace(manifest, shards=tuple(replace(shard, url="/a.tar") for shard in manifest.shards))
    _, order, readers = made(tmp_path, local)
    assert not has_room(readers, order), "nothing to fetch"


def test_a_shard_that_cannot_be_fetched_is_left_to_the_reader(remote, tmp_path: Path) -> None:
    server, manifest = remote
    _, order, readers = made(tmp_path, manifest)
    for path in server.directory.iterdir():
        path.unlink()
    ahead = FetchAhead(readers, order, share_of(0, 1, BATCH, BATCH, 0, GROUP_STEPS // 2))
    ahead.run()
    with pytest.raises(ValueError, match=r"\.tar could not be fetched|404"):
        readers.raw(0, 0, 0)
