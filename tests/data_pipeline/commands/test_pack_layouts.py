"""pack: the layouts that data sets come in, each read as it is meant, or refused with what to do instead."""

import io
import json
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from data_pipeline.commands.tables.find import TABLES
from data_pipeline.storage.manifest import load_manifest
from tests.support.pack_inputs import run_pack, samples, skipped
from tests.support.pictures import tiny_image


def texts(raw: dict) -> list[str]:
    return json.loads(raw["json"])["captions"] if "json" in raw else [raw["txt"].decode()] if "txt" in raw else []


def picture(path: Path, number: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tiny_image(number, kind="jpeg"))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with images/a.jpg, b.jpg, c.jpg."""
    for number, name in enumerate("abc"):
        picture(tmp_path / f"data/images/{name}.jpg", number)
    return tmp_path / "data"


def packed(source: Path, out: Path, *flags: object) -> list[list[str]]:
    """The captions of each sample."""
    assert run_pack(source, out, *flags) == 0
    return [texts(raw) for raw in samples(out)]


FLICKR8K = 'image,caption\na.jpg,a dog .\na.jpg,"a dog , and a cat ."\nb.jpg,a bird .\n'
FLICKR30K = "image_name| comment_number| comment\na.jpg| 0| A dog , brown .\na.jpg| 1| A dog .\nb.jpg| 0| A bird\n"
COCO = {
    "images": [{"id": 9, "file_name": "a.jpg"}, {"id": 4, "file_name": "b.jpg"}, {"id": 5, "file_name": "c.jpg"}],
    "annotations": [
        {"image_id": 9, "id": 1, "caption": "one"},
        {"image_id": 4, "id": 2, "caption": "two"},
        {"image_id": 9, "id": 3, "caption": "three"},
    ],
}


@pytest.mark.parametrize(
    ("name", "content", "flags", "expected"),
    [
        ("captions.txt", FLICKR8K, ["--image-root", "images"], [["a dog .", "a dog , and a cat ."], ["a bird ."]]),
        ("results.csv", FLICKR30K, ["--image-root", "images"], [["A dog , brown .", "A dog ."], ["A bird"]]),
        ("coco.json", json.dumps(COCO), ["--image-root", "images"], [["one", "three"], ["two"]]),
        ("list.json", '[{"image": "images/a.jpg", "text": "one"}]', [], [["one"]]),
        ("t.csv", "Image Path;Caption\nimages/a.jpg;one, two\n", [], [["one, two"]]),
        ("t.csv", "FILE_NAME\tText\nimages/a.jpg\tone, two\n", [], [["one, two"]]),
        ("t.txt", "image#caption\nimages/a.jpg#one, two\n", ["--delimiter", "#"], [["one, two"]]),
        ("metadata.csv", "file_name,text\nimages/a.jpg,one\n", [], [["one"]]),
        ("metadata.jsonl", '{"file_name": "images/a.jpg", "text": "one"}', [], [["one"]]),
    ],
)
def test_tables(data, tmp_path, name, content, flags, expected):
    (data / name).write_text(content)
    flags = [str(data / flag) if flag == "images" else flag for flag in flags]
    assert packed(data / name, tmp_path / "file", *flags) == expected
    if name in TABLES:  # found in the folder that it describes
        assert packed(data, tmp_path / "folder", *flags) == expected


def test_quotes_in_a_tsv_are_letters_unless_they_open_and_close_the_field(data, tmp_path):
    rows = ['a.jpg\t"Hello there', 'b.jpg\t"Welcome" sign', 'c.jpg\t"all, of it"', 'a2.jpg\tthe 5" disk']
    picture(data / "a2.jpg", 5)
    (data / "t.tsv").write_text(
        "image\tcaption\n" + "\n".join(f"images/{row}" if row[1] == "." else row for row in rows)
    )
    expected = [['"Hello there'], ['"Welcome" sign'], ["all, of it"], ['the 5" disk']]
    assert packed(data / "t.tsv", tmp_path / "out") == expected


def test_rows_of_a_csv_with_wrong_quotes_are_skipped_and_listed(data, tmp_path):
    rows = ['images/a.jpg,"Hello there', 'images/b.jpg,"Welcome" sign', 'images/c.jpg,"all, ""of"" it"']
    (data / "t.csv").write_text("image,caption\n" + "\n".join(rows))
    assert packed(data / "t.csv", tmp_path / "out") == [['all, "of" it']]
    assert ["unbalanced quote" in line["cause"] for line in skipped(tmp_path / "out")] == [True, True]


def test_rows_of_one_image_are_one_sample_wherever_they_are(tmp_path):
    """COCO's order: five captions of each image, far from each other."""
    lines = [f"{image}.jpg,caption {number} of {image}" for number in range(5) for image in range(3)]
    for image in range(3):
        picture(tmp_path / f"{image}.jpg", image)
    (tmp_path / "t.csv").write_text("\n".join(["image,caption", *lines]))
    expected = [[f"caption {number} of {image}" for number in range(5)] for image in range(3)]
    assert packed(tmp_path / "t.csv", tmp_path / "out") == expected
    assert load_manifest(tmp_path / "out").statistics["duplicates"]["image"] == 0


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "struct", "key"])
def test_rows_of_one_image_are_one_sample_in_any_table(tmp_path, kind):
    for image in range(2):
        picture(tmp_path / f"{image}.jpg", image)
    names = ["0.jpg", "1.jpg", "./0.jpg"]
    rows = [{"image": name, "caption": f"no. {row}", "id": f"k{row % 2}"} for row, name in enumerate(names)]
    if kind == "struct":  # as `datasets` writes images that are not embedded
        rows = [row | {"image": {"bytes": None, "path": row["image"]}} for row in rows]
    table = tmp_path / ("t.jsonl" if kind == "jsonl" else "t.parquet")
    if kind == "jsonl":
        table.write_text("\n".join(map(json.dumps, rows)))
    else:
        parquet.write_table(arrow.Table.from_pylist(rows), table)
    flags = ["--key-column", "id"] if kind == "key" else []
    assert packed(table, tmp_path / "out", *flags) == [["no. 0", "no. 2"], ["no. 1"]]


