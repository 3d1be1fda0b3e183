"""A shard is what its manifest says to the last bit, whatever its name, size and times are; it is hashed once."""

import io
import json
import os
import random
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.storage import kept_index
from data_pipeline.storage.cache import Store
from data_pipeline.storage.kept_index import read_hashed, read_index
from data_pipeline.storage.manifest import Shard
from data_pipeline.storage.shards import ShardReader
from tests.support.server import serve
from tests.support.tars import LONG, SAMPLES, contents, describe, forget_index, write_tar, write_webdataset

ALTERED = r"a\.tar has [0-9a-f]{64} as its sha256, its manifest says [0-9a-f]{64}: it is damaged or was replaced"


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    return describe(write_webdataset(tmp_path / "a.tar", SAMPLES))


def overwrite(shard: Shard, data: bytes) -> None:
    """In place, with the times that it had."""
    path = Path(shard.url)
    before = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_mtime_ns, path.stat().st_size) == (before.st_mtime_ns, before.st_size)


@pytest.mark.parametrize("opened_before", [False, True])
def test_case_12_a_shard_of_the_same_keys_size_and_time_with_other_captions_is_refused(shard, opened_before) -> None:
    if opened_before:
        ShardReader(shard.url, shard).close()
    data = Path(shard.url).read_bytes()
    overwrite(shard, data.replace(b"no. 0", b"no. *").replace(b"no. 1", b"no. 0").replace(b"no. *", b"no. 1"))
    for _ in range(2):
        with pytest.raises(ValueError, match=ALTERED):
            ShardReader(shard.url, shard)


def test_case_12_a_reordered_tar_does_not_get_the_offsets_of_the_one_before(shard) -> None:
    ShardReader(shard.url, shard).close()
    before = contents(shard.url)
    buffer = io.BytesIO()
    with tarfile.open(shard.url) as old, tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as new:
        for member in reversed(old.getmembers()):
            new.addfile(member, old.extractfile(member))
    overwrite(shard, buffer.getvalue().ljust(shard.filesize, b"\0"))
    with pytest.raises(ValueError, match=ALTERED):
        ShardReader(shard.url, shard)
    assert sorted(contents(shard.url)) == before


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_case_07_no_bit_of_a_long_name_or_a_payload_is_taken_for_another(form, tmp_path, record_property) -> None:
    members = [(f"{LONG}{n}.{kind}", b"%d %s" % (n, kind.encode())) for n in range(2) for kind in ("jpg", "txt")]
    shard = describe(write_tar(tmp_path / "a.tar", members, form=form))
    data = Path(shard.url).read_bytes()
    end = len(data.rstrip(b"\0"))
    for position in range(0, end, 37):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        Path(shard.url).write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.tar"):
            ShardReader(shard.url, shard)
    record_property("tries", len(range(0, end, 37)))


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "flipped"])
@pytest.mark.parametrize("kept", ["index", "no index", "cache"])
def test_case_07_no_damage_at_a_random_place_is_trained_on(damage, kept, tmp_path, record_property) -> None:
    """Beside the index of the whole tar with the times of before, without one, and in the cache that fetches again."""
    rng, tries = random.Random(7), 500
    samples = [
        (f"{n:03d}", {"txt": f"number {n}".encode(), "jpg": rng.randbytes(rng.randrange(900))}) for n in range(9)
    ]
    (tmp_path / "remote").mkdir()
    path = write_webdataset(tmp_path / "remote" / "a.tar", samples)
    whole, expected, shard = path.read_bytes(), contents(path), describe(path)
    end = len(whole.rstrip(b"\0"))  # behind it is nothing that a size would not tell
    with serve(tmp_path / "remote") as server:
        store = Store(tmp_path / "cache", 10**9, attempts=1)
        if kept == "cache":
            shard = replace(shard, url=f"{server.url}/a.tar")
            path = Path(store.local(shard))
        for _ in range(tries):
            data, place = bytearray(whole), rng.randrange(end)
            data[place] ^= 1 << rng.randrange(8)
            before = path.stat()
            path.write_bytes(data if damage == "flipped" else whole[:place])
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
            if kept == "cache":
                reader = store.open(shard)
                found = [reader.raw(index) for index in range(len(reader))]
                reader.close()
                assert [(raw["__key__"], raw["txt"], raw["jpg"]) for raw in found] == [
                    (key, members["txt"], members["jpg"]) for key, members in expected
                ]
                continue
            if kept == "no index":
                forget_index(path)
            with pytest.raises(ValueError, match=r"a\.tar"):
                ShardReader(path, shard)
            path.write_bytes(whole)
            ShardReader(path, shard).close()
    record_property("tries", tries)


def test_a_shard_is_hashed_once_while_it_stays(shard, monkeypatch) -> None:
    hashed: list[Path] = []

    def counted(path: Path) -> str:
        hashed.append(path)
        return original(path)

    original = kept_index.sha256_of
    monkeypatch.setattr(kept_index, "sha256_of", counted)
    Path(f"{shard.url}.idx").unlink()
    for _ in range(3):
        ShardReader(shard.url, shard).close()
    assert len(hashed) == 1
    # In the cache once more after the machine was started again.
    header, rest = Path(f"{shard.url}.idx").read_text().split("\n", 1)
    *stamp, digest, _, checksum = json.loads(header)
    Path(f"{shard.url}.idx").write_text(json.dumps([*stamp, digest, "another boot", checksum]) + "\n" + rest)
    assert read_hashed(shard.url)[1] == shard.sha256 and len(hashed) == 1
    assert read_hashed(shard.url, this_boot=True)[1] == shard.sha256 and len(hashed) == 2
    # Where nothing can be kept beside it, once in every process.
    Path(f"{shard.url}.idx").unlink()
    Path(f"{shard.url}.idx").mkdir()
    for _ in range(3):
        ShardReader(shard.url, shard).close()
    assert len(hashed) == 3


