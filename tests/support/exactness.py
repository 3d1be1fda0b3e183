"""The gradient of one step under every engine, world size and accumulation, against one plain process.

`python -m tests.benchmarks.exactness` prints the whole matrix; tests/train/test_exactness.py checks a part of it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.batch import MicroBatch
from data_pipeline.samples.masking import UNMASKED
from data_pipeline.seeds import micro_batch_seed
from tests.support.bert import write_bert
from tests.support.distributed import run_alone, run_distributed
from tests.support.wrong_schemes import sabotaged
from train.config import RunConfig

ENGINES = ("plain", "ddp", "zero1", "zero2", "zero3")
LOSSES = ("full", "local", "tiled", "sigmoid")
LEVELS, SELF_SUPERVISED = "tiled, multi-scale", "tiled, self-supervised"
ZERO_CONFIG = {
    "gradient_accumulation_steps": 1,
    "train_micro_batch_size_per_gpu": "auto",
    "zero_optimization": {"stage": 0},
}
TOLERANCE = 1e-5
BF16_ON_GPU = 2e-2  # its kernels may add up in another order every time, and what is then rounded to bf16 moves by 4e-3
BATCH = 64
SIZE = 32  # pixels
VOCABULARY = 64


class Case(NamedTuple):
    """One cell of the matrix."""

    engine: str
    world: int
    accumulation: int
    loss: str
    scheme: str = ""
    """A wrong one of tests.support.wrong_schemes; empty: Duet's."""


def make_config(text_tower: str, loss: str, **train: int) -> RunConfig:
    """ResNet-18 with BatchNorm beside a BERT of two layers with dropout."""
    config = RunConfig()
    config.data.image_size, config.data.max_tokens = SIZE, 32
    config.model.image.name = "resnet18"
    config.model.text.name, config.model.text.weights = text_tower, "scratch"
    config.model.embed_dim = 16
    config.loss.kind = "sigmoid" if loss == "sigmoid" else "softmax"
    config.loss.rows, config.loss.tile = (loss if loss in ("full", "local") else "tiled"), 5
    config.model.multiscale.enabled = config.model.multiscale.cross_level = loss == LEVELS
    if loss == SELF_SUPERVISED:
        ssl = config.model.self_supervision
        ssl.image, ssl.text, ssl.hidden, ssl.dim = 0.5, 0.25, 48, 12
    config.optim.warmup_steps = 0
    config.train.micro_batch = 4
    for name, value in train.items():
        setattr(config.train, name, value)
    return config


def write_text_tower(directory: str | Path) -> str:
    """The text tower of these configurations."""
    return write_bert(directory, width=32, vocab_size=VOCABULARY, max_position_embeddings=32)


