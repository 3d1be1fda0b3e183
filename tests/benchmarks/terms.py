"""What the optional terms of a step cost: whole training steps with and without them, in turns, in one process.

    python -m tests.benchmarks.terms [--variants multi-scale ...] [--size quickstart seed] [--steps 5] [--bf16] [--json]

quickstart: ResNet-18 at 64 px and the architecture of MiniLM, 128 pairs of 8 tokens, two micro-batches at once.
seed: ResNet-50 at 224 px and BERT-base, 8 pairs of 24 tokens. Random pixels and words; on a GPU where there is one.
Time is the median of the ratios of neighbouring steps, by the CPU's clock (all threads; what other processes do hardly
shows) and by the wall's. Memory is what autograd keeps of a step (train/memory.py), and weights with AdamW's state.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence

import torch
from transformers import BertConfig

from data_pipeline.batch import MicroBatch
from tests.benchmarks.batches import random_batch
from train.config import RunConfig
from train.engine.base import Engine
from train.engine.build import engine_of_run
from train.engine.start import start
from train.memory import plan
from train.model.pair import build_model
from train.step import training_step

STATISTICS = ((0.5,) * 3, (0.25,) * 3)
MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
SIZES = {"quickstart": ("resnet18", 64, 8, 128), "seed": ("resnet50", 224, 24, 8)}


def configure(size: str, directory: str, multiscale: dict[str, bool], self_supervision: dict[str, float]) -> RunConfig:
    """A run of this size, with these fields of model.multiscale and model.self_supervision."""
    config = RunConfig()
    config.model.image.name, config.data.image_size, config.data.max_tokens, config.train.global_batch = SIZES[size]
    config.model.text.weights = "scratch"
    if size == "quickstart":
        BertConfig(**MINILM).save_pretrained(directory)
        config.model.text.name, config.model.embed_dim = directory, 256
    config.train.resident = 2
    config.train.micro_batch = config.train.global_batch // 2
    for name, value in multiscale.items():
        setattr(config.model.multiscale, name, value)
    for name, value in self_supervision.items():
        setattr(config.model.self_supervision, name, value)
    return config


VARIANTS: dict[str, tuple[dict[str, bool], dict[str, float]]] = {
    "plain": ({}, {}),
    "multi-scale": ({"enabled": True}, {}),
    "multi-scale, fused": ({"enabled": True, "cross_level": True, "fuse": True}, {}),
    "image self-supervision": ({}, {"image": 1.0}),
    "text self-supervision": ({}, {"text": 1.0}),
}


def timed(engine: Engine, batches: list[MicroBatch], config: RunConfig) -> tuple[float, float]:
    """Seconds of one step by the CPU's clock and the wall's."""
    cpu, wall = time.process_time(), time.perf_counter()
    float(training_step(engine, batches, config)["grad_norm"])  # read, so that a GPU has finished
    return time.process_time() - cpu, time.perf_counter() - wall


def measure(size: str, variants: Sequence[str], steps: int, bf16: bool, accelerator, directory: str) -> dict:
    configs = {name: configure(size, directory, *VARIANTS[name]) for name in ("plain", *variants)}
    engines = {name: engine_of_run(accelerator, build_model(one, *STATISTICS), one) for name, one in configs.items()}
    batches = {
        name: [batch.to(accelerator.device) for batch in random_batch(config)] for name, config in configs.items()
    }
    clocks: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    for number in range(steps + 1):
        for name, engine in engines.items():
            clock = timed(engine, batches[name], configs[name])
            if number:  # not the first: it makes the optimizer's state
                clocks[name].append(clock)
    plans = {name: plan(config, 1, bf16) for name, config in configs.items()}
    results = {}
    for name in engines:
        ratios = [
            [own / plain for own, plain in zip(*pair, strict=True)]
            for pair in zip(clocks[name], clocks["plain"], strict=True)
        ]
        results[name] = {
            "cpu_seconds": round(statistics.median(cpu for cpu, _ in clocks[name]), 3),
            "wall_seconds": round(statistics.median(wall for _, wall in clocks[name]), 3),
            "cpu_ratio": round(statistics.median(cpu for cpu, _ in ratios), 3),
            "wall_ratio": round(statistics.median(wall for _, wall in ratios), 3),
            "activation_megabytes": round(plans[name].activations / 1e6, 1),
            "state_megabytes": round(plans[name].state(0) / 1e6, 1),
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = [name for name in VARIANTS if name != "plain"]
    parser.add_argument("--variants", nargs="+", choices=chosen, default=chosen, help="beside the plain step (all)")
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["quickstart"])
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each variant (default: 5)")
    parser.add_argument("--bf16", action="store_true", help="autocast, as in the accelerate configs")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps {args.steps}: at least 1")
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if args.bf16 else "no"
    accelerator = start()
    results: dict = {"device": str(accelerator.device), "threads": torch.get_num_threads(), "torch": torch.__version__}
    for size in args.size:
        with tempfile.TemporaryDirectory() as directory:
            results[size] = measure(size, args.variants, args.steps, args.bf16, accelerator, directory)
    if args.json:
        print(json.dumps(results))
        return
    for size in args.size:
        for name, one in results[size].items():
            print(f"{size:<12}{name:<26}" + "  ".join(f"{key} {value}" for key, value in one.items()))


if __name__ == "__main__":
    main()
