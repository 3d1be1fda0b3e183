"""The cache against a real HTTP server that cuts, flips and fails, and against other processes."""

import hashlib
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.storage import remote
from data_pipeline.storage.cache import Store
from data_pipeline.storage.manifest import Shard
from data_pipeline.storage.shards import ShardReader, read_index
from tests.support.server import serve
from tests.support.tars import SAMPLES, describe, write_tar, write_webdataset

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def server(tmp_path):
    (tmp_path / "remote").mkdir()
    with serve(tmp_path / "remote") as server:
        yield server


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def remote_shard(server, name="a.tar", size=3000):
    """A tar on the server, of 10,240 bytes, that differs by name."""
    path = write_tar(server.directory / name, [(f"{name}/key.jpg", bytes(size))])
    return replace(describe(path), url=f"{server.url}/{name}")


def store(cache, size=10**9, attempts=3):
    return Store(cache, size, attempts=attempts, backoff=0.01)


def files(cache):
    return {path.name for path in cache.iterdir()} - {"lock"}


def test_local_paths_are_given_back_as_they_are(cache):
    shard = Shard("/data/a.tar", 1, 10240, "0" * 64)
    assert store(cache).local(shard) == "/data/a.tar"
    assert not cache.exists()


@pytest.mark.parametrize(
    "url",
    ["pipe:cat a.tar", "http://h/a.tar::http://h/b.tar", "ftp://h/a.tar", "file:///a.tar", "s3:/b/a", "cache::x"],
)
def test_case_17_addresses_off_the_allow_list_are_refused(url, cache):
    with pytest.raises(ValueError, match=r"(nothing is read from|joined by ::)"):
        store(cache).local(Shard(url, 1, 10240, "0" * 64))


def test_a_remote_shard_is_fetched_once_and_read(server, cache):
    path = write_webdataset(server.directory / "a.tar", SAMPLES)
    shard = replace(describe(path), url=f"{server.url}/a.tar")
    for _ in range(3):
        local = store(cache).local(shard)
        assert Path(local).read_bytes() == path.read_bytes()
        reader = ShardReader(local, shard)
        assert reader.raw(1)["__key__"] == "001" and reader.raw(1)["__shard__"] == shard.url
        reader.close()
    assert server.requests == ["/a.tar"]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("fault", ["cut", "short", "flip", "error", "busy", "reset", "stall", "less", "more"])
def test_case_11_a_fault_on_the_way_is_found_and_the_shard_fetched_again(fault, server, cache, monkeypatch):
    monkeypatch.setattr(remote, "SILENCE_SECONDS", 0.3)
    shard = remote_shard(server)
    server.faults = [fault, fault]
    local = store(cache).local(shard)
    assert hashlib.sha256(Path(local).read_bytes()).hexdigest() == shard.sha256
    assert len(server.requests) == 3
    assert files(cache) == {Path(local).name}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("cut", "PayloadError"),
        ("short", "9728 bytes came"),
        ("flip", "sha256"),
        ("error", "500"),
        ("busy", "503"),
        ("reset", "could not be fetched"),
        ("less", "9728 bytes came|Data after"),  # where the rest comes before the connection is closed
        ("more", "PayloadError"),
    ],
)
def test_case_11_a_fault_that_stays_names_the_shard_and_leaves_nothing(fault, words, server, cache):
    shard = remote_shard(server)
    server.faults = [fault] * 9
    with pytest.raises(ValueError, match=words) as error:
        store(cache).local(shard)
    assert f"{shard.url} could not be fetched in 3 tries" in str(error.value)
    assert len(str(error.value)) < 500  # not what came
    assert len(server.requests) == 3 and files(cache) == set()


def test_case_11_a_missing_shard_and_a_dead_server_are_named(server, cache):
    shard = remote_shard(server)
    with pytest.raises(ValueError, match=r"nothere\.tar could not be fetched"):
        store(cache).local(replace(shard, url=f"{server.url}/nothere.tar"))
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:9/a\.tar could not be fetched"):
        store(cache).local(replace(shard, url="http://127.0.0.1:9/a.tar"))
    assert files(cache) == set()


def test_least_recently_used_shards_leave_first_with_their_index(server, cache):
    a, b, c = (remote_shard(server, f"{name}.tar") for name in "abc")
    bounded = store(cache, 2 * 10240)
    for shard in (a, b, a):
        read_index(bounded.local(shard))
    bounded.local(c)
    assert files(cache) == {f"{a.sha256}.tar", f"{a.sha256}.tar.idx", f"{c.sha256}.tar"}
    bounded.local(a)
    bounded.local(b)
    assert files(cache) == {f"{a.sha256}.tar", f"{a.sha256}.tar.idx", f"{b.sha256}.tar"}
    assert server.requests == ["/a.tar", "/b.tar", "/c.tar", "/b.tar"]


def test_the_index_beside_a_shard_holds_while_the_shard_stays(server, cache):
    shard = remote_shard(server)
    read_index(store(cache).local(shard))
    kept = cache / f"{shard.sha256}.tar.idx"
    written = kept.stat().st_mtime_ns
    time.sleep(0.02)
    read_index(store(cache).local(shard))
    assert kept.stat().st_mtime_ns == written


