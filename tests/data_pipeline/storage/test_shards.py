"""Reading real tars by index, as webdataset, GNU tar, Python and Duet write them."""

import multiprocessing
import os
import random
import tarfile
import time
from pathlib import Path

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.storage.kept_index import read_index
from data_pipeline.storage.shards import ShardReader
from data_pipeline.storage.tar_index import Entry, split_name
from tests.support.tars import (
    LONG,
    SAMPLES,
    WRITERS,
    contents,
    describe,
    write_tar,
    write_webdataset,
)


@pytest.mark.parametrize("write", WRITERS)
def test_whole_tars_of_other_writers_are_read(write, tmp_path):
    path = write(tmp_path / "a.tar", SAMPLES)
    assert contents(path) == contents(path, describe(path)) == [(key, members) for key, members in SAMPLES]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_are_read(form, tmp_path):
    members = [(f"{LONG}.jpg", b"i"), (f"{LONG}.txt", b"t"), ("ключ/名.png", b"j"), ("a.b/key.seg.PNG", b"k")]
    path = write_tar(tmp_path / "a.tar", members, form=form)
    assert contents(path) == [
        (LONG, {"jpg": b"i", "txt": b"t"}),
        ("ключ/名", {"png": b"j"}),
        ("a.b/key", {"seg.png": b"k"}),
    ]


def test_what_belongs_to_no_sample_is_passed_over_as_webdataset_does(tmp_path):
    members = [("./", b""), ("./.DS_Store", b"x"), ("README", b"x"), ("__meta__.info__", b"x"), ("./a.txt", b"hi")]
    path = write_tar(tmp_path / "a.tar", members[1:])
    with tarfile.open(path, "a") as tar:
        directory = tarfile.TarInfo("sub")
        directory.type = tarfile.DIRTYPE
        tar.addfile(directory)
    assert contents(path) == [("./a", {"txt": b"hi"})]
    assert [sample["__key__"] for sample in webdataset.WebDataset(str(path), shardshuffle=False)] == ["./a"]


@given(st.text("ab./_", min_size=1, max_size=8))
def test_names_are_split_as_webdataset_does(name):
    is_meta = name.startswith("__") and name.endswith("__")
    key, extension = webdataset.tariterators.base_plus_ext(name)
    assert split_name(name) == (None if is_meta or not extension or key.endswith("/") else (key, extension))


def test_index_says_where_the_bytes_are(tmp_path):
    path = write_webdataset(tmp_path / "a.tar", SAMPLES)
    data = path.read_bytes()
    for entry, (key, members) in zip(read_index(path), SAMPLES, strict=True):
        assert isinstance(entry, Entry) and entry.key == key
        assert {ext: data[offset : offset + size] for ext, (offset, size) in entry.members.items()} == members
    index = read_index(path)
    assert len(index) == 3 and index[-1] == index[2] and index[1:] == [index[1], index[2]]
    with pytest.raises(IndexError):
        index[3]


def test_the_index_is_kept_beside_the_shard_and_never_trusted_blindly(tmp_path):
    path = write_webdataset(tmp_path / "a.tar", SAMPLES)
    index = Path(f"{path}.idx")
    entries = list(read_index(path))
    kept = index.read_bytes()
    stamp = index.stat().st_mtime_ns
    assert list(read_index(path)) == entries and index.stat().st_mtime_ns == stamp  # read, not made again
    flipped = bytearray(kept)
    flipped[-20] ^= 1
    for damaged in (b"", b"{}", kept[:-30], bytes(flipped), kept.replace(b"003", b"001"), os.urandom(90)):
        index.write_bytes(damaged)
        assert list(read_index(path)) == entries
        assert index.read_bytes() == kept
    size = path.stat().st_size
    time.sleep(0.02)  # beyond the clock tick of file times
    write_webdataset(path, [("other", {"txt": b"x" * 12_000, "jpg": b"y"})])
    assert path.stat().st_size == size  # so that the time alone tells
    assert [entry.key for entry in read_index(path)] == ["other"]
    assert list(tmp_path.glob("*.part")) == []


def test_no_index_is_kept_where_it_cannot_be_written(tmp_path):
    path = write_webdataset(tmp_path / "a.tar", SAMPLES)
    Path(f"{path}.idx").mkdir()
    assert contents(path) == [(key, members) for key, members in SAMPLES]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.tar", "a.tar.idx"]


def read_many(reader, expected, seed):
    generator = random.Random(seed)
    for _ in range(300):
        index = generator.randrange(len(expected))
        assert reader.raw(index)["jpg"] == expected[index][1]["jpg"]


def test_forked_processes_share_a_reader(tmp_path):
    """With members larger than a read buffer, so that a file position shared by the processes would show."""
    samples = [(f"{number}", {"jpg": bytes([number]) * 100_000}) for number in range(20)]
    reader = ShardReader(write_webdataset(tmp_path / "a.tar", samples))
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=read_many, args=(reader, samples, seed)) for seed in range(3)]
    for process in processes:
        process.start()
    read_many(reader, samples, 3)
    for process in processes:
        process.join()
        assert process.exitcode == 0
