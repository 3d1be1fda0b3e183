"""Tables of real pictures for the tests of pack, and ways to run it."""

import csv
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from data_pipeline.__main__ import main
from data_pipeline.storage.manifest import load_manifest
from data_pipeline.storage.shards import ShardReader
from tests.support.pictures import tiny_image

IMAGES = {f"pictures/im{i}.{kind}": tiny_image(i, kind="png" if kind == "png" else "jpeg")
          for i, kind in enumerate(["png", "jpg", "jpg", "png", "jpg"])}  # fmt: skip
RECORDS = [{"image": name, "caption": f"picture {i}, the first", "label": 7 - i} for i, name in enumerate(IMAGES)]


def run_pack(*arguments: object) -> int:
    return main(["pack", *map(str, arguments), "--workers", "1"])


def samples(out: Path) -> list[dict]:
    """Raw samples of all shards of a manifest, in order."""
    found = []
    for shard in load_manifest(out).shards:
        reader = ShardReader(shard.url, shard)
        found += [reader.raw(i) for i in range(len(reader))]
        reader.close()
    return found


def content(out: Path) -> dict[str, bytes]:
    """Every file of a finished pack but what depends on times."""
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.suffix not in (".idx",)}


def write_csv(path: Path, records: list[dict], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(records)
    return path


def write_table(kind: str, folder: Path) -> Path:
    """RECORDS as a table of some kind, beside the images; returns INPUT."""
    bare = [record | {"image": {"bytes": IMAGES[record["image"]], "path": None}} for record in RECORDS]
    path = folder / f"table.{kind}"
    if kind in ("csv", "tsv"):
        return write_csv(path, RECORDS, "\t" if kind == "tsv" else ",")
    if kind == "jsonl":
        path.write_text("\n\n".join(map(json.dumps, RECORDS)))
        return path
    if kind == "parquet":
        parquet.write_table(arrow.Table.from_pylist(RECORDS), path, row_group_size=2)
        return path
    if kind == "embedded":
        (folder / "parts").mkdir()
        for part in range(2):
            rows = arrow.Table.from_pylist(bare[3 * part : 3 * part + 3])
            parquet.write_table(rows, folder / f"parts/{part}.parquet", row_group_size=2)
        return folder / "parts"
    if kind == "bytes":
        rows = [record | {"image": record["image"]["bytes"]} for record in bare]
        parquet.write_table(arrow.Table.from_pylist(rows), path.with_suffix(".parquet"))
        return path.with_suffix(".parquet")
    if kind == "folder":
        for record in RECORDS:
            side = {"caption": record["caption"], "label": record["label"]}
            (folder / record["image"]).with_suffix(".json").write_text(json.dumps(side))
        return folder
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(
        [record | {"image": str(folder / record["image"])} for record in RECORDS]
    ).cast_column("image", datasets.Image())
    dataset = dataset.cast_column("label", datasets.ClassLabel(num_classes=8))
    if kind == "splits":
        dataset = datasets.DatasetDict({"train": dataset, "test": dataset.select([0])})
    dataset.save_to_disk(folder / "saved", **({} if kind == "splits" else {"num_shards": 2}))
    return folder / "saved"


def skipped(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]


def many(folder: Path, number: int) -> Path:
    """A table of `number` pictures; some cannot be packed."""
    generator = random.Random(0)
    rows = []
    for i in range(number):
        name = f"{i:04d}.png"
        if i % 17:
            image = Image.frombytes("RGB", (60, 60), generator.randbytes(60 * 60 * 3)).resize((160, 160))
            image.save(folder / name, compress_level=1)
        rows.append({"image": name, "caption": f"picture {i}"})
    return write_csv(folder / "many.csv", rows)


def start(*arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "data_pipeline", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def wait_for_shards(process: subprocess.Popen, out: Path, number: int) -> None:
    while process.poll() is None and len(list(out.glob("*.tar"))) < number:
        time.sleep(0.005)


def group_is_gone(process: subprocess.Popen, seconds: float = 10) -> bool:
    """Whether every process of the group that `process` led has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


def write_pictures(folder: Path) -> Path:
    for name, data in IMAGES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder
