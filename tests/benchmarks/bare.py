"""A step of ResNet-50 and BERT-base beside torchvision's and transformers' own towers: python -m tests.benchmarks.bare

Both in one process, in turns, fp32: seconds of the CPU for a step of one micro-batch, captions of 22 tokens on average,
with the loss and AdamW. The bare towers have BatchNorm as torch has it and clip no gradient.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from tests.benchmarks.gpu.bench import Bench
from tests.benchmarks.gpu.towers import BareRun, Shape, make_config, make_engine, make_step
from train.step import training_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16, help="pairs of a step (default: 16)")
    parser.add_argument("--size", type=int, default=224, help="height and width of images, in pixels (default: 224)")
    parser.add_argument("--pairs", type=int, default=4, help="steps of each that are measured (default: 4)")
    parser.add_argument("--tiny", action="store_true", help="the smallest towers, to try it")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        found = measure(Path(directory), options.rows, options.size, options.pairs, options.tiny)
    print(json.dumps(found) if options.json else "\n".join(f"{name}: {value}" for name, value in found.items()))


def measure(directory: Path, rows: int, size: int, pairs: int, tiny: bool = False) -> dict[str, object]:
    """CPU seconds of each step, and the median of the ratios of neighbours: above 1, Duet is the faster one."""
    bench = Bench(directory / "rows.json", 3600, tiny)
    config = make_config(bench)
    config.data.image_size = 32 if tiny else size
    engine = make_engine(config, "fp32")
    bare = BareRun(config, "fp32", engine.device)
    batches = make_step(config, Shape(rows, 1, 1), True, engine.device)
    seconds: dict[str, list[float]] = {"duet": [], "bare": []}
    for _ in range(pairs + 1):
        began = time.process_time()
        training_step(engine, batches, config)
        between = time.process_time()
        bare.step(batches)
        seconds["duet"].append(between - began)
        seconds["bare"].append(time.process_time() - between)
    ratios = [bare / duet for duet, bare in zip(seconds["duet"][1:], seconds["bare"][1:], strict=True)]
    return {
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        **{name: [round(value, 3) for value in values[1:]] for name, values in seconds.items()},
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    main()
