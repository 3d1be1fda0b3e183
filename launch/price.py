"""What a whole run takes on 1 to 64 devices of this kind: python -m launch.price --config RUN.yaml [--field value ...]

    --gpus 1 8 64          numbers of processes to price, one device each (default: 1 2 4 8 16 32 64)
    --engine zero2         ddp, zero1, zero2 or zero3 (default: ddp)
    --precision bf16       or fp32 (default: bf16 on GPUs, fp32 on CPU cores)
    --price-per-hour 2.5   of one device
    --seconds 60           about how long to measure here
    --json                 one JSON object instead of the table

It measures, with the run's own model, data and functions, steps of a few micro-batches, the loss, the loader and the
collectives of two processes, and adds them up. Of the exchange nothing is taken to hide behind the computation, and
every link to be like those here; evaluation and checkpoints are left out, and train.resident null counts as 1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data_pipeline.batch import MicroBatch
from data_pipeline.loader import FOR_EVER
from data_pipeline.stages.slots import check_batch
from data_pipeline.stages.workers import number_of_workers
from data_pipeline.tokenizer import Tokenizer
from launch.estimate import in_words
from launch.links import Links, measure_links
from train import cli, distributed
from train.checks import check
from train.config import RunConfig
from train.engine.base import Engine
from train.engine.build import engine_of_run
from train.engine.optim import set_lrs
from train.engine.start import join, make_accelerator, start
from train.feed import Feed
from train.loss.ids import Rows
from train.memory import engine_name
from train.model.pair import build_model
from train.model.text_files import own_tokenizer
from train.step import training_step
from train.terms.objective import Objective

if TYPE_CHECKING:
    from accelerate import Accelerator

ROOT = Path(__file__).resolve().parents[1]
GPUS = (1, 2, 4, 8, 16, 32, 64)
ENGINES = tuple(map(engine_name, range(4)))
PRECISIONS = {"bf16": "bf16", "fp32": "no"}
"""Accelerate's words for them."""
MOST_ROWS = 4096
"""Of the loss that is measured; larger ones take as much longer as they have more logits."""


@dataclass(frozen=True)
class Calibration:
    """Seconds on one device of this machine, and bytes; under ZeRO `stage`, 0 for DDP.

    fixed: a step's part that does not depend on its micro-batches (optimizer). kept: a micro-batch whose activations
    stay; cached: one that goes forward twice. logit: of the loss, with its gradient, per row and column. loader: a
    micro-batch of the loader by itself; alone: no other process makes it meanwhile. gradients: bytes of them all;
    features: bytes of a pair's that ranks gather. links: None where only one device is here.
    """

    fixed: float
    kept: float
    cached: float
    logit: float
    loader: float
    alone: bool
    gradients: int
    features: int
    links: Links | None
    stage: int = 0


def exchanged(stage: int, parts: int) -> tuple[float, float]:
    """How often a step all-reduces as many bytes as there are of gradients, and how often it gathers as many.

    As DeepSpeed 0.19 does it with its defaults, which tests/launch/test_price.py counts: stages 1 and 2 all-reduce and
    keep their part of the result, 2 for every part of a rank's share; stage 3 reduces and scatters, which is half of
    that, and gathers the weights for every forward and every backward pass. Where there is one part, its backward pass
    finds them, in towers of less than 1e9 parameters.
    """
    if stage == 3:
        return parts / 2, 1.0 if parts == 1 else 3.0 * parts - 1
    return float(parts if stage == 2 else 1), float(stage > 0)


