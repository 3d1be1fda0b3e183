"""Streamed shards: whole micro-batches of all samples, nothing executed, nothing silent that can be noticed."""

import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_pipeline.loader import MicroBatch, stream_loader
from data_pipeline.storage.shards import ShardWriter
from data_pipeline.tokenizer import Tokenizer
from tests.support.loading import BATCH, MICRO, SEED, STEPS, damaged, settings
from tests.support.pictures import tiny_image


def stream(pattern: object, tokenizer: Tokenizer, workers: int = 0, **options: object) -> Iterator[MicroBatch]:
    chosen = {"seed": SEED, "global_batch": BATCH, "micro_batch": MICRO, "stop_step": STEPS, **options}
    return iter(stream_loader(settings(workers, train=str(pattern), mode="stream"), tokenizer, **chosen))


@pytest.mark.parametrize(("workers", "world"), [(0, 1), (2, 1), (1, 2), (2, 2)])
def test_a_stream_has_all_samples_in_an_epoch_and_whole_micro_batches(
    tiny_shards: Callable[..., Path], tokenizer: Tokenizer, workers: int, world: int
) -> None:
    directory = tiny_shards((8, 8, 8, 8))
    pattern = f"{directory}/train-{{000000..000003}}.tar"
    ranks = [list(stream(pattern, tokenizer, workers, rank=rank, world=world)) for rank in range(world)]
    share = BATCH // MICRO // world
    for rank, items in enumerate(ranks):
        expected = [(step, rank * share + k) for step in range(STEPS) for k in range(share)]
        assert [(item.step, item.index) for item in items] == expected
    keys = Counter(key for items in ranks for item in items for key in item.keys if item.step < 4)
    assert len(keys) == 32 and set(keys.values()) == {1}
    again = [item.keys for item in stream(pattern, tokenizer, workers, world=world)]
    assert again == [item.keys for item in ranks[0]]


class Shell:
    """What an attacker puts into a pickle."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


def test_case_17_a_stream_unpickles_nothing_and_opens_no_pipe(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    touched = tmp_path / "touched"
    evil = pickle.dumps(Shell(f"touch {touched}"))
    with ShardWriter(tmp_path, "evil") as writer:
        for number in range(8):
            picture = {"png": tiny_image(number), "txt": b"a picture"}
            writer.write(f"{number}", {**picture, "pkl": evil, "pyd": evil, "pth": evil})
    monkeypatch.setenv("GOPEN_REWRITE", f"{tmp_path}=pipe:touch {touched} #")
    assert len(list(stream(writer.paths[0], tokenizer))) == 32
    for url in (f"pipe:touch {touched}", f"{writer.paths[0]}::pipe:touch {touched}"):
        with pytest.raises(ValueError, match=r"pipe|::"):
            list(stream(url, tokenizer))
    assert not touched.exists()


def test_a_stream_leaves_bad_samples_out_and_records_them(tmp_path: Path, tokenizer: Tokenizer) -> None:
    damaged(tmp_path, (2, 3, 7), shards=1)
    seen = list(stream(tmp_path / "train-000000.tar", tokenizer))
    good = {f"train-000000.tar/0-{index}" for index in (0, 1, 4, 5, 6)}
    assert {key for item in seen for key in item.keys} == good
    records = [record for item in seen for record in item.bad]
    assert {record["key"] for record in records} == {"0-2", "0-3", "0-7"}
    assert all(record["replaced_by"] in good and record["cause"] for record in records)


def test_a_stream_says_what_it_cannot_do(
    tiny_shards: Callable[..., Path], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    directory = tiny_shards((8, 8))
    pattern = f"{directory}/train-*.tar"
    with pytest.raises(ValueError, match=r"data\.train .* has 2 shards for 3 loader processes .* data\.workers"):
        stream(pattern, tokenizer, 3)
    path = directory / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(ValueError, match=r"^shard .*train-000001\.tar could not be read"):
        list(stream(pattern, tokenizer))
    damaged(tmp_path / "bad", range(8), shards=1)
    with pytest.raises(ValueError, match=r"data\.train: 10,000 bad samples in a row"):
        list(stream(tmp_path / "bad" / "train-000000.tar", tokenizer))
