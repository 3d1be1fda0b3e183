"""The report of a run in `<run>/report/`: a page that shows the model at work, with plots and numbers.

The page is static: index.html and the pictures beside it, which no server has to answer for.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from data_pipeline.storage.files import write_atomically
from data_pipeline.storage.redaction import redact_urls
from train import cli
from train.config import RunConfig
from train.evaluation import find_task
from train.evaluation.beside import beside
from train.evaluation.retrieval import RECALL_AT
from train.evaluation.suite import NO_HELD_OUT
from train.report.confusion import confusion_table
from train.report.exhibit import Exhibit
from train.report.explore import explore
from train.report.frame import framed
from train.report.plots import DIRECTIONS, draw_plots
from train.run.records import read_history
from train.timing import PARTS

DIRECTORY = "report"
ATTRIBUTION = "ATTRIBUTION.md"
MOST_ATTRIBUTION = 10_000
"""Letters of it on the page."""
SCRIPT = Path(__file__).parent / "page.js"
SHARPNESS = 1.5
"""Pixels of a plot for each pixel of the page."""
# Section titles, pictures and what to say under each.
PLOTS = (
    ("Recall", "recall.png", "Share of queries that have the right answer among their first 1, 5 and 10, in percent."),
    ("Other evaluations", "tasks.png", "Each of eval.tasks over the steps."),
    ("Loss", "loss.png", "Every step, and the moving average. Chance is what features that know nothing would get."),
    ("Training", "training.png", ""),
    (
        "Towers",
        "towers.png",
        "What each step does to the towers (projections included), and how the batch's embeddings lie: alignment and "
        "uniformity after Wang and Isola, the gap between the means of images and texts, effective rank after Roy and "
        "Vetterli.",
    ),
)
CHOSEN = (
    ("Starts from", "init"),
    ("Image tower", "model.image.name"),
    ("Image weights", "model.image.weights"),
    ("Text tower", "model.text.name"),
    ("Text weights", "model.text.weights"),
    ("Embedding", "model.embed_dim"),
    ("Image size", "data.image_size"),
    ("Augmentation", "data.augment.policy"),
    ("Loss", "loss.kind"),
    ("Global batch", "train.global_batch"),
    ("Micro-batch", "train.micro_batch"),
    ("Peak learning rate", "optim.lr"),
    ("Seed", "train.seed"),
)


def write_report(
    run_dir: str | Path, config: RunConfig, results: dict[str, Any], exhibit: Exhibit | None = None
) -> Path:
    """Write the report of a run from its metrics.jsonl and its results; one process calls it.

    Args:
        results: `steps`, `samples_seen`, `seconds`, `bad_samples`, `skipped_steps`; `val`, `tasks`, `best`,
            `warnings` if any.
        exhibit: what the finished model makes of the held-out data; None for none.

    Returns:
        The path of index.html. Where data can no longer be read it shows numbers and plots alone, and says so.
    """
    directory = Path(run_dir) / DIRECTORY
    directory.mkdir(parents=True, exist_ok=True)
    for old in (*directory.glob("*.png"), *directory.glob("*.webp")):
        old.unlink()
    shown, notes = "", list(results.get("warnings", []))
    if exhibit is not None:
        try:
            shown = _exhibit(explore(exhibit, config.data, directory))
        except (OSError, ValueError) as error:
            notes.append(f"No pictures: {error}")
    history, metrics, tasks = read_history(Path(run_dir)), results.get("val", {}), results.get("tasks", {})
    chance_loss = math.log(config.train.global_batch) if config.loss.kind == "softmax" else None
    scores = {name: find_task(one["task"]).scores for name, one in tasks.items()}
    drawn = {name: [metric for metric in scores[name] if scores[name][metric] is max] for name in scores}
    draw_plots(history, metrics, drawn, chance_loss, directory)
    facts = [*config_facts(config), *result_facts(results), *evaluation_facts(history), *speed_facts(history)]
    body = BODY.substitute(
        name=escape(config.name),
        cards=_cards(metrics, bool(tasks)) + "".join(f"<p class=note>{escape(line)}</p>" for line in notes),
        exhibit=shown,
        confusions=_confusions(exhibit, tasks),
        plots=_plots(directory),
        numbers=_numbers(metrics) + "".join(_task_numbers(name, one["metrics"]) for name, one in tasks.items()),
        sources=_sources(exhibit),
        facts="".join(f"<tr><th>{escape(label)}</th><td>{escape(value)}</td></tr>" for label, value in facts),
        yaml=escape(cli.to_yaml(config)),
    )
    script = f"<script>{SCRIPT.read_text(encoding='utf-8')}</script>" if shown else ""
    write_atomically(directory / "index.html", framed(config.name, body, script=script))
    return directory / "index.html"


def config_facts(config: RunConfig) -> list[tuple[str, str]]:
    """What a reader wants to know of the configuration, in words."""
    flat = cli.flatten(config)
    return [(label, redact_urls(str(flat[name]))) for label, name in CHOSEN if flat[name] != ""]


def result_facts(results: dict[str, Any]) -> list[tuple[str, str]]:
    """How long the run was."""
    seconds, best = results["seconds"], results.get("best")
    return [
        ("Steps", f"{results['steps']:,}"),
        ("Samples seen", f"{results['samples_seen']:,}"),
        ("Time in training", f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"),
        ("Samples per second", f"{results['samples_seen'] / seconds:,.0f}" if seconds else "-"),
        ("Bad samples replaced", f"{results['bad_samples']:,}"),
        ("Steps skipped", f"{results['skipped_steps']:,}"),
        *([("Best", f"{best['metric']} {best['value']:.4g}, step {best['step']:,}")] if best else []),
    ]


def evaluation_facts(history: Iterable[dict[str, Any]]) -> list[tuple[str, str]]:
    """What evaluating has cost beside training."""
    costs = [value for record in history for name, value in record.items() if name.endswith("/eval_seconds")]
    return [("Time in evaluation", f"{sum(costs):.0f} s, {len(costs)} evaluations")] if costs else []


def speed_facts(history: Iterable[dict[str, Any]]) -> list[tuple[str, str]]:
    """Where the time of the steps went that were taken apart, in percent; peak memory; the median of mfu."""
    history = list(history)
    split = {part: sum(record.get(f"time/{part}", 0.0) for record in history) for part in PARTS}
    whole = sum(split.values())
    shares = ", ".join(f"{part} {value / whole:.1%}" for part, value in split.items() if value) if whole else ""
    memory = max((record.get("peak_memory_gb", 0.0) for record in history), default=0.0)
    used = [record["mfu"] for record in history if record.get("mfu") is not None]
    return [
        *([("Time of a step, rank 0", shares)] if whole else []),
        *([("Peak memory, rank 0", f"{memory:.2f} GB")] if memory else []),
        *([("MFU, rank 0", f"{statistics.median(used):.1%}")] if used else []),
    ]


def _exhibit(data: dict[str, Any]) -> str:
    """The sections that show the model at work, and their data for page.js."""
    training = len(data["items"]) - data["shown"]
    held_out = (
        f"{data['searched']:,}"
        if data["searched"] == data["total"]
        else (f"{data['searched']:,} of the {data['total']:,}, at even distances,")
    )
    sections = []
    if data["queries"]:
        pools = ""
        if training:
            pools = (
                '<div class="pool" id="pool" role="group" aria-label="Images to search">'
                '<button type="button" data-pool="held-out" aria-pressed="true">held-out images</button>'
                f'<button type="button" data-pool="all" aria-pressed="false">and {training:,} training images</button>'
                "</div>"
            )
        sections.append(SEARCH.substitute(queries=f"{len(data['queries']):,}", held_out=held_out, pools=pools))
    if data["text_gallery"]:
        sections.append(GALLERIES.substitute(total=f"{data['total']:,}"))
    if data["map"]:
        sections.append(MAP.substitute(share=f"{100 * data['map']['share']:.0f}"))
    # In JSON only "<" could end the element early.
    content = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return f'{"".join(sections)}{DIALOG}<script type="application/json" id="data">{content}</script>'


def _confusions(exhibit: Exhibit | None, tasks: dict[str, Any]) -> str:
    """For each evaluation that names classes, which it takes for which."""
    sections = []
    for name, predictions in (exhibit.predictions if exhibit else {}).items():
        metrics = tasks[name]["metrics"]
        words = (
            f"Each row: the images of a class, and how many percent of them were taken for each class, by what their "
            f"names say alone. Right for {metrics['top1']:.1f}% of {metrics['n_images']:,.0f} images, chance "
            f"{metrics['chance_top1']:.2g}%; as a mean over the classes {metrics['mean_per_class']:.1f}%."
        )
        table = confusion_table(predictions)
        sections.append(f"<section><h2>Zero-shot: {escape(name)}</h2><p>{words}</p>{table}</section>")
    return "".join(sections)


def _sources(exhibit: Exhibit | None) -> str:
    """Whose images these are, where a file beside the data says so."""
    said = beside(exhibit.sets[0].manifest.path, ATTRIBUTION) if exhibit else None
    if said is None:
        return ""
    text = said.read_text(encoding="utf-8", errors="replace")[:MOST_ATTRIBUTION]
    return f"<section><h2>Where the images come from</h2><pre>{escape(text)}</pre></section>"


def _plots(directory: Path) -> str:
    sections = []
    for title, name, words in PLOTS:
        if (directory / name).is_file():
            with Image.open(directory / name) as image:
                wide = round(image.width / SHARPNESS)
            plot = f'<div class="scroll"><img class="plot" style="--wide: {wide}px" src="{name}" alt="{title}"></div>'
            sections.append(f"<section><h2>{title}</h2><p>{escape(words)}</p>{plot}</section>")
    return "".join(sections)


def _cards(metrics: dict[str, float], other: bool) -> str:
    """The four numbers to look at first; other: there are evaluations besides retrieval on `data.val`."""
    if not metrics and other:
        return ""
    if not metrics:
        by_hand = "or evaluate the run as it is: python -m train.evaluate --run RUN --data MANIFEST"
        return f"<p class=note>{escape(NO_HELD_OUT)}; {by_hand}.</p>"
    cards = []
    for side, name in DIRECTIONS:
        for k in (1, 10):
            value, chance = metrics[f"{side}_R@{k}"], metrics[f"{side}_chance_R@{k}"]
            cards.append(
                f"<div class=card><div class=label>{name}, R@{k}</div><div class=big>{value:.1f}<small>%</small></div>"
                f"<div class=label>chance {chance:.2g}%</div></div>"
            )
    return f"<div class=cards>{''.join(cards)}</div>"


def _numbers(metrics: dict[str, float]) -> str:
    """The table of all retrieval metrics beside chance."""
    if not metrics:
        return ""
    rows = []
    names = [(f"R@{k} (%)", f"R@{k}") for k in RECALL_AT] + [("median rank", "median_rank"), ("mean rank", "mean_rank")]
    for label, name in names:
        cells = [metrics[f"{side}_{kind}{name}"] for side, _ in DIRECTIONS for kind in ("", "chance_")]
        rows.append(f"<tr><th>{label}</th>" + "".join(f"<td>{cell:,.1f}</td>" for cell in cells) + "</tr>")
    heads = "".join(f"<th>{name}</th><th>chance</th>" for _, name in DIRECTIONS)
    counts = f"{metrics['n_images']:,.0f} images, {metrics['n_texts']:,.0f} texts, {metrics['n_bad']:.0f} unreadable"
    table = f"<table class=numbers><tr><th></th>{heads}</tr>{''.join(rows)}</table>"
    return f'<section><h2>Held-out retrieval</h2><div class="scroll">{table}</div><p>{counts}</p></section>'


def _task_numbers(name: str, metrics: dict[str, float]) -> str:
    """All metrics of one of `eval.tasks`."""
    rows = "".join(f"<tr><th>{escape(metric)}</th><td>{value:,.4g}</td></tr>" for metric, value in metrics.items())
    return f"<section><h2>{escape(name)}</h2><table>{rows}</table></section>"


SEARCH = Template(
    """<section id="search"><h2>Ask the model</h2>
<p>Type, and choose one of $queries prepared texts: captions, and classes and frequent words where there are some. The
model finds the images nearest to it, among the held-out ones ($held_out here).</p>
<div class="ask"><input id="query" type="text" role="combobox" aria-expanded="false" aria-controls="matches"
aria-autocomplete="list" aria-label="Text to look for" placeholder="Type a word" autocomplete="off" spellcheck="false">
<ul id="matches" role="listbox" hidden></ul></div>
<div class="pills" id="examples"></div>
$pools
<p class="says" id="says" aria-live="polite"></p><div class="found" id="found"></div>
<noscript><p class="note">Search, galleries and map need JavaScript; what is below does not.</p></noscript></section>
"""
)
GALLERIES = Template(
    """<section><h2>Text finds image</h2><p>Each row: a text of the held-out data and the nearest of all $total
held-out images. The right one has a green frame. The texts are at even distances in the data, good and bad alike.</p>
<div id="texts"></div></section>
<section><h2>Image finds text</h2><p>Each card: a held-out image and the nearest of all held-out texts. Right ones are
green.</p><div class="cards2" id="images"></div></section>
"""
)
MAP = Template(
    """<section><h2>Both modalities on a map</h2><p>Each image, and its caption as a dot: the first two principal
components of all their embeddings, which hold $share% of the variance, each stretched to fit. The mean of each modality
is taken away first, so the gap between them is not shown. Point at one to see the line to its partner.</p>
<div class="plane"><canvas id="plane" role="img" aria-label="Map of images and captions"></canvas>
<div class="tip" id="tip" hidden></div></div>
<div class="legend"><span><i style="background: rgb(var(--image))"></i>image</span>
<span><i style="background: rgb(var(--text))"></i>caption</span></div></section>
"""
)
DIALOG = """<dialog id="image"><div id="one"></div>
<form method="dialog"><button class="close">Close</button></form></dialog>
"""
BODY = Template(
    """<h1>$name</h1><p>Image-text training with Duet</p>
$cards
$exhibit
$confusions
$plots
$numbers
$sources
<section><h2>The run</h2><table>$facts</table>
<details><summary>Full configuration</summary><pre>$yaml</pre></details></section>
"""
)
