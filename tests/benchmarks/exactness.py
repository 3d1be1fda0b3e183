"""Prints how far the gradients of every engine, world size and accumulation are from one plain process.

    python -m tests.benchmarks.exactness [--engines ddp zero2] [--worlds 1 2] [--bf16] [--json]

Relative error of the worst parameter; fp32 (in bf16 every sum rounds by 4e-3), ResNet-18 with BatchNorm and BERT with
dropout, global batch 64.
"""

from __future__ import annotations

import argparse
import json

from tests.exactness import ENGINES, LOSSES, run_cases, worlds

ACCUMULATIONS = (1, 2, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--worlds", nargs="+", type=int, default=(1, 2, 4))
    parser.add_argument("--bf16", action="store_true", help="autocast, on both sides of the comparison")
    parser.add_argument("--json", action="store_true", help="one JSON object per cell instead of a table")
    options = parser.parse_args()
    if not options.json:
        print(f"| engine | processes | accumulation | {' | '.join(LOSSES)} |\n|---|---|---|{'---|' * len(LOSSES)}")
    for engine in options.engines:
        for world in sorted(set(worlds(engine)) & set(options.worlds)):
            results = run_cases(engine, world, ACCUMULATIONS, LOSSES, bf16=options.bf16)
            for case, (loss, gradient, parameter) in results.items() if options.json else ():
                print(json.dumps(case._asdict() | {"loss_error": loss, "error": gradient, "parameter": parameter}))
            for steps in ACCUMULATIONS if not options.json else ():
                errors = {case.loss: error for case, (_, error, _) in results.items() if case.accumulation == steps}
                cells = " | ".join(f"{errors[loss]:.0e}" for loss in LOSSES)
                print(f"| {engine} | {world} | {steps} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
