"""Samples per second of decoding and augmentation, and of the whole loader, beside a plain pipeline in the same run.

    python -m tests.benchmarks.loader [--json] [--images 256] [--samples 1024] [--size 224] [--repeats 3]

The images are JPEGs of about 100 KB and 400 to 900 pixels a side, made here. "plain" is what is usually written:
webdataset's shard list and tar reader, Pillow, torchvision's RandomResizedCrop, flip, ToTensor and Normalize, and a
torch DataLoader. Both crop alike, and take turns, so that a busy machine slows both. Everything runs with one thread
per process; rates of one core are per second of processor time; the ratio is the median over the repeats.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.loader import train_loader
from data_pipeline.order import build_order
from data_pipeline.samples.transforms import train_transform
from data_pipeline.statistics import IMAGENET
from data_pipeline.storage.manifest import Manifest, Shard
from data_pipeline.storage.shards import ShardWriter, read_index
from data_pipeline.tokenizer import Tokenizer
from tests.benchmarks.photos import photo
from tests.support.vocabulary import write_tokenizer

SCALE, RATIO = (0.5, 1.0), (3 / 4, 4 / 3)
BATCH, SHARDS = 32, 8
AUGMENT = AugmentConfig(policy="light", scale=SCALE, ratio=RATIO)


def write_shards(directory: Path, images: list[bytes]) -> Manifest:
    shards = []
    with ShardWriter(directory, "bench", max_samples=-(-len(images) // SHARDS)) as writer:
        for number, data in enumerate(images):
            caption = f"picture number {number} of a red heart, drawing"
            writer.write(f"{number:06d}", {"jpg": data, "txt": caption.encode()})
    for path in writer.paths:
        content = Path(path).read_bytes()
        shards.append(Shard(path, len(read_index(path)), len(content), hashlib.sha256(content).hexdigest()))
    return Manifest(tuple(shards), {}, str(directory))


def plain_transform(size: int) -> Callable[[bytes], torch.Tensor]:
    change = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, SCALE, RATIO),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(*IMAGENET),
        ]
    )
    return lambda data: change(Image.open(io.BytesIO(data)).convert("RGB"))


def plain_loader(manifest: Manifest, tokenizer: Tokenizer, size: int, workers: int) -> Iterable:
    """One pass in batches of images [B, 3, H, W] and token ids."""
    change = plain_transform(size)

    def decode(sample: dict) -> tuple[torch.Tensor, str]:
        return change(sample["jpg"]), sample["txt"].decode()

    def collate(samples: list) -> tuple:
        return torch.stack([image for image, _ in samples]), *tokenizer([caption for _, caption in samples])

    pipeline = webdataset.DataPipeline(
        webdataset.SimpleShardList([shard.url for shard in manifest.shards]),
        webdataset.split_by_worker,
        webdataset.tarfile_to_samples(),
        webdataset.shuffle(100),
        webdataset.map(decode),
        webdataset.batched(BATCH, collation_fn=collate, partial=True),
    )
    return DataLoader(pipeline, batch_size=None, num_workers=workers, prefetch_factor=4)


def duet_loader(manifest: Manifest, tokenizer: Tokenizer, size: int, workers: int) -> Iterable:
    """One epoch of micro-batches."""
    config = DataConfig(image_size=size, augment=AUGMENT, workers=workers)
    order = build_order([manifest], [1.0], BATCH, 4, 0, SHARDS)
    options = {"seed": 0, "micro_batch": BATCH, "stop_step": order.steps_per_epoch}
    return train_loader(config, order, [manifest], tokenizer, **options)


def per_core(change: Callable[[bytes], torch.Tensor], images: list[bytes]) -> float:
    start = time.process_time()
    for data in images:
        change(data)
    return len(images) / (time.process_time() - start)


def through(loader: Iterable, images: Callable[[object], torch.Tensor]) -> float:
    """Samples per second from the first batch to the last, so that starting processes does not count."""
    iterator = iter(loader)
    next(iterator)
    start, count = time.perf_counter(), 0
    for batch in iterator:
        count += len(images(batch))
    return count / (time.perf_counter() - start)


def compare(ours: Callable[[], float], plain: Callable[[], float], repeats: int) -> dict[str, float]:
    """Medians of samples per second, and of the ratio of neighbouring runs."""
    pairs = [(ours(), plain()) for _ in range(repeats)]
    return {
        "duet": round(statistics.median(pair[0] for pair in pairs), 1),
        "plain": round(statistics.median(pair[1] for pair in pairs), 1),
        "ratio": round(statistics.median(mine / its for mine, its in pairs), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--images", type=int, default=256, help="different images (default: 256)")
    parser.add_argument("--samples", type=int, default=1024, help="samples per pass of a loader (default: 1024)")
    parser.add_argument("--size", type=int, default=224, help="pixels of a side that the tower sees (default: 224)")
    parser.add_argument("--repeats", type=int, default=3, help="paired runs (default: 3)")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    images = [photo(rng) for _ in range(args.images)]
    ours, plain = train_transform(DataConfig(image_size=args.size, augment=AUGMENT)), plain_transform(args.size)
    draws = random.Random(0)
    rates: dict[str, dict[str, float]] = {}
    results = {
        "images": args.images,
        "mean_kilobytes": round(sum(map(len, images)) / len(images) / 1000, 1),
        "size": args.size,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "samples_per_second": rates,
    }
    rates["decode and augment, one core"] = compare(
        lambda: per_core(lambda data: ours(data, draws), images), lambda: per_core(plain, images), args.repeats
    )
    with tempfile.TemporaryDirectory() as folder:
        # Each image several times over, in all of them a different crop, so that the queues run full.
        manifest = write_shards(Path(folder, "shards"), images * max(1, args.samples // args.images))
        tokenizer = Tokenizer(str(write_tokenizer(Path(folder, "tokenizer"))), 77)
        for workers in (1, 2):
            made = (manifest, tokenizer, args.size, workers)
            rates[f"loader, {workers} worker{'s' * (workers > 1)}"] = compare(
                lambda made=made: through(duet_loader(*made), lambda batch: batch.images_BCHW),
                lambda made=made: through(plain_loader(*made), lambda batch: batch[0]),
                args.repeats,
            )
    if args.json:
        print(json.dumps(results))
        return
    print(f"{args.images} JPEGs of {results['mean_kilobytes']} KB on average -> {args.size} pixels; samples/s")
    for name, rate in rates.items():
        print(f"{name:<32} duet {rate['duet']:>8.1f}   plain {rate['plain']:>8.1f}   ratio {rate['ratio']:.2f}")


if __name__ == "__main__":
    main()
