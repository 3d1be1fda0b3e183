"""What the machine is, and what it can do at most: products of matrices, memory, launches."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from tests.benchmarks.gpu.bench import Bench, Row

PACKAGES = ("torch", "torchvision", "transformers", "accelerate", "triton", "timm", "deepspeed", "webdataset")


def run(bench: Bench) -> None:
    bench.row("machine", lambda: describe(bench))
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("TF32", torch.float32, True),
        ("fp32", torch.float32, False),
    ):
        bench.row(f"matrix product, {name}", lambda dtype=dtype, tf32=tf32: product(bench, dtype, tf32))
    bench.row("copy on the device", lambda: copy(bench))
    bench.row("launches", lambda: launches(bench))


def describe(bench: Bench) -> Row:
    row: Row = {"device": "cpu", "cores": os.cpu_count(), "python": platform.python_version()}
    if bench.on_gpu:
        properties = torch.cuda.get_device_properties(0)
        row |= {"device": properties.name, "memory_gb": properties.total_memory / 1e9}
        row |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    for name in PACKAGES:
        try:
            row[name] = version(name)
        except PackageNotFoundError:
            row[name] = "none"
    return row


def product(bench: Bench, dtype: torch.dtype, tf32: bool) -> Row:
    size = 128 if bench.tiny else 8192
    a, b = (torch.randn(size, size, device=bench.device, dtype=dtype) for _ in range(2))
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        seconds, spread = bench.time(lambda: a @ b, budget=0.5)
    finally:
        torch.set_float32_matmul_precision("highest")
    return {"size": size, "tflops": 2 * size**3 / seconds / 1e12, "spread": spread}


def copy(bench: Bench) -> Row:
    source = torch.ones(1 << (16 if bench.tiny else 29), dtype=torch.float32, device=bench.device)
    target = torch.empty_like(source)
    seconds, spread = bench.time(lambda: target.copy_(source), budget=0.3)
    return {"gb": source.nbytes / 1e9, "gb_per_s": 2 * source.nbytes / seconds / 1e9, "spread": spread}


def launches(bench: Bench) -> Row:
    """What an operation on few numbers costs the host: no step takes less than that many times its operations."""
    x = torch.zeros(64, device=bench.device)
    seconds, spread = bench.time(lambda: [x.add_(1) for _ in range(1000)], budget=0.1)
    return {"us_per_operation": seconds / 1000 * 1e6, "spread": spread}
