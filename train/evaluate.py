"""Evaluation of held-out data: retrieval, zero-shot classification, linear probe; in training and by hand.

python -m train.evaluate --run runs/quickstart --task retrieval --data data/val --json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import compress

import torch

from data_pipeline.storage.manifest import Manifest, load_manifest
from data_pipeline.tokenizer import Tokenizer
from train.checkpoint import load_model
from train.config import RunConfig
from train.distributed import is_main, start
from train.engine import precision
from train.evaluation.encode import Autocast, Evaluation, encode
from train.evaluation.probe import probe_metrics, split_by_key
from train.evaluation.retrieval import RECALL_AT, retrieval_metrics
from train.evaluation.zeroshot import (
    TEMPLATES,
    check_templates,
    class_features,
    class_indices,
    labelled,
    read_lines,
    read_names,
    zeroshot_metrics,
)
from train.model.pair import PairModel

# Options that only one task reads.
OWN_OPTIONS = {"classnames": "zeroshot", "templates": "zeroshot", "fit": "probe"}


def evaluate(
    model: PairModel,
    config: RunConfig,
    tokenizer: Tokenizer,
    manifest: Manifest,
    *,
    autocast: Autocast = nullcontext,
) -> Evaluation:
    """Retrieval on held-out data: the metrics of `train.evaluation.retrieval.retrieval_metrics`, and `n_bad`.

    All processes call it together, on a module that can be called directly (not the engine's wrapper). Each encodes
    its share of the data; all get the same result, whatever the number of processes.

    Args:
        autocast: makes the context of every forward pass, such as `train.engine.precision.autocast`.

    Raises:
        ValueError: not one sample could be read, or features that are not finite.
    """
    features = encode(model, config, tokenizer, manifest, autocast=autocast)
    metrics = retrieval_metrics(features.image_ND, features.text_MD, features.image_of_text_M, config.eval.chunk)
    return Evaluation({**metrics, "n_bad": float(len(features.bad))}, features)


def table(metrics: dict[str, float]) -> str:
    """Retrieval metrics as a table for the terminal, beside chance."""
    lines = [f"{'held-out retrieval':20}{'text -> image':>15}{'chance':>9}{'image -> text':>17}{'chance':>9}"]
    rows = [(f"R@{k}", f"R@{k}", "%") for k in RECALL_AT] + [
        ("median rank", "median_rank", ""),
        ("mean rank", "mean_rank", ""),
    ]
    for label, name, unit in rows:
        cells = [metrics[f"{side}_{kind}{name}"] for side in ("t2i", "i2t") for kind in ("", "chance_")]
        texts = [f"{cell:.1f}{unit}" for cell in cells]
        lines.append(f"  {label:18}{texts[0]:>15}{texts[1]:>9}{texts[2]:>17}{texts[3]:>9}")
    bad = f", {metrics['n_bad']:.0f} unreadable" if metrics["n_bad"] else ""
    lines.append(f"  {metrics['n_images']:.0f} images, {metrics['n_texts']:.0f} texts{bad}")
    return "\n".join(lines)


def run_task(options: argparse.Namespace) -> dict[str, float]:
    """The metrics of a task on the newest model of a run; the same on every process.

    Raises:
        ValueError: naming the option that is missing or wrong, or what the data lacks.
    """
    for name, task in OWN_OPTIONS.items():
        if getattr(options, name) is not None and options.task != task:
            raise ValueError(f"--{name} {getattr(options, name)} is for --task {task}, not for {options.task}")
    if options.workers is not None and options.workers < 0:
        raise ValueError(f"--workers {options.workers}: 0 (load in this process) or more")
    names, templates = _zeroshot_lines(options) if options.task == "zeroshot" else ([], [])
    accelerator = start()
    autocast = partial(precision.autocast, accelerator)
    model, config = load_model(options.run)
    if options.workers is not None:
        config.data.workers = options.workers
    if not (options.data or config.data.val):
        raise ValueError(f"--data is missing, and the run {options.run} has no --data.val")
    manifest = load_manifest(options.data or config.data.val)
    fit_manifest = load_manifest(options.fit) if options.fit else None
    tokenizer = Tokenizer(config.model.text.tokenizer or config.model.text.name, config.data.max_tokens)
    model.to(accelerator.device)
    if options.task == "retrieval":
        return evaluate(model, config, tokenizer, manifest, autocast=autocast).metrics

    features = encode(model, config, tokenizer, manifest, autocast=autocast)
    tested = labelled(features)
    counts = {"n_unlabelled": float(tested.n_unlabelled), "n_bad": float(len(features.bad))}
    if options.task == "zeroshot":
        rows_N = class_indices(tested.keys, tested.classes, names)
        class_CD = class_features(model, tokenizer, names, templates, size=config.eval.batch, autocast=autocast)
        return zeroshot_metrics(tested.image_ND, class_CD, rows_N) | counts

    if fit_manifest is not None:
        fitting = labelled(encode(model, config, tokenizer, fit_manifest, autocast=autocast))
        return probe_metrics(fitting.image_ND, fitting.classes, tested.image_ND, tested.classes) | counts
    tested_N = split_by_key(tested.keys)
    rows = torch.as_tensor(tested_N, device=tested.image_ND.device)
    fit_classes, test_classes = (list(compress(tested.classes, chosen)) for chosen in (~tested_N, tested_N))
    return probe_metrics(tested.image_ND[~rows], fit_classes, tested.image_ND[rows], test_classes) | counts


def _zeroshot_lines(options: argparse.Namespace) -> tuple[Sequence[str], Sequence[str]]:
    """Class names and templates, checked before any time is spent on the data."""
    if not options.classnames:
        raise ValueError(
            "--task zeroshot needs --classnames FILE: one class name per line, in the order of their numbers"
        )
    templates = read_lines("--templates", options.templates) if options.templates else TEMPLATES
    check_templates(templates)
    return read_names(options.classnames), templates


@contextmanager
def stdout_kept() -> Iterator[None]:
    """Sends to stderr what libraries write to stdout inside, also from C: nothing but the result is to stand there."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 the user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m train.evaluate", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--run", required=True, help="run directory, or one checkpoint of it")
    parser.add_argument("--task", choices=("retrieval", "zeroshot", "probe"), default="retrieval")
    parser.add_argument("--data", help="manifest of the data, or its directory; default: the run's data.val")
    parser.add_argument(
        "--classnames", help="zeroshot: a file with one class name per line, in the order of their numbers"
    )
    parser.add_argument("--templates", help="zeroshot: a file with one sentence per line, {} is the class name")
    parser.add_argument("--fit", help="probe: manifest of the data to fit to; default: four fifths of --data")
    parser.add_argument("--workers", type=int, help="loader processes; default: as in the run")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args(argv)
    try:
        with stdout_kept():
            metrics = run_task(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if is_main():
        if options.json:
            print(json.dumps({"task": options.task, "run": options.run, **metrics}))
        elif options.task == "retrieval":
            print(table(metrics))
        else:
            print("\n".join(f"{name:16}{value:10.4g}" for name, value in metrics.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
