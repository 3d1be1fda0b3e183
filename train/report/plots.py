"""Plots of a run, from its history of metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from train.evaluation.retrieval import RECALL_AT

History = Sequence[dict[str, Any]]
INK, MUTED, LINE = "#1f2933", "#7b8794", "#e4e7eb"
IMAGE, TEXT, TEMPERATURE, NORM = "#0b8457", "#d9622b", "#3d5a98", "#8d5a97"
TOWERS = (("image", IMAGE), ("text", TEXT))
DIRECTIONS = (("t2i", "text → image"), ("i2t", "image → text"))


class PlainNumbers(LogFormatter):
    """Of a logarithmic axis: 0.002, where matplotlib writes 2 x 10^-3 or 2e-03."""

    def __call__(self, x, pos=None):
        return f"{x:g}" if super().__call__(x, pos) else ""


def draw_plots(
    history: History,
    results: dict[str, float],
    tasks: Mapping[str, Sequence[str]],
    chance_loss: float | None,
    directory: Path,
) -> None:
    """Write loss.png and training.png, and recall.png, tasks.png and towers.png where there is something to show.

    Args:
        results: the final retrieval metrics; empty for none.
        tasks: other evaluations by name, with the metrics to draw of each.
        chance_loss: the loss of features that know nothing; None where there is no such number.
    """
    save(loss_plot(history, chance_loss), directory / "loss.png")
    save(training_plot(history), directory / "training.png")
    if results:
        save(recall_plot(history, results), directory / "recall.png")
    if tasks:
        save(tasks_plot(history, tasks), directory / "tasks.png")
    if any("alignment" in record for record in history):
        save(towers_plot(history), directory / "towers.png")


def loss_plot(history: History, chance_loss: float | None) -> Figure:
    """Every step, and a smooth line through them."""
    figure = Figure(figsize=(9, 4.2))
    axes = style(figure.subplots(), "Contrastive loss", "step")
    steps, losses = series(history, "loss")
    if len(steps):
        axes.plot(steps, losses, color=TEMPERATURE, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth(losses), color=TEMPERATURE, linewidth=2.0)
        if chance_loss is not None:
            axes.axhline(chance_loss, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
            label = f"chance {chance_loss:.2f}"
            axes.annotate(
                label, (1, chance_loss), (-4, 4), ("axes fraction", "data"), "offset points", ha="right", color=MUTED
            )
        axes.set_ylim(bottom=0, top=1.08 * max(float(np.nanpercentile(losses, 99)), chance_loss or 0))
        axes.margins(x=0.01)
    return figure


def recall_plot(history: History, results: dict[str, float]) -> Figure:
    """Left: recall over the steps, where there were several evaluations. Right: the final recall beside chance."""
    steps, _ = series(history, "val/t2i_R@1")
    if len(steps) > 1:
        figure = Figure(figsize=(11, 4.2))
        over_time, final = figure.subplots(1, 2, width_ratios=(1.25, 1))
        _recall_curves(style(over_time, "Held-out recall during training (%)", "step"), history)
    else:
        figure = Figure(figsize=(7, 4.2))
        final = figure.subplots()
    _recall_bars(style(final, "Held-out recall at the end (%)"), results)
    return figure


def _recall_curves(axes: Axes, history: History) -> None:
    for (side, name), color in zip(DIRECTIONS, (TEXT, IMAGE), strict=True):
        for k, style in zip(RECALL_AT, ("-", "--", ":"), strict=True):
            steps, values = series(history, f"val/{side}_R@{k}")
            axes.plot(steps, values, style, color=color, marker="o", markersize=3, label=f"{name}, R@{k}")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))


def _recall_bars(axes: Axes, results: dict[str, float]) -> None:
    places = np.arange(len(RECALL_AT))
    for (side, name), color, shift in zip(DIRECTIONS, (TEXT, IMAGE), (-0.19, 0.19), strict=True):
        values = [results[f"{side}_R@{k}"] for k in RECALL_AT]
        chances = [results[f"{side}_chance_R@{k}"] for k in RECALL_AT]
        bars = axes.bar(places + shift, values, 0.36, color=color, label=name)
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=10, color=INK)
        chance = axes.hlines(chances, places + shift - 0.18, places + shift + 0.18, INK, linewidth=2)
    chance.set_label("chance")
    axes.set_xticks(places, [f"R@{k}" for k in RECALL_AT])
    axes.tick_params(axis="x", labelsize=11, length=0)
    axes.set_ylim(0, min(109.0, 1.18 * max(results[f"{side}_R@10"] for side, _ in DIRECTIONS) + 3))
    axes.legend(frameon=False, fontsize=9, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.1))


def tasks_plot(history: History, tasks: Mapping[str, Sequence[str]]) -> Figure:
    """Every evaluation but that of `data.val` over the steps, each in axes of its own."""
    figure, places = grid(len(tasks), 2, 5.5, 3.0)
    for axes, (name, metrics) in zip(places, tasks.items(), strict=True):
        style(axes, name, "step")
        for metric, color in zip(metrics, (IMAGE, TEXT, TEMPERATURE, NORM, MUTED, INK) * len(metrics), strict=False):
            axes.plot(*series(history, f"{name}/{metric}"), color=color, marker="o", markersize=3, label=metric)
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.legend(frameon=False, fontsize=9)
    return figure


def training_plot(history: History) -> Figure:
    """Learning rates, temperature, norm of the gradient, throughput."""
    figure = Figure(figsize=(11, 5.6))
    (rates, temperature), (norm, speed) = figure.subplots(2, 2)
    style(rates, "Learning rate")
    for tower, color in TOWERS:
        rates.plot(*series(history, f"lr/{tower}"), color=color, linewidth=1.8, label=f"{tower} tower")
    rates.legend(frameon=False, fontsize=9)
    rates.set_ylim(bottom=0)
    style(temperature, "Temperature").plot(*series(history, "temperature"), color=TEMPERATURE, linewidth=1.8)
    steps, norms = series(history, "grad_norm")
    style(norm, "Norm of the gradient", "step")
    if len(norms):
        norm.plot(steps, norms, color=NORM, alpha=0.3, linewidth=0.8)
        norm.plot(steps, smooth(norms), color=NORM, linewidth=1.8)
        norm.set_ylim(0, 1.15 * float(np.percentile(norms, 99.5)))
    steps, rate = series(history, "samples_per_second")
    style(speed, "Samples per second", "step")
    if len(rate):
        speed.plot(steps, rate, color=MUTED, linewidth=0.8)
        speed.set_ylim(0, 1.15 * float(np.percentile(rate, 99)))
    return figure


def towers_plot(history: History) -> Figure:
    """What train.engine.meter measures: the tower is the colour, or both together are one curve."""
    figure = Figure(figsize=(11, 5.6))
    top, bottom = figure.subplots(2, 3)
    for axes, title, name, scale in (
        (top[0], "Norm of the gradient", "grad_norm", "log"),
        (top[1], "Update / weights", "update_ratio", "log"),
        (top[2], "Effective rank", "effective_rank", "linear"),
        (bottom[0], "Uniformity (low: spread out)", "uniformity", "linear"),
    ):
        style(axes, title, "step" if axes is bottom[0] else "").set_yscale(scale)
        if scale == "log":
            # Within a decade the ticks that have numbers are the minor ones.
            axes.tick_params(which="minor", colors=MUTED, length=0)
            axes.yaxis.set_major_formatter(PlainNumbers())
            axes.yaxis.set_minor_formatter(PlainNumbers())
        for tower, color in TOWERS:
            axes.plot(*series(history, f"{name}/{tower}"), color=color, linewidth=1.8, label=f"{tower} tower")
    top[0].legend(frameon=False, fontsize=9)
    for axes, title, name in (
        (bottom[1], "Alignment (low: pairs are close)", "alignment"),
        (bottom[2], "Modality gap", "modality_gap"),
    ):
        style(axes, title, "step").plot(*series(history, name), color=TEMPERATURE, linewidth=1.8)
        axes.set_ylim(bottom=0)
    return figure


def series(history: History, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values at which a metric is a finite number."""
    points = [(r["step"], r[name]) for r in history if isinstance(r.get(name), (int, float)) and math.isfinite(r[name])]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps), np.array(values, dtype=float)


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of a fortieth of the values, narrower at both ends."""
    half = max(1, len(values) // 80)
    total = np.concatenate([[0.0], np.cumsum(values)])
    center = np.arange(len(values))
    reach = np.minimum(half, np.minimum(center, len(values) - 1 - center))
    return (total[center + reach + 1] - total[center - reach]) / (2 * reach + 1)


def grid(count: int, most: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with so many axes, at most `most` in a row, of so many inches each."""
    columns = min(most, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows))
    places = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axes in places[count:]:
        axes.set_visible(False)
    return figure, places[:count]


def style(axes: Axes, title: str, xlabel: str = "") -> Axes:
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=10)
    axes.set_xlabel(xlabel, color=MUTED)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.tick_params(colors=MUTED, length=0)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def save(figure: Figure, to: Path | BinaryIO) -> None:
    """As a PNG."""
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained")
    figure.savefig(to, dpi=150, facecolor="white")
