"""The memory plan of train.memory beside what a step takes: python -m tests.benchmarks.plan [--json]

Each case in a process of its own (or two, under DDP), fp32, one thread, no GPU: the peak of the resident size in the
second step above that of the loaded libraries. Towers have fresh weights, data are random.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.batches import random_batch
from tests.benchmarks.loss import memory, reset_peak
from tests.support.distributed import run_distributed
from tests.support.exactness import engine_environment
from train import cli, distributed
from train.config import RunConfig
from train.memory import engine_name, plan


@dataclass
class Case:
    """image: tower at `size` pixels. text: width, layers. count: micro-batches of `micro` pairs, of which a process
    keeps `resident`. stage: of ZeRO, 0 for none."""

    image: str
    size: int
    text: tuple[int, int]
    micro: int
    count: int
    resident: int
    stage: int = 0
    processes: int = 1


CASES = {
    "resnet18, 1 part": Case("resnet18", 128, (256, 4), 32, 1, 1),
    "resnet18, 3 cached": Case("resnet18", 128, (256, 4), 32, 3, 1),
    "resnet18, 2 resident": Case("resnet18", 128, (256, 4), 16, 2, 2),
    "resnet50, 2 cached": Case("resnet50", 128, (256, 4), 16, 2, 1),
    "resnet50, 1 part": Case("resnet50", 128, (256, 4), 24, 1, 1),
    "resnet50, BERT-base, 2 cached": Case("resnet50", 96, (768, 12), 8, 2, 1),
    "efficientnet_b0, 1 part": Case("efficientnet_b0", 128, (256, 4), 24, 1, 1),
    "vit_b_32, 2 cached": Case("vit_b_32", 224, (256, 4), 16, 2, 1),
    "resnet50, 2 cached, ZeRO-2": Case("resnet50", 128, (256, 4), 16, 2, 1, stage=2),
    "resnet50, 2 cached, DDP of 2": Case("resnet50", 128, (256, 4), 16, 4, 1, processes=2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", action="store_true", help="one JSON object per case")
    options = parser.parse_args()
    for name in options.cases:
        row = compared(CASES[name])
        print(json.dumps({"case": name} | row) if options.json else f"{name:32} {row}", flush=True)


def compared(case: Case) -> dict[str, float]:
    """Megabytes by the plan and measured."""
    with tempfile.TemporaryDirectory() as directory:
        config = config_of(case, directory)
        environment = engine_environment(engine_name(case.stage), directory)
        text = cli.to_yaml(config)
        measured = max(run_distributed(peak, case.processes, text, directory, environment=environment, timeout=900))
        needs = plan(config, case.processes, bf16=False)
    parts = {"state": needs.state(case.stage), "activations": needs.activations, "loss": needs.loss}
    shown = {name: round(value / 1e6) for name, value in parts.items()}
    planned = needs.total(case.stage)
    return {"measured": round(measured / 1e6), "plan": round(planned / 1e6), **shown, "error": planned / measured - 1}


def config_of(case: Case, directory: str) -> RunConfig:
    from transformers import BertConfig

    width, layers = case.text
    heads = {"num_attention_heads": width // 64, "intermediate_size": 4 * width}
    BertConfig(hidden_size=width, num_hidden_layers=layers, **heads).save_pretrained(directory)
    config = RunConfig()
    config.data.image_size, config.data.max_tokens = case.size, 32
    config.model.image.name = case.image
    config.model.text.name, config.model.text.weights = directory, "scratch"
    config.train.micro_batch, config.train.global_batch = case.micro, case.micro * case.count
    config.train.resident = case.resident
    return config


def peak(text: str, directory: str) -> int:
    """Bytes that the second step takes at its peak, above the libraries."""
    from train.engine.build import engine_of_run
    from train.engine.start import start
    from train.model.pair import build_model
    from train.step import training_step

    path = Path(directory) / f"rank{distributed.rank()}.yaml"
    path.write_text(text)
    config, accelerator = cli.load(path), start()
    share = config.train.global_batch // (config.train.micro_batch * distributed.world_size())
    empty = memory("VmRSS")
    engine = engine_of_run(accelerator, build_model(config, (0.5,) * 3, (0.25,) * 3), config)
    for step in range(2):
        batches = random_batch(config, step)[:share]
        reset_peak()
        training_step(engine, batches, config)
    return memory("VmHWM") - empty


if __name__ == "__main__":
    main()
