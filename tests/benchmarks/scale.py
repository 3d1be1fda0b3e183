"""What a run of any size would ask of a rank, from the real code: python -m tests.benchmarks.scale [--json]

Bytes are counted by calling the real functions with a process group that answers each collective at once and writes
down what would be sent: a rank sees the shapes that it would see among as many others. Order, lanes and the manifest
are timed for 10 billion samples in 100,000 shards, by CPU time.

    bytes     of features, sums and gradients that a rank sends in a step, 8 to 1,024 ranks, batches up to 2^20
    order     seek and step of a rank: seconds and memory
    manifest  100,000 shards: reading it, memory, names
    shard     opening one of 10,000 samples whose index is kept
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
from torch import Tensor

from data_pipeline.order import Order
from data_pipeline.stages.readers import most_open
from data_pipeline.stages.slots import shard_names, share_of
from data_pipeline.storage.manifest import KIND, Shard, load_manifest
from data_pipeline.storage.shards import ShardReader, ShardWriter
from train import distributed
from train.config import TOWERS, RunConfig
from train.loss import full, tiled
from train.loss.gradients import loss_gradients
from train.loss.tiled import tile_on
from train.memory import GB, loss_bytes
from train.terms.objective import Objective

RANKS = (8, 64, 256, 1024)
BATCHES = (2**15, 2**17, 2**20)
WIDTH = 768
PARAMETERS = 136_000_000
"""Of ResNet-50 and BERT-base with their projections."""
FORWARD = 12e9
"""FLOPs of a pair's forward pass through these towers: 224 px, 22 tokens (train.model.flops)."""
SHARDS, PER_SHARD = 100_000, 100_000
MICRO_BATCH = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, row in rows():
        print(json.dumps({"what": name} | row) if options.json else f"{name}: {row}", flush=True)


def rows() -> Iterator[tuple[str, dict[str, Any]]]:
    for batch in BATCHES:
        for ranks in RANKS:
            yield "bytes", bytes_of_a_step(ranks, batch)
    for ranks, batch, lanes in ((8, 2**15, 8), (8, 2**20, 128), (64, 2**20, 64), (1024, 2**20, 1024), (8, 2**20, 1024)):
        yield "order", order_of(ranks, batch, lanes)
    yield "manifest", manifest_of()
    yield "shard", opening_of(10_000)


