"""How long a search takes among many embeddings.

    python -m tests.benchmarks.search --json [--count 100000] [--dims 384] [--repeats 7]

Random unit vectors in an index on the disk, as train.embed writes one. A search is what `python -m train.search` does
once the model has embedded the query: vectors from the file, the nearest ten, their keys and captions. The first one is
told apart, as nothing of the index is in memory then but what the system keeps of its files.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from data_pipeline.embeddings.index import open_index, write_about
from data_pipeline.embeddings.parts import Part, assemble, remove_parts, write_part
from train.use.find import search

PART = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=100_000, help="images, each with a caption (default: %(default)s)")
    parser.add_argument("--dims", type=int, default=384, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        report = measure(Path(name), options.count, options.dims, options.repeats)
    if options.json:
        print(json.dumps(report))
        return
    print("{count:,} embeddings of {dims}: first {first:.3f} s, then {median:.3f} s, {how}".format(**report))


def measure(directory: Path, count: int, dims: int, repeats: int) -> dict:
    rng = np.random.default_rng(0)
    (directory / "parts").mkdir()
    for number in range(0, count, PART):
        samples = list(range(number, min(number + PART, count)))
        vectors = [unit(rng, len(samples), dims) for _ in "it"]
        keys = [f"train-000000.tar/{sample:08d}" for sample in samples]
        write_part(
            directory, number // PART, Part(*vectors, samples, keys, samples, keys, [f"no. {s}" for s in samples])
        )
    found = assemble(directory, -(-count // PART))
    write_about(directory, {"complete": True, "dims": dims, "input": {"path": ""}, **found})
    remove_parts(directory)
    times = []
    for _ in range(repeats + 1):
        query = unit(rng, 1, dims)
        began = time.perf_counter()
        _, how = search(open_index(directory), ["a red flag"], query, 10)
        times.append(time.perf_counter() - began)
    return {"count": count, "dims": dims, "how": how, "first": times[0], "median": statistics.median(times[1:])}


def unit(rng: np.random.Generator, count: int, dims: int) -> np.ndarray:
    vectors = rng.standard_normal((count, dims), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


if __name__ == "__main__":
    main()
