import json
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from train.config import RunConfig
from train.evaluation.retrieval import retrieval_metrics
from train.report.page import write_report
from train.report.plots import PlainNumbers, series, smooth, tasks_plot
from train.run.records import read_history

RESULTS = {"steps": 30, "samples_seen": 3840, "seconds": 12.0, "bad_samples": 2, "skipped_steps": 0}
PLOTS = {"loss.png", "training.png", "towers.png", "recall.png"}


def metrics() -> dict[str, float]:
    """Of 13 images, each with a text that finds it."""
    return retrieval_metrics(torch.eye(13), torch.eye(13), torch.arange(13)) | {"n_bad": 0.0}


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


def test_a_report_shows_plots_and_numbers(tmp_path):
    write_history(tmp_path, evaluations=3)
    config = RunConfig(name="a <small> run")
    index = write_report(tmp_path, config, RESULTS | {"val": metrics(), "warnings": ["3 of <13> are known"]})
    assert index == tmp_path / "report" / "index.html"
    assert {path.name for path in index.parent.iterdir()} == PLOTS | {"index.html"}
    page = Page(index.read_text())
    assert set(page.images) == PLOTS
    assert page.links == page.images  # nothing is fetched from elsewhere
    for words in (
        "a <small> run",
        "3 of <13> are known",
        "100.0",
        "chance 7.7%",
        "13 images, 13 texts",
        "3,840",
        "resnet50",
        "embed_dim: 768",
    ):
        assert words in page.text, words
    for name in page.images:
        with Image.open(index.parent / name) as image:
            image.load()
            assert image.width >= 700 and len(image.getcolors(maxcolors=2**24)) > 10


def test_one_evaluation_makes_bars_without_a_curve(tmp_path):
    widths = []
    for evaluations in (3, 1):
        write_history(tmp_path, evaluations=evaluations)
        write_report(tmp_path, RunConfig(), RESULTS | {"val": metrics()})
        widths.append(Image.open(tmp_path / "report" / "recall.png").width)
    assert widths[1] < widths[0]


def test_what_evaluating_has_cost_is_said(tmp_path):
    write_history(tmp_path, evaluations=0)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        for step in (10, 20):
            file.write(json.dumps({"step": step, "val/eval_seconds": 4.0, "groups/eval_seconds": 1.5}) + "\n")
    assert "11 s, 4 evaluations" in Page(write_report(tmp_path, RunConfig(), RESULTS).read_text()).text


def test_where_the_time_went_is_said(tmp_path):
    write_history(tmp_path, evaluations=0)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        for step, mfu in ((10, 0.3), (20, 0.5)):
            record = {
                "step": step,
                "time/wait": 1.0,
                "time/backward": 3.0,
                "time/copy": 0.0,
                "peak_memory_gb": step / 4,
            }
            file.write(json.dumps(record | {"mfu": mfu}) + "\n")
    text = Page(write_report(tmp_path, RunConfig(), RESULTS).read_text()).text
    for words in ("wait 25.0%, backward 75.0%", "5.00 GB", "40.0%"):
        assert words in text


def test_without_held_out_data_there_are_the_curves(tmp_path):
    write_history(tmp_path, evaluations=0)
    page = Page(write_report(tmp_path, RunConfig(), RESULTS).read_text())
    assert set(page.images) == PLOTS - {"recall.png"}
    assert "no held-out data, so nothing is evaluated" in page.text


def test_a_run_without_a_step_has_a_report(tmp_path):
    Page(write_report(tmp_path, RunConfig(), RESULTS | {"steps": 0, "samples_seen": 0, "seconds": 0.0}).read_text())


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
