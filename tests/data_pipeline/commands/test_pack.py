"""pack: every kind of table gives the same samples, and what cannot be packed is listed: nothing is lost."""

import io
import json
import random
import shutil
from pathlib import Path

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.commands.rows import LONGEST_KEY, _key
from data_pipeline.storage.manifest import load_manifest
from data_pipeline.storage.shards import ShardReader, split_name
from tests.support.pack_inputs import (
    IMAGES,
    RECORDS,
    content,
    run_pack,
    samples,
    skipped,
    write_csv,
    write_pictures,
    write_table,
)


@pytest.fixture(name="folder")
def picture_folder(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "input")


KINDS = ["csv", "tsv", "jsonl", "parquet", "embedded", "bytes", "folder", "dataset", "splits"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_table_gives_the_same_samples(kind, folder, tmp_path, capsys):
    flags = ["--split", "train"] if kind == "splits" else []
    assert (
        run_pack(write_table(kind, folder), tmp_path / "out", "--class-column", "label", "--shard-size", 2, *flags) == 0
    )
    found = samples(tmp_path / "out")
    assert [shard.nsamples for shard in load_manifest(tmp_path / "out").shards] == [2, 2, 1]
    assert len(found) == len(RECORDS)
    for raw, record in zip(found, RECORDS, strict=True):
        extension = record["image"].rpartition(".")[2]
        assert raw[extension] == IMAGES[record["image"]]
        assert raw["txt"].decode() == record["caption"]
        assert raw["cls"].decode() == str(record["label"])
        assert len(raw) == 5  # three members, __key__ and __shard__
    assert "5 samples in 3 shards" in capsys.readouterr().out


def test_webdataset_reads_what_pack_writes(folder, tmp_path):
    run_pack(write_table("csv", folder), tmp_path / "out", "--class-column", "label")
    urls = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("png;jpg", "txt", "cls"))
    assert [(image.size, text, label) for image, text, label in read] == [
        ((24, 20), record["caption"], record["label"]) for record in RECORDS
    ]


def test_several_captions_from_columns_lists_and_rows(folder, tmp_path):
    rows = [
        {"image": "pictures/im0.png", "caption": ["one", "two"], "alt": "three"},
        {"image": "pictures/im0.png", "caption": "four", "alt": "one"},
        {"image": "pictures/im1.jpg", "caption": "only", "alt": None},
        {"image": "pictures/im0.png", "caption": "not the neighbour of its like", "alt": ""},
    ]
    table = folder / "table.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    assert run_pack(table, tmp_path / "comma", "--caption-column", "caption,alt") == 0
    assert run_pack(table, tmp_path / "twice", "--caption-column", "caption", "--caption-column", "alt") == 0
    first, second = samples(tmp_path / "comma")
    texts = ["one", "two", "three", "four", "not the neighbour of its like"]
    assert json.loads(first["json"]) == {"captions": texts}
    assert second["txt"] == b"only"
    assert [raw["__key__"] for raw in (first, second)] == ["000000000", "000000002"]
    assert [{**raw, "__shard__": ""} for raw in samples(tmp_path / "twice")] == [
        {**raw, "__shard__": ""} for raw in (first, second)
    ]


def test_side_cars_text_lines_and_json_together(folder, tmp_path):
    (folder / "pictures/im0.txt").write_text("\ufefffirst line\n\n  second line \n", encoding="utf-8")
    (folder / "pictures/im1.txt").write_text("same")
    (folder / "pictures/im1.json").write_text(
        json.dumps({"caption": "same", "captions": ["other"], "image": "ignored"})
    )
    (folder / "pictures/im2.json").write_text("{ not json")
    (folder / "orphan.txt").write_text("no picture")
    assert run_pack(folder, tmp_path / "out", "--captions", "lines") == 0
    first, second = samples(tmp_path / "out")
    assert (first["__key__"], second["__key__"]) == ("pictures/im0", "pictures/im1")
    assert json.loads(first["json"]) == {"captions": ["first line", "second line"]}
    assert json.loads(second["json"]) == {"captions": ["other", "same"]}
    causes = {line["key"]: line["cause"] for line in skipped(tmp_path / "out")}
    assert set(causes) == {"orphan", "pictures/im2", "pictures/im3", "pictures/im4"}
    assert "no image beside orphan.txt" in causes["orphan"]
    assert "im2.json is not JSON" in causes["pictures/im2"]
    assert "no caption" in causes["pictures/im3"]