def columns(*changed: tuple[int, object]) -> list:
    """The columns of an index of one sample with one member of 5 bytes, with some of them replaced."""
    whole: list = [["000"], [0], [["txt"]], [512], [5]]
    for place, value in changed:
        whole[place] = value
    return whole


@pytest.mark.parametrize(
    "crafted",
    [
        *([], [1, 2, 3, 4, 5], {"a": 1}, None, [[]] * 9),
        *(columns((0, "0")), columns((0, [0])), columns((1, [-1])), columns((1, [7])), columns((2, [[3]]))),
        *(columns((2, 4)), columns((3, [2**70])), columns((3, [10**9])), columns((4, []))),
        columns((3, [512, 0]), (4, [5, 5])),
    ],
)
def test_a_crafted_index_is_read_again_from_the_tar(crafted: Sequence, tmp_path) -> None:
    path = write_tar(tmp_path / "a.tar", [("000.txt", b"hello")])
    whole = list(read_index(path))
    header, _, _ = Path(f"{path}.idx").read_text().split("\n")
    text = json.dumps(crafted)
    Path(f"{path}.idx").write_text(f"{json.dumps([*json.loads(header)[:-1], zlib.crc32(text.encode())])}\n{text}\n")
    assert list(read_index(path)) == whole


def test_members_called_like_what_a_sample_is_given_do_not_replace_it(tmp_path) -> None:
    names = ("__key__", "__shard__", "__slot__", "__name__", "txt")
    path = write_tar(tmp_path / "a.tar", [(f"000.{name}", b"x") for name in names])
    raw = ShardReader(path).raw(0)
    assert raw["__key__"] == "000" and raw["__shard__"] == str(path) and raw["txt"] == b"x"


def test_of_members_that_are_not_used_or_too_large_the_size_alone_is_read(tmp_path) -> None:
    path = write_tar(tmp_path / "a.tar", [("0.jpg", bytes(10)), ("0.bin", bytes(20)), ("0.txt", bytes(30))])
    raw = ShardReader(path, limits={"jpg": 10, "txt": 29}).raw(0)
    assert (raw["jpg"], raw["bin"], raw["txt"]) == (bytes(10), 20, 30)


def test_long_headers_are_refused_before_they_are_read(tmp_path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("000.txt")
        member.pax_headers = {"comment": "x" * (2 << 20)}
        tar.addfile(member)
    with pytest.raises(
        ValueError, match=r"a\.tar is no whole tar: a header of 2,\d+,\d+ bytes, the limit is 1,048,576"
    ):
        read_index(path)


def test_a_shard_changed_while_it_is_open_is_not_read_on(shard) -> None:
    reader = ShardReader(shard.url, shard)
    assert reader.raw(0)["__key__"] == "000"
    os.utime(shard.url)
    with Path(shard.url).open("r+b") as file:
        file.seek(700)
        file.write(b"!")
    with pytest.raises(ValueError, match=r"a\.tar: it ends early or was changed while in use: restore it"):
        reader.raw(0)


@pytest.mark.parametrize("damage", ["zeroed", "cut", "flipped"])
@pytest.mark.parametrize("opened_before", [False, True])
def test_case_11_a_cached_shard_damaged_by_power_loss_is_fetched_again(damage, opened_before, tmp_path) -> None:
    (tmp_path / "remote").mkdir()
    with serve(tmp_path / "remote") as server:
        path = write_webdataset(server.directory / "a.tar", SAMPLES)
        shard = replace(describe(path), url=f"{server.url}/a.tar")
        store = Store(tmp_path / "cache", 10**9, attempts=1)
        cached = Path(store.local(shard))
        if opened_before:
            store.open(shard).close()
        stat, data = cached.stat(), bytearray(cached.read_bytes())
        data[1024] ^= 1
        cached.write_bytes({"zeroed": bytes(len(data)), "cut": data[:512], "flipped": data}[damage])
        os.utime(cached, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        reader = store.open(shard)
        assert reader.raw(2)["jpg"] == SAMPLES[2][1]["jpg"]
        assert cached.read_bytes() == path.read_bytes() and server.requests == ["/a.tar"] * 2


def test_case_11_a_body_without_end_is_stopped_at_the_size_of_the_shard(tmp_path) -> None:
    (tmp_path / "remote").mkdir()
    with serve(tmp_path / "remote") as server:
        path = write_webdataset(server.directory / "a.tar", SAMPLES)
        shard = replace(describe(path), url=f"{server.url}/a.tar")
        server.faults = ["endless"]
        with pytest.raises(ValueError, match=r"in 1 tries: ValueError: more than the [\d,]+ bytes that it should have"):
            Store(tmp_path / "cache", 10**9, attempts=1).local(shard)
        assert not list((tmp_path / "cache").glob("*.part"))
        assert 0 < server.sent < 100 << 20
