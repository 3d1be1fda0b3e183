"""How long a save holds up training, and how long a run takes to resume: python -m tests.benchmarks.save [--json]

ResNet-50 and BERT-base (134 M parameters, 1.6 GB to save), fp32, one process, one thread, no GPU; small images and few
pairs, so that a step is as short as it can be. Saves in the background and in the foreground take turns in one process.
Starts are of `python -m train`, from the command to the end of the first step, fresh and resumed in turns; what they
compute is the same. `ranks`: steps and saves in the background of two ranks over gloo, by engine.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tests.benchmarks.batches import random_batch
from tests.support import running
from tests.support.distributed import run_distributed
from tests.support.exactness import engine_environment
from train import checkpoint, cli
from train.config import RunConfig
from train.run.records import METRICS, cut


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--saves", type=int, default=4, help="of each kind")
    parser.add_argument("--starts", type=int, default=3, help="of each kind")
    parser.add_argument("--layers", type=int, default=12, help="of the text tower")
    parser.add_argument("--json", action="store_true", help="one JSON object per measurement")
    parser.add_argument("--only", choices=MEASURED, nargs="+", default=list(MEASURED))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.only:
        with tempfile.TemporaryDirectory() as directory:
            found = MEASURED[name](config_of(Path(directory), options.layers), options)
        print(json.dumps({"measured": name} | found) if options.json else f"{name}: {found}", flush=True)


def config_of(directory: Path, layers: int) -> RunConfig:
    """A run on a few samples, whose towers are of their usual size."""
    from transformers import BertConfig

    config = running.prepare(directory, steps=1000, global_batch=4, micro_batch=4)
    BertConfig(num_hidden_layers=layers).save_pretrained(directory / "text")
    config.data.val, config.data.image_size, config.model.image.name = "", 64, "resnet50"
    config.checkpoint.every, config.checkpoint.keep = 0, 1
    return config


def stalls(config: RunConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of steps and saves, and saves in steps."""
    from train.checkpoint import TrainState
    from train.engine.build import engine_of_run
    from train.engine.ema import WeightAverage
    from train.engine.start import start
    from train.model.pair import build_model
    from train.saving import saver
    from train.step import training_step

    engine = engine_of_run(start(), build_model(config, (0.5,) * 3, (0.25,) * 3), config)
    average, state, directory = WeightAverage(engine, 0.0), TrainState(), Path(config.runs_dir) / config.name

    def step() -> float:
        began = time.perf_counter()
        training_step(engine, random_batch(config, state.step), config)
        state.step += 1
        return time.perf_counter() - began

    def save(writer: saver.Saver, wait: bool) -> float:
        began = time.perf_counter()
        writer.save(engine, average, state)
        if wait:
            writer.wait()
        return time.perf_counter() - began

    step()
    writers = {wait: saver.Saver(directory, config, {}, print) for wait in (False, True)}
    writers[True]._room = lambda *_: {}  # type: ignore[method-assign]  # as where memory has no room
    first = save(writers[False], False)
    writers[False].wait()
    steps, beside, written = [step()], [], []
    held: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(options.saves):
        for wait in (False, True):
            steps.append(step())
            held[wait].append(save(writers[wait], wait))
            began, thread = time.perf_counter(), writers[wait]._thread
            while thread is not None and thread.is_alive():
                beside.append(step())
            writers[wait].wait()
            if not wait:
                written.append(time.perf_counter() - began)
    usual = median(steps)
    return {
        "parameters": sum(parameter.numel() for parameter in engine.module.parameters()),
        "saved_gb": engine.saved_bytes(copies=1) / 1e9,
        "step_seconds": usual,
        "step_beside_a_write": median(beside),
        "first_stall_seconds": first,
        "background_seconds": median(held[False]),
        "foreground_seconds": median(held[True]),
        "background_in_steps": median(held[False]) / usual,
        "foreground_in_steps": median(held[True]) / usual,
        "written_after_seconds": median(written),
    }


