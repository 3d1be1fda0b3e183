"""Time and memory of the contrastive loss, forward and backward: the whole matrix of logits against tiles.

    python -m tests.benchmarks.loss --json [--batch 4096] [--dim 512] [--repeats 3] [--threads 1] [--kind sigmoid]
    python -m tests.benchmarks.loss --open-clip PYTHON     also open_clip's ClipLoss, from the environment of PYTHON

Every pass runs in a process of its own, after a small pass that loads the libraries; the contestants take turns, and
medians are reported. Memory is the growth of the process's peak resident size above its size with the features loaded,
gradients included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(description="contrastive loss: whole matrix against tiles")
    parser.add_argument("--batch", type=int, default=4096, help="pairs of the global batch (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=512, help="features per pair (default: %(default)s)")
    parser.add_argument("--kind", choices=["softmax", "sigmoid"], default="softmax")
    parser.add_argument("--tile", type=int, default=0, help="rows and columns of a tile (default: the config's)")
    parser.add_argument("--repeats", type=int, default=3, help="passes of each contestant (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="threads of a process (default: torch's)")
    parser.add_argument("--open-clip", metavar="PYTHON", help="python of an environment that has open_clip")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--measure", choices=["plain", "full", "tiled", "open_clip"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options)))
        return 0
    report = compare(options)
    if options.json:
        print(json.dumps(report, indent=2))
        return 0
    print(f"{options.kind} loss, B = {options.batch}, D = {options.dim}, median of {options.repeats}")
    for name, result in report["results"].items():
        print(
            f"{name:10} {result['seconds']:8.2f} s  {result['cpu_seconds']:8.2f} CPU s  {result['megabytes']:8.0f} MB"
        )
    for name, ratio in report["tiled_against"].items():
        shares = ", ".join(f"{key} {value:.3f}" for key, value in ratio.items())
        print(f"tiled / {name}: {shares}")
    return 0


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Lets the contestants take turns; medians, and tiled against each of the others."""
    pythons = {"plain": sys.executable, "full": sys.executable, "tiled": sys.executable}
    if options.kind == "sigmoid":
        del pythons["plain"]
    elif options.open_clip:
        pythons["open_clip"] = options.open_clip
    passes: dict[str, list[dict[str, Any]]] = {name: [] for name in pythons}
    for _ in range(options.repeats):
        for name, python in pythons.items():
            passes[name].append(run_pass(name, python, options))
    results = {
        name: {key: statistics.median(p[key] for p in done) for key in ("seconds", "cpu_seconds", "megabytes", "loss")}
        | {"torch": done[0]["torch"], "threads": done[0]["threads"]}
        for name, done in passes.items()
    }
    tiled = results["tiled"]
    against = {
        name: {
            "seconds": tiled["seconds"] / other["seconds"],
            "cpu_seconds": tiled["cpu_seconds"] / other["cpu_seconds"],
            "memory": tiled["megabytes"] / other["megabytes"],
        }
        for name, other in results.items()
        if name != "tiled"
    }
    return {
        "kind": options.kind,
        "batch": options.batch,
        "dim": options.dim,
        "repeats": options.repeats,
        "results": results,
        "tiled_against": against,
    }


def run_pass(name: str, python: str, options: argparse.Namespace) -> dict[str, Any]:
    """One forward and backward pass of one contestant, in a process of its own."""
    command = [python, str(Path(__file__).resolve()), "--measure", name, "--kind", options.kind]
    for flag in ("batch", "dim", "tile", "threads"):
        command += [f"--{flag}", str(getattr(options, flag))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"error: {name} at --batch {options.batch} failed ({done.returncode})\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    loss_function = LOSSES[options.measure](options)
    features = []
    for batch in (64, options.batch):
        generator = torch.Generator().manual_seed(0)
        features = [torch.empty(batch, options.dim).normal_(generator=generator) for _ in range(2)]
        for x in features:
            x.div_(x.norm(dim=1, keepdim=True)).requires_grad_()
        scale = torch.tensor([1 / 0.07], requires_grad=True)
        reset_peak()
        resident = memory("VmRSS")
        began, cpu_began = time.perf_counter(), time.process_time()
        loss = loss_function(*features, scale)
        loss.backward()
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "megabytes": (memory("VmHWM") - resident) / 1e6,
        "loss": loss.item(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def reset_peak() -> None:
    """Makes the kernel forget the process's peak resident size (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def memory(field: str) -> int:
    """A size of this process in bytes: VmRSS, resident now, or VmHWM, its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def plain(options: argparse.Namespace) -> Callable:
    """What a first implementation looks like."""
    import torch
    from torch.nn import functional as F

    def loss(image, text, scale):
        logits = scale * image @ text.T
        labels = torch.arange(image.shape[0])
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    return loss


def open_clip(options: argparse.Namespace) -> Callable:
    from open_clip.loss import ClipLoss

    return ClipLoss()


def duet(options: argparse.Namespace) -> Callable:
    sys.path.insert(0, str(ROOT))
    from train.config import LossConfig
    from train.loss.full import contrastive_loss

    config = LossConfig(kind=options.kind, rows=options.measure)
    config.tile = options.tile or config.tile

    def loss(image, text, scale):
        return contrastive_loss(image, text, scale, start=0, stop=image.shape[0], config=config)

    return loss


LOSSES = {"plain": plain, "full": duet, "tiled": duet, "open_clip": open_clip}

if __name__ == "__main__":
    sys.exit(main())
