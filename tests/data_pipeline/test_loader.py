"""The loader against a plain reference: the same rows, bit for bit, for any workers, ranks and start; nothing lost."""

import gc
import hashlib
import itertools
import multiprocessing
import pickle
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from data_pipeline.config import DataConfig
from data_pipeline.loader import MicroBatch, train_loader
from data_pipeline.order import Mixture, Order, build_order
from data_pipeline.samples.text import split
from data_pipeline.samples.transforms import train_transform
from data_pipeline.storage.manifest import Manifest, load_manifest
from data_pipeline.storage.shards import ShardReader
from data_pipeline.tokenizer import Tokenizer
from tests.support.loading import BATCH, LANES, MICRO, SEED, SIZES, STEPS, assert_equal, damaged, settings
from tests.support.pictures import tiny_image
from tests.support.tars import write_shards

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture
def manifest(tiny_shards: Callable[..., Path]) -> Manifest:
    return load_manifest(tiny_shards(SIZES))


def ordered(*manifests: Manifest) -> Order | Mixture:
    return build_order(manifests, [1.0, 3.0][: len(manifests)], BATCH, LANES, SEED, 2)


def load(
    manifests: Sequence[Manifest], tokenizer: Tokenizer, config: DataConfig | None = None, **options: object
) -> Iterator[MicroBatch]:
    chosen = {"seed": SEED, "micro_batch": MICRO, "stop_step": STEPS, **options}
    return iter(train_loader(config or settings(), ordered(*manifests), manifests, tokenizer, **chosen))


def all_ranks(manifests: Sequence[Manifest], tokenizer: Tokenizer, config: DataConfig, world: int) -> list[MicroBatch]:
    """What all ranks get, put together step by step."""
    ranks = [list(load(manifests, tokenizer, config, rank=rank, world=world)) for rank in range(world)]
    share = BATCH // MICRO // world
    return [ranks[r][step * share + k] for step in range(STEPS) for r in range(world) for k in range(share)]


