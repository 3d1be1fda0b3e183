"""pack of a folder or a file: which table and which split in it is meant, or what to give instead."""

import json
from pathlib import Path

import pytest

from tests.data_pipeline.commands.test_pack_layouts import packed, picture, write_parquet
from tests.support.pack_inputs import run_pack, skipped


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with 0.jpg, 1.jpg and 2.jpg."""
    for number in range(3):
        picture(tmp_path / f"in/{number}.jpg", number)
    return tmp_path / "in"


@pytest.mark.parametrize("names", [("my_train", "my_test"), ("trainset", "testset"), ("coco.train-0", "coco.test-0")])
def test_a_split_is_seen_wherever_it_is_in_the_name_of_a_file(tmp_path, capsys, names):
    for rows, name in enumerate(names, start=1):
        write_parquet(tmp_path / f"in/{name}.parquet", rows)
    assert run_pack(tmp_path / "in", tmp_path / "out") == 2
    assert "holds the splits test, train; choose one with --split" in capsys.readouterr().err
    assert len(packed(tmp_path / "in", tmp_path / "out", "--split", "test")) == 2


def test_files_beside_those_of_splits_are_each_their_own(tmp_path, capsys):
    for rows, name in enumerate(("train", "extra", "latest"), start=1):
        write_parquet(tmp_path / f"in/{name}.parquet", rows)
    assert run_pack(tmp_path / "in", tmp_path / "out") == 2
    assert "holds the splits train, extra, latest;" in capsys.readouterr().err
    assert len(packed(tmp_path / "in", tmp_path / "out", "--split", "latest")) == 3


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_tables_of_splits_in_a_folder_of_images(folder, tmp_path, capsys, kind):
    for split, numbers in (("train", (0, 1)), ("test", (2,))):
        rows = [{"image": f"{number}.jpg", "caption": f"no. {number}"} for number in numbers]
        delimiter = "\t" if kind == "tsv" else ","
        lines = [delimiter.join(rows[0]), *(delimiter.join(row.values()) for row in rows)]
        (folder / f"{split}.{kind}").write_text("\n".join(map(json.dumps, rows) if kind == "jsonl" else lines))
    assert run_pack(folder, tmp_path / "out") == 2
    assert "holds the splits test, train; choose one with --split" in capsys.readouterr().err
    assert packed(folder, tmp_path / "out", "--split", "train") == [["no. 0"], ["no. 1"]]
    (folder / "0.txt").write_text("beside it")  # then the texts beside the images are what is meant
    assert packed(folder, tmp_path / "other") == [["beside it"]]
    assert f"{folder}/test.{kind} is not read; nor are 1 more, such as {folder}/train.{kind}" in capsys.readouterr().err


def test_a_table_that_is_not_read_is_said(folder, tmp_path, capsys):
    (folder / "0.txt").write_text("zero")
    (folder / "labels.csv").write_text("image,caption\n1.jpg,one\n")
    assert packed(folder, tmp_path / "out") == [["zero"]]
    assert f"{folder}/labels.csv is not read; give what you mean as INPUT" in capsys.readouterr().err
    assert packed(folder / "labels.csv", tmp_path / "table") == [["one"]]


@pytest.mark.parametrize("where", ["data/0.parquet", "0.parquet"])
def test_what_is_not_read_beside_parquet_files_is_said(folder, tmp_path, capsys, where):
    write_parquet(folder / where, 1)
    (folder / "metadata.csv").write_text("file_name,text\n1.jpg,one\n")
    write_parquet(folder / "more/1.parquet", 1)
    assert packed(folder, tmp_path / "out") == [["0"]]
    error = capsys.readouterr().err
    assert f"{folder}/metadata.csv is not read; nor are 1 more, such as {folder}/more/1.parquet" in error


@pytest.mark.parametrize("where", ["en/train-00000-of-00001.parquet", "data/en/0.parquet"])
def test_parquet_files_in_folders_below_are_named(tmp_path, capsys, where):
    """As the configurations of a data set of the Hugging Face hub."""
    file = write_parquet(tmp_path / "in" / where, 1)
    assert run_pack(tmp_path / "in", tmp_path / "out") == 2
    assert f"give one of those, such as {file.parent}" in capsys.readouterr().err
    assert len(packed(file.parent, tmp_path / "out")) == 1


def test_a_folder_without_images_names_its_tables(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    picture(tmp_path / "0.jpg", 0)
    (tmp_path / "in/all.csv").write_text(f"image,caption\n{tmp_path}/0.jpg,one\n")
    assert run_pack(tmp_path / "in", tmp_path / "out") == 2
    assert f"no image in {tmp_path}/in; give a table as INPUT, such as {tmp_path}/in/all.csv" in capsys.readouterr().err
    assert packed(tmp_path / "in/all.csv", tmp_path / "out") == [["one"]]


KARPATHY = {
    "dataset": "coco",
    "images": [
        {"filepath": "in", "filename": "0.jpg", "split": "train", "sentences": [{"raw": "one"}, {"raw": "two"}]},
        {"filename": "in/1.jpg", "split": "val", "sentences": [{"raw": "three", "tokens": ["three"]}]},
        {"filename": "no sentences"},
    ],
}


def test_karpathys_splits_of_coco_and_flickr(folder, tmp_path, capsys):
    (tmp_path / "dataset.json").write_text(json.dumps(KARPATHY))
    assert run_pack(tmp_path / "dataset.json", tmp_path / "out") == 2
    assert "holds the splits train, val; choose one with --split" in capsys.readouterr().err
    assert packed(tmp_path / "dataset.json", tmp_path / "train", "--split", "train") == [["one", "two"]]
    assert packed(tmp_path / "dataset.json", tmp_path / "val", "--split", "val") == [["three"]]


@pytest.mark.parametrize("name", ["Flickr8k.token.txt", "results_20130124.token"])
def test_captions_numbered_after_the_name_of_their_image(folder, tmp_path, name):
    (tmp_path / name).write_text('0.jpg#0\tA "dog" .\n1.jpg#0\tA bird\n0.jpg#1\t"Two dogs .\nno tab\n')
    assert packed(tmp_path / name, tmp_path / "out", "--image-root", folder) == [
        ['A "dog" .', '"Two dogs .'],
        ["A bird"],
    ]
    assert ["the line is not the name" in line["cause"] for line in skipped(tmp_path / "out")] == [True]


def test_columns_that_are_asked_for_are_found_in_any_case(folder, tmp_path):
    (folder / "t.csv").write_text("Img Name,My Text,Class\n0.jpg,zero,7\n")
    flags = ["--image-column", "img_name", "--caption-column", "my text", "--class-column", "class"]
    assert packed(folder / "t.csv", tmp_path / "out", *flags) == [["zero"]]


def test_paths_written_as_addresses_of_files(folder, tmp_path):
    picture(folder / "a b.jpg", 3)
    (folder / "t.csv").write_text(f"image,caption\nfile://{folder}/0.jpg,zero\nfile://{folder}/a%20b.jpg,blank\n")
    assert packed(folder / "t.csv", tmp_path / "out") == [["zero"], ["blank"]]
