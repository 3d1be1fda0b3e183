"""What a sample costs before it is trained on, beside an older checkout and open_clip's loader; how long a step waits.

    python -m tests.benchmarks.feed [--before CHECKOUT] [--open-clip PYTHON] [--photos FILE ...] [--json]

CPU milliseconds per image, processes of the loader included, so that a busy machine counts little; the sides take
turns, each in a process of its own with one thread, and the ratio is the median over neighbouring runs. The JPEGs are
made here, 400 to 900 pixels a side and about 100 KB; beside them pictures of files, in four sizes, at quality 85.
decode: from bytes to what a loader process hands over; colours: what is left to the device, on a CPU.
loader: all that a pass of the loader costs, by the pictures' size, number of processes, and crops and flips as in
open_clip or of a policy.
wait: the part of a step that waits for data, where an engine of no work takes 4/3 of the time of a loader that is
paced, and a step takes 16 micro-batches at once, four times what its one process prepares at least.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import pickle
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
SIZES = ((340, 256), (500, 375), (640, 480), (1024, 768))
SIDE, MICRO, SHARDS = 224, 32, 8
SCALE = (0.9, 1.0)  # open_clip's crops
MADE, USUAL = "made here", "500x375"
PACE, SHARE, STEPS = 0.03, 16, 6


def cpu_seconds() -> float:
    """Of this process and all its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def decode(work: Path) -> dict[str, float]:
    import torch

    from data_pipeline.config import AugmentConfig, DataConfig
    from data_pipeline.samples.transforms import train_transform

    found = {}
    for policy in ("light", "standard"):
        transform = train_transform(DataConfig(augment=AugmentConfig(policy=policy)))  # type: ignore[arg-type]
        # A checkout from before has nothing left for the device to do.
        make: Callable = getattr(transform, "drawn", transform)
        for kind, images in pickle.loads((work / "images.pkl").read_bytes()).items():
            rng, count, made = random.Random(0), 0, [make(images[0], random.Random(0))]
            began = time.process_time()
            while (took := time.process_time() - began) < 0.4:
                made = [make(data, rng) for data in images]
                count += len(images)
            found[f"{policy}, {kind}"] = took / count * 1e3
        if make is not transform and policy == "standard":
            from data_pipeline.samples.colors import gathered, recolor

            images_BCHW = torch.stack([one.permute(1, 2, 0) for one, _ in made]).permute(0, 3, 1, 2)
            began = time.process_time()
            for _ in range(3):
                if colors := gathered([change for _, change in made]):
                    recolor(images_BCHW, colors)
            found["standard, colours"] = (time.process_time() - began) / 3 / len(made) * 1e3
    return found


def loader(work: Path, kind: str, workers: str, policy: str = "") -> dict[str, float]:
    from data_pipeline.config import AugmentConfig, DataConfig
    from data_pipeline.loader import train_loader
    from data_pipeline.order import build_order
    from data_pipeline.storage.manifest import load_manifest
    from data_pipeline.tokenizer import Tokenizer

    manifest, tokenizer = load_manifest(work / kind), Tokenizer(str(work / "tokenizer"), 77)
    augment = AugmentConfig(policy=policy) if policy else AugmentConfig(policy="light", scale=SCALE)  # type: ignore[arg-type]
    config = DataConfig(augment=augment, workers=int(workers))
    order = build_order([manifest], [1.0], MICRO, 4, 0, SHARDS)
    options = {"seed": 0, "micro_batch": MICRO, "stop_step": order.steps_per_epoch}
    return passed(lambda: train_loader(config, order, [manifest], tokenizer, **options))


def open_clip(work: Path, kind: str, workers: str) -> dict[str, float]:
    import open_clip as package
    from open_clip_train.data import get_wds_dataset

    shards = sorted(map(str, (work / kind).glob("*.tar")))
    samples = json.loads((work / kind / "manifest.json").read_text())["nsamples"]
    args = SimpleNamespace(
        train_data="::".join(shards), train_num_samples=samples, train_data_upsampling_factors=None, seed=0
    )
    args.batch_size, args.workers, args.world_size = MICRO, int(workers), 1
    transform, tokenizer = package.image_transform(SIDE, is_train=True), package.get_tokenizer("RN50")
    return passed(lambda: get_wds_dataset(args, transform, is_train=True, tokenizer=tokenizer).dataloader)


def passed(make: Callable[[], Iterable]) -> dict[str, float]:
    began, images = cpu_seconds(), 0
    for batch in make():
        images += len(batch[0] if isinstance(batch, (tuple, list)) else batch.images_BCHW)
    deadline = time.monotonic() + 20
    while psutil.Process().children():  # processes count once they have ended
        assert time.monotonic() < deadline
        gc.collect()
        time.sleep(0.1)
    return {"ms": (cpu_seconds() - began) / images * 1e3}


