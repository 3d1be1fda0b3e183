"""index and verify: what the manifest says is so, damage is named, and an interrupted index resumes."""

import hashlib
import http.server
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from data_pipeline.__main__ import main
from data_pipeline.commands import index as indexing
from data_pipeline.statistics import merge_statistics, shard_statistics
from data_pipeline.storage.manifest import load_manifest
from data_pipeline.storage.shards import ShardWriter
from tests.support.pack_inputs import group_is_gone, start
from tests.support.pictures import tiny_image
from tests.support.server import serve, serving


def index(*arguments: object, workers: int = 1) -> int:
    return main(["index", *map(str, arguments), "--workers", str(workers)])


def verify(manifest: Path, workers: int = 1) -> int:
    return main(["verify", str(manifest), "--workers", str(workers)])


@pytest.fixture
def shards(tiny_shards) -> Path:
    """Three shards without a manifest."""
    directory = tiny_shards((5, 4, 3))
    (directory / "manifest.json").unlink()
    for kept in directory.glob("*.idx"):
        kept.unlink()
    return directory


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("pattern", ["", "/*.tar", "/train-{000000..000002}.tar", "/train-00000[0-2].tar"])
def test_the_manifest_says_what_the_shards_are(pattern, workers, shards):
    assert index(f"{shards}{pattern}", workers=workers) == 0
    manifest = load_manifest(shards)
    paths = sorted(shards.glob("*.tar"))
    assert [shard.url for shard in manifest.shards] == [str(path) for path in paths]
    assert [shard.nsamples for shard in manifest.shards] == [5, 4, 3]
    for shard, path in zip(manifest.shards, paths, strict=True):
        assert shard.filesize == path.stat().st_size
        assert shard.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    expected = merge_statistics(shard_statistics(path) for path in paths)
    assert manifest.statistics == {**expected, "left_out": []}
    assert manifest.statistics["samples"] == 12
    assert not list(shards.glob("*.partial"))


def test_shards_stand_in_the_order_they_were_given(shards):
    last, first = shards / "train-000002.tar", shards / "train-000000.tar"
    assert index(last, first, workers=2) == 0
    assert [shard.url for shard in load_manifest(shards).shards] == [str(last), str(first)]


def test_out_says_where_the_manifest_goes(shards, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    (shards / "train-000001.tar").rename(other / "a.tar")
    assert index(shards, other) == 2
    error = capsys.readouterr().err
    assert "--out" in error
    assert str(other) in error
    assert index(shards, other, "--out", tmp_path / "deep/all.json") == 0
    assert load_manifest(tmp_path / "deep/all.json").nsamples == 12
    assert index(shards, "--out", other) == 0
    assert load_manifest(other / "manifest.json").nsamples == 8
    assert index("https://example.invalid/a.tar") == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [1, 2])
def test_every_damaged_shard_is_named_and_the_others_are_kept(workers, shards, capsys):
    whole = (shards / "train-000000.tar").read_bytes()
    (shards / "train-000000.tar").write_bytes(whole[:2048])
    (shards / "train-000002.tar").write_bytes(b"this is no tar" * 731 + b"......")
    (shards / "manifest.json.partial").write_text('{"shard": {"url": "cut sho')
    assert index(shards, workers=workers) == 2
    error = capsys.readouterr().err
    assert "2 of 3 shards cannot be used" in error
    assert "train-000000.tar" in error
    assert "train-000002.tar" in error
    assert "train-000001.tar" not in error
    assert not (shards / "manifest.json").exists()
    lines = (shards / "manifest.json.partial").read_text().splitlines()
    assert [json.loads(line)["shard"]["url"] for line in lines] == [str(shards / "train-000001.tar")]
    (shards / "train-000000.tar").write_bytes(whole)
    (shards / "train-000002.tar").unlink()
    assert index(shards, workers=workers) == 0
    assert load_manifest(shards).nsamples == 9


def test_bad_samples_are_told(tmp_path, capsys):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("x.jpg", b"no picture"), ("x.txt", b"text")):
            (tmp_path / name).write_bytes(data)
            tar.add(tmp_path / name, name)
    assert index(tmp_path / "a.tar") == 0
    out = capsys.readouterr().out
    assert "1 of the samples are bad" in out
    assert "1: not a JPEG" in out
    (record,) = map(json.loads, (tmp_path / "manifest.bad.jsonl").read_text().splitlines())
    assert (record["shard"], record["key"]) == ("a.tar", "x") and "10 bytes" in record["cause"]


def test_what_is_kept_is_used_only_while_the_shard_is_the_same(shards, monkeypatch):
    """A partial file with one good line, one of a shard that changed since, and one cut short."""
    measured = []
    real = indexing._measured
    monkeypatch.setattr(indexing, "_measured", lambda url, *rest: measured.append(Path(url).name) or real(url, *rest))
    records = [indexing.index_shard("", "whole", (str(path), None)) for path in sorted(shards.glob("*.tar"))]
    lines = [json.dumps(record) for record in records]
    (shards / "manifest.json.partial").write_text("\n".join([lines[0], lines[1], lines[2][:-30]]))
    (shards / "train-000001.tar").write_bytes((shards / "train-000000.tar").read_bytes())
    measured.clear()
    assert index(shards) == 0
    assert measured == ["train-000001.tar", "train-000002.tar"]
    assert [shard.nsamples for shard in load_manifest(shards).shards] == [5, 5, 3]


