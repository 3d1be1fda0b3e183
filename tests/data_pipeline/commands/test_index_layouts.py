"""index: what other tools write and people bring is read as it is meant, and what is not is said."""

import functools
import gzip
import json
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data_pipeline.__main__ import main
from data_pipeline.samples.text import CAPTIONS, captions
from data_pipeline.storage.manifest import load_manifest
from data_pipeline.storage.remote import expand
from data_pipeline.storage.shards import ShardReader
from tests.support.pictures import tiny_image
from tests.support.server import serve, serving
from tests.support.tars import write_tar

LINES = [f"caption {number}" for number in range(5)]


def index(*arguments: object) -> int:
    return main(["index", *map(str, arguments), "--workers", "1"])


def retrieval_set(folder: Path) -> Path:
    """As CLIP_benchmark writes them: a caption per line of the txt."""
    members = []
    for number in range(12):
        text = "\n".join(f"{line} of {number}" for line in LINES)
        members += [(f"s{number:07d}.jpg", tiny_image(number, kind="jpeg")), (f"s{number:07d}.txt", text.encode())]
    return write_tar(folder / "0.tar", members)


@pytest.mark.parametrize(("rule", "texts"), [("lines", 60), ("whole", 12)])
def test_captions_per_line(tmp_path, capsys, rule, texts):
    tar = retrieval_set(tmp_path)
    assert index(tar, "--captions", rule) == 0
    manifest = load_manifest(tmp_path)
    assert manifest.captions == rule
    assert manifest.statistics["captions_per_image"]["mean"] == texts / 12
    assert manifest.statistics["several_lines"] == 12
    assert "12 samples have a text of several lines" in capsys.readouterr().out
    reader = ShardReader(str(tar))
    found = [text for i in range(12) for text in captions(reader.raw(i) | {CAPTIONS: manifest.captions})]
    assert len(found) == texts


def test_the_rule_for_captions_is_part_of_what_the_data_are(tmp_path):
    tar = retrieval_set(tmp_path)
    hashes = set()
    for rule in ("lines", "whole"):
        assert index(tar, "--captions", rule) == 0
        hashes.add(load_manifest(tmp_path).hash)
    assert len(hashes) == 2
    content = json.loads((tmp_path / "manifest.json").read_text())
    del content["captions"]  # as manifests were written before
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    assert load_manifest(tmp_path).captions == "whole" and load_manifest(tmp_path).hash in hashes


@pytest.mark.parametrize(("good", "hopeless"), [(1, 0), (0, 1)])
def test_a_shard_without_a_good_sample_is_foretold(tmp_path, capsys, good, hopeless):
    write_tar(tmp_path / "a.tar", [("a.png", tiny_image(1) if good else b"bad"), ("a.txt", b"text")])
    write_tar(tmp_path / "b.tar", [("b.png", tiny_image(1)), ("b.txt", b"text")])
    assert index(tmp_path) == 0
    assert load_manifest(tmp_path).statistics["hopeless"] == hopeless
    assert ("1 shards have no sample to train with" in capsys.readouterr().out) is bool(hopeless)


def test_a_shard_of_bad_samples_and_of_others_without_captions_is_foretold(tmp_path, capsys):
    write_tar(tmp_path / "a.tar", [("a.png", b"bad"), ("a.txt", b"text"), ("b.png", tiny_image(1)), ("b.cls", b"1")])
    write_tar(tmp_path / "b.tar", [("b.png", tiny_image(1)), ("b.txt", b"text")])
    assert index(tmp_path) == 0
    assert "1 shards have no sample to train with" in capsys.readouterr().out


def test_a_classification_set_without_captions_is_not_bad(tmp_path, capsys):
    members = [
        (f"s{number:07d}.{extension}", data)
        for number in range(4)
        for extension, data in (("webp", tiny_image(number, kind="webp")), ("cls", str(number % 2).encode()))
    ]
    write_tar(tmp_path / "0.tar", members)
    assert index(tmp_path) == 0
    known = load_manifest(tmp_path).statistics
    assert known["bad"]["count"] == 0 and known["uncaptioned"] == 4 and known["classes"]["samples"] == 4
    assert "4 samples have no caption" in capsys.readouterr().out