def test_what_cannot_be_packed_is_listed_with_its_cause(folder, tmp_path, capsys):
    good = IMAGES["pictures/im1.jpg"]
    (folder / "cut.jpg").write_bytes(good[: len(good) // 2])
    noise = io.BytesIO()
    Image.frombytes("RGB", (30, 30), random.Random(0).randbytes(2700)).save(noise, "JPEG")
    (folder / "noise.jpg").write_bytes(noise.getvalue()[:-400])  # its header is whole, its last rows are not there
    (folder / "cut.png").write_bytes(IMAGES["pictures/im0.png"][:-30])
    (folder / "text.jpg").write_text("this is no picture")
    Image.new("RGB", (40, 30)).save(folder / "wide.png")
    lines = [
        "name,image,caption,label",
        "a,pictures/im0.png,good,1",
        "b,gone.jpg,text,1",
        "c,cut.jpg,text,1",
        "d,cut.png,text,1",
        "e,text.jpg,text,1",
        "f,pictures/im1.jpg,   ,1",
        "g,,text,1",
        "h,wide.png,text,1",
        "i,pictures/im1.jpg,unquoted, comma,1",
        "j,pictures/im1.jpg,text,cat",
        "a,pictures/im2.jpg,text,1",
        "k,https://example.com/a.jpg,text,1",
        "m,noise.jpg,text,1",
        "l,pictures/im3.png,good,2",
    ]
    (folder / "t.csv").write_text("\n".join(lines))
    flags = ["--key-column", "name", "--class-column", "label", "--max-pixels", "1000"]
    assert run_pack(folder / "t.csv", tmp_path / "out", *flags) == 0
    assert [raw["__key__"] for raw in samples(tmp_path / "out")] == ["a", "f", "j", "l"]
    listed = skipped(tmp_path / "out")
    assert [line["row"] for line in listed] == [number for number in range(1, 13) if number not in (5, 9)]
    expected = [
        "No such file",
        "unreadable",
        "unreadable",
        "not a JPEG",
        "no image",
        "max_pixels",
        "5 fields, the header 4",
        "'a' is there more than once",
        "is a url, to be fetched first",
        "unreadable JPEG",
    ]
    for line, part in zip(listed, expected, strict=True):
        assert part in line["cause"], line
    assert listed[0]["image"] == str(folder / "gone.jpg")
    out = capsys.readouterr().out
    assert "4 samples in 1 shards" in out
    assert "10 skipped" in out


def test_nothing_usable_is_an_error_and_other_flags_may_follow(folder, tmp_path, capsys):
    table = write_csv(folder / "t.csv", [{"image": "gone.png", "good": "pictures/im0.png", "caption": "text"}])
    assert run_pack(table, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "no sample of" in error
    assert "No such file" in error and f"paths start from {folder}: --image-root names another folder" in error
    assert run_pack(table, tmp_path / "out", "--image-column", "good") == 0
    assert len(samples(tmp_path / "out")) == 1


@pytest.mark.parametrize("flags, named", [
    (["--caption-column", "title"], "--caption-column: there is no column 'title'"),
    (["--caption-column", "caption,title"], "--caption-column: there is no column 'title'"),
    (["--image-column", "picture"], "--image-column: there is no column 'picture'"),
    (["--key-column", "id"], "--key-column: there is no column 'id'"),
    (["--class-column", "cls"], "--class-column: there is no column 'cls'"),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "folder", "dataset"])
def test_a_missing_column_names_those_there_are(kind, flags, named, folder, tmp_path, capsys):
    assert run_pack(write_table(kind, folder), tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err
    assert named in error
    for column in ("image", "caption", "label"):
        assert column in error.partition("columns are:")[2]
    assert not (tmp_path / "out").exists()


def test_resize_and_format(folder, tmp_path):
    Image.new("RGB", (400, 300), (10, 200, 30)).save(folder / "large.jpg", quality=95)
    turned = Image.new("RGB", (400, 200), (10, 200, 30))
    turned.paste((250, 0, 0), (0, 0, 100, 200))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: its left part comes to the top
    turned.save(folder / "turned.jpg", exif=exif, quality=95)
    Image.new("RGBA", (300, 300), (0, 0, 0, 0)).save(folder / "clear.png")
    names = ["large.jpg", "turned.jpg", "clear.png", "pictures/im1.jpg"]
    table = write_csv(folder / "t.csv", [{"image": name, "caption": name} for name in names])
    assert run_pack(table, tmp_path / "keep", "--resize", 100) == 0
    large, upright, clear, small = samples(tmp_path / "keep")
    assert Image.open(io.BytesIO(large["jpg"])).size == (133, 100)
    upright = Image.open(io.BytesIO(upright["jpg"]))
    assert upright.size == (100, 200)
    assert 0x0112 not in upright.getexif()
    assert upright.getpixel((50, 10))[0] > 200 > 100 > upright.getpixel((50, 190))[0]
    assert Image.open(io.BytesIO(clear["png"])).convert("RGB").getpixel((5, 5)) == (255, 255, 255)
    assert small["jpg"] == IMAGES["pictures/im1.jpg"]
    assert run_pack(table, tmp_path / "webp", "--format", "webp", "--quality", 50) == 0
    for raw in samples(tmp_path / "webp"):
        assert Image.open(io.BytesIO(raw["webp"])).format == "WEBP"


def test_max_bytes_bounds_a_shard(folder, tmp_path):
    table = write_csv(folder / "t.csv", RECORDS)
    size = max(map(len, IMAGES.values())) + 100
    assert run_pack(table, tmp_path / "out", "--max-bytes", 2 * size) == 0
    shards = load_manifest(tmp_path / "out").shards
    assert len(shards) > 1
    for shard in shards:
        reader = ShardReader(shard.url)
        total = sum(len(value) for i in range(len(reader)) for name, value in reader.raw(i).items() if name[0] != "_")
        assert total <= 2 * size


@given(st.lists(st.text(min_size=1), unique=True, max_size=20))
def test_keys_are_read_back_as_written_and_stay_different(names):
    names = [name for name in names if name.strip("/") == name]
    keys = [_key(name, 0) for name in names]
    assert len(set(keys)) == len(names)
    for key in keys:
        assert split_name(f"{key}.jpg") == (key, "jpg")
        assert len(key) <= LONGEST_KEY
        assert key.isascii()


def test_other_options_other_input_and_other_shards_are_refused(folder, tmp_path, capsys):
    table, out = write_csv(folder / "t.csv", RECORDS), tmp_path / "out"
    assert run_pack(table, out) == 0
    expected = content(out)
    assert run_pack(table, out) == 0
    assert "is packed already" in capsys.readouterr().out
    assert run_pack(table, out, "--resize", 10, "--shard-size", 2) == 2
    error = capsys.readouterr().err
    assert "--resize: 0 there, 10 here" in error
    assert "--shard-size: 10000 there, 2 here" in error
    write_csv(table, RECORDS[:3])
    assert run_pack(table, out) == 2
    assert "INPUT: '1 files" in capsys.readouterr().err
    assert content(out) == expected
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    shutil.copy(out / "shard-000000.tar", foreign / "mine.tar")
    assert run_pack(table, foreign) == 2
    assert "holds shards that this command did not write" in capsys.readouterr().err
    (out / "shard-000000.tar").unlink()
    write_csv(table, RECORDS)
    assert run_pack(folder, folder / "inside") == 2
    assert "is inside INPUT" in capsys.readouterr().err


def test_a_shard_that_vanished_is_noticed(folder, tmp_path, capsys):
    table, out = write_csv(folder / "t.csv", RECORDS), tmp_path / "out"
    assert run_pack(table, out, "--shard-size", 2) == 0
    (out / "shard-000001.tar").unlink()
    assert run_pack(table, out, "--shard-size", 2) == 2
    assert "shard-000001.tar is not as it was left" in capsys.readouterr().err


def test_a_list_of_skipped_ones_that_vanished_is_noticed(folder, tmp_path, capsys):
    table, out = write_csv(folder / "t.csv", [*RECORDS, RECORDS[0] | {"image": "gone.png"}]), tmp_path / "out"
    assert run_pack(table, out) == 0
    (out / "skipped.jsonl").unlink()
    assert run_pack(table, out) == 2
    assert "skipped.jsonl is not as it was left" in capsys.readouterr().err


@pytest.mark.parametrize("make, message", [
    (lambda folder: folder / "nothing", "does not exist"),
    (lambda folder: folder / "pictures/im0.png", "is of no known kind"),
    (lambda folder: _empty(folder / "empty.csv"), "is empty"),
    (lambda folder: _empty(folder / "empty.jsonl"), "none of its first 100 lines"),
    (lambda folder: _empty(folder / "empty.parquet"), "cannot be read"),
    (lambda folder: _empty(folder / "void/some.md").parent, "no image in"),
    (lambda folder: write_table("splits", folder), "train, test; choose one with --split"),
    (lambda folder: _bytes(folder / "latin.csv", b"image,caption\na,\xe9t\xe9\n"), "cannot be read as UTF-8"),
    (lambda folder: _bytes(folder / "twice.csv", b"image,caption,caption\n"), "'caption' more than once"),
])  # fmt: skip
def test_inputs_that_cannot_be_read(make, message, folder, tmp_path, capsys):
    assert run_pack(make(folder), tmp_path / "out") == 2
    assert message in capsys.readouterr().err


def _bytes(path: Path, data: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


def _empty(path: Path) -> Path:
    return _bytes(path, b"")
