"""`python -m train.curate`: scores, copies, and the manifest of what is kept."""

import io
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from data_pipeline.__main__ import main as pipeline
from data_pipeline.embeddings.index import Index, open_index
from data_pipeline.storage.manifest import load_manifest
from tests.support.small import write_data
from tests.support.tars import contents
from train import curate, embed
from train.use.curate import clip_scores

COPIES = {3: 0, 7: 5, 11: 5}
"""Sample -> the earlier one that it is a copy of."""


def drawn(number: int) -> bytes:
    """A drawing, or another sample's drawing in another size and format."""
    image, buffer = drawing(COPIES.get(number, number)), io.BytesIO()
    if number in COPIES:
        image.resize((61, 61), Image.Resampling.BICUBIC).save(buffer, "webp", quality=80)
    else:
        image.save(buffer, "png")
    return buffer.getvalue()


def drawing(number: int) -> Image.Image:
    rng = random.Random(number)
    image = Image.new("RGB", (96, 96), tuple(rng.randbytes(3)))
    for _ in range(3):
        x, y = rng.randrange(60), rng.randrange(60)
        ImageDraw.Draw(image).ellipse((x, y, x + 30, y + 24), fill=tuple(rng.randbytes(3)))
    return image


def embedded(run: Path, data: Path, out: Path) -> Index:
    assert embed.main(["--model", str(run), "--workers", "0", str(data), str(out)]) == 0
    return open_index(out)


@pytest.fixture(scope="module")
def copied(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Index]:
    """12 samples in two shards, some of which are copies, and their index."""
    directory = tmp_path_factory.mktemp("copied")
    data = write_data(directory / "train", (7, 5), draw=drawn)
    return data, embedded(run, data, directory / "index")


def test_a_score_is_the_cosine_of_an_image_and_its_best_caption(index: Index):
    scores, texts = clip_scores(index), index.rows("texts").to_pylist()
    for row, sample in enumerate(index.sample_N):
        own = [number for number, text in enumerate(texts) if text["sample"] == sample]
        assert scores[sample] == pytest.approx(max(index.vectors("texts")[own] @ index.image_ND[row]), abs=1e-6)
    assert np.flatnonzero(np.isnan(scores)).tolist() == [3, 20], "those that cannot be read"


def test_copies_are_dropped_and_the_best_are_kept_in_a_manifest_of_the_same_tars(copied, tmp_path: Path, capsys):
    data, index = copied
    out, dropped = tmp_path / "some.json", tmp_path / "dropped.jsonl"
    command = ["--index", str(index.directory), "--drop-duplicates", "--keep-best", "0.5", "--dropped", str(dropped)]
    before = {path: path.read_bytes() for path in data.glob("*.tar")}
    assert curate.main([*command, "--out", str(out), "--scores", str(tmp_path / "scores.npy")]) == 0
    records = [json.loads(line) for line in dropped.read_text().splitlines()]
    found = {one["sample"]: int(one["of"].split("/")[1]) for one in records if one["rule"] == "duplicate"}
    assert found.keys() == COPIES.keys() and found[3] == 0 and found[7] == 5 and found[11] in (5, 7)

    scores = np.load(tmp_path / "scores.npy")
    left = [sample for sample in range(12) if sample not in COPIES]
    best = sorted(sorted(left, key=lambda sample: -scores[sample])[:4])
    manifest = load_manifest(out)
    keys = [int(key) for shard in manifest.shards for key, _ in contents(shard.url, shard)]
    assert keys == best and {path: path.read_bytes() for path in data.glob("*.tar")} == before
    assert manifest.statistics["samples"] == 4, "its own, not those of the whole data"
    said = capsys.readouterr().out
    assert "dropped 3 copies of earlier images" in said and "kept 4 of 12 samples" in said
    assert pipeline(["inspect", str(out)]) == 0
    assert "dropped 3 copies of earlier images; 5 not among the best 0.5" in capsys.readouterr().out


def test_copies_of_held_out_images_are_found_by_inspect_and_dropped(copied, run: Path, tmp_path: Path, capsys):
    data, index = copied
    held_out = write_data(tmp_path / "val", (4,), draw=lambda number: drawn((3, 7, 100, 101)[number]))
    other = embedded(run, held_out, tmp_path / "val-index")
    assert pipeline(["inspect", str(data), "--held-out", str(held_out)]) == 0
    assert "leaks      2 of the 4 held-out images, byte for byte" in capsys.readouterr().out
    indexes = ["--index", str(index.directory), str(other.directory)]
    assert pipeline(["inspect", str(data), "--held-out", str(held_out), *indexes]) == 0
    said = capsys.readouterr().out
    assert "leaks      2 of the 4 held-out images, the same picture in any size or format" in said
    assert "part-000000.tar/0000 is part-000000.tar/0003" in said

    out = tmp_path / "clean.json"
    options = ["--held-out", str(other.directory), "--out", str(out)]
    assert curate.main(["--index", str(index.directory), *options]) == 0
    keys = {int(key) for shard in load_manifest(out).shards for key, _ in contents(shard.url, shard)}
    assert keys == set(range(12)) - {0, 3, 5, 7, 11}, "all copies of the two, not only the nearest ones"
    again = embedded(run, out, tmp_path / "clean-index")
    capsys.readouterr()
    indexes = ["--index", str(again.directory), str(other.directory)]
    assert pipeline(["inspect", str(out), "--held-out", str(held_out), *indexes]) == 0
    assert "leaks      0 of the 4" in capsys.readouterr().out


def test_what_cannot_be_curated_is_refused(copied, run: Path, tmp_path: Path, capsys):
    data, index = copied
    (tmp_path / "list.txt").write_text("one")
    assert embed.main(["--model", str(run), str(tmp_path / "list.txt"), str(tmp_path / "texts")]) == 0
    assert embed.main(["--model", str(run), "--step", "1", "--workers", "0", str(data), str(tmp_path / "step1")]) == 0
    for arguments, message in (
        (["--index", tmp_path / "texts", "--keep-best", "0.5"], "--index .* has no images"),
        (["--index", tmp_path / "texts", "--drop-duplicates"], "--index .* has no images"),
        (["--index", index.directory, "--keep-best", "1.5"], "--keep-best 1.5: give a share"),
        (["--index", index.directory, "--cosine", "3"], "--cosine 3.0: give a cosine"),
        (["--index", index.directory, "--held-out", tmp_path / "gone"], "--held-out: index .* there is no index.json"),
        (["--index", index.directory, "--dropped", tmp_path], "--dropped .* is a directory"),
        (["--index", index.directory, "--held-out", tmp_path / "step1"], "embed both with the same one"),
        (["--index", tmp_path / "nowhere"], "there is no index.json in it"),
        (
            ["--index", index.directory, "--keep-best", "0.01", "--out", tmp_path / "x.json"],
            "not one of the 12",
        ),
    ):
        capsys.readouterr()
        assert curate.main([str(argument) for argument in arguments]) == 2, arguments
        assert re.search(message, capsys.readouterr().err), arguments
    assert not (tmp_path / "x.json").exists()
