"""The data of the page, against plain loops; that they are bounded, and that captions cannot become markup."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops

from data_pipeline.samples.text import split
from data_pipeline.storage.manifest import Manifest, load_manifest
from data_pipeline.storage.shards import ShardReader
from tests.support.pictures import picture
from tests.support.small import COLOURS, write_data
from train.config import RunConfig
from train.evaluation.encode import Features
from train.evaluation.retrieval import retrieval_metrics
from train.evaluation.task import Predictions
from train.report import exhibit
from train.report.confusion import confusion_table
from train.report.exhibit import Exhibit, Query, Shown, even, keywords
from train.report.explore import explore, nearest, plane
from train.report.page import write_report
from train.report.pictures import Pictures

RESULTS = {"steps": 30, "samples_seen": 3840, "seconds": 12.0, "bad_samples": 2, "skipped_steps": 0}
EVIL = '</script><img src=x onerror=alert(1)> & \u2028 "quoted" <b>'


def features_of(manifest: Manifest, seed: int = 0, width: int = 6, noise: float = 0.7) -> Features:
    """Unit vectors of the readable samples: of images by chance, of texts near those of their images."""
    keys, captions, owners, classes = [], [], [], []
    for shard in manifest.shards:
        reader = ShardReader(shard.url, shard)
        for index in range(len(reader)):
            raw = reader.raw(index)
            if raw["png"] == b"no picture":
                continue
            _, texts, label = split(raw)
            owners += [len(keys)] * len(texts)
            keys.append(f"{Path(shard.url).name}/{raw['__key__']}")
            captions += texts
            classes.append(label)
        reader.close()
    generator = torch.Generator().manual_seed(seed)
    image_ND = F.normalize(torch.randn(len(keys), width, generator=generator), dim=-1)
    text_MD = image_ND[owners] + noise * F.normalize(torch.randn(len(owners), width, generator=generator), dim=-1)
    bad = [{}] * (manifest.nsamples - len(keys))
    return Features(image_ND, F.normalize(text_MD, dim=-1), torch.tensor(owners), keys, captions, classes, bad)


@pytest.fixture
def manifest(tmp_path) -> Manifest:
    return load_manifest(write_data(tmp_path / "data", (7, 6)))


def shown(manifest: Manifest, training: Manifest | None = None) -> Exhibit:
    """As train.report.exhibit.collect makes it, without a model."""
    held_out = features_of(manifest)
    sets = [Shown(held_out, manifest, even(len(held_out.keys), exhibit.HELD_OUT_IMAGES))]
    if training is not None:
        known = features_of(training, seed=1)
        sets.append(Shown(known, training, list(range(len(known.keys))), training=True))
    rows = exhibit.caption_rows(held_out, sets[0].rows)
    queries = [Query("blue", "class"), Query("drawing", "keyword")]
    queries += [Query(held_out.captions[row], "caption") for row in rows]
    query_QD = torch.cat(
        [F.normalize(torch.ones(2, 6) * torch.tensor([[1.0], [-1.0]]), dim=-1), held_out.text_MD[rows]]
    )
    return Exhibit(sets, queries, query_QD, class_names=list(COLOURS))


def test_what_is_found_is_what_sorting_finds(tmp_path, manifest):
    training = load_manifest(write_data(tmp_path / "training", (5,)))
    given_to = shown(manifest, training)
    data = explore(given_to, RunConfig().data, tmp_path)
    held_out, known = (one.features for one in given_to.sets)
    assert (data["searched"], data["shown"], data["total"], len(data["items"])) == (13, 13, 13, 18)
    images = np.concatenate([held_out.image_ND.numpy(), known.image_ND.numpy()]).astype(np.float64)
    for query, query_D in zip(data["queries"], given_to.query_QD.numpy().astype(np.float64), strict=True):
        assert query["n"] == np.argsort(-(images[:13] @ query_D), kind="stable").tolist()
        assert query["a"] == np.argsort(-(images @ query_D), kind="stable").tolist()
    classes = [list(COLOURS)[int(label)] for label in held_out.classes + known.classes]
    assert [item["c"] for item in data["items"]] == classes
    blue, drawing, first = data["queries"][:3]
    assert sorted(blue["r"]) == [item for item, name in enumerate(classes) if name == "blue"]
    assert sorted(drawing["r"]) == [item for item in range(18) if (item if item < 13 else item - 13) % 3 >= 1]
    assert first["k"] == "caption" and set(first["r"]) == {0, 13}, "the training sample has the same caption"
    captions = [number for number, query in enumerate(data["queries"]) if query["k"] == "caption"]
    scores = held_out.image_ND.numpy().astype(np.float64) @ given_to.query_QD.numpy().astype(np.float64)[captions].T
    assert data["texts"] == [[captions[row] for row in np.argsort(-line, kind="stable")[:6]] for line in scores]


def test_galleries_rank_among_all_held_out_data(tmp_path, manifest, monkeypatch):
    monkeypatch.setattr(exhibit, "HELD_OUT_IMAGES", 4)
    given_to = shown(manifest)
    data = explore(given_to, RunConfig().data, tmp_path)
    held_out = given_to.sets[0].features
    assert data["searched"] == 4 < data["shown"] <= 13
    assert all(max(query["n"]) < 4 for query in data["queries"]), "the search is among those at even distances"
    wanted = retrieval_metrics(
        held_out.image_ND, held_out.text_MD[exhibit.caption_rows(held_out, range(13))], torch.arange(13)
    )
    assert len(data["text_gallery"]) == len(data["image_gallery"]) == 8 and wanted["n_images"] == 13
    for one in data["text_gallery"]:
        text = held_out.captions.index(one["t"])
        scores = (held_out.image_ND @ held_out.text_MD[text]).tolist()
        own = int(held_out.image_of_text_M[text])
        assert one["position"] == 1 + sum(score > scores[own] + 1e-6 for score in scores)
        best = sorted(range(13), key=lambda row: -scores[row])[:7]
        titles = [held_out.captions[held_out.image_of_text_M.tolist().index(row)] for row in best]
        assert [data["items"][item]["t"] for item in one["near"]] == titles
    for one in data["image_gallery"]:
        right = [text for text, is_right in one["near"] if is_right]
        assert (one["position"] == 1) == one["near"][0][1] and len(one["near"]) == 6 and len(right) <= 3


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), items=st.integers(1, 12))
def test_a_gallery_ranks_as_the_metrics_do(seed, items):
    generator = np.random.default_rng(seed)
    items_ID = torch.from_numpy(generator.integers(-1, 2, size=(items, 2)).astype(np.float32))  # with ties
    query_D = torch.from_numpy(generator.integers(-1, 2, size=2).astype(np.float32))
    own = int(generator.integers(items))
    right_I = torch.arange(items) == own
    order_I, position = nearest(query_D, items_ID, right_I)
    scores_I = items_ID @ query_D
    assert position == 1 + int((scores_I[~right_I] >= scores_I[own]).sum())
    assert order_I.tolist().index(own) == position - 1
    assert sorted(order_I.tolist()) == list(range(items))


def test_the_map_is_the_plane_of_the_principal_components(manifest):
    held_out = shown(manifest).sets[0]
    found = plane(held_out)
    rows = exhibit.caption_rows(held_out.features, held_out.rows)
    parts = [held_out.features.image_ND.double(), held_out.features.text_MD[rows].double()]
    centred = np.concatenate([(part - part.mean(0)).numpy() for part in parts])
    values, vectors = np.linalg.eigh(centred.T @ centred)
    wanted = centred @ vectors[:, ::-1][:, :2]
    got = np.array(found["images"] + found["texts"])
    assert got.min(0).tolist() == [-1, -1] and got.max(0).tolist() == [1, 1]
    for axis in (0, 1):
        assert abs(np.corrcoef(wanted[:, axis], got[:, axis])[0, 1]) > 0.9999
    assert found["share"] == pytest.approx(values[-2:].sum() / values.sum())


def test_keywords_are_in_several_captions_and_say_something():
    captions = ["man, tall, grey hat", "Man walking with a dog", "the dog, grey hat", "with the cat", "x of"] * 1
    assert keywords(captions) == ["dog", "grey", "grey hat", "hat", "man"]
    assert keywords(captions, leave_out=["Dog"]) == ["grey", "grey hat", "hat", "man"]


def test_images_are_those_of_the_row_also_after_bad_samples(tmp_path):
    manifest = load_manifest(write_data(tmp_path / "data", (5, 4), bad=(0, 1, 4, 6)))
    pictures = Pictures(features_of(manifest), manifest, RunConfig().data)
    for row, number in enumerate((2, 3, 5, 7, 8)):
        (tmp_path / "one.png").write_bytes(picture(number))
        with Image.open(tmp_path / "one.png") as original:
            square = pictures.square(row, 40)
            assert ImageChops.difference(square.crop((0, 2, 40, 38)), original.convert("RGB")).getbbox() is None


def test_nothing_is_read_of_the_samples_that_are_left_out(tmp_path):
    manifest = load_manifest(write_data(tmp_path / "data", (30, 30), bad=range(10, 50)))
    pictures = Pictures(features_of(manifest), manifest, RunConfig().data)
    named, read = [], []
    name, raw = pictures.readers.name, pictures.readers.raw
    pictures.readers.name = lambda *place: named.append(place) or name(*place)
    pictures.readers.raw = lambda *place: read.append(place) or raw(*place)
    for row in [*range(10, 20), 3, 12]:
        pictures.square(row, 8)
    assert [shard * 30 + index for _, shard, index in read] == [*range(50, 60), 3, 52]
    assert len(named) == 41 + 9 + 1 + 1, "the way to the first one is gone once"


def test_the_sheet_holds_each_image_in_its_cell(tmp_path, manifest):
    given_to = shown(manifest)
    (sheet,) = explore(given_to, RunConfig().data, tmp_path)["sheets"]
    pictures = Pictures(given_to.sets[0].features, manifest, RunConfig().data)
    with Image.open(tmp_path / sheet["file"]) as image:
        assert image.size == (96 * sheet["columns"], 96 * sheet["rows"])
        for row in (0, 12):
            left, top = 96 * (row % sheet["columns"]), 96 * (row // sheet["columns"])
            difference = ImageChops.difference(image.crop((left, top, left + 96, top + 96)), pictures.square(row, 96))
            assert np.asarray(difference).mean() < 8  # WebP


def test_captions_cannot_become_markup(tmp_path, manifest):
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "data" / "ATTRIBUTION.md").write_text(f"drawn by {EVIL}")
    given_to = shown(manifest)
    given_to.sets[0].features.captions[0] = EVIL
    given_to.queries[2] = Query(EVIL, "caption")
    given_to.predictions = {EVIL: Predictions([EVIL, "b"], ["x", "y"], [0, 1], [0, 0])}
    scores = {"top1": 50.0, "n_images": 2.0, "chance_top1": 50.0, "mean_per_class": 50.0}
    results = RESULTS | {"tasks": {EVIL: {"task": "zeroshot", "metrics": scores}}}
    text = write_report(tmp_path, RunConfig(name=EVIL), results, given_to).read_text()
    assert "<img src=x" not in text and "</script><" not in text.replace("</script></body>", "").replace(
        "</script><script", ""
    )
    content = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1]
    assert "drawn by &lt;/script&gt;&lt;img" in text
    assert json.loads(content)["queries"][2]["t"] == EVIL and json.loads(content)["items"][0]["t"] == EVIL
    source = (Path(exhibit.__file__).parent / "page.js").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function", source)


def test_the_work_is_bounded(tmp_path, manifest, monkeypatch):
    monkeypatch.setattr(exhibit, "HELD_OUT_IMAGES", 5)
    monkeypatch.setattr(exhibit, "MOST", {"class": 2, "keyword": 2, "caption": 3})
    features = features_of(manifest)
    assert even(100_000, 5) == [10_000, 30_000, 50_000, 70_000, 90_000]
    features.captions[:] = [f"{row} " + "pale, " * 200_000 for row in range(len(features.captions))]
    rows = exhibit.caption_rows(features, even(13, 5))
    assert len(rows) == 3
    sets = [Shown(features, manifest, even(13, 5))]
    assert keywords(exhibit.captions_of(sets)) == ["pale"]
    queries = [Query(exhibit.cut(features.captions[row]), "caption") for row in rows]
    assert all(len(query.text) == exhibit.LETTERS for query in queries)
    data = explore(Exhibit(sets, queries, features.text_MD[rows]), RunConfig().data, tmp_path)
    assert len(json.dumps(data)) < 20_000


def test_training_images_are_shown_where_they_are_few_and_here(manifest, monkeypatch):
    assert exhibit.training_is_shown([manifest]) and not exhibit.training_is_shown([])
    monkeypatch.setattr(exhibit, "TRAINING_IMAGES", 25)
    assert not exhibit.training_is_shown([manifest, manifest])


def test_held_out_data_that_is_gone_leaves_out_the_pictures_and_says_so(tmp_path, manifest):
    (tmp_path / "metrics.jsonl").touch()
    given_to = shown(manifest)
    write_report(tmp_path, RunConfig(), RESULTS, given_to)
    Path(manifest.shards[0].url).unlink()
    text = write_report(tmp_path, RunConfig(), RESULTS, given_to).read_text()
    assert not list((tmp_path / "report").glob("*.webp"))  # none of the report before
    assert re.search(r"No pictures: shard .*part-000000.tar", text) and "<script" not in text


def test_confusions_are_counted_by_row():
    table = confusion_table(Predictions(["a", "b <c>", "d"], list("wxyz"), [0, 0, 0, 1], [0, 1, 1, 1]))
    rows = re.findall(r"<tr><th.*?</tr>", table)
    cells = [re.findall(r'<td class="(\w+)" style="--share:([\d.]+)"[^>]*>(\d*)</td>', row) for row in rows]
    assert cells == [
        [("right", "0.333", "33"), ("wrong", "0.667", "67")],
        [("wrong", "0.000", ""), ("right", "1.000", "100")],
    ]
    assert "b &lt;c&gt; <small>1</small>" in table and 'title="a, taken for b &lt;c&gt;: 2 of 3"' in table


def test_of_many_classes_those_with_the_most_images_are_shown():
    names = [f"class {row}" for row in range(1000)]
    right = [row for row in range(1000) for _ in range(1 + (row % 100 == 0))]
    table = confusion_table(Predictions(names, [str(row) for row in right], right, right))
    assert table.count("<tr>") == 31 and "The 30 of the 1,000 classes" in table
    assert all(f"class {row}<" in table or f"class {row} <" in table for row in range(0, 1000, 100))
