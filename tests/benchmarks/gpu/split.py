"""Where the time of a step goes: by its parts, on the host and on the device, and by the dearest operations."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

from data_pipeline.batch import MicroBatch
from tests.benchmarks.gpu.bench import Bench, Row
from tests.benchmarks.gpu.towers import BareRun, Shape, make_config, make_engine, make_step
from train import step as step_module
from train.config import RunConfig
from train.engine.base import Engine
from train.step import training_step

SHAPES = (Shape(128, 4, 1), Shape(128, 4, 4))
STEPS, DEAREST = 3, 14


def run(bench: Bench) -> None:
    config = make_config(bench)
    engine = make_engine(config, "bf16")
    for shape in (Shape(4, 2, 1),) if bench.tiny else SHAPES:
        batches = make_step(config, shape, True, engine.device)
        bench.row(f"parts, {shape}", lambda batches=batches: parts(bench, engine, config, batches))
        step = lambda batches=batches: training_step(engine, batches, config)  # noqa: E731
        bench.row(f"operations, {shape}", lambda step=step: operations(bench, step))
    bare = BareRun(config, "bf16", engine.device)
    bench.row(f"operations, bare, {shape.micro} x {shape.share}", lambda: operations(bench, lambda: bare.step(batches)))


class Stopwatch:
    """Seconds of named sections: of the host, and between two points of the device's stream, its idle time included."""

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        self.host: dict[str, float] = defaultdict(float)
        self.events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        first = self._event()
        yield
        self.host[name] += time.perf_counter() - began
        if first is not None:
            self.events.append((name, first, self._event()))

    def _event(self) -> Any:
        if not self.on_gpu:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def around(self, name: str, function: Callable) -> Callable:
        """The function as a section of this name."""

        @wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            with self.section(name):
                return function(*arguments, **options)

        return timed

    def device(self) -> dict[str, float]:
        """Seconds by section; on a CPU the host's."""
        if not self.on_gpu:
            return dict(self.host)
        torch.cuda.synchronize()
        seconds: dict[str, float] = defaultdict(float)
        for name, first, last in self.events:
            seconds[name] += first.elapsed_time(last) / 1e3
        return dict(seconds)


def parts(bench: Bench, engine: Engine, config: RunConfig, batches: list[MicroBatch]) -> Row:
    """Milliseconds of a step, by part. What the whole has beside the parts is `other`."""
    training_step(engine, batches, config)
    watch = Stopwatch(bench.on_gpu)
    sections = [
        (engine, "features", "cached pass"),
        (engine, "forward", "forward"),
        (step_module, "loss_gradients", "gather and loss"),
        (engine, "backward", "backward"),
        (engine, "step", "optimizer"),
        (step_module.norm, "update_running", "running statistics"),
    ]
    with ExitStack() as stack:
        for owner, name, section in sections:
            timed = watch.around(section, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, timed))
        bench.wait()
        for _ in range(STEPS):
            with watch.section("whole"):
                training_step(engine, batches, config)
    row: Row = {}
    for side, seconds in (("device", watch.device()), ("host", watch.host)):
        whole = seconds["whole"]
        other = 2 * whole - sum(seconds.values())
        row |= {f"{side}_{name}_ms": 1e3 * value / STEPS for name, value in (seconds | {"other": other}).items()}
    return row


def operations(bench: Bench, step: Callable[[], object]) -> Row:
    """The dearest operations of a step by their own time on the device, and the share of the time that it is busy."""
    step()
    bench.wait()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.on_gpu else [])]
    began = time.perf_counter()
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            step()
        bench.wait()
        wall = time.perf_counter() - began
    kind = "device" if bench.on_gpu else "cpu"
    averages = profiler.key_averages()
    own = {one: getattr(one, f"self_{kind}_time_total") / 1e6 for one in averages}
    if bench.on_gpu:  # kernels alone: an operation's own time is that of the kernels that it started
        cuda = torch.autograd.DeviceType.CUDA
        own = {one: value for one, value in own.items() if one.device_type == cuda and not one.is_user_annotation}
    busy = sum(own.values())
    dearest = sorted(own, key=own.__getitem__, reverse=True)[:DEAREST]
    return {
        "step_ms": 1e3 * wall / STEPS,
        "busy": busy / wall,
        "kernels": sum(one.count for one in own) / STEPS,
        "dearest": {one.key[:90]: f"{1e3 * own[one] / STEPS:.2f} ms, {one.count // STEPS} calls" for one in dearest},
    }
