"""The kinds of BatchNorm at the sizes of a ResNet-50, forward and backward, in bf16 and channels_last."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from tests.benchmarks.gpu.bench import Bench, Row
from train.model.norm import convert

ROWS = 128
SIZES = ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7))
"""Channels, and height and width of a map."""
KINDS = ("torch", "batch", "sync_batch", "group", "frozen")


def run(bench: Bench) -> None:
    for channels, side in ((8, 4),) if bench.tiny else SIZES:
        for layout in ("NHWC", "NCHW") if channels == SIZES[1][0] else ("NHWC",):
            for dtype in (torch.bfloat16, torch.float32) if channels == SIZES[1][0] else (torch.bfloat16,):
                for kind in KINDS:
                    name = f"{kind}, {channels} x {side} x {side}, {layout}, {str(dtype).removeprefix('torch.')}"
                    bench.row(name, partial(measure, bench, kind, channels, side, layout, dtype))


def measure(bench: Bench, kind: str, channels: int, side: int, layout: str, dtype: torch.dtype) -> Row:
    module = nn.Sequential(nn.BatchNorm2d(channels))
    if kind != "torch":
        convert(module, kind)  # type: ignore[arg-type]
    module.to(bench.device).train()
    shape = (4 if bench.tiny else ROWS, channels, side, side)
    layouts = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}
    x = torch.randn(shape, device=bench.device).to(dtype).contiguous(memory_format=layouts[layout]).requires_grad_()
    gradient = torch.randn_like(x)

    def both() -> None:
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = module(x)
        y.backward(gradient.to(y.dtype))
        x.grad = None

    seconds, spread = bench.time(both, budget=0.1)
    return {"ms": 1e3 * seconds, "gb_per_s": 5 * x.nbytes / seconds / 1e9, "spread": spread}