def test_embedded_images_that_are_equal_and_no_neighbours_are_counted(tmp_path, capsys):
    images = [tiny_image(number, kind="jpeg") for number in (0, 1, 0)]
    parquet.write_table(arrow.table({"image": images, "caption": ["a", "b", "c"]}), tmp_path / "t.parquet")
    assert packed(tmp_path / "t.parquet", tmp_path / "out") == [["a"], ["b"], ["c"]]
    assert "1 have the same image as another one, each with captions of its own" in capsys.readouterr().out


def test_a_row_that_cannot_be_used_between_those_of_an_image(tmp_path):
    for image in range(2):
        picture(tmp_path / f"{image}.jpg", image)
    (tmp_path / "t.csv").write_text("image,caption\n0.jpg,one\n0.jpg,a, b\n0.jpg,two\n1.jpg,three\n")
    assert packed(tmp_path / "t.csv", tmp_path / "out") == [["one", "two"], ["three"]]
    assert [record["row"] for record in skipped(tmp_path / "out")] == [1]


def test_a_pack_of_another_version_is_named_as_such(tmp_path, capsys):
    picture(tmp_path / "0.jpg", 0)
    (tmp_path / "t.csv").write_text("image,caption\n0.jpg,one\n")
    packed(tmp_path / "t.csv", tmp_path / "out")
    state = json.loads((tmp_path / "out/pack.json").read_text())
    del state["options"]["--captions"]
    (tmp_path / "out/pack.json").write_text(json.dumps(state))
    assert run_pack(tmp_path / "t.csv", tmp_path / "out") == 2
    assert "is no state of this version's pack" in capsys.readouterr().err


def test_a_table_in_the_folder_of_the_only_split(tmp_path):
    for number in range(2):
        picture(tmp_path / f"in/train/{number}.jpg", number)
    (tmp_path / "in/train/metadata.csv").write_text("file_name,text\n0.jpg,one\n1.jpg,two\n")
    assert packed(tmp_path / "in", tmp_path / "out") == [["one"], ["two"]]
    picture(tmp_path / "in/more/2.jpg", 2).with_suffix(".txt").write_text("three")
    assert packed(tmp_path / "in", tmp_path / "other") == [["three"]]  # not the split alone: every image is asked for
    assert len(skipped(tmp_path / "other")) == 2