def make_batch(config: RunConfig, step: int = 0) -> list[MicroBatch]:
    """All micro-batches of one global batch: random images, and captions of several lengths with hidden words."""
    generator, hiding = torch.Generator().manual_seed(1000 + step), torch.Generator().manual_seed(2000 + step)
    batches = []
    for index in range(config.train.global_batch // config.train.micro_batch):
        rows, length = config.train.micro_batch, 8 * int(torch.randint(1, 3, (1,), generator=generator))
        mask = torch.arange(length) < torch.randint(3, length + 1, (rows, 1), generator=generator)
        images = torch.randint(0, 256, (rows, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
        ids = torch.randint(0, VOCABULARY, (rows, length), generator=generator) * mask
        hidden = (torch.rand(ids.shape, generator=hiding) < 0.05 + 0.3 * (index % 3)) & mask
        batches.append(
            MicroBatch(
                images,
                ids,
                mask.long(),
                index=index,
                step=step,
                keys=[f"{index}/{row}" for row in range(rows)],
                views_BCHW=torch.randint(0, 256, images.shape, generator=hiding, dtype=torch.uint8),
                masked_BL=ids.masked_fill(hidden, 3),
                targets_BL=ids.masked_fill(~hidden, UNMASKED),
            )
        )
    return batches


def plain_gradients(
    config: RunConfig, bf16: bool = False, device: torch.device | str = "cpu"
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one process that holds the whole batch, by the textbook formulas and one backward."""
    from train.model.pair import build_model

    model = build_model(config, (0.5,) * 3, (0.25,) * 3).to(device)
    batches = [batch.to(device) for batch in make_batch(config)]
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
        outputs = [model([batch], [micro_batch_seed(config.train.seed, 0, batch.index)]) for batch in batches]
    outputs = {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}
    image, text, scale = outputs["image"], outputs["text"], outputs["logit_scale"][0]
    if config.loss.kind == "sigmoid":
        signs = 2 * torch.eye(len(image), device=device) - 1
        logits = scale * image @ text.T + outputs["logit_bias"][0]
        loss = total = -F.logsigmoid(signs * logits).sum() / len(image)
    else:
        loss = total = clip_loss(image, text, scale)
    if config.model.multiscale.enabled:
        shares, scales = model.level_logits.softmax(0), model.level_log_scales.exp()
        images, texts = outputs["image_levels"].unbind(1), outputs["text_levels"].unbind(1)
        levels = zip(images, texts, scales, strict=True)
        total = loss + sum(share * clip_loss(*level) for share, level in zip(shares, levels, strict=True))
        total = total - (shares * len(shares)).log().sum() / len(shares)
    if config.model.self_supervision.image:
        views = torch.cat([outputs["view"], outputs["other_view"]])
        scores = (views @ views.T / config.model.self_supervision.temperature).fill_diagonal_(-torch.inf)
        total = total + 0.5 * F.cross_entropy(scores, torch.arange(len(views), device=device).roll(len(image)))
        total = total + 0.25 * outputs["words_loss"].sum() / sum((b.targets_BL != UNMASKED).sum() for b in batches)
    total.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


def clip_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """The symmetric cross-entropy, as in figure 3 of arXiv 2103.00020."""
    logits, labels = scale * image @ text.T, torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def engine_environment(engine: str, directory: str | Path, gpu: bool = False) -> dict[str, str]:
    """What `accelerate launch` would set for this engine."""
    device = {"ACCELERATE_USE_CPU": "false" if gpu else "true"}
    if not engine.startswith("zero"):
        return device
    path = Path(directory) / f"{engine}.json"
    path.write_text(json.dumps(ZERO_CONFIG | {"zero_optimization": {"stage": int(engine[-1])}}))
    return device | {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}


def worlds(engine: str) -> tuple[int, ...]:
    """The world sizes that an engine is checked on."""
    return (1,) if engine == "plain" else (1, 2, 4)


def step_gradients(text_tower: str, cases: Sequence[Case], bf16: bool, gpu: bool) -> list[tuple[float, float, str]]:
    """On each rank, per case: the relative errors of the loss and of the worst parameter's gradient, and its name."""
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if bf16 else "no"
    os.environ["ACCELERATE_USE_CPU"] = "false" if gpu else "true"
    torch.backends.cudnn.deterministic = True
    from train import distributed
    from train.engine.build import engine_of_run
    from train.engine.start import start
    from train.model.pair import build_model
    from train.step import training_step

    accelerator = start()
    results, engines, references = [], {}, {}
    for case in cases:
        config = make_config(text_tower, case.loss, global_batch=BATCH)
        share = BATCH // config.train.micro_batch // case.world
        config.train.resident = share // case.accumulation
        kind = case.loss if case.loss in (LEVELS, SELF_SUPERVISED) else config.loss.kind
        if kind not in engines:
            references[kind] = plain_gradients(config, bf16, accelerator.device)
            model = build_model(config, (0.5,) * 3, (0.25,) * 3)
            engines[kind] = engine_of_run(accelerator, model, config)
            engines[kind].step = partial(keep_gradients, engines[kind])
        engine, (expected_loss, expected) = engines[kind], references[kind]
        own = make_batch(config)[distributed.rank() * share : (distributed.rank() + 1) * share]
        own = [batch.to(accelerator.device) for batch in own]
        with sabotaged(case.scheme):
            loss = float(training_step(engine, own, config)["loss"])
        errors = {name: relative_error(engine.gradients[name], expected[name]) for name in expected if counts(name)}
        worst = max(errors, key=errors.get)
        results.append((abs(loss - expected_loss) / expected_loss, errors[worst], worst))
    return results


def counts(parameter: str) -> bool:
    """Not the biases of attention's keys: softmax does not see them, so their gradient is rounding noise about zero."""
    return not parameter.endswith("attention.self.key.bias")


def keep_gradients(engine) -> tuple[Tensor, Tensor]:
    """In place of an engine's step: keeps whole gradients as `engine.gradients` and makes no update."""
    parameters = dict(engine.module.named_parameters())
    if not engine.sharded:
        learning = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        engine.gradients = {name: parameter.grad.clone() for name, parameter in learning.items()}
        engine.optimizer.zero_grad(set_to_none=True)
        return torch.tensor(0.0), torch.tensor(False)
    from deepspeed.utils import safe_get_full_grad

    engine.gradients = {name: safe_get_full_grad(parameter).clone() for name, parameter in parameters.items()}
    engine.wrapped.optimizer.zero_grad()
    averaged = engine.wrapped.optimizer.averaged_gradients
    if engine.stage == 3:
        averaged.clear()
    else:  # in place: parameters keep a reference to this dictionary
        averaged.update(dict.fromkeys(averaged))
    return torch.tensor(0.0), torch.tensor(False)


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Norm of the difference, relative to the norm of what is expected."""
    return float((value - expected).norm() / expected.norm().clamp_min(1e-12))


def run_cases(
    engine: str,
    world: int,
    accumulations: Sequence[int],
    losses: Sequence[str],
    schemes: Sequence[str] = ("",),
    bf16: bool = False,
    gpu: bool = False,
) -> dict[Case, tuple[float, float, str]]:
    """Per case the relative error of the loss, the largest relative error of a gradient, and its parameter."""
    with tempfile.TemporaryDirectory() as directory:
        text_tower = write_text_tower(directory)
        cases = [
            Case(engine, world, steps, loss, scheme) for loss in losses for steps in accumulations for scheme in schemes
        ]
        if engine == "plain":
            ranks = [run_alone(step_gradients, text_tower, cases, bf16, gpu)]
        else:
            environment = engine_environment(engine, directory, gpu)
            ranks = run_distributed(
                step_gradients, world, text_tower, cases, bf16, gpu, environment=environment, timeout=600
            )
    return {case: max((rank[i] for rank in ranks), key=lambda errors: errors[1]) for i, case in enumerate(cases)}
