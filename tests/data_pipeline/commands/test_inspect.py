"""inspect: the table says what the manifest holds, the sheet shows samples, or exactly what the model will see."""

import io
import json
import random

import numpy as np
import pytest
from PIL import Image

from data_pipeline.__main__ import main
from data_pipeline.commands import inspect as inspecting
from data_pipeline.commands.index import index
from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.samples.text import pick_caption, split
from data_pipeline.samples.transforms import train_transform
from data_pipeline.storage.manifest import load_manifest
from data_pipeline.storage.shards import ShardReader, ShardWriter
from tests.support.pictures import tiny_image
from tests.support.tars import write_shards


@pytest.fixture
def data(tmp_path):
    """Two shards of plain colours: 8 + 4 samples, the red channel is 10 x the sample's number, one sample bad."""
    with ShardWriter(tmp_path / "data", "s", max_samples=8) as writer:
        for number in range(12):
            image = Image.new("RGB", (40 + number, 30), (10 * number, 100, 200))
            image.save(tmp_path / "image.png")
            content = (tmp_path / "image.png").read_bytes() if number != 7 else b"no picture"
            writer.write(f"{number:03d}", {"png": content, "txt": f"colour {number}".encode(), "cls": b"3"})
    assert main(["index", str(tmp_path / "data"), "--workers", "1"]) == 0
    return tmp_path / "data"


