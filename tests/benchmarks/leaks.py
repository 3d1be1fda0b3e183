"""How well copies of training images are found among held-out ones: some are planted, resized and encoded again.

    python -m tests.benchmarks.leaks --json --model runs/quickstart [--data data/demo/openmoji] [--planted 400]

The held-out set is the demo's own and `--planted` training drawings, each scaled to between 0.5 and 2 times its size
and encoded as JPEG or WebP of quality 50 to 95. A find is right if it names a training drawing with the same pixels as
the held-out one, or as the one that was planted. Ends with 1 where recall is below 0.95 or precision below 0.99.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data_pipeline.embeddings.duplicates import COSINE, candidates, copies
from data_pipeline.embeddings.inputs import find_input
from data_pipeline.samples.image import decode_image
from data_pipeline.samples.text import split
from data_pipeline.storage.files import sha256_of
from data_pipeline.storage.kept_index import read_index
from data_pipeline.storage.manifest import Shard, load_manifest, write_manifest
from data_pipeline.storage.shards import ShardReader, ShardWriter
from train.use.embed import embed
from train.use.towers import Towers, load_towers

RECALL, PRECISION = 0.95, 0.99


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="run or export to embed with")
    parser.add_argument("--data", default="data/demo/openmoji", help="folder with train and val (default: %(default)s)")
    parser.add_argument("--planted", type=int, default=400, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--cosine", type=float, default=COSINE, help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    towers = load_towers(options.model, device=torch.device("cpu"))
    with tempfile.TemporaryDirectory() as name:
        report = measure(towers, Path(options.data), Path(name), options.planted, options.seed, options.cosine)
    print(json.dumps(report) if options.json else "\n".join(f"{key}: {value}" for key, value in report.items()))
    if report["recall"] < RECALL or report["precision"] < PRECISION:
        raise SystemExit(f"the aims are a recall of {RECALL} and a precision of {PRECISION}")


def measure(towers: Towers, data: Path, directory: Path, planted: int, seed: int, cosine: float) -> dict:
    drawings, held_out = pictures(data / "train"), pictures(data / "val")
    rng = random.Random(seed)
    chosen = rng.sample(sorted(drawings), planted)
    originals: dict[str, bytes] = {}
    with ShardWriter(directory / "val", "val") as writer:
        for number, content in enumerate(held_out.values()):
            writer.write(f"own/{number:06d}", {"png": content, "txt": b"a drawing"})
            originals[f"val-000000.tar/own/{number:06d}"] = content
        for number, key in enumerate(chosen):
            kind, content = copied(drawings[key], rng)
            writer.write(f"planted/{number:06d}", {kind: content, "txt": b"a drawing"})
            originals[f"val-000000.tar/planted/{number:06d}"] = drawings[key]
    (path,) = writer.paths
    write_manifest(
        directory / "val", [Shard(path, len(read_index(path)), Path(path).stat().st_size, sha256_of(Path(path)))], {}
    )
    train_made = embed(towers, find_input(str(data / "train")), directory / "train-index")
    val_made = embed(towers, find_input(str(directory / "val")), directory / "val-index")

    assert train_made and val_made
    train, val = train_made.index, val_made.index

    found = {one.key: one.of_key for one in copies(val, train, cosine)}
    right = {key for key, of in found.items() if same(drawings[of], originals[key])}
    wanted = [key for key in originals if "/planted/" in key]
    keys, train_keys = (index.rows("images")["key"].to_pylist() for index in (val, train))
    proposed = {
        keys[row]: [train_keys[other] for other in rows]
        for row, rows, _ in candidates(val.image_ND, train.image_ND, cosine)
    }
    reached = [key for key, of in zip(wanted, chosen, strict=True) if of in proposed.get(key, [])]
    return {
        "train": len(drawings),
        "held_out": len(held_out),
        "planted": planted,
        "found": len(found),
        "recall": len(right.intersection(wanted)) / planted,
        "precision": len(right) / max(1, len(found)),
        "reached_by_embeddings": len(reached) / planted,
        "wrong": {key: of for key, of in found.items() if key not in right},
        "missed": [key for key in wanted if key not in right],
    }


def pictures(data: Path) -> dict[str, bytes]:
    """Key, as an index has it, -> image bytes."""
    found = {}
    for shard in load_manifest(data).shards:
        reader = ShardReader(shard.url, shard)
        for number in range(len(reader)):
            raw = reader.raw(number)
            found[f"{Path(shard.url).name}/{raw['__key__']}"] = split(raw, needs_caption=False)[0]
        reader.close()
    return found


def copied(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """The drawing in another size and format: extension and bytes."""
    image = decode_image(content)
    scale = rng.uniform(0.5, 2)
    size = (round(image.width * scale), round(image.height * scale))
    kind = rng.choice(("jpeg", "webp"))
    buffer = io.BytesIO()
    resample = rng.choice((Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS))
    image.resize(size, resample).save(buffer, kind, quality=rng.randint(50, 95))
    return kind, buffer.getvalue()


def same(one: bytes, other: bytes) -> bool:
    """Whether two drawings have the same pixels."""
    a, b = (np.asarray(decode_image(each)) for each in (one, other))
    return a.shape == b.shape and bool((a == b).all())


if __name__ == "__main__":
    main()