def hash_of(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") // 2


def reference(manifests: Sequence[Manifest], tokenizer: Tokenizer, config: DataConfig) -> list[MicroBatch]:
    """The definition, written down without a loader."""
    transform, order, expected = train_transform(config), ordered(*manifests), []
    shards = [[ShardReader(shard.url, shard) for shard in manifest.shards] for manifest in manifests]
    for step, index in itertools.product(range(STEPS), range(BATCH // MICRO)):
        images, captions, keys = [], [], []
        for place in order.rows(step, index * MICRO, (index + 1) * MICRO):
            raw = shards[place.source][place.shard].raw(place.index)
            data, texts, _ = split(raw)
            rng = random.Random(f"{SEED}/{place.source}/{place.epoch}/{place.position}")
            images.append(transform(data, rng))
            caption = texts[rng.randrange(len(texts))]
            captions.append(f"a drawing of {caption}" if rng.random() < 0.5 and rng.choice([True]) else caption)
            path = Path(raw["__shard__"])  # two sources with shards of the same names are told apart
            is_shared = sum(other.url.endswith(path.name) for each in manifests for other in each.shards) > 1
            name = f"{path.parent.name}/{path.name}" if is_shared else path.name
            keys.append(f"{name}/{raw['__key__']}")
        ids_BL, mask_BL = tokenizer(captions)
        texts = [repr(ids[: sum(mask)]) for ids, mask in zip(ids_BL.tolist(), mask_BL.tolist(), strict=True)]
        rows = [f"{row} {key}" for row, key in enumerate(keys, index * MICRO)]
        expected.append(
            MicroBatch(
                torch.stack(images),
                ids_BL,
                mask_BL,
                index,
                step,
                keys,
                image_ids_B=torch.tensor([hash_of(key) for key in keys]),
                text_ids_B=torch.tensor([hash_of(text) for text in texts]),
                digest=sum(hash_of(row) for row in rows),
            )
        )
    return expected


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_case_16_any_workers_and_ranks_give_the_rows_of_the_definition(
    manifest: Manifest, tokenizer: Tokenizer, workers: int, world: int
) -> None:
    torch.rand(300, 300) @ torch.rand(300, 300)  # threads of this process must not hang forked loaders
    config = settings(workers)
    seen = all_ranks([manifest], tokenizer, config, world)
    assert_equal(seen, reference([manifest], tokenizer, config))
    assert seen[0].images_BCHW.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("workers", [0, 2])
def test_case_16_any_start_gives_the_same_tail(manifest: Manifest, tokenizer: Tokenizer, workers: int) -> None:
    whole = list(load([manifest], tokenizer))
    for start in (1, 5, 8):
        for world, rank in ((1, 0), (2, 1)):
            share = BATCH // MICRO // world
            tail = [item for item in whole if item.step >= start and item.index // share == rank]
            options = {"start_step": start, "rank": rank, "world": world}
            assert_equal(list(load([manifest], tokenizer, settings(workers), **options)), tail)


def test_case_16_one_shard_feeds_four_ranks_of_two_loaders_and_resumes_at_an_epochs_end(
    tiny_shards: Callable[..., Path], tokenizer: Tokenizer
) -> None:
    manifest = load_manifest(tiny_shards((2 * BATCH + 3,)))
    plain = list(load([manifest], tokenizer))
    assert_equal(all_ranks([manifest], tokenizer, settings(2), 4), plain)
    for start in (2, 6):  # two steps are an epoch
        tail = [batch for batch in plain if batch.step >= start]
        assert_equal(list(load([manifest], tokenizer, settings(1), start_step=start)), tail)


def test_an_epoch_has_every_sample_once_but_the_remainder(manifest: Manifest, tokenizer: Tokenizer) -> None:
    order = ordered(manifest)
    per_epoch = order.steps_per_epoch
    counts = Counter(key for item in load([manifest], tokenizer, stop_step=per_epoch) for key in item.keys)
    assert set(counts.values()) == {1} and len(counts) == sum(SIZES) - order.remainder


def test_case_08_several_sources_are_mixed_by_weight(tiny_shards: Callable[..., Path], tokenizer: Tokenizer) -> None:
    both = [load_manifest(tiny_shards(SIZES, name="shards")), load_manifest(tiny_shards((30,), name="other"))]
    expected = reference(both, tokenizer, settings())
    assert_equal(all_ranks(both, tokenizer, settings(2), 2), expected)
    rows = Counter(key for item in expected for key in item.keys if item.step < 3)
    assert sum(count for key, count in rows.items() if key.startswith("other/train-000000")) >= 18


def test_case_09_bad_samples_are_replaced_by_the_next_good_one_and_recorded(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    bad = (2, 3, 7)
    manifest = damaged(tmp_path, bad)
    seen = all_ranks([manifest], tokenizer, settings(), 1)
    after = {2: 4, 3: 4, 7: 0}
    expected, records = [], []
    for step in range(STEPS):
        for row, place in enumerate(ordered(manifest).rows(step, 0, BATCH)):
            name = f"train-{place.shard:06d}.tar"
            taken = after.get(place.index, place.index)
            expected.append(f"{name}/{place.shard}-{taken}")
            if place.index in bad:
                key = f"{place.shard}-{place.index}"
                records.append((step, row, name, key, expected[-1]))
    assert [key for item in seen for key in item.keys] == expected
    got = [record for item in seen for record in item.bad]
    assert [(r["step"], r["row"], r["shard"], r["key"], r["replaced_by"]) for r in got] == records
    assert {record["cause"].split()[0] for record in got} == {"not", "no"}
    for workers, world in ((2, 1), (0, 4), (1, 2)):
        assert_equal(all_ranks([manifest], tokenizer, settings(workers), world), seen)


@pytest.mark.parametrize("workers", [0, 2])
def test_case_10_data_without_a_good_sample_stop_the_run(tmp_path: Path, tokenizer: Tokenizer, workers: int) -> None:
    manifest = damaged(tmp_path, range(8))
    with pytest.raises(ValueError, match=r"^shard .*train-00000\d\.tar: not one of its samples can be used, nor of .+"):
        list(load([manifest], tokenizer, settings(workers)))


@pytest.mark.parametrize(
    ("sizes", "bad", "member", "expected"),
    [
        ((9, 1, 1, 9), (9, 10), {"png": b"bad", "txt": b"text"}, "train-000003.tar/11"),
        ((9, 9, 1), (18,), {"png": b"bad", "txt": b"text"}, "train-000000.tar/0"),
        ((9, 2, 9), (9, 10), {"png": tiny_image(1), "cls": b"7"}, "train-000002.tar/11"),  # good, but for training
    ],
)
def test_a_shard_without_a_good_sample_takes_those_of_the_next_one(
    tmp_path: Path, tokenizer: Tokenizer, sizes, bad, member, expected
) -> None:
    """Shards of one sample, as a pack by bytes may end, are no reason to stop at half a percent of bad samples."""

    def sample(number: int) -> tuple[str, dict[str, bytes]]:
        return f"{number}", member if number in bad else {"png": tiny_image(number), "txt": b"text"}

    manifest = load_manifest(write_shards(tmp_path, sizes, sample))
    for workers, world in ((0, 1), (2, 2)):
        seen = all_ranks([manifest], tokenizer, settings(workers), world)
        records = {record["key"]: record["replaced_by"] for item in seen for record in item.bad}
        assert records == dict.fromkeys(map(str, bad), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_is_not_the_manifests_is_named(manifest: Manifest, tokenizer: Tokenizer, workers: int) -> None:
    path = Path(manifest.shards[1].url)
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(ValueError, match=r"^shard .*train-000001\.tar has \d+ bytes, its manifest says \d+"):
        list(load([manifest], tokenizer, settings(workers)))
    assert not multiprocessing.active_children()


class Unpicklable(Exception):
    """Cannot be sent from a process to another."""

    def __init__(self, one: int, two: int):
        super().__init__(f"{one} and {two}")


def test_other_exceptions_come_through_with_their_trace(manifest: Manifest, tokenizer: Tokenizer) -> None:
    def lookup(sample: dict) -> dict:
        return {}["missing"]

    def odd(sample: dict) -> dict:
        raise Unpicklable(1, 2)

    for workers in (0, 2):
        with pytest.raises(KeyError, match="missing") as caught:
            list(load([manifest], tokenizer, settings(workers), stages=[lookup]))
        assert "in lookup" in str(caught.value.__cause__)
        with pytest.raises(RuntimeError, match="Unpicklable: 1 and 2"):
            list(load([manifest], tokenizer, settings(workers), stages=[odd]))


def test_stages_change_samples_and_cannot_drop_them(manifest: Manifest, tokenizer: Tokenizer) -> None:
    def noise(sample: dict) -> dict:
        level = sample["rng"].randrange(256)
        return {"image": torch.full_like(sample["image"], level), "caption": f"number {level}"}

    seen = list(load([manifest], tokenizer, stages=[noise]))
    assert all((item.images_BCHW.float().std((1, 2, 3)) == 0).all() for item in seen)
    assert len({int(image[0, 0, 0]) for item in seen for image in item.images_BCHW}) > 30
    assert_equal(list(load([manifest], tokenizer, settings(2), stages=[noise])), seen)
    assert [item.keys for item in seen] == [item.keys for item in load([manifest], tokenizer)]

    def drop(sample: dict) -> dict:
        return None if sample["rng"].random() < 0.5 else sample

    with pytest.raises(ValueError, match=r"stage drop gave back NoneType for train-\d+\.tar/\d+: .* cannot drop"):
        list(load([manifest], tokenizer, stages=[drop]))


def children_end(seconds: float = 10) -> bool:
    """Whether this process has no more child processes, at the latest after `seconds`."""
    end = time.monotonic() + seconds
    while multiprocessing.active_children() and time.monotonic() < end:
        gc.collect()
        time.sleep(0.05)
    return not multiprocessing.active_children()


@pytest.mark.parametrize("way", ["forget", "close", "exhaust", "exception"])
def test_no_process_is_left_behind(manifest: Manifest, tokenizer: Tokenizer, way: str) -> None:
    batches = load([manifest], tokenizer, settings(2), stop_step=STEPS if way == "exhaust" else 10_000)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    if way == "exhaust":
        assert len(list(batches)) == STEPS * BATCH // MICRO - 1
    elif way == "close":
        batches.close()
    elif way == "exception":
        with pytest.raises(ZeroDivisionError):
            for item in batches:
                item.step / 0
    del batches
    assert children_end()


@pytest.mark.parametrize("name", ["INT", "TERM"])
def test_loader_processes_leave_signals_to_the_training_process(
    manifest: Manifest, tokenizer: Tokenizer, name: str
) -> None:
    batches = load([manifest], tokenizer, settings(2))
    seen = [next(batches)]
    for child in multiprocessing.active_children():
        subprocess.run(["kill", f"-{name}", str(child.pid)], check=True)
    assert_equal([*seen, *batches], list(load([manifest], tokenizer)))
    assert children_end()


def hang(sample: dict) -> dict:
    time.sleep(60)
    return sample


def exit_while_loading(manifest: Manifest, tokenizer: Tokenizer, way: str) -> None:
    batches = load([manifest], tokenizer, settings(2), stages=[hang] if way == "hang" else [])
    if way == "hang":
        loop = threading.Thread(target=next, args=(batches,), daemon=True)
        loop.start()
        loop.join(1)
    else:
        next(batches)
    setattr(sys, f"_{way}", batches)  # as the traceback of an uncaught exception holds it


@pytest.mark.parametrize("way", ["idle", "hang"])
def test_a_process_can_exit_with_loader_processes_that_wait_or_hang(
    manifest: Manifest, tokenizer: Tokenizer, way: str
) -> None:
    process = multiprocessing.get_context("fork").Process(target=exit_while_loading, args=(manifest, tokenizer, way))
    process.start()
    process.join(30)
    try:
        assert process.exitcode == 0
    finally:
        process.kill()


def test_a_loader_can_be_sent_to_a_process_that_is_not_forked(manifest: Manifest, tokenizer: Tokenizer) -> None:
    options = {"seed": SEED, "micro_batch": MICRO, "stop_step": STEPS}
    loader = train_loader(settings(), ordered(manifest), [manifest], tokenizer, **options)
    assert_equal(list(pickle.loads(pickle.dumps(loader))), list(loader))


def test_batches_that_cannot_be_shared_are_refused(manifest: Manifest, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"^global_batch 8 is not divisible by 3 processes x micro_batch 2"):
        load([manifest], tokenizer, world=3)


def test_unusable_workers_are_refused(manifest: Manifest, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"data\.workers is -1"):
        load([manifest], tokenizer, settings(-1))
    with pytest.raises(ValueError, match=r"data\.prefetch is 0"):
        load([manifest], tokenizer, settings(1, prefetch=0))


def test_batches_move_with_all_their_tensors(manifest: Manifest, tokenizer: Tokenizer) -> None:
    batch = next(load([manifest], tokenizer))
    moved = batch.to("meta", non_blocking=True)
    assert {moved.images_BCHW.device.type, moved.ids_BL.device.type, moved.mask_BL.device.type} == {"meta"}
    assert {moved.image_ids_B.device.type, moved.text_ids_B.device.type} == {"meta"}
    assert (moved.keys, moved.step, moved.index) == (batch.keys, batch.step, batch.index)
    assert batch.images_BCHW.device.type == "cpu"


def test_a_stage_that_makes_a_sample_of_its_own_keeps_the_colours_that_are_drawn(
    manifest: Manifest, tokenizer: Tokenizer
) -> None:
    def copied(sample: dict) -> dict:
        return {"image": sample["image"].clone(), "caption": sample["caption"]}

    plain, seen = (list(load([manifest], tokenizer, stages=stages)) for stages in ((), (copied,)))
    assert_equal(seen, plain)
    assert sum(len(batch.colors.rows_R) for batch in seen if batch.colors) > len(seen)


@pytest.mark.parametrize(("workers", "prefetch", "expected"), [(1, 1, 8), (3, 1, 9), (4, 4, 16)])
def test_two_steps_are_prepared_ahead(
    manifest: Manifest, tokenizer: Tokenizer, workers: int, prefetch: int, expected: int
) -> None:
    """A step takes four micro-batches."""
    loader = train_loader(
        settings(workers, prefetch=prefetch),
        ordered(manifest),
        [manifest],
        tokenizer,
        seed=0,
        micro_batch=2,
        stop_step=9,
    )
    assert loader._loader.prefetch_factor * workers == expected
