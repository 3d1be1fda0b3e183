"""The doctor's checks of a run: its configuration, pretrained weights, shards, Weights & Biases."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from data_pipeline.overlap import warnings
from data_pipeline.samples.image import BadSample
from data_pipeline.samples.text import split
from data_pipeline.samples.transforms import train_transform
from data_pipeline.stages.workers import number_of_workers
from data_pipeline.storage.cache import open_store
from data_pipeline.storage.manifest import Manifest, load_manifest
from data_pipeline.storage.remote import expand, filesystem, is_remote
from data_pipeline.storage.shards import ShardReader
from launch.findings import Finding, fail, ok, warn
from train import cli, distributed
from train.begin import Fresh
from train.checks import check, check_data
from train.config import RunConfig
from train.evaluation.suite import Suite
from train.feed import Feed
from train.memory import GB
from train.model.text_files import own_tokenizer
from train.model.trial import try_out
from train.run.wandb import wanted_mode, why_offline

GPU_RATE = 2500
"""Pairs per second that one data-centre GPU takes (ResNet-50, 224 px, bf16), which its loader has to deliver: an
estimate for an H100, where tests/benchmarks/gpu has not measured it yet."""
DECODE_SECONDS = 2.0
"""How long samples are decoded to measure the rate."""


def configuration(config: RunConfig) -> list[Finding]:
    """Whether the run would be refused, under a launcher for its number of processes; raises what the run would say."""
    if config == RunConfig():
        return [warn("configuration", "no run is described", "give the run's config to check it")]
    # Whether there are data is what `data` looks at.
    described = config if config.data.train else replace(config, data=replace(config.data, train="none yet"))
    check(described, distributed.world_size() if "RANK" in os.environ else None)
    return [ok("configuration", f"{config.name}: its fields fit each other")]


def weights(config: RunConfig) -> list[Finding]:
    """Towers and tokenizer as the run builds them: what they are pretrained with is there, or is fetched now."""
    if config == RunConfig():
        return [warn("pretrained weights", "no run is described", "give the run's config to check what it starts from")]
    image, text = config.model.image, config.model.text
    began = time.perf_counter()
    try:
        model = Fresh(config).built((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        notes = try_out(model, own_tokenizer(model, config), config)
    except ValueError as error:
        remedy = "or run this where there is a network: what it fetches stays in the caches of the home directory"
        return [fail("pretrained weights", cli.with_flags(str(error)), remedy)]
    towers = config.init or f"{image.name} {image.weights}, {text.name} {text.weights}"
    measured = f"{towers} and tokenizer: loaded and tried out in {time.perf_counter() - began:.0f} s"
    return [ok("pretrained weights", "; ".join([measured, *notes]))]


def data(config: RunConfig) -> list[Finding]:
    """The training shards of every source: reachable, whole by the first and last, how fast they are decoded here."""
    if not config.data.train:
        return [warn("data", "no --data.train given", "give the run's config to check its data")]
    if config.data.mode == "stream":
        return [_stream(config)]
    manifests = Feed(config).manifests  # refuses what the run would: fewer samples than a step takes, no statistics
    count, decoding, fetching, size, bad = _read_ends(manifests, config, DECODE_SECONDS)
    workers = max(1, number_of_workers(config.data.workers))
    rate = count / decoding * workers
    text = f"{sum(m.nsamples for m in manifests)} samples in {sum(len(m.shards) for m in manifests)} shards; "
    text += f"about {rate:.0f} samples/s per process ({workers} workers)"
    if size:
        text += f", fetched or found in the cache at {size / 1e6 / fetching:.0f} MB/s"
    if bad:
        text += f"; {len(bad)} of {count} tried are bad, such as {bad[0]}"
    room = _cache_room(manifests, config)
    if len(bad) > config.data.max_bad_fraction * count:
        return [
            warn("data", text, "training stops above --data.max_bad_fraction; `inspect` lists them by cause"),
            *room,
        ]
    if torch.cuda.is_available() and rate < GPU_RATE:
        need = -(-GPU_RATE * workers // max(1, int(rate)))
        return [warn("data", text, f"a GPU takes {GPU_RATE}/s (ResNet-50 at 224 px): --data.workers {need}"), *room]
    return [ok("data", text), *room]


def held_out(config: RunConfig) -> list[Finding]:
    """The shards for evaluation, which a run reads for the first time when it has trained for long."""
    named = Suite(config).manifests()
    if not named:
        return [ok("held-out data", "none: nothing is evaluated")]
    manifests = {manifest.path: manifest for manifest in named.values()}
    _read_ends(list(manifests.values()), config, 0.0)
    sets = [f"{one.nsamples} samples in {len(one.shards)} shards" for one in manifests.values()]
    text = f"{', '.join(sets)}, for {', '.join(named)}"
    if config.data.mode == "indexed" and config.data.train and (shared := warnings(_training_sets(config), named)):
        remedy = "python -m train.curate --index TRAIN_INDEX --held-out HELD_OUT_INDEX --out NEW.json leaves them out"
        return [warn("held-out data", f"{text}; {shared[0]}", remedy)]
    return [ok("held-out data", text)]


def _training_sets(config: RunConfig) -> list[Manifest]:
    sources = [config.data.train] if isinstance(config.data.train, str) else [s.data for s in config.data.train]
    return [load_manifest(source) for source in sources]


def _stream(config: RunConfig) -> Finding:
    """Shards without a manifest: whether the first and the last one are there."""
    check_data(config)
    urls = expand([str(config.data.train)])
    for url in dict.fromkeys((urls[0], urls[-1])):
        if is_remote(url):
            system, path = filesystem(url)
            if not system.exists(path):
                return fail("data", f"{url} is not there", "give --data.train shards that this host can reach")
    return ok("data", f"{len(urls)} shards, read as a stream: neither counted nor checked")


def _read_ends(
    manifests: Sequence[Manifest], config: RunConfig, budget: float
) -> tuple[int, float, float, int, list[str]]:
    """Decodes samples of the first and the last shard of each manifest for `budget` seconds, one of each at least.

    Returns samples, seconds of decoding, seconds of fetching, bytes fetched (or found in the cache), bad samples.
    """
    shards = list(dict.fromkeys(shard for m in manifests for shard in (m.shards[0], m.shards[-1])))
    store = open_store(config.data)
    transform, count, bad = train_transform(config.data), 0, []
    decoding = fetching = 0.0
    for shard in shards:
        began = time.perf_counter()
        path = store.local(shard)
        fetching += time.perf_counter() - began
        reader = ShardReader(path, shard)
        began = time.perf_counter()
        for index in range(len(reader)):
            try:
                transform.drawn(split(reader.raw(index))[0], random.Random(index))
            except BadSample as error:
                bad.append(f"{shard.url}, sample {index}: {error.cause}")
            count += 1
            if time.perf_counter() - began > budget / len(shards):
                break
        decoding += time.perf_counter() - began
        reader.close()
    return count, decoding, fetching, sum(shard.filesize for shard in shards if is_remote(shard.url)), bad


def _cache_room(manifests: Sequence[Manifest], config: RunConfig) -> list[Finding]:
    """Room for the cache of remote shards on this node; nothing where none is remote."""
    remote = sum(shard.filesize for manifest in manifests for shard in manifest.shards if is_remote(shard.url))
    if not remote:
        return []
    directory = open_store(config.data).cache_dir
    kept = sum(path.stat().st_size for path in directory.glob("*.tar"))
    room = shutil.disk_usage(directory).free + kept
    need = min(config.data.cache_gb * GB, remote)
    text = f"{directory}: {room / GB:.0f} GB for it on this node, it may take {need / GB:.0f}"
    if room < need:
        remedy = f"--data.cache_gb {room / GB * 0.9:.0f}, or a larger disk by --data.cache_dir"
        return [warn("shard cache", text, remedy)]
    return [ok("shard cache", text)]


def wandb(config: RunConfig) -> list[Finding]:
    """Whether the run will be online: a key where W&B looks for one, and a server that answers."""
    mode = wanted_mode(config)
    if mode in ("offline", "disabled"):
        return [ok("W&B", f"{mode}, as asked")]
    # Its own client says which server it is for: it depends on its version, its settings files and the environment.
    asked = subprocess.run([sys.executable, "-m", "wandb", "status"], capture_output=True, text=True)
    if asked.returncode:
        return [warn("W&B", "wandb does not run here: runs are logged in metrics.jsonl alone", "pip install wandb")]
    address = json.loads(asked.stdout[asked.stdout.index("{") :])["base_url"]
    if problem := why_offline(address, "" if os.environ.get("WANDB_BASE_URL") else address):
        remedy = "runs are kept offline and sent by `wandb sync`; or set WANDB_API_KEY, or `wandb login` once"
        return [warn("W&B", problem, remedy)]
    return [ok("W&B", f"a key, and {address} answers")]
