"""pack over what folders and tables hold in life: links in circles, pipes, odd names, empty cells; nothing is lost."""

import functools
import json
import os
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from tqdm import tqdm

from data_pipeline.commands import pack
from data_pipeline.commands.tables.base import PROBED
from data_pipeline.storage.files import files_below
from tests.support.pack_inputs import run_pack, samples, skipped, write_pictures, write_table
from tests.support.pictures import tiny_image

PICTURE = tiny_image(1)
DEEP = "[" * 200_000
"""JSON that no parser of a bounded stack can read."""


def put(path: Path, caption: str | None = "text", data: bytes = PICTURE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


def packed(source: Path, *flags: object) -> tuple[dict[str, dict], dict[str, str]]:
    """Samples by key, and the causes of the others by key."""
    out = source.parent / "packed"
    assert run_pack(source, out, *flags) == 0
    return {raw["__key__"]: raw for raw in samples(out)}, {line["key"]: line["cause"] for line in skipped(out)}


def test_links_in_circles_end_and_others_are_followed(tmp_path):
    folder = tmp_path / "in"
    put(folder / "a/x.png")
    put(folder / "b/y.png")
    put(tmp_path / "elsewhere/z.png")
    (folder / "a/self").symlink_to(".")
    (folder / "a/top").symlink_to("..")
    (folder / "a/other").symlink_to("../b")
    (folder / "b/back").symlink_to("../a")
    (folder / "more").symlink_to("../elsewhere")
    found, causes = packed(folder)
    assert set(found) == {"a/x", "a/other/y", "b/y", "b/back/x", "more/z"}
    assert causes == {}


def test_files_that_are_none_cost_only_themselves(tmp_path):
    folder = tmp_path / "in"
    put(folder / "good.png")
    put(folder / "nowhere.txt", None, b"text")
    (folder / "nowhere.png").symlink_to("gone.png")
    put(folder / "itself.txt", None, b"text")
    (folder / "itself.png").symlink_to("itself.png")
    put(folder / "pipe.txt", None, b"text")
    os.mkfifo(folder / "pipe.png")
    put(folder / "told.png", None)
    os.mkfifo(folder / "told.txt")
    put(folder / "zero.png", data=b"")
    put(folder / "deep.png", None)
    (folder / "deep.json").write_text(DEEP)
    found, causes = packed(folder)
    assert set(found) == {"good"}
    expected = {
        "nowhere": "No such file",
        "itself": "symbolic links",
        "pipe": "a pipe or a device",
        "told": "told.txt is a pipe or a device",
        "zero": "0 bytes",
        "deep": "deep.json is not JSON",
    }
    assert causes.keys() == expected.keys()
    for key, part in expected.items():
        assert part in causes[key]


def test_names_with_spaces_and_seldom_suffixes_are_found(tmp_path):
    folder = tmp_path / "in"
    names = [" before.png", "behind .png", "a.jfif", "b.JPE", "c.mpo", "d.apng", "e.f.png"]
    for number, name in enumerate(names):
        put(folder / name, data=tiny_image(number))
    found, causes = packed(folder)
    assert set(found) == {"%20before", "behind%20", "a", "b", "c", "d", "e%2Ef"}
    assert causes == {}
    (folder / "t.csv").write_text("image,caption\n before.png,x\n e.f.png ,y\n")
    (tmp_path / "packed").rename(tmp_path / "of_the_folder")
    source = (folder / "t.csv").rename(tmp_path / "in/table.csv")
    assert run_pack(source, tmp_path / "out") == 0
    assert [raw["png"] for raw in samples(tmp_path / "out")] == [tiny_image(0), tiny_image(6)]


def test_of_images_with_one_name_the_readable_one_is_packed(tmp_path):
    folder = tmp_path / "in"
    put(folder / "star.avif", data=b"of another kind")
    put(folder / "star.png")
    found, causes = packed(folder)
    assert found["star"]["png"] == PICTURE
    assert causes == {"star": "star.png has the same name"}


def test_a_directory_that_cannot_be_read_is_named(tmp_path):
    put(tmp_path / "x.png", None)
    (tmp_path / "sub").mkdir()
    files = files_below(tmp_path)
    assert next(files).name == "x.png"
    (tmp_path / "sub").rmdir()
    with pytest.raises(ValueError, match="sub cannot be read: No such file"):
        next(files)


def test_keys_and_classes_of_empty_cells(tmp_path):
    rows = [("/", 1.0), (None, -2.0), ("a/", float("nan")), ("b", 2.5), ("", 3.0)]
    keys, classes = zip(*rows, strict=True)
    table = {"image": [tiny_image(i) for i in range(5)], "caption": ["x"] * 5, "id": keys, "label": classes}
    parquet.write_table(arrow.table(table), tmp_path / "t.parquet")
    found, causes = packed(tmp_path / "t.parquet", "--key-column", "id", "--class-column", "label")
    assert {key: raw["cls"] for key, raw in found.items()} == {
        "000000000": b"1",
        "000000001": b"-2",
        "000000004": b"3",
    }
    assert causes == {
        "a": "no class in column 'label'",
        "b": "the class 2.5 in column 'label' is not a whole number",
    }


def test_parquet_columns_with_dots_and_files_with_columns_of_their_own(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    pictures = [tiny_image(i) for i in range(4)]
    parquet.write_table(arrow.table({"image.bytes": pictures[:2], "a.text": ["x", "y"]}), folder / "0.parquet")
    parquet.write_table(arrow.table({"image.bytes": pictures[2:], "b": ["z", None]}), folder / "1.parquet")
    found, causes = packed(folder, "--image-column", "image.bytes", "--caption-column", "a.text,b")
    assert [(raw["png"], raw["txt"]) for raw in found.values()] == list(zip(pictures, [b"x", b"y", b"z"], strict=False))
    assert causes == {"000000003": "no caption in a.text, b"}
    assert run_pack(folder, tmp_path / "b", "--image-column", "image.bytes", "--caption-column", "b") == 0
    assert [line["row"] for line in skipped(tmp_path / "b")] == [0, 1, 3]


def test_lines_that_cannot_be_parsed_cost_only_themselves(tmp_path):
    put(tmp_path / "x.png", None)
    good = json.dumps({"image": "x.png", "caption": "x"})
    (tmp_path / "t.jsonl").write_text("\n".join([good, DEEP, "null", '{"image": "gone.png", "caption": 1}']))
    found, causes = packed(tmp_path / "t.jsonl")
    assert set(found) == {"000000000"}
    assert [cause.split(":")[0] for cause in causes.values()] == [
        "the line is not JSON",
        "the line is not a JSON object",
        "the image cannot be read",
    ]


@pytest.mark.parametrize("disable", [False, True])
def test_what_is_done_does_not_depend_on_the_progress_bar(disable, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pack, "tqdm", functools.partial(tqdm, disable=disable))  # as TQDM_DISABLE does
    (tmp_path / "t.csv").write_text("image,caption\na.png,x\nb.png,y\n")
    for _ in range(2):
        assert run_pack(tmp_path / "t.csv", tmp_path / "out") == 2
        assert "all 2 are listed" in capsys.readouterr().err
    assert len(skipped(tmp_path / "out")) == 2


def test_a_table_without_rows_says_so(tmp_path, capsys):
    (tmp_path / "t.csv").write_text("image,caption\n")
    assert run_pack(tmp_path / "t.csv", tmp_path / "out") == 2
    assert "t.csv has no rows" in capsys.readouterr().err


def test_out_inside_the_input_is_refused_behind_a_link_too(tmp_path, capsys):
    put(tmp_path / "in/x.png")
    (tmp_path / "link").symlink_to("in")
    for source, out in (("in", "link/out"), ("link", "in/out")):
        assert run_pack(tmp_path / source, tmp_path / out) == 2
        assert "is inside INPUT" in capsys.readouterr().err
    assert not (tmp_path / "in/out").exists()


@pytest.mark.parametrize("kind", ["parquet", "dataset"])
def test_a_table_damaged_in_the_middle_is_named(kind, tmp_path, capsys):
    source = write_table(kind, write_pictures(tmp_path / "in"))
    file = sorted(source.glob("*.arrow"))[1] if kind == "dataset" else source
    data = bytearray(file.read_bytes())
    if kind == "parquet":
        data[4:24] = bytes(20)  # the header of the first page
    file.write_bytes(data if kind == "parquet" else data[: len(data) * 2 // 3])
    assert run_pack(source, tmp_path / "out") == 2
    assert f"INPUT: {file} cannot be read" in capsys.readouterr().err


def test_a_column_that_only_later_records_have_is_found(tmp_path):
    rows = [{"image": f"{number}.png", "caption": "x"} for number in range(PROBED)]
    rows.append({"image": "x.png", "alt": "late", "label": 3})
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    put(tmp_path / "x.png", None)
    found, _ = packed(tmp_path / "t.jsonl", "--caption-column", "caption,alt", "--class-column", "label")
    assert [(raw["txt"], raw["cls"]) for raw in found.values()] == [(b"late", b"3")]


def test_a_tar_among_images_is_said_and_keeps_nothing_else_out(tmp_path, capsys):
    folder = tmp_path / "in"
    put(folder / "below/x.png")
    (folder / "backup.tar").write_bytes(b"anything")
    found, _ = packed(folder)
    assert set(found) == {"below/x"}
    assert (
        "backup.tar is not packed, only its images are read: python -m data_pipeline index" in capsys.readouterr().err
    )
    (folder / "below/x.png").unlink()
    assert run_pack(folder, tmp_path / "other") == 2 and "holds tars, which need no packing" in capsys.readouterr().err


def test_a_manifest_without_statistics_is_made_again(tmp_path):
    folder = tmp_path / "in"
    put(folder / "x.png")
    packed(folder)
    manifest = tmp_path / "packed" / "manifest.json"
    whole = manifest.read_text()
    manifest.write_text(json.dumps(json.loads(whole) | {"statistics": {}}))
    packed(folder)
    assert manifest.read_text() == whole