def predict(found: Calibration, config: RunConfig, world: int) -> dict[str, float]:
    """Seconds of a step on so many devices, by part.

    Raises:
        ValueError: the global batch cannot be shared among them, or the exchange between them was not measured.
    """
    train = config.train
    check_batch(train.global_batch, train.micro_batch, world)
    if world > 1 and found.links is None:
        raise ValueError("no link between devices was measured: run it where there are two or more")
    share = train.global_batch // (train.micro_batch * world)
    resident = train.resident or 1
    kept = share % resident or min(share, resident)  # the last part of the share
    towers = kept * found.kept + (share - kept) * found.cached
    loss = found.logit * train.global_batch * (train.global_batch // world)
    exchange = 0.0
    if found.links is not None:
        features = train.global_batch * found.features  # gathered, and their gradients reduced
        reduced, gathered = (found.gradients * times for times in exchanged(found.stage, -(-share // resident)))
        exchange = found.links.of(world, reduced + features, gathered + features)
    fixed = found.fixed / (world if found.stage else 1)  # under ZeRO each updates its part
    computing = fixed + towers + loss + exchange
    loader = share * found.loader
    wait = loader if found.alone else max(0.0, loader - computing)
    parts = {"towers": towers, "loss": loss, "exchange": exchange, "other": fixed, "wait": wait}
    return parts | {"step": sum(parts.values())}


def calibrate(
    config: RunConfig,
    engine: Engine,
    links: Links | None,
    seconds: float,
    feed: Feed | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Calibration:
    """Measure this run on this device for about so many seconds.

    Args:
        engine: of the run's model, in one process.
        feed: the run's data; None leaves the loader out.
    """
    train, model = config.train, engine.module
    loader, batches = 0.0, [model.blank_micro_batch(train.micro_batch, config.data.max_tokens)]
    if feed is not None:
        loader, batches = _loader(config, feed, own_tokenizer(model, config), seconds / 4, clock)
    batches = [batch.to(engine.device) for batch in batches]
    ids_B = torch.arange(train.micro_batch, device=engine.device)
    batches = [replace(batch, image_ids_B=ids_B, text_ids_B=ids_B) for batch in batches]

    def step(count: int, resident: int) -> float:
        shape = replace(config, train=replace(train, global_batch=count * train.micro_batch, resident=resident))
        own = [replace(batches[index % len(batches)], index=index) for index in range(count)]
        began = clock()
        training_step(engine, own, shape)
        wait_for(engine.device)
        return clock() - began

    set_lrs(engine.optimizer, 0, 10_000, config.optim)
    shapes = [(1, 1), (2, 1), (3, 1)] + ([(2, 2)] if (train.resident or 1) > 1 else [])
    times: dict[tuple[int, int], list[float]] = {shape: [] for shape in shapes}
    deadline, rounds = time.monotonic() + seconds / 2, 0
    while rounds < 3 or time.monotonic() < deadline:
        for shape in shapes:
            times[shape].append(step(*shape))
        rounds += 1
    median = {shape: statistics.median(found[1:]) for shape, found in times.items()}
    cached = max(0.0, median[3, 1] - median[2, 1])
    # Without a second one that is kept there is no telling: three passes of four, by their FLOPs.
    kept = median[2, 2] - median[1, 1] if (2, 2) in median else 0.75 * cached
    fixed = max(0.0, median[1, 1] - kept)
    logit, features = _loss(config, engine, clock)
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    alone = number_of_workers(config.data.workers) == 0
    return Calibration(fixed, kept, cached, logit, loader, alone, 4 * learning, features, links, engine.stage)


def _loader(
    config: RunConfig, feed: Feed, tokenizer: Tokenizer, seconds: float, clock: Callable[[], float]
) -> tuple[float, list[MicroBatch]]:
    """Seconds per micro-batch of the run's loader by itself, and some of what it makes."""
    batches = iter(feed.batches(tokenizer, 0, FOR_EVER))
    ahead = 1 + number_of_workers(config.data.workers) * config.data.prefetch
    made = list(islice(batches, ahead))  # what is made while nobody waits says nothing of the rate
    began, until, count = clock(), time.monotonic() + seconds, 0
    for batch in batches:
        count += 1
        made = [*made[-3:], batch]
        if count >= 4 and time.monotonic() > until:
            break
    return (clock() - began) / max(count, 1), made


def _loss(config: RunConfig, engine: Engine, clock: Callable[[], float]) -> tuple[float, int]:
    """Seconds of the loss and its gradient per logit, and the bytes of a pair's features that ranks gather."""
    outputs = engine.features([engine.module.blank_micro_batch().to(engine.device)], [0])
    objective = Objective(config)
    dtype = torch.float64 if engine.device.type == "cpu" else torch.float32
    rows = min(MOST_ROWS, config.train.global_batch)
    full, width = {}, 0
    for name, value in outputs.items():
        if name in objective.scalars:
            full[name] = value.detach().to(dtype).requires_grad_()
            continue
        width += value[0].numel() if objective.gathers(name) else 0
        shape = (rows, *value.shape[1:])
        random = torch.nn.functional.normalize(torch.randn(shape, device=engine.device, dtype=dtype), dim=-1)
        full[name] = random.requires_grad_()
    ids = torch.arange(rows, device=engine.device)
    took = []
    for _ in range(3):
        began = clock()
        total, _parts = objective(full, Rows(0, rows, ids, ids))
        torch.autograd.grad(total, list(full.values()), materialize_grads=True)
        wait_for(engine.device)
        took.append(clock() - began)
    return statistics.median(took) / rows**2, width * (8 if dtype == torch.float64 else 4)


def all_ranks_here(stage: int) -> Accelerator:
    """This process as all ranks of a run under ZeRO `stage`, 0 for none; DeepSpeed wants a process group."""
    if stage:
        ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        os.environ.update(ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"})
    join()
    return make_accelerator(stage)


def usual_precision() -> str:
    """Of the launchers, where they are not told."""
    return "bf16" if torch.cuda.is_available() else "fp32"


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def links_here() -> Links | None:
    """Those of two processes of this machine; None where it has a single GPU."""
    on_gpu = torch.cuda.is_available()
    if on_gpu and torch.cuda.device_count() < 2:
        return None
    engine = "ddp" if on_gpu else "cpu"
    launcher = ["--config_file", str(ROOT / f"launch/accelerate/{engine}.yaml"), "--num_processes", "2"]
    command = [sys.executable, "-m", "launch.start", *launcher, "--main_process_port", "0"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    done = subprocess.run(
        [*command, "-m", "launch.price", "--links"], env=environment, capture_output=True, text=True, timeout=300
    )
    if done.returncode or "{" not in done.stdout:
        raise ValueError(f"two processes could not exchange here: {(done.stderr or done.stdout).strip()[-500:]}")
    return Links(**json.loads(done.stdout[done.stdout.index("{") :]))


def table(how: str, rows: Sequence[dict[str, Any]], price: float) -> str:
    """For the screen."""
    lines = [how]
    heads = ("devices", "step", "towers", "loss", "exchange", "wait", "whole run", "device-hours")
    lines.append("".join(f"{head:>14}" for head in heads) + ("         price" if price else ""))
    for row in rows:
        if "why" in row:
            lines.append(f"{row['devices']:>14}  {row['why']}")
            continue
        cells = [f"{row['devices']}", f"{row['step']:.3g} s"]
        cells += [f"{row[part] / row['step']:.0%}" for part in ("towers", "loss", "exchange", "wait")]
        cells += [in_words(row["seconds"]), f"{row['device_hours']:,.1f}"]
        cells += [f"{row['price']:,.2f}"] if price else []
        lines.append("".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def priced(found: Calibration, config: RunConfig, steps: int, gpus: Sequence[int], price: float) -> list[dict]:
    """A row per number of devices: its step by part, or `why` it has none; seconds, device-hours, price of the run."""
    rows = []
    for devices in gpus:
        try:
            parts = predict(found, config, devices)
        except ValueError as error:
            rows.append({"devices": devices, "why": cli.with_flags(str(error))})
            continue
        seconds = steps * parts["step"]
        hours = devices * seconds / 3600
        rows.append({"devices": devices, **parts, "seconds": seconds, "device_hours": hours, "price": hours * price})
    return rows


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 the user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m launch.price", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--gpus", type=int, nargs="+", default=list(GPUS), help=argparse.SUPPRESS)
    parser.add_argument("--engine", choices=ENGINES, default="ddp", help=argparse.SUPPRESS)
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="", help=argparse.SUPPRESS)
    parser.add_argument("--price-per-hour", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--links", action="store_true", help=argparse.SUPPRESS)
    options, fields = parser.parse_known_args(argv)
    if options.links:
        return _print_links()
    return cli.exit_status(lambda: _price(options, fields))


def _price(options: argparse.Namespace, fields: list[str]) -> None:
    if min(options.gpus) < 1:
        raise ValueError(f"--gpus {min(options.gpus)}: give numbers of processes from 1 on, such as --gpus 1 8 64")
    if not 0 <= options.price_per_hour < float("inf"):
        raise ValueError(f"--price-per-hour {options.price_per_hour}: give the price of one device, such as 2.5")
    if "RANK" in os.environ:
        raise ValueError("launch.price starts its processes itself: run it without a launcher")
    config = cli.parse(fields)
    check(config)
    os.environ["ACCELERATE_MIXED_PRECISION"] = PRECISIONS[precision := options.precision or usual_precision()]
    feed = Feed(config)
    with cli.stdout_kept():
        links = links_here() if max(options.gpus) > 1 else None
        accelerator = all_ranks_here(ENGINES.index(options.engine))
        model = build_model(config, feed.mean, feed.std, pretrained=False)
        engine = engine_of_run(accelerator, model, config)
        endless = Feed(replace(config, train=replace(config.train, steps=feed.steps + 10**6)))
        found = calibrate(config, engine, links, options.seconds, endless)
    rows = priced(found, config, feed.steps, options.gpus, options.price_per_hour)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"a CPU, {torch.get_num_threads()} threads"
    if options.json:
        said = {"device": device, "steps": feed.steps, "engine": options.engine, "precision": precision}
        print(json.dumps(said | {"calibration": asdict(found), "runs": rows}, indent=2))
    else:
        how = f"{feed.steps} steps of {config.train.global_batch} pairs on {device}, {options.engine}, {precision}:"
        print(table(how, rows, options.price_per_hour))


def _print_links() -> int:
    start()
    found = measure_links()
    if distributed.is_main():
        print(json.dumps(asdict(found)), flush=True)
    distributed.barrier()
    return 0


if __name__ == "__main__":
    sys.exit(main())