def centre(sheet: Image.Image, column: int, row: int) -> tuple[int, ...]:
    """The colour in the middle of a cell."""
    width, height = (
        inspecting.CELL + inspecting.MARGIN,
        inspecting.CELL + 3 * inspecting.LINE_HEIGHT + inspecting.MARGIN,
    )
    x, y = inspecting.MARGIN + column * width, inspecting.MARGIN + 2 * inspecting.LINE_HEIGHT + row * height
    return sheet.getpixel((x + inspecting.CELL // 2, y + inspecting.CELL // 2))


def test_the_table_says_what_the_manifest_holds(data, capsys):
    capsys.readouterr()
    assert main(["inspect", str(data)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "samples    12" in lines
    assert any(line.startswith("shards     2: 4 to 8 samples") for line in lines)
    assert "bad        1" in lines
    assert any("1: not a JPEG" in line for line in lines)
    assert "classes    1, of 11 samples" in lines
    width = next(line for line in lines if line.startswith("image width")).split()
    assert width[3:] == ["40", "40", "45", "51", "51", f"{np.mean([40 + n for n in range(12) if n != 7]):.1f}"]
    words = next(line for line in lines if line.startswith("caption words")).split()
    assert words[2:] == ["2", "2", "2", "2", "2", "2.0"]


def test_a_manifest_without_statistics_still_counts(tiny_shards, capsys):
    assert main(["inspect", str(tiny_shards())]) == 0
    out = capsys.readouterr().out
    assert "samples    12" in out
    assert "no statistics" in out


def test_the_sheet_shows_samples_evenly_spaced(data, tmp_path):
    out = tmp_path / "new/sheet.png"
    assert main(["inspect", str(data), "--out", str(out), "--count", "12"]) == 0
    sheet = Image.open(out)
    for number in range(12):
        colour = centre(sheet, number % 6, number // 6)
        assert colour == ((10 * number, 100, 200) if number != 7 else (255, 255, 255))
    assert main(["inspect", str(data), "--out", str(out), "--count", "3"]) == 0
    assert [centre(Image.open(out), i, 0)[0] for i in range(3)] == [20, 60, 100]
    assert main(["inspect", str(data), "--out", str(out), "--count", "100"]) == 0
    assert centre(Image.open(out), 5, 1)[0] == 110


def test_the_augmented_cells_are_what_the_transform_gives(tiny_shards):
    directory = tiny_shards((6,))
    config = DataConfig(image_size=16, augment=AugmentConfig(policy="strong"))
    config.caption.templates = ["a drawing of {}"]
    reader = ShardReader(load_manifest(directory).shards[0].url)
    cells = inspecting._augmented_cells(config, seed=5)
    transform = train_transform(config)
    for number in range(6):
        raw = reader.raw(number)
        row = cells(number, raw)
        assert len(row) == inspecting.VIEWS + 1
        for view, (image, text) in enumerate(row[1:]):
            rng = random.Random(f"5/{number}/{view}")
            data, captions, _ = split(raw)
            expected_3HW = transform(data, rng).numpy()
            assert np.array_equal(np.asarray(image), expected_3HW.transpose(1, 2, 0))
            assert text == pick_caption(captions, config.caption, rng)


def test_augmented_uses_the_run_configuration(data, tmp_path, capsys):
    config, out = tmp_path / "run.yaml", tmp_path / "sheet.png"
    config.write_text(
        "name: some_run\noptim: {lr: 1.0e-4}\n"
        "data: {image_size: 8, augment: {policy: none, grayscale: 1.0}, background: [0, 0, 0]}\n"
    )
    arguments = ["inspect", str(data), "--augmented", "--config", str(config), "--out", str(out), "--count", "3"]
    assert main(arguments) == 0
    sheet = Image.open(out)
    for row in range(3):
        red, green, blue = centre(sheet, 1, row)
        assert red == green == blue
        assert centre(sheet, 0, row)[1:] == (100, 200)
    first = sheet.tobytes()
    assert main(arguments) == 0
    assert Image.open(out).tobytes() == first


@pytest.mark.parametrize(
    ("yaml", "named"),
    [
        ("data: {imagesize: 8}", "imagesize"),
        ("data: {image_size: large}", "image_size"),
        ("data: {augment: {policy: wild}}", "policy"),
        ("data: {caption: {templates: [no braces]}}", "data.caption.templates"),
        ("data: [", "run.yaml"),
    ],
)
def test_configurations_that_cannot_be_used(yaml, named, data, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(yaml)
    arguments = ["--augmented", "--out", str(tmp_path / "sheet.png"), "--config", str(tmp_path / "run.yaml")]
    assert main(["inspect", str(data), *arguments]) == 2
    assert named in capsys.readouterr().err


def test_augmented_needs_a_file_to_draw_on(data, capsys):
    assert main(["inspect", str(data), "--augmented"]) == 2
    assert "--augmented needs --out" in capsys.readouterr().err


def test_a_shard_that_is_not_the_manifests_is_refused(tiny_shards, tmp_path, capsys):
    directory = tiny_shards((5,))
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["shardlist"][0]["nsamples"] = 6
    (directory / "manifest.json").write_text(json.dumps(manifest))
    assert main(["inspect", str(directory), "--out", str(tmp_path / "sheet.png")]) == 2
    assert "train-000000.tar has 5 samples, its manifest says 6" in capsys.readouterr().err


def test_long_captions_and_any_script_fit_under_a_picture():
    image = Image.open(io.BytesIO(tiny_image(1)))
    sheet = inspecting.paint([(image, "слово 词 " * 200), (None, "unusable")], 2, "title")
    below = sheet.crop((0, sheet.height - inspecting.MARGIN // 2, sheet.width, sheet.height))
    assert below.getextrema() == ((255, 255),) * 3


def test_classes_without_captions_are_drawn_and_captions_read_as_the_manifest_says(tmp_path, capsys):
    def sample(number):
        text = {"txt": b"one\ntwo"} if number else {}
        return f"{number}", {"png": tiny_image(number), "cls": b"heart", **text}

    paths = sorted(str(path) for path in write_shards(tmp_path, (2,), sample).glob("*.tar"))
    manifest = index(paths, tmp_path / "manifest.json", 1, caption_rule="lines")
    assert inspecting.describe(manifest).count("1 samples have") == 2
    cells = inspecting._plain_cells(DataConfig())
    shown = [cells(number, raw)[0] for number, raw in enumerate(inspecting._spaced(manifest, DataConfig(), 2))]
    assert [text for _, text in shown] == ["[heart] ", "[heart] one (+1)"] and all(image for image, _ in shown)
    assert inspecting.draw(manifest, DataConfig(image_size=32), count=2, augmented=True, seed=0)
