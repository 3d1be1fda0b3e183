"""A step of ResNet-50 and BERT-base beside torchvision's and transformers' own towers: python -m tests.benchmarks.bare

In one process, in turns: seconds of the CPU for a step of one micro-batch, captions of 22 tokens on average, with the
loss and AdamW. The bare towers have BatchNorm as torch has it and clip no gradient. With --open-clip, open_clip takes
its turn as well: the same sizes in a process of its own, fp32, captions padded as it pads them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
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
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of Duet and the bare towers")
    parser.add_argument("--pieces", type=int, default=1, help="of Duet's model.text.pieces (default: 1)")
    parser.add_argument("--open-clip", metavar="PYTHON", help="python of an environment that has open_clip")
    parser.add_argument("--tiny", action="store_true", help="the smallest towers, to try it")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        found = measure(Path(directory), options)
    print(json.dumps(found) if options.json else "\n".join(f"{name}: {value}" for name, value in found.items()))


def measure(directory: Path, options: argparse.Namespace) -> dict[str, object]:
    """CPU seconds of each step, and the median of the ratios of neighbours: above 1, Duet is the faster one."""
    config = make_config(Bench(directory / "rows.json", 3600, options.tiny))
    config.data.image_size = 32 if options.tiny else options.size
    config.model.text.pieces = options.pieces
    engine = make_engine(config, options.precision)
    bare = BareRun(config, options.precision, engine.device)
    batches = make_step(config, Shape(options.rows, 1, 1), True, engine.device)
    steps: dict[str, Callable[[], float]] = {
        "duet": lambda: timed(lambda: training_step(engine, batches, config)),
        "bare": lambda: timed(lambda: bare.step(batches)),
    }
    with ExitStack() as stack:
        if options.open_clip:
            steps["open_clip"] = open_clip_steps(options, directory, stack)
        made = [{name: step() for name, step in steps.items()} for _ in range(options.pairs + 1)][1:]
    ratios = {name: [one[name] / one["duet"] for one in made] for name in steps if name != "duet"}
    return {
        "ratio": {name: round(statistics.median(values), 3) for name, values in ratios.items()},
        "ratios": {name: [round(value, 3) for value in values] for name, values in ratios.items()},
        "seconds": {name: [round(one[name], 3) for one in made] for name in steps},
        "precision": options.precision,
        "pieces": options.pieces,
        "threads": torch.get_num_threads(),
    }


def timed(step: Callable[[], object]) -> float:
    began = time.process_time()
    step()
    return time.process_time() - began


def open_clip_steps(options: argparse.Namespace, directory: Path, stack: ExitStack) -> Callable[[], float]:
    """A step of open_clip, which waits meanwhile."""
    size = 32 if options.tiny else options.size
    script = Path(__file__).with_name("open_clip_step.py")
    command = [options.open_clip, str(script), str(options.rows), str(size), str(directory)]
    worker = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    assert worker.stdin and worker.stdout
    asked, answers = worker.stdin, worker.stdout
    print(answers.readline().strip(), file=sys.stderr)

    def step() -> float:
        print(file=asked, flush=True)
        return float(answers.readline())

    return step


if __name__ == "__main__":
    main()
