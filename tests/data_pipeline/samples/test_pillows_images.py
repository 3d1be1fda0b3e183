"""All images that Pillow's own tests use, many of them made to break readers: each is trained on or in the ledger."""

from __future__ import annotations

import importlib.metadata
import os
import resource
import subprocess
import sys
import tarfile
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from data_pipeline import loader
from data_pipeline.config import DataConfig
from data_pipeline.order import build_order
from data_pipeline.storage.manifest import load_manifest
from data_pipeline.tokenizer import Tokenizer
from tests.support.distributed import start_context
from tests.support.pictures import tiny_image
from tests.support.tars import write_shards
from tests.support.vocabulary import write_tokenizer

BATCH = 8
MOST_MEMORY = 1 << 30
"""Bytes that decoding may take at its peak, beside the libraries: an image of data.max_pixels has a quarter of it."""


def sources() -> Path:
    """Pillow's source archive of the version that is installed, kept below the cache directory."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "duet-tests"
    version = importlib.metadata.version("pillow")
    path = cache / f"pillow-{version}.tar.gz"
    if not path.is_file():
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", str(cache)]
        done = subprocess.run([*command, f"pillow=={version}"], capture_output=True, text=True, timeout=600)
        if done.returncode or not path.is_file():
            pytest.skip(f"Pillow's sources cannot be had: {done.stderr.strip()[-300:]}")
    return path


def images(path: Path) -> dict[str, bytes]:
    """Its test images by name."""
    found = {}
    with tarfile.open(path) as tar:
        for member in tar:
            _, _, name = member.name.partition("/Tests/images/")
            if name and member.isfile() and (content := tar.extractfile(member)) is not None:
                found[name] = content.read()
    return found


def load(manifest: str, tokenizer: str, steps: int, sender: Connection) -> None:
    """Sends keys that were trained on, records of the ledger, and the bytes of memory that it took at its peak."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data = load_manifest(manifest)
    order = build_order([data], [1.0], BATCH, 1, 0, 1)
    config = DataConfig(image_size=32, lanes=1, shuffle_shards=1, workers=0)
    chosen = {"seed": 0, "micro_batch": BATCH, "stop_step": steps}
    keys, bad = [], []
    for batch in loader.train_loader(config, order, [data], Tokenizer(tokenizer, 24), **chosen):
        keys += batch.keys
        bad += batch.bad
    sender.send((keys, bad, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_case_09_each_of_pillows_own_test_images_is_trained_on_or_in_the_ledger(tmp_path, record_property) -> None:
    found = list(images(sources()).items())
    assert len(found) > 800
    count = -(-len(found) // BATCH) * BATCH

    def sample(number: int) -> tuple[str, dict[str, bytes]]:
        image = found[number][1] if number < len(found) else tiny_image(number)
        return f"{number:05d}", {"jpg": image, "txt": b"a picture"}

    directory = write_shards(tmp_path / "shards", (count,), sample)
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    receiver, sender = start_context().Pipe(duplex=False)
    process = start_context().Process(target=load, args=(str(directory), str(tokenizer), count // BATCH, sender))
    process.start()
    sender.close()
    try:
        assert receiver.poll(900), "it hangs"
        keys, bad, peak = receiver.recv()
    finally:
        process.kill()
        process.join()
    assert len(keys) == count
    shard = "train-000000.tar"
    trained, refused = {key.removeprefix(f"{shard}/") for key in keys}, {record["key"]: record for record in bad}
    assert trained | set(refused) == {f"{number:05d}" for number in range(count)} and not trained & set(refused)
    assert all(record["cause"] and record["replaced_by"] for record in bad)
    accepted = {Path(found[int(key)][0]).suffix for key in trained if int(key) < len(found)}
    assert {".jpg", ".png", ".webp"} <= accepted and not accepted & {".gif", ".tif", ".psd", ".eps", ".bmp", ".pdf"}
    assert peak < MOST_MEMORY, f"{peak / 1e9:.2f} GB"
    record_property("tries", len(found))