def by_engine(config: RunConfig, options: argparse.Namespace) -> dict[str, Any]:
    """How long a save in the background holds up rank 0 of two, in steps: by wall time and by CPU time."""
    path = Path(config.runs_dir).parent / "ranks.yaml"
    config.train.global_batch = 8
    path.write_text(cli.to_yaml(config))
    found = {}
    for engine in ("ddp", "zero1", "zero2", "zero3"):
        environment = engine_environment(engine, path.parent)
        found[engine] = run_distributed(stall_of, 2, str(path), options.saves, environment=environment, timeout=1200)[0]
    return found


def stall_of(path: str, saves: int) -> dict[str, float]:
    """Medians of this rank; the first save, which allocates, is left out."""
    from train import distributed
    from train.checkpoint import TrainState
    from train.engine.build import engine_of_run
    from train.engine.ema import WeightAverage
    from train.engine.start import start
    from train.model.pair import build_model
    from train.saving import saver
    from train.step import training_step

    config = cli.load(path)
    engine = engine_of_run(start(), build_model(config, (0.5,) * 3, (0.25,) * 3), config)
    average, state = WeightAverage(engine, 0.0), TrainState()
    writer = saver.Saver(Path(config.runs_dir) / config.name, config, {}, print)
    taken: dict[str, list[float]] = {"step": [], "stall": [], "step_cpu": [], "stall_cpu": []}

    def timed(name: str, call: Callable[[], object]) -> None:
        distributed.barrier()
        began, cpu = time.perf_counter(), time.process_time()
        call()
        taken[f"{name}_cpu"].append(time.process_time() - cpu)
        taken[name].append(time.perf_counter() - began)

    for number in range(saves + 1):
        for _ in range(2):
            batch = random_batch(config, state.step)[distributed.rank() :][:1]
            timed("step", lambda batch=batch: training_step(engine, batch, config))
            state.step += 1
        timed("stall", lambda: writer.save(engine, average, state))
        writer.wait()
        if not number:
            taken = {name: [] for name in taken}
    middle = {name: median(values) for name, values in taken.items()}
    middle["stall_in_steps"] = middle["stall"] / middle["step"]
    return middle | {"stall_in_steps_cpu": middle["stall_cpu"] / middle["step_cpu"]}


def starts(config: RunConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds to the end of the first step of a fresh run, and of one that resumes."""
    directory = Path(config.runs_dir).parent
    config.name = "resumed"
    to_first_step(config, directory, signal.SIGUSR1)
    assert checkpoint.newest(running.run_dir(config)) is not None
    found: dict[str, list[float]] = {"resumed": [], "fresh": []}
    for number in range(options.starts):
        config.name = f"fresh{number}"
        found["fresh"].append(to_first_step(config, directory, signal.SIGKILL))
        config.name = "resumed"
        found["resumed"].append(to_first_step(config, directory, signal.SIGKILL))
    seconds = {f"{kind}_seconds": median(values) for kind, values in found.items()}
    return seconds | {"ratio": seconds["resumed_seconds"] / seconds["fresh_seconds"]}


def to_first_step(config: RunConfig, directory: Path, ended_by: signal.Signals) -> float:
    """Seconds from a run's start until it has logged another step than its newest checkpoint's."""
    reached = max(checkpoint.steps(running.run_dir(config)), default=0)
    if reached:
        cut(running.run_dir(config) / METRICS, lambda record: record["step"] <= reached)
    began = time.perf_counter()
    process = running.start(running.command(config, directory), directory / "run.log")
    while not any(record["step"] > reached for record in running.metrics(config)):
        assert process.poll() is None, (directory / "run.log").read_text()[-3000:]
        time.sleep(0.02)
    seconds = time.perf_counter() - began
    os.killpg(process.pid, ended_by)
    process.wait()
    return seconds


MEASURED = {"save": stalls, "start": starts, "ranks": by_engine}

if __name__ == "__main__":
    main()