def test_files_of_others_in_the_directory_are_left_alone(server, cache):
    names = ("train-000000.tar", "train-000000.tar.idx", "notes.part", f"{'A' * 64}.tar", f"{'0' * 64}.part", "lock")
    cache.mkdir()
    for name in names:
        (cache / name).write_bytes(bytes(20_000))
    bounded = store(cache, 10240)
    for shard in (remote_shard(server), last := remote_shard(server, "b.tar")):
        bounded.local(shard)
    assert {path.name for path in cache.iterdir()} == {*names, f"{last.sha256}.tar"}
    assert all((cache / name).stat().st_size == 20_000 for name in names)


def test_a_shard_in_use_stays_readable_when_it_leaves(server, cache):
    a, b = (remote_shard(server, f"{name}.tar") for name in "ab")
    bounded = store(cache, 10240)
    reader = ShardReader(bounded.local(a), a)
    bounded.local(b)
    assert files(cache) == {f"{b.sha256}.tar"}
    assert reader.raw(0)["jpg"] == bytes(3000)


def test_a_shard_larger_than_the_cache_is_refused(server, cache):
    with pytest.raises(ValueError, match=r"10240 bytes, the cache 10000: raise data\.cache_gb"):
        store(cache, 10_000).local(remote_shard(server))
    assert server.requests == []


def test_case_11_a_damaged_file_in_the_cache_is_fetched_again(server, cache):
    shard = remote_shard(server)
    local = store(cache).local(shard)
    os.truncate(local, 512)
    assert hashlib.sha256(Path(store(cache).local(shard)).read_bytes()).hexdigest() == shard.sha256


def fetch(cache, shards, size=10**9):
    for shard in shards:
        path = store(cache, size).local(shard)
        assert hashlib.sha256(Path(path).read_bytes()).hexdigest() == shard.sha256


def start(count, target, *arguments):
    processes = [FORK.Process(target=target, args=arguments) for _ in range(count)]
    for process in processes:
        process.start()
    return processes


def exit_codes(processes):
    for process in processes:
        process.join(300)
    return sorted(process.exitcode for process in processes)


def test_processes_that_want_the_same_shard_fetch_it_once(server, cache):
    shard = remote_shard(server)
    server.delay = 0.5
    assert exit_codes(start(3, fetch, cache, [shard])) == [0, 0, 0]
    assert server.requests == ["/a.tar"]
    assert files(cache) == {f"{shard.sha256}.tar"}


def test_a_process_takes_over_when_the_one_it_waited_for_fails(server, cache):
    """The first of two gives up after its tries; the second finds no shard, and fetches it itself."""
    shard = remote_shard(server)
    server.delay = 0.3
    server.faults = ["flip"] * 3
    assert exit_codes(start(2, fetch, cache, [shard])) == [0, 1]
    assert len(server.requests) == 4 and files(cache) == {f"{shard.sha256}.tar"}


def test_a_forked_process_fetches_after_its_parent_did(server, cache):
    first, second = remote_shard(server), remote_shard(server, "b.tar")
    store(cache).local(first)
    assert exit_codes(start(2, fetch, cache, [first, second])) == [0, 0]
    assert sorted(server.requests) == ["/a.tar", "/b.tar"]


def kill_while_fetching(server, cache, shard):
    server.delay = 30
    (process,) = start(1, fetch, cache, [shard])
    part = cache / f"{shard.sha256}.{shard.filesize}.part"
    while not (part.exists() and part.stat().st_size):
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    server.delay = 0
    assert part.name in files(cache)


def test_what_a_killed_process_left_is_deleted(server, cache):
    shard, other = remote_shard(server), remote_shard(server, "b.tar")
    kill_while_fetching(server, cache, shard)
    fetch(cache, [other], 10240)
    assert files(cache) == {f"{other.sha256}.tar"}


def test_what_a_killed_process_began_is_fetched_again(server, cache):
    shard = remote_shard(server)
    kill_while_fetching(server, cache, shard)
    fetch(cache, [shard], 10240)
    assert files(cache) == {f"{shard.sha256}.tar"}


def fetch_repeatedly(cache, shards, bound):
    """Without a look at the files: the other process may evict them at any time."""
    for _ in range(2):
        for shard in shards:
            store(cache, bound).local(shard)


def test_the_bound_holds_while_several_processes_fetch(server, cache):
    shards = [remote_shard(server, f"{number}.tar") for number in range(6)]
    bound = 4 * 10240
    processes = start(1, fetch_repeatedly, cache, shards, bound) + start(
        1, fetch_repeatedly, cache, shards[::-1], bound
    )
    largest = 0
    while any(process.is_alive() for process in processes):
        largest = max(largest, sum(_size(path) for path in cache.glob("*.*")))
        time.sleep(0.002)
    assert exit_codes(processes) == [0, 0]
    assert 0 < largest <= bound


def _size(path):
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_case_11_a_missing_backend_names_the_package(scheme, package, cache, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # cannot be imported
    with pytest.raises(ValueError, match=f"pip install {package}"):
        store(cache).local(Shard(f"{scheme}://bucket/a.tar", 1, 10240, "0" * 64))