class Wire:
    """Stands for a process group of so many ranks; counts what one of them sends, by the kind of collective."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.sent: dict[str, float] = {"gather": 0.0, "scatter": 0.0, "reduce": 0.0}

    def gather(self, x_bD: Tensor) -> Tensor:
        # A ring sends (W - 1) times a rank's own rows.
        self.sent["gather"] += (self.ranks - 1) * x_bD.nbytes
        return x_bD.detach().expand(1, *x_bD.shape).expand(self.ranks, *x_bD.shape).reshape(-1, *x_bD.shape[1:])

    def scatter(self, grad_BD: Tensor) -> Tensor:
        self.sent["scatter"] += (self.ranks - 1) / self.ranks * grad_BD.nbytes
        return grad_BD[: len(grad_BD) // self.ranks].clone()

    def reduce(self, tensor: Tensor) -> Tensor:
        self.sent["reduce"] += 2 * (self.ranks - 1) / self.ranks * tensor.nbytes
        return tensor * self.ranks

    @contextmanager
    def connected(self) -> Iterator[None]:
        replaced: dict[str, Callable] = {
            "all_gather_rows": self.gather,
            "reduce_scatter_rows": self.scatter,
            "all_reduce_sum": self.reduce,
            "all_reduce_max": self.reduce,
            "world_size": lambda: self.ranks,
            "rank": lambda: 0,
        }
        with ExitStack() as stack:
            stack.enter_context(mock.patch.multiple(distributed, **replaced))
            for loss in (full, tiled):  # torch has no precision to set where nothing is computed
                stack.enter_context(mock.patch.object(loss, "exact_matmul", lambda _: nullcontext()))
            yield


def bytes_of_a_step(ranks: int, batch: int) -> dict[str, Any]:
    """Megabytes that a rank sends, by the real loss on the meta device: shapes and dtypes are those of a GPU."""
    wire, rows_b = Wire(ranks), batch // ranks
    config = RunConfig()
    config.train.global_batch, config.train.micro_batch = batch, MICRO_BATCH
    objective = Objective(config)
    outputs = {name: torch.empty(rows_b, WIDTH, device="meta") for name in ("image", "text")}
    outputs["logit_scale"] = torch.empty(1, device="meta")

    with wire.connected():
        loss_gradients([outputs], objective, gathers=objective.gathers)
    ring = (ranks - 1) / ranks
    gradients = 4 * PARAMETERS
    tile = tile_on("cuda", config.loss)
    return {
        "ranks": ranks,
        "batch": batch,
        "features_mb": round(wire.sent["gather"] / 1e6, 1),
        "feature_gradients_mb": round(wire.sent["scatter"] / 1e6, 1),
        "sums_mb": round(wire.sent["reduce"] / 1e6, 2),
        # DDP and ZeRO-1 all-reduce once, DeepSpeed's ZeRO-2 in every backward pass of a share; ZeRO-3 reduces and
        # scatters there. 1 and 2 gather the updated weights, 3 the weights before each forward and backward pass.
        "gradients_ddp_mb": round(2 * ring * gradients / 1e6),
        "gradients_zero2_mb_per_part": round(2 * ring * gradients / 1e6),
        "weights_zero2_mb": round(ring * gradients / 1e6),
        "weights_zero3_mb_per_pass": round(ring * gradients / 1e6),
        "parts": max(1, rows_b // MICRO_BATCH),
        "loss_memory_gb": round(loss_bytes(config, ranks, dict.fromkeys(TOWERS, WIDTH)) / GB, 2),
        "loss_tiles": -(-rows_b // tile) * -(-batch // tile),
        # One product forward and three backward, of this rank's rows with all: 2 x rows x batch x width each.
        "loss_tflop": round(4 * 2 * rows_b * batch * WIDTH / 1e12, 2),
        "towers_tflop": round(rows_b * 3 * FORWARD / 1e12, 2),
    }


def order_of(ranks: int, batch: int, lanes: int) -> dict[str, Any]:
    """Of rank 0: CPU seconds until its first micro-batch, for the rest of that step and for a later one; memory."""
    before = memory_mb()
    share = share_of(0, ranks, batch, MICRO_BATCH, 5000, 5003)
    began = time.process_time()
    order = Order([PER_SHARD] * SHARDS, batch=batch, lanes=lanes, seed=0, shuffle_shards=8)
    marks = []
    for _, _, rows in share.micro_batches():
        order.rows(5000 + len(marks) // share.count, rows.start, rows.stop)
        marks.append(time.process_time() - began)
    return {
        "ranks": ranks,
        "batch": batch,
        "lanes": lanes,
        "first_micro_batch_s": round(marks[0], 4),
        "first_step_s": round(marks[share.count - 1], 3),
        "later_step_s": round((marks[-1] - marks[share.count - 1]) / 2, 4),
        "microseconds_per_sample": round((marks[-1] - marks[share.count - 1]) / 2 / (batch // ranks) * 1e6, 2),
        "memory_mb": round(memory_mb() - before, 1),
        "shards_open": most_open(share.lanes(batch, lanes), shuffle_shards=8, sources=1),
    }


def manifest_of() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "manifest.json"
        shards = [
            {
                "url": f"s3://bucket/data/{number:06d}.tar",
                "nsamples": PER_SHARD,
                "filesize": 2 * 10**9,
                "sha256": hashlib.sha256(str(number).encode()).hexdigest(),
            }
            for number in range(SHARDS)
        ]
        path.write_text(json.dumps({"__kind__": KIND, "shardlist": shards, "statistics": {}}))
        size = path.stat().st_size
        del shards
        before, began = memory_mb(), time.process_time()
        manifest = load_manifest(path)
        read = time.process_time() - began
        held = memory_mb() - before
        began = time.process_time()
        names = shard_names([manifest])
        named = time.process_time() - began
        assert len(names[0]) == SHARDS
    return {
        "samples": manifest.nsamples,
        "file_mb": round(size / 1e6, 1),
        "read_s": round(read, 2),
        "names_s": round(named, 2),
        "memory_mb": round(held, 1),
    }


def opening_of(samples: int) -> dict[str, Any]:
    """CPU seconds of opening a shard for the first time, when its headers are read, and again; memory of a reader."""
    with tempfile.TemporaryDirectory() as directory:
        with ShardWriter(directory, "part", max_samples=samples) as writer:
            for number in range(samples):
                writer.write(f"{number:08d}", {"jpg": b"0", "txt": b"a caption"})
        path = writer.paths[0]
        shard = Shard(path, samples, Path(path).stat().st_size, hashlib.sha256(Path(path).read_bytes()).hexdigest())
        seconds, readers, before = [], [], memory_mb()
        for _ in range(6):
            began = time.process_time()
            readers.append(ShardReader(path, shard))
            seconds.append(time.process_time() - began)
        held = (memory_mb() - before) / len(readers)
        for reader in readers:
            reader.close()
    again = sorted(seconds[1:])[2]
    return {
        "samples": samples,
        "first_s": round(seconds[0], 3),
        "again_s": round(again, 3),
        "memory_mb": round(held, 1),
    }


def memory_mb() -> float:
    """What the process holds now."""
    return psutil.Process().memory_info().rss / 1e6


if __name__ == "__main__":
    main()
