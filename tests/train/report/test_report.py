import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image, ImageChops

from data_pipeline.samples.text import split
from data_pipeline.storage.manifest import Manifest, load_manifest
from data_pipeline.storage.shards import ShardReader
from tests.support.pictures import picture
from tests.support.small import write_data
from train.config import RunConfig
from train.evaluation.encode import Features
from train.evaluation.retrieval import retrieval_metrics
from train.evaluation.task import Evaluation
from train.report.gallery import RIGHT, RIGHT_PALE, Pictures, draw_galleries, nearest
from train.report.page import write_report
from train.report.plots import PlainNumbers, series, smooth, tasks_plot
from train.run.records import read_history

RESULTS = {"steps": 30, "samples_seen": 3840, "seconds": 12.0, "bad_samples": 2, "skipped_steps": 0}
PLOTS = {"loss.png", "training.png", "towers.png", "recall.png"}
GALLERIES = {"gallery_text_to_image.png", "gallery_image_to_text.png"}


def evaluation(manifest: Manifest, bad: int = 0, right: bool = True) -> Evaluation:
    """Features for which every right answer is first, or last."""
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
    image_ND = torch.eye(len(keys))
    text_MD = image_ND[owners] if right else F.normalize(1 - image_ND[owners], dim=-1)
    features = Features(image_ND, text_MD, torch.tensor(owners), keys, captions, classes, [{}] * bad)
    metrics = retrieval_metrics(image_ND, text_MD, features.image_of_text_M)
    return Evaluation(metrics | {"n_bad": float(bad)}, features)


def write_history(run_dir: Path, evaluations: int) -> None:
    with open(run_dir / "metrics.jsonl", "w") as file:
        for step in range(1, 31):
            grad_norm = None if step == 7 else 1.0 / step  # a step that was skipped
            record = {"step": step, "loss": 5 * math.exp(-step / 9), "grad_norm": grad_norm, "temperature": 0.07}
            record |= {"lr/image": 1e-3, "lr/text": 1e-5, "samples_per_second": 300.0, "data_wait": 0.1}
            if step % 10 == 0:
                record |= {"alignment": 2 / step, "modality_gap": 1 / step}
                names = ("grad_norm", "update_ratio", "uniformity", "effective_rank")
                record |= {f"{name}/{tower}": step / 10 for name in names for tower in ("image", "text")}
            file.write(json.dumps(record) + "\n")
        for number in range(evaluations):
            recalls = {f"val/{side}_R@{k}": float(k + number) for side in ("t2i", "i2t") for k in (1, 5, 10)}
            file.write(json.dumps({"step": 10 * (number + 1), **recalls}) + "\n")


@pytest.fixture
def manifest(tmp_path) -> Manifest:
    return load_manifest(write_data(tmp_path / "data", (7, 6)))


class Page(HTMLParser):
    """Images, addresses and text of a page; every tag must be closed."""

    def __init__(self, text: str):
        super().__init__()
        self.images, self.links, self.text, self.open = [], [], "", []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.links += [values[name] for name in ("src", "href") if name in values]
        if tag == "img":
            self.images.append(values["src"])
        elif tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_every_task_is_shown_over_time(tmp_path):
    write_history(tmp_path, evaluations=0)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        for step in (10, 20, 30):
            file.write(json.dumps({"step": step, "groups/top1": 2.0 * step, "near/top1": 40.0}) + "\n")
    tasks = {
        "groups": {"task": "zeroshot", "metrics": {"top1": 60.0}},
        "near": {"task": "knn", "metrics": {"top1": 40}},
    }
    best = {"metric": "groups/top1", "step": 30, "value": 60.0}
    page = Page(write_report(tmp_path, RunConfig(), RESULTS | {"tasks": tasks, "best": best}).read_text())
    assert "tasks.png" in page.images and "groups" in page.text and "groups/top1 60, step 30" in page.text
    assert "nothing was evaluated" not in page.text
    drawn = tasks_plot(read_history(tmp_path), {"groups": ["top1", "top5"], "near": ["top1"], "third": ["top1"]})
    lines = [[list(line.get_ydata()) for line in axes.lines] for axes in drawn.axes[:2]]
    assert lines == [[[20, 40, 60], []], [[40, 40, 40]]]


def shows(path: Path, colour: str) -> bool:
    """Whether a picture has many pixels of exactly this colour."""
    image = Image.open(path).convert("RGB")
    difference = ImageChops.difference(image, Image.new("RGB", image.size, colour)).convert("L")
    return difference.histogram()[0] > 300


def test_a_report_shows_plots_galleries_and_numbers(tmp_path, manifest):
    write_history(tmp_path, evaluations=3)
    config = RunConfig(name="a <small> run")
    found = evaluation(manifest)
    index = write_report(tmp_path, config, RESULTS, found, manifest)
    assert index == tmp_path / "report" / "index.html"
    assert {path.name for path in index.parent.iterdir()} == PLOTS | GALLERIES | {"index.html"}
    page = Page(index.read_text())
    assert set(page.images) == PLOTS | GALLERIES
    assert page.links == page.images  # nothing is fetched from elsewhere
    for words in (
        "a <small> run",
        "100.0",
        "chance 7.7%",
        "13 images, 25 texts",
        "3,840",
        "resnet50",
        "embed_dim: 768",
    ):
        assert words in page.text, words
    for name in page.images:
        with Image.open(index.parent / name) as image:
            image.load()
            assert image.width >= 700 and len(image.getcolors(maxcolors=2**24)) > 10


