"""The stages of the run, by worth; without torch until one is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from tests.benchmarks.gpu.bench import Bench


class Stage(NamedTuple):
    """A module of this package and the arguments of its `run`; `weight` is its share of the time."""

    name: str
    module: str
    weight: float
    arguments: Mapping[str, Any] = {}

    def load(self) -> Any:
        return import_module(f"{__package__}.{self.module}")

    def run(self, bench: Bench) -> None:
        self.load().run(bench, **self.arguments)


STAGES = (
    Stage("machine", "machine", 20),
    Stage("exactness-fp32", "exactness", 40, {"precision": "fp32"}),
    Stage("exactness-bf16", "exactness", 40, {"precision": "bf16"}),
    Stage("speed", "speed", 110, {"how": "eager"}),
    Stage("waits", "waits", 25),
    Stage("split", "split", 35),
    Stage("loss", "loss", 35),
    Stage("compiled", "speed", 130, {"how": "compiled"}),
    Stage("copies", "copies", 12),
    Stage("norms", "norms", 15),
    Stage("decode", "decode", 20),
    Stage("speed-fp32", "speed", 25, {"how": "fp32"}),
)
