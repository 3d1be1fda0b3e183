"""Pairs per second of Duet's step, beside the bare towers in the same process; eager or compiled.

The bare towers see the same micro-batches, one after the other, each with a loss of its own, and update once per step:
what a plain loop does at the batch size of a micro-batch.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from tests.benchmarks.gpu.bench import Bench, Row
from tests.benchmarks.gpu.exactness import replay
from tests.benchmarks.gpu.towers import BareRun, Shape, lengths_of, make_config, make_engine, make_step
from train.model.flops import PairFlops, peak_tflops
from train.step import training_step

SHAPES = (Shape(128, 4, 4), Shape(128, 4, 1), Shape(64, 8, 1), Shape(512, 1, 1), Shape(128, 32, 1))
PIECES = 4
TINY = (Shape(4, 2, 2), Shape(4, 2, 1))


def run(bench: Bench, how: str) -> None:
    """How: eager, compiled, or fp32."""
    speed = Speed(bench, "fp32" if how == "fp32" else "bf16")
    getattr(speed, how)()


class Speed:
    """Both contestants at one precision, and the rows of each."""

    def __init__(self, bench: Bench, precision: str) -> None:
        self.bench, self.precision, self.config = bench, precision, make_config(bench)
        self.engine = make_engine(self.config, precision)
        self.bare = BareRun(self.config, precision, self.engine.device)
        self.flops = PairFlops(self.engine.module)
        self.shapes = TINY if bench.tiny else SHAPES

    def eager(self) -> None:
        for ragged in (False, True):
            for number, shape in enumerate(self.shapes):
                self.duet(shape, ragged)
                # The bare towers keep nothing between micro-batches: other shapes differ by the update alone.
                if number in (0, 2, 3):
                    self.plain(shape, ragged)
        self.config.model.text.pieces = PIECES
        for shape in self.shapes[:2]:
            self.duet(shape, True, f"captions in {PIECES} pieces, ")
        self.config.model.text.pieces = 1
        self.engine = make_engine(self.config, self.precision, nhwc=True)
        self.duet(self.shapes[0], False, "NHWC weights, ")
        torch.backends.cudnn.benchmark = True
        self.duet(self.shapes[0], False, "NHWC weights, cudnn.benchmark, ")
        self.plain(self.shapes[0], False, "cudnn.benchmark, ")

    def fp32(self) -> None:
        shape = self.shapes[1]._replace(share=2)
        self.duet(shape, True)
        self.plain(shape, True)

    def compiled(self) -> None:
        first, second = self.shapes[:2]
        # On a CPU the script is only tried, and its compiler would take minutes.
        backend = "inductor" if self.bench.on_gpu else "eager"
        # Duet first: compiling takes minutes, and what is cut off comes last.
        self.engine.module.compile_towers(backend)
        self.duet(first, False)
        self.duet(second, False)
        batches = make_step(self.config, second, False, self.engine.device)
        self.bench.row("duet, replay", lambda: replay(self.engine, batches))
        for module in (self.bare.model.image, self.bare.model.text):
            module.compile(backend=backend)
        self.plain(first, False)
        for shape in (first, second):
            self.duet(shape, True)
        self.plain(first, True)
        self.bench.row("duet, replay, ragged", lambda: self.replay_ragged(second))

    def replay_ragged(self, shape: Shape) -> Row:
        return replay(self.engine, make_step(self.config, shape, True, self.engine.device))

    def duet(self, shape: Shape, ragged: bool, variant: str = "") -> None:
        def measure() -> Row:
            batches = make_step(self.config, shape, ragged, self.engine.device)
            step = lambda: training_step(self.engine, batches, self.config)  # noqa: E731
            return self.rates(step, shape, lengths_of(batches))

        self.bench.row(f"duet, {variant}{shape}, {_captions(ragged)}", measure)

    def plain(self, shape: Shape, ragged: bool, variant: str = "") -> None:
        def measure() -> Row:
            batches = make_step(self.config, shape, ragged, self.engine.device)
            return self.rates(lambda: self.bare.step(batches), shape, lengths_of(batches))

        self.bench.row(f"bare, {variant}{shape.micro} x {shape.share}, {_captions(ragged)}", measure)

    def rates(self, step: Callable[[], object], shape: Shape, lengths: list[int]) -> Row:
        dynamo = sys.modules.get("torch._dynamo.utils")  # there once something is compiled
        counters = dynamo.counters if dynamo else {}
        counters.clear()
        began = time.perf_counter()
        step()
        self.bench.wait()
        first = time.perf_counter() - began
        seconds, spread = self.bench.time(step, budget=2.0, most=20, warm=1)
        pairs = shape.micro * shape.share
        tflops = self.flops.training(lengths) * pairs / seconds / 1e12
        peak = peak_tflops(self.precision)
        row = {
            "pairs_per_s": pairs / seconds,
            "step_s": seconds,
            "spread": spread,
            "model_tflops": tflops,
            "mfu": tflops / peak if peak else None,
            "peak_gb": self.bench.peak_gb(),
            "first_step_s": first,
        }
        if counters:
            row |= {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}
        return row


def _captions(ragged: bool) -> str:
    return "ragged" if ragged else "full"
