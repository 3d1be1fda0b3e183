"""The doctor's checks of one host and of all ranks together. Every check is called on every rank, in the same order."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from launch.findings import Finding, fail, ok, warn
from launch.links import measure_links
from train import distributed
from train.config import RunConfig
from train.memory import GB, RESERVE, engine_name, less_memory, loader_bytes, own_memory, plan

REQUIRED = ("torch", "torchvision", "transformers", "accelerate", "webdataset", "pillow")
PACKAGES = (*REQUIRED, "simplejpeg", "deepspeed", "wandb")


def versions() -> list[Finding]:
    """The same packages everywhere."""
    here = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            here[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            here[name] = "missing"
    everywhere = distributed.broadcast_object(distributed.gather_objects(here))
    text = " ".join(f"{name} {version}" for name, version in here.items())
    if missing := [name for name in REQUIRED if here[name] == "missing"]:
        return [fail("versions", text, f"pip install {' '.join(missing)}")]
    different = sorted({name for other in everywhere for name in here if other[name] != here[name]})
    if different:
        return [
            fail("versions", f"{', '.join(different)} differ between ranks", "install one requirements.lock everywhere")
        ]
    absent = [name for name in PACKAGES if here[name] == "missing"]
    return [warn("versions", text, f"optional: pip install {' '.join(absent)}") if absent else ok("versions", text)]


def devices() -> list[Finding]:
    """GPUs, and whether driver and torch's CUDA go together."""
    if torch.cuda.is_available():
        index = torch.cuda.current_device()
        properties = torch.cuda.get_device_properties(index)
        text = f"{torch.cuda.device_count()} x {properties.name}, {properties.total_memory / GB:.0f} GB, "
        text += f"CUDA {torch.version.cuda}"
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            return [warn("devices", text, "no bf16 on these: start with --precision fp32")]
        return [ok("devices", text)]
    if shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
        if listed.returncode == 0 and listed.stdout.strip():
            remedy = f"the driver is too old for CUDA {torch.version.cuda}: update it, or install a torch made for it"
            return [fail("devices", "nvidia-smi sees GPUs, torch does not", remedy)]
    memory = psutil.virtual_memory().total / GB
    return [
        warn("devices", f"no GPU; {os.cpu_count()} cores, {memory:.0f} GB", "fine for the quickstart, slow for more")
    ]


def memory(config: RunConfig) -> list[Finding]:
    """What the run's model needs, and the engine that it takes where --engine does not name one."""
    # Alone it speaks for the run that would start here, with a rank on every GPU.
    world = distributed.world_size() if "RANK" in os.environ else max(1, torch.cuda.device_count())
    on_gpu = torch.cuda.is_available()
    needs = plan(config, world, bf16=on_gpu)
    there = own_memory()
    parts = f"{needs.in_words()}; there are {there / GB:.0f} GB"
    stage = needs.smallest_stage(there)
    if not needs.fits(stage, there):
        return [fail("memory plan", parts, less_memory(needs, config))]
    kept = ""
    if config.train.resident is None:
        kept = f"; train.resident null is {needs.most_resident(there, stage)} of {needs.share} micro-batches then"
    return [ok("memory plan", f"{parts}: fits with --engine {engine_name(stage)}{kept}")]


def collectives() -> list[Finding]:
    """Latency and bandwidth of all-reduce, bandwidth of all-gather, over all ranks."""
    world = distributed.world_size()
    if world == 1:
        return [ok("collectives", "one process: nothing to exchange")]
    links = measure_links()
    text = (
        f"{world} ranks: all-reduce {links.latency * 1e6:.0f} us, {links.reduce / GB:.2f} GB/s; "
        f"all-gather {links.gather / GB:.2f} GB/s"
    )
    if torch.cuda.is_available() and min(links.reduce, links.gather) < 2 * GB:
        return [
            warn(
                "collectives",
                text,
                "slow for GPUs: NCCL_DEBUG=INFO shows the transport; NCCL_SOCKET_IFNAME, NCCL_IB_HCA",
            )
        ]
    return [ok("collectives", text)]


def clocks() -> list[Finding]:
    """Clocks of all ranks, read right after a barrier."""
    distributed.barrier()
    times = distributed.broadcast_object(distributed.gather_objects(time.time()))
    skew = max(times) - min(times)
    text = f"{skew * 1e3:.0f} ms between {len(times)} ranks"
    if skew > 2:
        return [warn("clock skew", text, "logs and file times will not line up: run chrony or ntpd on every node")]
    return [ok("clock skew", text)]


def shared_files(config: RunConfig) -> list[Finding]:
    """The runs directory: every rank sees what every other writes; its speed; room for checkpoints."""
    directory = Path(config.runs_dir)
    rank, block = distributed.rank(), os.urandom(2**22)
    token = distributed.broadcast_object(f".doctor-{os.getpid()}-{time.time_ns()}")
    own = directory / f"{token}-{rank}"
    problem, speed = "", 0.0
    try:
        directory.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        with own.open("wb") as file:
            for _ in range(16):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        speed = 16 * len(block) / (time.perf_counter() - began)
    except OSError as error:
        problem = f"rank {rank} on {socket.gethostname()}: {error}"
    distributed.barrier()
    unseen = [other for other in range(distributed.world_size()) if not (directory / f"{token}-{other}").exists()]
    if unseen and not problem:
        problem = f"{socket.gethostname()} does not see the file of rank {unseen[0]}"
    problems = distributed.broadcast_object(distributed.gather_objects(problem))
    with suppress(OSError):  # never written
        own.unlink()
    if any(problems):
        text = next(filter(None, problems))
        return [
            fail(
                "runs directory",
                f"{directory}: {text}",
                "--runs_dir on a file system that all nodes mount and may write",
            )
        ]
    free = shutil.disk_usage(directory).free
    text = f"{directory.resolve()}: seen by all ranks, {speed / 1e6:.0f} MB/s written, {free / GB:.0f} GB free"
    if free < 20 * GB:
        return [
            warn("runs directory", text, "each checkpoint holds 12 bytes per parameter, and --checkpoint.keep stay")
        ]
    return [ok("runs directory", text)]


def host(config: RunConfig) -> list[Finding]:
    """Ports of this host, and its shared memory beside what the run's loaders take of it."""
    found = []
    port = int(os.environ.get("MASTER_PORT", "29500"))
    if "MASTER_PORT" in os.environ:
        found.append(ok("rendezvous", f"{os.environ.get('MASTER_ADDR')}:{port}, {distributed.world_size()} ranks met"))
    else:
        with socket.socket() as probe:
            taken = probe.connect_ex(("127.0.0.1", port)) == 0
        used = warn("rendezvous", f"port {port} is taken on this host", "give --port another one")
        found.append(used if taken else ok("rendezvous", f"port {port} is free on this host"))
    shared = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    # As in `memory`: alone it speaks for a rank on every GPU.
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(max(1, torch.cuda.device_count()))))
    world = distributed.world_size() if "RANK" in os.environ else local
    needed = loader_bytes(config, world, local)
    text = f"/dev/shm {shared / GB:.1f} GB; loaders of {local} rank(s) take up to {needed / GB:.2f} GB"
    if shared < max(GB, RESERVE * needed):
        size = max(8, -(-RESERVE * needed // GB))
        remedy = f"docker: --ipc host or --shm-size {size:.0f}g; or fewer --data.workers, a smaller --data.prefetch"
        return [*found, warn("shared memory", text, remedy)]
    return [*found, ok("shared memory", text)]