def test_the_same_bytes_wherever_packing_was_interrupted(tmp_path):
    """Resuming in the middle of scattered rows."""
    lines = [f"./{image}.jpg,caption {number}" for number in range(3) for image in range(4)]
    for image in range(4):
        picture(tmp_path / f"{image}.jpg", image)
    (tmp_path / "t.csv").write_text("\n".join(["image,caption", *lines]))
    assert len(packed(tmp_path / "t.csv", tmp_path / "whole", "--shard-size", 1)) == 4
    assert len(packed(tmp_path / "t.csv", tmp_path / "again", "--shard-size", 1)) == 4
    state = json.loads((tmp_path / "again/pack.json").read_text())
    (tmp_path / "again/pack.json").write_text(
        json.dumps(state | {"rows": 2, "shards": 2, "samples": 2, "complete": False})
    )
    for name in ("shard-000002.tar", "shard-000003.tar", "manifest.json"):
        (tmp_path / "again" / name).unlink()
    assert run_pack(tmp_path / "t.csv", tmp_path / "again", "--shard-size", 1) == 0
    for path in (tmp_path / "whole").glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


@pytest.mark.parametrize(("rule", "expected"), [("whole", [["one two", "x"]]), ("lines", [["one", "two", "x"]])])
def test_texts_of_several_lines(tmp_path, capsys, rule, expected):
    picture(tmp_path / "in/a.jpg", 0)
    (tmp_path / "in/t.jsonl").write_text(json.dumps({"image": "a.jpg", "caption": "one\ntwo", "text": ["x"]}))
    flags = ["--captions", rule]
    assert packed(tmp_path / "in/t.jsonl", tmp_path / "table", "--caption-column", "caption,text", *flags) == expected
    assert "1 samples have a text of several lines" in capsys.readouterr().out
    (tmp_path / "in/t.jsonl").unlink()
    (tmp_path / "in/a.txt").write_text("one\ntwo\n")
    (tmp_path / "in/a.json").write_text('{"caption": "one two"}')
    assert packed(tmp_path / "in", tmp_path / "folder", *flags) == [expected[0][:-1]]
    assert "1 samples have a text of several lines" in capsys.readouterr().out
    assert load_manifest(tmp_path / "folder").statistics["several_lines"] == 0


