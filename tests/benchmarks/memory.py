"""Memory and time of one training step: activation checkpointing, cached features, ZeRO and its offload.

    python -m tests.benchmarks.memory [--variants plain checkpointing ...] [--micro_batch 8] [--json]

ResNet-50 at 224 pixels and BERT-base with fresh weights, four micro-batches in a step, one process. Each variant runs
in a process of its own; its second step is measured: with a GPU the peak that torch allocated there, otherwise the
peak resident size above that of the loaded libraries. Without a GPU offload has nowhere to go and changes nothing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.batches import random_batch
from tests.benchmarks.loss import memory, reset_peak
from tests.support.distributed import run_distributed
from tests.support.exactness import ZERO_CONFIG
from train.config import RunConfig

MICRO_BATCHES, SIZE, TOKENS = 4, 224, 32
CPU_OFFLOAD = {"device": "cpu"}
# Fields of the run's configuration, and the part of DeepSpeed's.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all resident": ({"resident": MICRO_BATCHES}, {}),
    "cached": ({}, {}),
    "image checkpointing": ({"image": True}, {}),
    "text checkpointing": ({"text": True}, {}),
    "checkpointing": ({"image": True, "text": True}, {}),
    "zero2": ({}, {"stage": 2}),
    "zero2 offload": ({}, {"stage": 2, "offload_optimizer": CPU_OFFLOAD}),
    "zero3 offload": ({}, {"stage": 3, "offload_optimizer": CPU_OFFLOAD, "offload_param": CPU_OFFLOAD}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--micro_batch", type=int, default=8, help="pairs of a micro-batch (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object per variant")
    options = parser.parse_args()
    for variant in options.variants:
        fields, zero = VARIANTS[variant]
        with tempfile.TemporaryDirectory() as directory:
            environment = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
            if torch.accelerator.is_available():
                environment["ACCELERATE_USE_CPU"] = "false"
            if zero:
                path = Path(directory) / "zero.json"
                path.write_text(json.dumps(ZERO_CONFIG | {"zero_optimization": zero}))
                environment |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}
            (result,) = run_distributed(
                measure, 1, directory, options.micro_batch, fields, environment=environment, timeout=900
            )
        if options.json:
            print(json.dumps({"variant": variant} | result), flush=True)
        else:
            print(f"{variant:20} {result['megabytes']:8.0f} MB  {result['seconds']:8.2f} s", flush=True)


def measure(directory: str, micro_batch: int, fields: dict[str, Any]) -> dict[str, float]:
    """Peak memory and CPU or wall seconds of the second of two steps."""
    from transformers import BertConfig

    from train.engine.build import engine_of_run
    from train.engine.start import start
    from train.model.pair import build_model
    from train.step import training_step

    BertConfig().save_pretrained(directory)
    config = RunConfig()
    config.data.image_size, config.data.max_tokens = SIZE, TOKENS
    config.model.text.name, config.model.text.weights = directory, "scratch"
    config.model.image.checkpointing, config.model.text.checkpointing = (
        fields.get(n, False) for n in ("image", "text")
    )
    config.train.micro_batch, config.train.global_batch = micro_batch, MICRO_BATCHES * micro_batch
    config.train.resident = fields.get("resident", 1)
    accelerator = start()
    on_gpu = accelerator.device.type == "cuda"
    empty = 0 if on_gpu else memory("VmRSS")
    engine = engine_of_run(accelerator, build_model(config, (0.5,) * 3, (0.25,) * 3), config)
    for step in range(2):
        batches = [batch.to(engine.device) for batch in random_batch(config, step)]
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            reset_peak()
        began = time.perf_counter()
        training_step(engine, batches, config)
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() if on_gpu else memory("VmHWM") - empty
    return {"megabytes": peak / 1e6, "seconds": seconds, "micro_batch": micro_batch}


if __name__ == "__main__":
    main()