@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_index_goes_on(blow, tiny_shards):
    shards = tiny_shards([20] * 30)
    expected = (shards / "manifest.json").read_bytes()
    expected_hash = load_manifest(shards).hash
    (shards / "manifest.json").unlink()
    process = start("index", shards, "--workers", 2)
    partial = shards / "manifest.json.partial"
    while process.poll() is None and (not partial.exists() or partial.read_bytes().count(b"\n") < 3):
        time.sleep(0.002)
    os.killpg(process.pid, blow) if blow == signal.SIGINT else process.kill()
    _, errors = process.communicate()
    assert process.returncode == (130 if blow == signal.SIGINT else -signal.SIGKILL), errors
    assert "Traceback" not in errors
    assert group_is_gone(process)
    kept = partial.read_bytes().count(b"\n")
    assert 3 <= kept < 30
    if blow == signal.SIGINT:
        assert f"{kept} of 30 shards are indexed" in errors
    assert index(shards, workers=2) == 0
    assert load_manifest(shards).hash == expected_hash
    assert json.loads(expected)["shardlist"] == json.loads((shards / "manifest.json").read_text())["shardlist"]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def served(shards):
    """The shards over http, from a thread."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: Quiet(*args, directory=str(shards)))
    with serving(server):
        yield f"http://127.0.0.1:{server.server_port}"


def test_remote_shards(served, shards, tmp_path, capsys):
    out = tmp_path / "remote.json"
    assert index(f"{served}/train-{{000000..000002}}.tar", "--out", out, workers=2) == 0
    assert index(shards) == 0
    remote, local = load_manifest(out), load_manifest(shards)
    assert [shard.url for shard in remote.shards] == [f"{served}/train-00000{i}.tar" for i in range(3)]
    assert remote.hash == local.hash
    assert remote.statistics == local.statistics
    assert verify(out) == 0
    (shards / "train-000001.tar").unlink()
    with (shards / "train-000002.tar").open("r+b") as file:
        file.seek(600)
        file.write(b"changed")
    capsys.readouterr()
    assert verify(out, workers=2) == 1
    report = capsys.readouterr().out
    assert f"{served}/train-000001.tar: it is missing" in report
    assert f"{served}/train-000002.tar: its sha256 is" in report
    assert index(f"{served}/train-000000.tar", f"{served}/gone.tar", "--out", out) == 2
    assert f"{served}/gone.tar" in capsys.readouterr().err


def test_a_large_shard_on_a_server_that_gives_no_parts_of_files(served, shards, tmp_path, capsys):
    with ShardWriter(shards, "large") as writer:
        writer.write("a", {"png": tiny_image(1), "txt": b"text", "bin": bytes(6 << 20)})  # more than fsspec's block
    out = tmp_path / "remote.json"
    assert index(f"{served}/large-*.tar", "--out", out) == 0
    assert verify(out) == 0, capsys.readouterr().out


def test_a_server_that_cannot_list_is_named(tmp_path, capsys):
    with serve(tmp_path) as server:
        server.faults = ["error"] * 5
        assert index(f"{server.url}/*.tar", "--out", tmp_path / "m.json") == 2
        assert f"{server.url}/*.tar could not be listed" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [1, 2])
def test_verify_reports_every_shard_that_differs(workers, shards, capsys):
    assert index(shards) == 0
    assert verify(shards, workers) == 0
    assert "all 3 shards (12 samples)" in capsys.readouterr().out
    first, second, third = sorted(shards.glob("*.tar"))
    data = bytearray(first.read_bytes())
    data[700] ^= 1
    first.write_bytes(data)
    second.write_bytes(second.read_bytes() + bytes(512))
    third.unlink()
    assert verify(shards / "manifest.json", workers) == 1
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"{first}: its sha256 is {hashlib.sha256(data).hexdigest()}")
    assert lines[1].startswith(f"{second}: it has")
    assert lines[2] == f"{third}: it is missing"
    assert "3 of 3 shards differ" in captured.err


def test_verify_without_a_manifest_names_the_remedy(tmp_path, capsys):
    assert verify(tmp_path) == 2
    assert "python -m data_pipeline index" in capsys.readouterr().err


def test_a_second_index_of_the_same_manifest_waits_for_nobody(shards, capsys):
    partial = shards / "manifest.json.partial"
    lock = f"f = open({str(partial)!r}, 'ab'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True)"
    code = f"import fcntl, time; {lock}; time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        assert index(shards) == 2
        assert "another index is writing" in capsys.readouterr().err
    finally:
        holder.kill()
        holder.communicate()
