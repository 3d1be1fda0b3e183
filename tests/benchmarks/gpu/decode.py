"""Images per second of the loader's decoding and augmentation: of one core, and of all of this machine's."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from functools import partial

import numpy as np
import torch

from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.samples.transforms import train_transform
from tests.benchmarks.gpu.bench import Bench, Row
from tests.benchmarks.photos import photo

POLICIES = ("light", "standard")


def run(bench: Bench) -> None:
    count, seconds = (2, 0.1) if bench.tiny else (16, 3.0)
    rng = np.random.default_rng(0)
    images = [photo(rng) for _ in range(count)]
    bench.row("images", lambda: {"count": count, "mean_kilobytes": sum(map(len, images)) / count / 1000})
    cores = len(os.sched_getaffinity(0))
    for policy in POLICIES:
        for processes in dict.fromkeys((1, cores)):
            name = f"{policy}, {processes} process{'es' * (processes > 1)}"
            bench.row(name, partial(rate, policy, images, processes, seconds))


def rate(policy: str, images: list[bytes], processes: int, seconds: float) -> Row:
    # Forked: nothing has been started on a GPU here, and an import takes a process longer than what is measured.
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        results = pool.starmap(decode, [(policy, images, seconds)] * processes, chunksize=1)
    each = [count / took for count, took in results]
    return {"images_per_s": sum(each), "per_process": sum(each) / processes, "slowest": min(each)}


def decode(policy: str, images: list[bytes], seconds: float) -> tuple[int, float]:
    """How many images in how many seconds."""
    torch.set_num_threads(1)
    config = DataConfig(augment=AugmentConfig(policy=policy))  # type: ignore[arg-type]
    transform, rng = train_transform(config).drawn, random.Random(0)  # what loaders do
    transform(images[0], rng)
    began, count = time.perf_counter(), 0
    while (took := time.perf_counter() - began) < seconds:
        transform(images[count % len(images)], rng)
        count += 1
    return count, took