def test_right_answers_are_marked_and_only_they(tmp_path, manifest):
    good, poor = tmp_path / "good", tmp_path / "poor"
    for directory, right in ((good, True), (poor, False)):
        directory.mkdir()
        draw_galleries(evaluation(manifest, right=right).features, manifest, RunConfig().data, directory)
    assert shows(good / "gallery_text_to_image.png", RIGHT) and shows(good / "gallery_image_to_text.png", RIGHT_PALE)
    assert not shows(poor / "gallery_text_to_image.png", RIGHT)
    assert not shows(poor / "gallery_image_to_text.png", RIGHT_PALE)


def test_a_caption_as_long_as_a_book_is_cut_like_one_that_is_a_little_too_long(tmp_path, manifest):
    """One word and many; letter by letter a million of them would take hours."""
    for name, letters in (("page", 5_000), ("book", 1_000_000)):
        features = evaluation(manifest).features
        features.captions[:] = [
            ("pale " * letters if row % 2 else "w" * letters)[:letters] for row in range(len(features.captions))
        ]
        (tmp_path / name).mkdir()
        draw_galleries(features, manifest, RunConfig().data, tmp_path / name)
    for gallery in GALLERIES:
        with Image.open(tmp_path / "page" / gallery) as page, Image.open(tmp_path / "book" / gallery) as book:
            assert ImageChops.difference(page, book).getbbox() is None


def test_galleries_show_the_image_of_the_row_also_after_bad_samples(tmp_path):
    manifest = load_manifest(write_data(tmp_path / "data", (5, 4), bad=(0, 1, 4, 6)))
    features = evaluation(manifest, bad=4).features
    config = RunConfig().data
    pictures = Pictures(features, manifest, config)
    for row, number in enumerate((2, 3, 5, 7, 8)):
        (tmp_path / "one.png").write_bytes(picture(number))
        with Image.open(tmp_path / "one.png") as original:
            shown = pictures.square(row, 40)
            assert ImageChops.difference(shown.crop((0, 2, 40, 38)), original.convert("RGB")).getbbox() is None


def test_one_evaluation_makes_bars_without_a_curve(tmp_path, manifest):
    write_history(tmp_path, evaluations=3)
    wide = write_report(tmp_path, RunConfig(), RESULTS, evaluation(manifest), manifest).parent / "recall.png"
    width = Image.open(wide).width
    write_history(tmp_path, evaluations=1)
    narrow = write_report(tmp_path, RunConfig(), RESULTS, evaluation(manifest), manifest).parent / "recall.png"
    assert Image.open(narrow).width < width


def test_without_held_out_data_there_are_the_curves(tmp_path):
    write_history(tmp_path, evaluations=0)
    page = Page(write_report(tmp_path, RunConfig(), RESULTS).read_text())
    assert set(page.images) == PLOTS - {"recall.png"}
    assert "no held-out data, so nothing was evaluated" in page.text


def test_a_run_without_a_step_has_a_report(tmp_path):
    Page(write_report(tmp_path, RunConfig(), RESULTS | {"steps": 0, "samples_seen": 0, "seconds": 0.0}).read_text())


def test_held_out_data_that_is_gone_leaves_out_the_galleries_and_says_so(tmp_path, manifest):
    write_history(tmp_path, evaluations=1)
    found = evaluation(manifest)
    write_report(tmp_path, RunConfig(), RESULTS, found, manifest)
    Path(manifest.shards[0].url).unlink()
    page = Page(write_report(tmp_path, RunConfig(), RESULTS, found, manifest).read_text())
    assert set(page.images) == PLOTS  # none of the report before
    assert re.search(r"No galleries: shard .*part-000000.tar", page.text)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), items=st.integers(1, 12))
def test_a_gallery_ranks_as_the_metrics_do(seed, items):
    generator = np.random.default_rng(seed)
    items_ID = torch.from_numpy(generator.integers(-1, 2, size=(items, 2)).astype(np.float32))  # with ties
    query_D = torch.from_numpy(generator.integers(-1, 2, size=2).astype(np.float32))
    own = int(generator.integers(items))
    right_I = torch.arange(items) == own
    order_I, rank = nearest(query_D, items_ID, right_I)
    scores_I = items_ID @ query_D
    assert rank == 1 + int((scores_I[~right_I] >= scores_I[own]).sum())
    assert order_I.tolist().index(own) == rank - 1
    assert sorted(order_I.tolist()) == list(range(items))


def test_a_series_leaves_out_what_is_no_number():
    history = [{"step": 1, "a": 1.0}, {"step": 2, "a": None}, {"step": 3}, {"step": 4, "a": 2}]
    steps, values = series(history, "a")
    assert steps.tolist() == [1, 4] and values.tolist() == [1.0, 2.0]


@settings(deadline=None)
@given(values=st.lists(st.floats(-1e3, 1e3), max_size=400))
def test_smoothing_is_the_mean_of_the_neighbours(values):
    half = max(1, len(values) // 80)
    expected = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        expected.append(np.mean(values[i - reach : i + reach + 1]))
    assert smooth(np.array(values, dtype=float)) == pytest.approx(expected, abs=1e-6)


def test_a_logarithmic_axis_within_a_decade_has_plain_numbers():
    axes = Figure().subplots()
    axes.set_yscale("log")
    axes.set_ylim(1.5e-3, 4.5e-3)
    for which in ("major", "minor"):
        getattr(axes.yaxis, f"set_{which}_formatter")(PlainNumbers())
    texts = [label.get_text() for which in ("major", "minor") for label in axes.get_yticklabels(which=which)]
    assert {"0.002", "0.003", "0.004"} <= set(texts)
