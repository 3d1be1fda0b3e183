"""Whether gradients are those of the textbook on this device, and cached features those of their second pass."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from data_pipeline.batch import MicroBatch
from data_pipeline.seeds import micro_batch_seed
from tests.benchmarks.gpu.bench import Bench, Row
from tests.benchmarks.gpu.towers import Shape, make_config, make_engine, make_step
from tests.support.exactness import (
    BF16_ON_GPU,
    TOLERANCE,
    Case,
    counts,
    keep_gradients,
    relative_error,
    step_gradients,
    write_text_tower,
)
from train.config import RunConfig
from train.engine.base import Engine
from train.step import training_step

LENGTHS = (8, 24, 40, 77)
CASES = [Case("plain", 1, parts, loss) for loss in ("tiled", "sigmoid") for parts in (1, 4)]


def run(bench: Bench, precision: str) -> None:
    tower = write_text_tower(bench.path.with_suffix(".tower"))
    found: list[tuple[float, float, str]] = []
    cases = CASES[:2] if bench.tiny else CASES
    bf16 = precision == "bf16"
    limit = BF16_ON_GPU if bf16 and bench.on_gpu else TOLERANCE
    bench.row("textbook", lambda: textbook(step_gradients(tower, cases, bf16, bench.on_gpu), found, limit))
    for case, (loss, gradient, parameter) in zip(cases, found, strict=False):
        name = f"textbook, {case.loss}, {'resident' if case.accumulation == 1 else 'cached'}"
        bench.row(name, lambda row={"loss_error": loss, "gradient_error": gradient, "worst": parameter}: row)

    torch.backends.cudnn.deterministic = False  # as in a run
    config = make_config(bench)
    engine = make_engine(config, precision)
    replays(bench, engine, config)
    bench.row("cached against resident", lambda: cached_against_resident(bench, engine, config))


def textbook(results: list[tuple[float, float, str]], found: list[tuple[float, float, str]], limit: float) -> Row:
    found += results
    worst = max(gradient for _, gradient, _ in results)
    return {"gradient_error": worst, "passed": worst <= limit}


def replays(bench: Bench, engine: Engine, config: RunConfig) -> None:
    """Rows that say whether a pass without a graph and its second one with a graph are the same to the last bit."""
    rows = 4 if bench.tiny else 64
    for length in (*LENGTHS[: 2 if bench.tiny else None], None):
        batches = make_step(config, Shape(rows, 2, 1), ragged=length is None, device=engine.device)
        for batch in batches if length else ():
            batch.ids_BL, batch.mask_BL = batch.ids_BL[:, :length], batch.mask_BL[:, :length]
        name = f"replay, {f'{length} tokens' if length else 'ragged'}"
        bench.row(name, lambda batches=batches: replay(engine, batches))


def replay(engine: Engine, batches: list[MicroBatch]) -> Row:
    seeds = [micro_batch_seed(0, batch.step, batch.index) for batch in batches]
    engine.announce_backward(last=True)
    cached, again = engine.features(batches, seeds), engine.features(batches, seeds)
    with_graph = engine.forward(batches, seeds)
    other = engine.features(batches, [seed + 1 for seed in seeds])
    row: Row = {}
    for tower in ("image", "text"):
        row[f"{tower}_same_bits"] = torch.equal(cached[tower], with_graph[tower])
        row[f"{tower}_error"] = relative_error(with_graph[tower].detach(), cached[tower])
        row[f"{tower}_deterministic"] = torch.equal(cached[tower], again[tower])
    row["dropout_drops"] = not torch.equal(cached["text"], other["text"])
    return row


def cached_against_resident(bench: Bench, engine: Engine, config: RunConfig) -> Row:
    """How far the gradients of the same step are apart; and two resident ones, of which atomics change the order."""
    gradients: list[dict[str, Tensor]] = []
    size = 4 if bench.tiny else 32
    plain_step, engine.step = engine.step, partial(keep_gradients, engine)
    try:
        for resident in (4, 4, 1):
            batches = make_step(config, Shape(size, 4, resident), ragged=True, device=engine.device)
            training_step(engine, batches, config)
            gradients.append(engine.gradients)
    finally:
        engine.step = plain_step
    first, second, cached = gradients
    errors = {name: relative_error(cached[name], first[name]) for name in first if counts(name)}
    worst = max(errors, key=errors.__getitem__)
    whole = [torch.cat([one[name].flatten() for name in first]) for one in (first, second, cached)]
    return {
        "gradient_error": relative_error(whole[2], whole[0]),
        "error_of_a_repetition": relative_error(whole[1], whole[0]),
        "worst_error": errors[worst],
        "worst": worst,
    }
