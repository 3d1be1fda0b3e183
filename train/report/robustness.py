"""The page of `train.evaluate --corrupt`: how a task's metrics fall as its images get worse."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

from matplotlib.figure import Figure

from data_pipeline.storage.files import write_atomically
from train.report.frame import framed
from train.report.page import DIRECTORY
from train.report.plots import IMAGE, NORM, TEMPERATURE, TEXT, grid, save, style

Curves = Mapping[str, Sequence[Mapping[str, float]]]


def write_robustness(
    run_dir: Path, name: str, kept: Sequence[str], clean: Mapping[str, float], curves: Curves, words: str
) -> Path:
    """Write `<run>/report/robustness-<name>.html`, one file; returns its path.

    Args:
        kept: the metrics to draw.
        clean, curves: all metrics without corruption, and of each corruption at severity 1, 2, ...
        words: which model and data these are.
    """
    picture = io.BytesIO()
    figure = robustness_plot(kept, clean, curves)
    save(figure, picture)
    path = run_dir / DIRECTORY / f"robustness-{name}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    body = BODY.substitute(
        name=escape(name),
        words=escape(words),
        wide=round(100 * figure.get_figwidth()),
        plot=base64.b64encode(picture.getvalue()).decode(),
        rows="".join(_rows(kept, clean, curves)),
        heads="".join(f"<th>{escape(metric)}</th>" for metric in kept),
    )
    write_atomically(path, framed(f"{name}, corrupted", body))
    return path


def robustness_plot(kept: Sequence[str], clean: Mapping[str, float], curves: Curves) -> Figure:
    """One plot for each metric, over the severity; 0 is without corruption."""
    figure, places = grid(len(kept), 3, 3.9, 3.2)
    for axes, metric in zip(places, kept, strict=True):
        style(axes, metric, "severity")
        for (corruption, found), color in zip(curves.items(), (TEMPERATURE, TEXT, IMAGE, NORM) * 2, strict=False):
            values = [clean[metric], *(one[metric] for one in found)]
            axes.plot(range(len(values)), values, color=color, marker="o", markersize=3.5, label=corruption)
        axes.set_ylim(bottom=0)
    places[0].legend(frameon=False, fontsize=9)
    return figure


def _rows(kept: Sequence[str], clean: Mapping[str, float], curves: Curves) -> list[str]:
    named = [("none", clean)]
    named += [(f"{name}, {place}", one) for name, found in curves.items() for place, one in enumerate(found, start=1)]
    cells = [(name, "".join(f"<td>{one[metric]:.1f}</td>" for metric in kept)) for name, one in named]
    return [f"<tr><th>{escape(name)}</th>{line}</tr>" for name, line in cells]


BODY = Template(
    """<h1>$name, corrupted</h1><p>$words</p>
<section><h2>As images get worse</h2><p>Gaussian noise and blur, JPEG and loss of colour, each in five severities; at 0
the images are as they are.</p>
<div class="scroll">
<img class="plot" style="--wide: ${wide}px" src="data:image/png;base64,$plot" alt="Metrics over the severity">
</div></section>
<section><h2>Numbers</h2><div class="scroll"><table>
<tr><th>corruption, severity</th>$heads</tr>$rows</table></div></section>
"""
)
