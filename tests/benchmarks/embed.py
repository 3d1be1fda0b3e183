"""What share of the towers' own rate `train.embed` keeps.

    python -m tests.benchmarks.embed --json --model runs/quickstart [--data data/demo/openmoji/train] [--pairs 5]

Two passes over the same samples take turns: the whole of `train.embed` into a new directory, and the bare towers on
batches that are decoded and tokenized already, while a loader decodes the same samples beside them, as it does for the
command: on a machine of few cores both then have the same ones to themselves. The median of the ratios of neighbours,
by the wall clock and by the process's CPU time, which other work changes less, but which does not see waiting.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
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
    pairs = []
    for pair in range(options.pairs + 1):
        bare = timed(lambda: run_bare(towers, given, batches, options.batch, options.workers))
        with tempfile.TemporaryDirectory() as name:
            out = Path(name) / "out"
            whole = timed(partial(embed, towers, given, out, batch=options.batch, workers=options.workers))
        if pair:  # the first one warms up
            pairs.append((bare, whole))
    shares = {
        clock: [bare[number] / whole[number] for bare, whole in pairs] for number, clock in enumerate(("wall", "cpu"))
    }
    report = {
        "model": options.model,
        "samples": given.samples,
        "precision": towers.precision,
        "batch": options.batch,
        "bare_rate": given.samples / statistics.median(bare[0] for bare, _ in pairs),
        "embed_rate": given.samples / statistics.median(whole[0] for _, whole in pairs),
        "share": statistics.median(shares["wall"]),
        "cpu_share": statistics.median(shares["cpu"]),
        "shares": {clock: [round(share, 4) for share in found] for clock, found in shares.items()},
    }
    print(json.dumps(report) if options.json else "\n".join(f"{key}: {value}" for key, value in report.items()))
    if report["share"] < AIM:
        raise SystemExit(f"the aim is a share of {AIM}")


def load(towers: Towers, given: Input, batch: int, workers: int):
    config = replace(towers.data, workers=workers)
    return sample_loader(config, given.readers(config), given.positions(), towers.tokenizer, batch=batch)


def run_bare(towers: Towers, given: Input, batches: list[EvalBatch], batch: int, workers: int) -> None:
    """The towers on these batches, while a loader makes as many and hands them over."""
    for one, _ in zip(batches, load(towers, given, batch, workers), strict=True):
        towers.images(one.images_BCHW)
        towers.tokens(one.ids_ML, one.mask_ML, batch)
    if towers.device.type != "cpu":
        torch.accelerator.synchronize()


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the wall clock, and of this process's CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    main()