def test_a_second_dot_in_a_name_is_said(tmp_path, capsys):
    names = ("img.jpg", "img.txt", "img.v2.jpg", "img.v2.txt")
    members = [(name, tiny_image(1) if name.endswith("jpg") else b"text") for name in names]
    write_tar(tmp_path / "0.tar", members)
    assert index(tmp_path) == 0
    assert load_manifest(tmp_path).nsamples == 1
    assert "members that are not read: 1 .v2.jpg, 1 .v2.txt" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "shown"),
    [("img.2020.01.jpg", "1 .2020.01.jpg"), ("img.png", "1 .png"), ("img.caption", "1 .caption"), ("img.cls.txt", "")],
)
def test_what_looks_like_a_part_of_a_sample_and_is_not_read_is_said(tmp_path, capsys, name, shown):
    write_tar(tmp_path / "0.tar", [("img.jpg", tiny_image(1)), ("img.txt", b"text"), (name, tiny_image(2))])
    assert index(tmp_path) == 0
    assert f"members that are not read: {shown or '1 .cls.txt'};" in capsys.readouterr().out


def test_samples_that_are_bad_for_a_dot_say_so(tmp_path, capsys):
    write_tar(tmp_path / "0.tar", [("img.v1.jpg", tiny_image(1)), ("img.v1.txt", b"text")])
    assert index(tmp_path) == 0
    assert "members that are not read: 1 .v1.jpg, 1 .v1.txt;" in capsys.readouterr().out


def test_a_directory_stands_for_its_tars_in_any_case_and_not_for_what_macos_adds(tmp_path):
    for name in ("a.tar", "B.TAR"):
        write_tar(tmp_path / name, [(f"{name[0]}.png", tiny_image(1)), (f"{name[0]}.txt", b"text")])
    (tmp_path / "._a.tar").write_bytes(b"Mac OS X")
    assert index(tmp_path) == 0
    assert load_manifest(tmp_path).nsamples == 2


@pytest.mark.parametrize("other", ["b.tgz", "b.tar.gz", "b.tar.zst", "sub/b.tar"])
def test_a_directory_with_other_tars_is_refused(tmp_path, capsys, other):
    write_tar(tmp_path / "a.tar", [("a.png", tiny_image(1)), ("a.txt", b"text")])
    (tmp_path / other).parent.mkdir(exist_ok=True)
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / other).write_bytes(data if "sub" in other else gzip.compress(data))
    assert index(tmp_path) == 2
    assert other in capsys.readouterr().err
    assert index(f"{tmp_path}/*.tar") == 0
    if "sub" in other:
        assert index(f"{tmp_path}/**/*.tar", "--out", tmp_path) == 0
        assert load_manifest(tmp_path).nsamples == 2


@pytest.mark.parametrize(
    ("name", "remedy"), [("sub/b.tar", r"/**/*.tar'"), ("b.tgz", "gzip -d"), ("b.png", "python -m data_pipeline pack")]
)
def test_a_directory_without_tars_says_what_to_give(tmp_path, capsys, name, remedy):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    assert index(tmp_path) == 2
    assert remedy in capsys.readouterr().err


