"""Images on their way to the device: from pinned memory and from other, alone and beside computation."""

from __future__ import annotations

import torch

from data_pipeline.batch import MicroBatch
from tests.benchmarks.gpu.bench import Bench, Row
from train.arrival import Arrivals

ROWS = 128


def run(bench: Bench) -> None:
    shape = (4, 3, 32, 32) if bench.tiny else (ROWS, 3, 224, 224)
    pageable = torch.randint(0, 256, shape, dtype=torch.uint8)
    pinned = pageable.pin_memory() if bench.on_gpu else pageable
    for name, images in (("pageable", pageable), ("pinned", pinned)):
        bench.row(f"copy of {shape[0]} images, {name}", lambda images=images: alone(bench, images))
    bench.row("beside products of matrices", lambda: beside(bench, pinned))
    for way in ("one by one", "ahead"):
        bench.row(
            f"micro-batches of a run beside products, {way}", lambda way=way: taken(bench, pinned, way == "ahead")
        )


def alone(bench: Bench, images: torch.Tensor) -> Row:
    seconds, spread = bench.time(lambda: images.to(bench.device, non_blocking=True), budget=0.3)
    return {"ms": 1e3 * seconds, "gb_per_s": images.nbytes / seconds / 1e9, "spread": spread}


def beside(bench: Bench, images: torch.Tensor) -> Row:
    """Milliseconds of products alone, copies alone, and both: in one stream, and with a stream for the copies.

    Hidden: the share of the copies' time that the stream of its own saves.
    """
    size = 64 if bench.tiny else 8192
    a = torch.randn(size, size, device=bench.device, dtype=torch.bfloat16)
    stream = torch.cuda.Stream() if bench.on_gpu else None

    def compute() -> None:
        for _ in range(4):
            a @ a

    def copies() -> None:
        for _ in range(8):
            images.to(bench.device, non_blocking=True)

    def one_stream() -> None:
        copies()
        compute()

    def two_streams() -> None:
        with torch.cuda.stream(stream):
            copies()
        compute()

    runs = {"compute": compute, "copies": copies, "one_stream": one_stream, "two_streams": two_streams}
    times = {name: 1e3 * bench.time(run, budget=0.3)[0] for name, run in runs.items()}
    hidden = (times["one_stream"] - times["two_streams"]) / times["copies"]
    return {f"{name}_ms": value for name, value in times.items()} | {"hidden": hidden}


def taken(bench: Bench, images: torch.Tensor, ahead: int) -> Row:
    """Milliseconds per micro-batch of a run that does four products with each, and of the products alone."""
    size, count = (64, 4) if bench.tiny else (8192, 24)
    a = torch.randn(size, size, device=bench.device, dtype=torch.bfloat16)
    ids_BL = torch.ones(len(images), 24, dtype=torch.int64)
    batch = MicroBatch(images, ids_BL.pin_memory() if bench.on_gpu else ids_BL, ids_BL, 0, 0, [])

    def compute() -> None:
        for _ in range(4):
            a @ a

    def run() -> None:
        batches = iter([batch] * count)
        for one in Arrivals(batches, bench.device, ahead) if ahead else batches:
            one.to(bench.device, non_blocking=True)
            compute()

    return {
        "ms": 1e3 * bench.time(run, budget=0.5)[0] / count,
        "products_ms": 1e3 * bench.time(lambda: [compute() for _ in range(count)], budget=0.5)[0] / count,
    }
