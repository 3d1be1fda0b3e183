"""What share of the towers' own rate `train.embed` keeps.

    python -m tests.benchmarks.embed --json --model runs/quickstart [--data data/demo/openmoji/train] [--pairs 5]

Two passes over the same samples take turns: the whole of `train.embed` into a new directory, and the bare towers on
batches that are decoded and tokenized already, while a loader decodes the same samples beside them, as it does for the
command: on a machine of few cores both then have the same ones to themselves. The ratio of each pair of neighbours; the
median of them. `--precision` and `--batch` as in the command.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from data_pipeline.batch import EvalBatch
from data_pipeline.embeddings.inputs import Input, find_input
from data_pipeline.loader import sample_loader
from train.engine.start import start
from train.use.embed import embed
from train.use.towers import Towers, load_towers

AIM = 0.95


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="run or export to embed with")
    parser.add_argument("--data", default="data/demo/openmoji/train", help="default: %(default)s")
    parser.add_argument("--pairs", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--precision", default="", choices=["", "bf16", "fp32"])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    device = start().device
    towers = load_towers(options.model, precision=options.precision, device=device)
    given = find_input(options.data)
    batches = list(load(towers, given, options.batch, options.workers))
    ratios, rates = [], []
    for pair in range(options.pairs + 1):
        bare = given.samples / bare_seconds(towers, given, batches, options.batch, options.workers)
        with tempfile.TemporaryDirectory() as name:
            began = time.perf_counter()
            embed(towers, given, Path(name) / "out", batch=options.batch, workers=options.workers)
            whole = given.samples / (time.perf_counter() - began)
        if pair:  # the first one warms up
            ratios.append(whole / bare)
            rates.append((bare, whole))
    report = {
        "model": options.model,
        "samples": given.samples,
        "precision": towers.precision,
        "batch": options.batch,
        "bare_rate": statistics.median(bare for bare, _ in rates),
        "embed_rate": statistics.median(whole for _, whole in rates),
        "share": statistics.median(ratios),
        "shares": [round(ratio, 4) for ratio in ratios],
    }
    print(json.dumps(report) if options.json else "\n".join(f"{key}: {value}" for key, value in report.items()))
    if report["share"] < AIM:
        raise SystemExit(f"the aim is a share of {AIM}")


def load(towers: Towers, given: Input, batch: int, workers: int):
    config = replace(towers.data, workers=workers)
    return sample_loader(config, given.readers(config), given.positions(), towers.tokenizer, batch=batch)


def bare_seconds(towers: Towers, given: Input, batches: list[EvalBatch], batch: int, workers: int) -> float:
    """The time that the towers take for these batches, while a loader makes as many and hands them over."""
    beside = load(towers, given, batch, workers)
    began = time.perf_counter()
    for one, _ in zip(batches, beside, strict=True):
        towers.images(one.images_BCHW)
        towers.tokens(one.ids_ML, one.mask_ML, batch)
    if towers.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