def wait(work: Path) -> dict[str, float]:
    import torch

    from data_pipeline.config import AugmentConfig, DataConfig
    from data_pipeline.loader import train_loader
    from data_pipeline.order import build_order
    from data_pipeline.storage.manifest import load_manifest
    from data_pipeline.tokenizer import Tokenizer
    from train.feed import fetch
    from train.run.signals import StopRequest

    manifest, tokenizer = load_manifest(work / "tiny"), Tokenizer(str(work / "tokenizer"), 77)

    def paced(sample: dict) -> dict:
        time.sleep(PACE)
        return sample

    config = DataConfig(image_size=8, augment=AugmentConfig(policy="none"), workers=1)
    order = build_order([manifest], [1.0], SHARE, 4, 0, SHARDS)
    batches = iter(
        train_loader(config, order, [manifest], tokenizer, seed=0, micro_batch=1, stop_step=STEPS + 4, stages=[paced])
    )
    stop, device = StopRequest(), torch.device("cpu")
    fetch(batches, SHARE, device, stop, at_once=False)  # with it the process has started
    began = time.perf_counter()
    fetch(batches, SHARE, device, stop, at_once=False)
    engine = (time.perf_counter() - began) * 4 / 3  # whatever this machine makes of the pace now
    waited = 0.0
    began = time.perf_counter()
    for _ in range(STEPS):
        time.sleep(engine)
        asked = time.perf_counter()
        fetch(batches, SHARE, device, stop, at_once=False)
        waited += time.perf_counter() - asked
    return {"share": waited / (time.perf_counter() - began)}


MEASURES: dict[str, Callable[..., dict[str, float]]] = {
    "decode": decode,
    "loader": loader,
    "open_clip": open_clip,
    "wait": wait,
}


def measured(checkout: Path, python: str, *arguments: object) -> dict[str, float]:
    """A measure in a process of its own, by the code of a checkout."""
    command = [python, "-P", __file__, "--measure", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def compared(ours: Callable[[], dict], theirs: Callable[[], dict] | None, repeats: int) -> dict[str, dict[str, float]]:
    """Of each value the medians of both sides, and of the ratio of neighbours: how many times less ours takes."""
    made = [(ours(), theirs() if theirs else {}) for _ in range(repeats)]
    found: dict[str, dict[str, float]] = {}
    for key in made[0][0]:
        found[key] = {"duet": statistics.median(one[key] for one, _ in made)}
        if key in made[0][1]:
            found[key]["other"] = statistics.median(other[key] for _, other in made)
            found[key]["ratio"] = statistics.median(other[key] / max(one[key], 1e-9) for one, other in made)
    return found


def write(work: Path, photos: list[str], samples: int) -> list[str]:
    """Images by kind, and shards of each kind. Returns the kinds."""
    import numpy as np
    from PIL import Image

    from data_pipeline.storage.manifest import write_manifest
    from tests.benchmarks.loader import write_shards
    from tests.benchmarks.photos import photo
    from tests.support.vocabulary import write_tokenizer

    rng = np.random.default_rng(0)
    images = {MADE: [photo(rng) for _ in range(24)]}
    for width, height in SIZES if photos else ():
        kept = images.setdefault(f"{width}x{height}", [])
        for path in photos:
            buffer = io.BytesIO()
            picture = Image.open(path).convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
            picture.save(buffer, "JPEG", quality=85)
            kept.append(buffer.getvalue())
    (work / "images.pkl").write_bytes(pickle.dumps(images))
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    shards = {kind: kept * (samples // len(kept)) for kind, kept in images.items()}
    for name, content in {**shards, "tiny": [buffer.getvalue()] * 64}.items():
        manifest = write_shards(work / name, content)
        write_manifest(work / name / "manifest.json", list(manifest.shards), {})
    write_tokenizer(work / "tokenizer")
    return list(images)


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        import torch

        torch.set_num_threads(1)
        name, work, *rest = sys.argv[2:]
        print(json.dumps(MEASURES[name](Path(work), *rest)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="an older checkout to compare with")
    parser.add_argument("--open-clip", metavar="PYTHON", help="of an environment with open_clip and webdataset 0.2.86")
    parser.add_argument("--photos", nargs="+", default=[], metavar="FILE", help="pictures to measure with as well")
    parser.add_argument("--samples", type=int, default=2400, help="samples per pass of a loader (default: 2400)")
    parser.add_argument("--repeats", type=int, default=3, help="paired runs (default: 3)")
    args = parser.parse_args()
    results: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        kinds = write(work, args.photos, args.samples)
        usual = USUAL if args.photos else MADE
        loaders: list[tuple[Any, ...]] = [("loader", kind, 1) for kind in kinds]
        loaders += [("loader", usual, 2), *(("loader", usual, 1, policy) for policy in ("light", "standard"))]
        for name, *arguments in [("wait",), ("decode",), *loaders]:
            ours = partial(measured, ROOT, sys.executable, name, work, *arguments)
            before = args.before and partial(measured, args.before.resolve(), sys.executable, name, work, *arguments)
            title = " ".join(map(str, (name, *arguments)))
            results[title] = compared(ours, before, args.repeats)
            if name == "loader" and len(arguments) == 2 and args.open_clip:
                theirs = partial(measured, ROOT, args.open_clip, "open_clip", work, *arguments)
                results[f"{title}, open_clip"] = compared(ours, theirs, args.repeats)
            print(title, results[title], file=sys.stderr, flush=True)
    if args.json:
        print(json.dumps(results))
        return
    for title, values in results.items():
        for key, found in values.items():
            print(f"{title:<32} {key:<28}", "  ".join(f"{side} {value:.3g}" for side, value in found.items()))


if __name__ == "__main__":
    main()