def test_empty_tars_are_left_out_and_unusable_ones_on_request(tmp_path, capsys):
    write_tar(tmp_path / "a.tar", [("a.png", tiny_image(1)), ("a.txt", b"text")])
    write_tar(tmp_path / "b.tar", [])
    (tmp_path / "c.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:700])
    assert index(tmp_path) == 2
    error = capsys.readouterr().err
    assert "c.tar" in error and "b.tar" not in error and "--leave-out-unusable" in error and "continues" in error
    assert index(tmp_path, "--leave-out-unusable") == 0
    out = capsys.readouterr().out
    manifest = load_manifest(tmp_path)
    assert [Path(shard.url).name for shard in manifest.shards] == ["a.tar"]
    left_out = {Path(item["shard"]).name: item["cause"] for item in manifest.statistics["left_out"]}
    assert left_out.keys() == {"b.tar", "c.tar"} and "empty" in left_out["b.tar"]
    assert all(cause in out for cause in left_out.values())
    (tmp_path / "c.tar").unlink()
    assert index(tmp_path) == 0
    (tmp_path / "a.tar").unlink()
    assert index(tmp_path, "--leave-out-unusable") == 2, "nothing is left"


def test_causes_are_grouped_and_every_bad_sample_is_listed(tmp_path, capsys):
    members = [(f"{number:03d}.{kind}", b"GIF89a" + b"x" * number) for number in range(40) for kind in ("jpg", "txt")]
    write_tar(tmp_path / "a.tar", [*members, ("good.png", tiny_image(1)), ("good.txt", b"text")])
    assert index(tmp_path) == 0
    causes = load_manifest(tmp_path).statistics["bad"]["causes"]
    assert list(causes.values()) == [40]
    assert len((tmp_path / "manifest.bad.jsonl").read_text().splitlines()) == 40


def test_causes_that_differ_in_a_byte_or_a_number_are_one(tmp_path):
    members = [(f"{byte}.{kind}", data) for byte in range(0xC0, 0xF8) for kind, data in (("jpg", b"x"), ("txt", b"y"))]
    captions = [(name, bytes([int(name[:3]), 32]) if name.endswith("txt") else tiny_image(1)) for name, _ in members]
    write_tar(tmp_path / "a.tar", captions)
    assert index(tmp_path) == 0
    assert len(load_manifest(tmp_path).statistics["bad"]["causes"]) <= 2


SIGNATURE = "X-Amz-Signature=" + "5ec7e7" * 60
"""Longer than a file's name may be."""


def test_a_signed_address_is_indexed_and_shown_nowhere(tmp_path, capsys):
    tar = write_tar(
        tmp_path / "a.tar", [("a.png", tiny_image(1)), ("a.txt", b"text"), ("b.png", b"bad"), ("b.txt", b"")]
    )
    (tmp_path / "cut.tar").write_bytes(tar.read_bytes()[:700])
    with serve(tmp_path) as server:
        urls = [f"{server.url}/{name}.tar?{SIGNATURE}" for name in ("a", "cut", "gone")]
        assert index(*urls, "--out", tmp_path / "x.json") == 2
        error = capsys.readouterr().err
        assert "cut.tar?***" in error and "gone.tar?***" in error and "5ec7e7" not in error
        assert index(*urls, "--out", tmp_path / "x.json", "--leave-out-unusable") == 0
        assert "5ec7e7" not in capsys.readouterr().out
    manifest = load_manifest(tmp_path / "x.json")
    assert [shard.url for shard in manifest.shards] == urls[:1], "where it is read from"
    assert "5ec7e7" not in json.dumps(manifest.statistics)
    assert "5ec7e7" not in (tmp_path / "x.bad.jsonl").read_text()


def test_indexing_tries_again_as_training_does(tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    write_tar(tmp_path / "a.tar", [("a.png", tiny_image(1)), ("a.txt", b"text")])
    with serve(tmp_path) as server:
        server.faults = ["error", "cut"]
        assert index(f"{server.url}/a.tar", "--out", tmp_path / "x.json") == 0
    assert load_manifest(tmp_path / "x.json").nsamples == 1


def test_a_remote_directory_stands_for_its_tars(tmp_path):
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", [(f"{name}.png", tiny_image(1)), (f"{name}.txt", b"text")])
    (tmp_path / "notes.txt").write_text("no tar")
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), handler)) as server:
        url = f"http://127.0.0.1:{server.server_port}/"
        assert expand([url]) == [f"{url}a.tar", f"{url}b.tar"]


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass
