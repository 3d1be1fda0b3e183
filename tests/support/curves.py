"""The curve of one small run of 50 steps under any engine and world size; tests/golden holds that of one process.

    python -m tests.benchmarks.curves

A curve is as reproducible as the network leaves its rounding small. This run sees to that: pictures without flat areas
(BatchNorm divides by their variance), and a learning rate of 3e-6, since a ReLU that flips sends a gradient elsewhere:
two ways to round are 5e-6 apart after 20 steps, where they are 9e-5 with a rate of 1e-5 and 6e-4 with 3e-5. All else is
as in any run: a ResNet-18 with BatchNorm, a BERT with dropout, AdamW, warm-up, cosine, clipping, augmentation, epochs.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

from tests.support.distributed import run_alone, run_distributed
from tests.support.exactness import engine_environment
from tests.support.running import metrics, prepare
from train import cli

GOLDEN = Path(__file__).parents[1] / "golden" / "curve.json"
STEPS, BATCH, MICRO_BATCHES = 50, 16, 4


class Curve(NamedTuple):
    """One value per step: a digest of the samples in their order, the loss, the temperature."""

    digests: list[str]
    losses: list[float]
    temperatures: list[float]

    def differs(self, other: Curve) -> float:
        """The largest relative difference of a loss or temperature at the same step; inf if the samples differ."""
        if self.digests != other.digests:
            return float("inf")
        pairs = [*zip(self.losses, other.losses, strict=True), *zip(self.temperatures, other.temperatures, strict=True)]
        return max(abs(a - b) / b for a, b in pairs)


def record(engine: str = "plain", world: int = 1, loss: str = "tiled", resident: int = MICRO_BATCHES) -> Curve:
    """Trains; `loss` is full, local, tiled or sigmoid, `resident` as in the configuration: 1 accumulates."""
    with tempfile.TemporaryDirectory() as directory:
        config = prepare(Path(directory), steps=STEPS)
        config.data.val, config.data.image_size = "", 48
        config.train.global_batch, config.train.micro_batch = BATCH, BATCH // MICRO_BATCHES
        config.train.resident = resident
        config.optim.lr, config.optim.warmup_steps = 3e-6, 5
        config.loss.kind = "sigmoid" if loss == "sigmoid" else "softmax"
        config.loss.rows = "tiled" if loss == "sigmoid" else loss
        config.checkpoint.every = 0
        path = Path(directory) / "config.yaml"
        path.write_text(cli.to_yaml(config))
        if engine == "plain":
            run_alone(_train, str(path))
        else:
            environment = engine_environment(engine, directory)
            run_distributed(_train, world, str(path), environment=environment, timeout=600)
        records = metrics(config)
    keys = ("batch_digest", "loss", "temperature")
    return Curve(*([record[key] for record in records] for key in keys))


def _train(path: str) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"  # where the recorded curve is from
    import torch

    from train.__main__ import main

    torch.set_num_threads(1)
    if status := main(["--config", path]):
        raise RuntimeError(f"the run ended with {status}")


def golden() -> tuple[Curve, dict[str, str]]:
    """The recorded curve, and the versions it was recorded with."""
    content = json.loads(GOLDEN.read_text())
    return Curve(*(content[name] for name in Curve._fields)), content["versions"]


def write_golden(curve: Curve) -> None:
    """Records this curve and the versions of now."""
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(curve._asdict() | {"versions": versions()}, indent=1) + "\n")


def versions() -> dict[str, str]:
    """What a curve depends on besides Duet."""
    import torch
    import torchvision
    import transformers

    modules = (torch, torchvision, transformers)
    return {module.__name__: str(module.__version__) for module in modules}
