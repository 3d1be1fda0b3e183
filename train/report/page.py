"""The report of a run: plots, galleries and one page that shows them, in `<run>/report/`."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from data_pipeline.storage.files import write_atomically
from data_pipeline.storage.manifest import Manifest
from data_pipeline.storage.redaction import redact_urls
from train import cli
from train.config import RunConfig
from train.evaluation import find_task
from train.evaluation.retrieval import RECALL_AT
from train.report.gallery import draw_galleries
from train.report.plots import DIRECTIONS, draw_plots
from train.run.records import read_history

if TYPE_CHECKING:
    from train.evaluation.task import Evaluation

DIRECTORY = "report"
# Section titles, pictures and what to say under each.
SECTIONS = (
    (
        "Text finds image",
        "gallery_text_to_image.png",
        "Each row: a text that the model has never seen and, of all {n_images:.0f} held-out images, the nearest ones. "
        "The right one has a green frame. The texts are at even distances in the data, good and bad alike.",
    ),
    (
        "Image finds text",
        "gallery_image_to_text.png",
        "Each card: a held-out image and the nearest of all {n_texts:.0f} held-out texts. Right ones are green.",
    ),
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
    run_dir: str | Path,
    config: RunConfig,
    results: dict[str, Any],
    evaluation: Evaluation | None = None,
    manifest: Manifest | None = None,
) -> Path:
    """Write the report of a run from its metrics.jsonl and its results; one process calls it.

    Args:
        results: `steps`, `samples_seen`, `seconds`, `bad_samples`, `skipped_steps`; `tasks`, `best` if any.
        evaluation: of the finished model on the held-out data, which `manifest` describes; None for none.

    Returns:
        The path of index.html. Held-out data that can no longer be read leaves out the galleries, and the page says so.
    """
    directory = Path(run_dir) / DIRECTORY
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("*.png"):
        old.unlink()
    metrics = evaluation.metrics if evaluation else {}
    chance_loss = math.log(config.train.global_batch) if config.loss.kind == "softmax" else None
    note = ""
    if evaluation is not None and manifest is not None:
        try:
            draw_galleries(evaluation.features, manifest, config.data, directory)
        except (OSError, ValueError) as error:
            note = f"No galleries: {error}"
    tasks = results.get("tasks", {})
    scores = {name: find_task(one["task"]).scores for name, one in tasks.items()}
    drawn = {name: [metric for metric in scores[name] if scores[name][metric] is max] for name in scores}
    draw_plots(read_history(Path(run_dir)), metrics, drawn, chance_loss, directory)
    facts = config_facts(config) + result_facts(results)
    write_atomically(directory / "index.html", _page(config, metrics, tasks, facts, note, directory))
    return directory / "index.html"


def config_facts(config: RunConfig) -> list[tuple[str, str]]:
    """What a reader wants to know of the configuration, in words."""
    flat = cli.flatten(config)
    return [(label, redact_urls(str(flat[name]))) for label, name in CHOSEN]


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


def _page(
    config: RunConfig,
    metrics: dict[str, float],
    tasks: dict[str, Any],
    facts: list[tuple[str, str]],
    note: str,
    directory: Path,
) -> str:
    sections = []
    for title, name, words in SECTIONS:
        if (directory / name).is_file():
            shown = escape(words.format(**metrics) if metrics else words)
            sections.append(f'<section><h2>{title}</h2><p>{shown}</p><img src="{name}" alt="{title}"></section>')
    rows = "".join(f"<tr><th>{escape(label)}</th><td>{escape(value)}</td></tr>" for label, value in facts)
    return PAGE.substitute(
        name=escape(config.name),
        cards=_cards(metrics, bool(tasks)) + (f"<p class=note>{escape(note)}</p>" if note else ""),
        numbers=_numbers(metrics) + "".join(_task_numbers(name, one["metrics"]) for name, one in tasks.items()),
        sections="".join(sections),
        facts=rows,
        yaml=escape(cli.to_yaml(config)),
    )


def _cards(metrics: dict[str, float], other: bool) -> str:
    """The four numbers to look at first; other: there are evaluations besides retrieval on `data.val`."""
    if not metrics and other:
        return ""
    if not metrics:
        return (
            "<p class=note>The run has no held-out data, so nothing was evaluated. Keep some samples out of training, "
            "make a manifest of them (python -m data_pipeline index) and give it as --data.val; or evaluate the run as "
            "it is: python -m train.evaluate --run RUN --data MANIFEST.</p>"
        )
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
    return f"<section><h2>Held-out retrieval</h2>{table}<p>{counts}</p></section>"


def _task_numbers(name: str, metrics: dict[str, float]) -> str:
    """All metrics of one of `eval.tasks`."""
    rows = "".join(f"<tr><th>{escape(metric)}</th><td>{value:,.4g}</td></tr>" for metric, value in metrics.items())
    return f"<section><h2>{escape(name)}</h2><table>{rows}</table></section>"


PAGE = Template(
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$name - Duet</title>
<style>
:root { color-scheme: light; --ink: #1f2933; --muted: #697683; --line: #e4e7eb; --accent: #0b8457; }
* { box-sizing: border-box; }
body { margin: 0; background: #f3f5f7; color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1100px; margin: 0 auto; padding: 40px 20px 60px; }
h1 { font-size: 34px; margin: 0; letter-spacing: -0.02em; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 0 0 4px; }
p { color: var(--muted); margin: 4px 0 14px; max-width: 80ch; }
section, .card { background: #fff; border: 1px solid var(--line); border-radius: 14px; }
section { padding: 22px 24px; margin: 20px 0; }
img { width: 100%; height: auto; display: block; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 16px; margin: 24px 0; }
.card { padding: 16px 20px; }
.label { color: var(--muted); font-size: 14px; }
.big { font-size: 40px; font-weight: 700; line-height: 1.2; color: var(--accent); letter-spacing: -0.02em; }
.big small { font-size: 20px; margin-left: 2px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 7px 12px 7px 0; border-bottom: 1px solid var(--line); font-weight: 400; }
td { font-weight: 600; overflow-wrap: anywhere; } th { color: var(--muted); }
.numbers td, .numbers th + th { text-align: right; }
.numbers td:nth-child(odd) { color: var(--muted); font-weight: 400; }
.note { background: #fff7e6; border-radius: 10px; padding: 10px 14px; color: #7a4b00; }
details { margin-top: 14px; } summary { cursor: pointer; color: var(--muted); }
pre { background: #f7f9fb; padding: 14px; border-radius: 10px; overflow: auto; font-size: 13px; }
</style></head><body><main>
<h1>$name</h1><p>Image-text training with Duet</p>
$cards
$sections
$numbers
<section><h2>The run</h2><table>$facts</table>
<details><summary>Full configuration</summary><pre>$yaml</pre></details></section>
</main></body></html>
"""
)
