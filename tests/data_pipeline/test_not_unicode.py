"""Texts and names that UTF-8 cannot hold: halves of surrogate pairs in JSON, file and member names in Latin-1."""

import json
import os
from pathlib import Path

import pytest

from data_pipeline.commands.index import index_shard
from data_pipeline.stages.collate import image_ids, order_digest
from data_pipeline.storage.manifest import load_manifest
from data_pipeline.storage.shards import ShardReader
from tests.support.pack_inputs import run_pack, samples, skipped, start
from tests.support.pictures import tiny_image
from tests.support.tars import write_tar


def command(*arguments: object) -> str:
    """What the command prints, which must succeed."""
    process = start(*arguments)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return output


def test_texts_and_keys_of_a_table(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(tiny_image(1))
    records = [
        {"image": "a.png", "caption": "cut \ud83d", "name": "k\ud83d"},
        {"image": "a.png", "caption": ["Löwe 🦁", "\udd81 cut"], "name": "Löwe"},
        {"image": "\ud83d.png", "caption": "text", "name": "m"},
        {"image": "http://\ud83d.png", "caption": "text", "name": "n"},
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, records)))
    command("pack", tmp_path / "t.jsonl", tmp_path / "out", "--key-column", "name", "--workers", 1)
    packed = samples(tmp_path / "out")
    assert [raw["__key__"] for raw in packed] == ["k%ED%A0%BD", "L%C3%B6we"]
    assert packed[0]["txt"] == b"cut ?"
    assert packed[1]["json"] == '{"captions": ["Löwe 🦁", "? cut"]}'.encode()
    assert [line["key"] for line in skipped(tmp_path / "out")] == ["m", "n"]


def test_file_names_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    for name, data in ((b"caf\xe9.png", tiny_image(1)), (b"caf\xe9.txt", b"text"), (b"alone\xe9.txt", b"text")):
        (folder / os.fsdecode(name)).write_bytes(data)
    assert run_pack(folder, tmp_path / "out") == 0
    assert [raw["txt"] for raw in samples(tmp_path / "out")] == [b"text"]
    assert "alone?.txt" in skipped(tmp_path / "out")[0]["cause"]


def test_an_image_that_is_skipped_is_named_as_the_file_is(tmp_path: Path) -> None:
    folder = tmp_path / "input"
    folder.mkdir()
    for name, data in (
        (b"caf\xe9.png", b"broken"),
        (b"caf\xe9.txt", b"text"),
        (b"b.png", tiny_image(1)),
        (b"b.txt", b"t"),
    ):
        (folder / os.fsdecode(name)).write_bytes(data)
    assert run_pack(folder, tmp_path / "out") == 0
    assert Path(skipped(tmp_path / "out")[0]["image"]).read_bytes() == b"broken"


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    names = [os.fsdecode(name) for name in (b"caf\xe9", b"bad\xe9")]
    members = [(f"{names[0]}.png", tiny_image(1)), (f"{names[0]}.json", b'{"caption": "cut \\ud83d"}')]
    return write_tar(tmp_path / "latin.tar", [*members, (f"{names[1]}.txt", b"no image")])


def test_members_of_a_shard_are_indexed_and_trained_on(shard: Path) -> None:
    assert "no image member" in command("index", shard)
    listed = json.loads((shard.parent / "manifest.bad.jsonl").read_text())
    assert listed["key"] == os.fsdecode(b"bad\xe9")
    manifest = load_manifest(shard.parent)
    assert manifest.nsamples == 2
    reader = ShardReader(shard, manifest.shards[0])
    key = f"latin.tar/{reader.raw(0)['__key__']}"
    reader.close()
    assert order_digest([0], [key]) != order_digest([0], ["latin.tar/other"])
    assert len(set(image_ids([key, "latin.tar/other"]).tolist())) == 2


def test_a_shard_whose_path_cannot_be_read_is_named() -> None:
    assert index_shard("", "whole", ("/data/\0.tar", None)) == "/data/\0.tar: embedded null byte"
