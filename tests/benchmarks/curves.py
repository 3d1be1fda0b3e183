"""Prints how far the 50-step curves of every engine and world size are from that of one plain process.

    python -m tests.benchmarks.curves [--engines ddp zero2] [--worlds 1 2] [--losses tiled sigmoid] [--json]
    python -m tests.benchmarks.curves --update      record one plain process's curve again in tests/golden/curve.json

Largest relative difference of a loss or temperature at the same step; inf where the samples or their order differ.
`golden` is the same against the recorded curve, which may come from another CPU. The run: tests/support/curves.py.
"""

from __future__ import annotations

import argparse
import json

from tests.support.curves import golden, record, write_golden
from tests.support.exactness import ENGINES, LOSSES, worlds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--worlds", nargs="+", type=int, choices=(1, 2, 4), default=(1, 2, 4))
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=("tiled",))
    parser.add_argument("--update", action="store_true", help="record tests/golden/curve.json again, and nothing else")
    parser.add_argument("--json", action="store_true", help="one JSON object per curve instead of a table")
    options = parser.parse_args()
    if options.update:
        write_golden(record())
        return
    if not options.json:
        print("| engine | processes | loss | difference |\n|---|---|---|---|")
    for loss in options.losses:
        plain = record(loss=loss)
        if loss == "tiled":
            show(options.json, "golden", 1, loss, plain.differs(golden()[0]))
        for engine in options.engines:
            for world in sorted(set(worlds(engine)) & set(options.worlds)):
                if engine != "plain":
                    show(options.json, engine, world, loss, record(engine, world, loss, resident=1).differs(plain))


def show(as_json: bool, engine: str, world: int, loss: str, difference: float) -> None:
    if as_json:
        print(json.dumps({"engine": engine, "world": world, "loss": loss, "difference": difference}), flush=True)
    else:
        print(f"| {engine} | {world} | {loss} | {difference:.0e} |", flush=True)


if __name__ == "__main__":
    main()