def write_parquet(path: Path, rows: int, **columns: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {"image": [{"bytes": tiny_image(number), "path": None} for number in range(rows)]}
    parquet.write_table(arrow.table(table | {"caption": [path.stem] * rows} | columns), path)
    return path


@pytest.mark.parametrize(
    "names",
    [
        ("train.parquet", "test.parquet"),
        ("data/train-00000-of-00001-0123abcdef.parquet", "data/test-00000-of-00001-fedcba3210.parquet"),
        ("train_0.parquet", "test_0.parquet"),
        ("train/0000.parquet", "test/0000.parquet"),
    ],
)
def test_splits_of_parquet_files_are_never_mixed(tmp_path, capsys, names):
    for rows, name in enumerate(names, start=1):
        write_parquet(tmp_path / "in" / name, rows)
    assert run_pack(tmp_path / "in", tmp_path / "out") == 2
    assert "--split" in (error := capsys.readouterr().err) and "train" in error and "test" in error
    assert len(packed(tmp_path / "in", tmp_path / "out", "--split", "test")) == 2


def test_splits_in_a_column_or_in_folders_are_never_mixed(tmp_path, capsys):
    write_parquet(tmp_path / "column/all.parquet", 3, split=["train", "val", "train"])
    for name, number in (("train2017/a", 0), ("train2017/b", 1), ("val2017/c", 2)):
        picture(tmp_path / f"folders/{name}.jpg", number).with_suffix(".txt").write_text(name)
    for source, split in (("column", "train"), ("folders", "train2017")):
        assert run_pack(tmp_path / source, tmp_path / "out") == 2
        assert "--split" in capsys.readouterr().err
        assert len(packed(tmp_path / source, tmp_path / f"out_{source}", "--split", split)) == 2


def test_parquet_files_in_two_places_are_refused(tmp_path, capsys):
    write_parquet(tmp_path / "in/a.parquet", 1)
    write_parquet(tmp_path / "in/data/b.parquet", 1)
    assert run_pack(tmp_path / "in", tmp_path / "out") == 2
    assert str(tmp_path / "in/data") in capsys.readouterr().err


def test_files_of_img2dataset(tmp_path):
    """--output_format files: a folder per shard, its table of urls and its counts beside it."""
    for shard in range(2):
        for number in range(2):
            path = picture(tmp_path / f"in/{shard:05d}/{shard:05d}{number:04d}.jpg", number)
            path.with_suffix(".txt").write_text(f"caption {shard} {number}")
            path.with_suffix(".json").write_text(
                json.dumps({"caption": f"caption {shard} {number}", "url": "http://x"})
            )
        rows = {"url": ["http://x"] * 2, "caption": ["x"] * 2, "key": ["0", "1"], "status": ["success"] * 2}
        parquet.write_table(arrow.table(rows), tmp_path / f"in/{shard:05d}.parquet")
        (tmp_path / f"in/{shard:05d}_stats.json").write_text('{"count": 2}')
    found = packed(tmp_path / "in", tmp_path / "out")
    assert found == [[f"caption {shard} {number}"] for shard in range(2) for number in range(2)]
    assert not (tmp_path / "out/skipped.jsonl").read_text()


def test_parquet_of_img2dataset(tmp_path):
    """--output_format parquet: the images in a column jpg, empty where one could not be fetched."""
    rows = {"caption": ["one", "two"], "url": ["http://x/a.jpg"] * 2, "jpg": [tiny_image(1, kind="jpeg"), None]}
    (tmp_path / "in").mkdir()
    parquet.write_table(
        arrow.table(rows | {"status": ["success", "failed_to_download"]}), tmp_path / "in/00000.parquet"
    )
    assert packed(tmp_path / "in", tmp_path / "out") == [["one"]]
    assert [line["cause"] for line in skipped(tmp_path / "out")] == ["no image"]


def test_class_folders_need_no_captions(tmp_path, capsys):
    for number, name in enumerate(("cat/1", "cat/2", "polar bear/1")):
        picture(tmp_path / f"in/{name}.jpg", number)
    assert packed(tmp_path / "in", tmp_path / "out", "--class-column", "folder") == [[], [], []]
    assert [raw["cls"] for raw in samples(tmp_path / "out")] == [b"cat", b"cat", b"polar bear"]
    assert "3 have no caption" in capsys.readouterr().out
    (tmp_path / "t.csv").write_text("image,label\nin/cat/1.jpg,cat\nin/cat/2.jpg,0\n")
    assert packed(tmp_path / "t.csv", tmp_path / "table", "--class-column", "label") == [[], []]
    assert run_pack(tmp_path / "t.csv", tmp_path / "none") == 2, "without a class there must be captions"


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "AVIF"])
def test_other_formats_are_converted_where_a_format_is_asked_for(tmp_path, form):
    stored = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(stored, form)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / f"a.{form.lower()}").write_bytes(stored.getvalue())
    (tmp_path / "in/a.txt").write_text("red")
    assert run_pack(tmp_path / "in", tmp_path / "kept") == 2
    assert f"but a{'n' * (form == 'AVIF')} {form}" in skipped(tmp_path / "kept")[0]["cause"]
    assert packed(tmp_path / "in", tmp_path / "out", "--format", "png") == [["red"]]
    (raw,) = samples(tmp_path / "out")
    red = Image.open(io.BytesIO(raw["png"])).convert("RGB").getpixel((10, 10))
    assert red[0] > 240 and max(red[1:]) < 15


def test_urls_and_tars_get_the_command_that_is_meant(tmp_path, capsys):
    (tmp_path / "t.csv").write_text("url,caption\nhttps://host/a.jpg,one\n")
    assert run_pack(tmp_path / "t.csv", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert (
        f"img2dataset --url_list {tmp_path / 't.csv'} --input_format csv --url_col 'url' --caption_col 'caption'"
        in error
    )
    (tmp_path / "in").mkdir()
    (tmp_path / "in/0.tar").write_bytes(b"")
    for source in (tmp_path / "in", tmp_path / "in/0.tar"):
        assert run_pack(source, tmp_path / "out") == 2
        assert f"python -m data_pipeline index {source}" in capsys.readouterr().err
