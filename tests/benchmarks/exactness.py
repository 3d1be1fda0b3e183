"""Prints how far the gradients of every engine, world size and accumulation are from one plain process.

    python -m tests.benchmarks.exactness [--engines ddp zero2] [--worlds 1 2] [--gpu] [--bf16] [--json]

Relative error of the worst parameter; ResNet-18 with BatchNorm and BERT with dropout, global batch 64. On the CPU over
gloo; with --gpu each process has a GPU, over NCCL, and the plain process too.
Ends with 1 where an error is larger than 1e-5, or 2e-2 in bf16 on GPUs.
"""

from __future__ import annotations

import argparse
import json

import torch

from tests.support.exactness import BF16_ON_GPU, ENGINES, LOSSES, TOLERANCE, run_cases, worlds

ACCUMULATIONS = (1, 2, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--worlds", nargs="+", type=int, default=(1, 2, 4))
    parser.add_argument(
        "--gpu", action="store_true", help="a GPU for every process; worlds of more than there are drop out"
    )
    parser.add_argument("--bf16", action="store_true", help="autocast, on both sides of the comparison")
    parser.add_argument("--json", action="store_true", help="one JSON object per cell instead of a table")
    options = parser.parse_args()
    gpus = torch.accelerator.device_count()
    if options.gpu and not gpus:
        parser.error("--gpu: torch sees no GPU here; leave it out to run on the CPU")
    tolerance, failed = BF16_ON_GPU if options.bf16 and options.gpu else TOLERANCE, False
    if not options.json:
        print(f"| engine | processes | accumulation | {' | '.join(LOSSES)} |\n|---|---|---|{'---|' * len(LOSSES)}")
    for engine in options.engines:
        for world in sorted(set(worlds(engine)) & set(options.worlds)):
            if options.gpu and world > gpus:
                continue
            results = run_cases(engine, world, ACCUMULATIONS, LOSSES, bf16=options.bf16, gpu=options.gpu)
            failed |= any(not gradient <= tolerance for _, gradient, _ in results.values())
            for case, (loss, gradient, parameter) in results.items() if options.json else ():
                print(json.dumps(case._asdict() | {"loss_error": loss, "error": gradient, "parameter": parameter}))
            for steps in ACCUMULATIONS if not options.json else ():
                errors = {case.loss: error for case, (_, error, _) in results.items() if case.accumulation == steps}
                cells = " | ".join(f"{errors[loss]:.0e}" for loss in LOSSES)
                print(f"| {engine} | {world} | {steps} | {cells} |", flush=True)
    if failed:
        raise SystemExit(f"an error is larger than {tolerance:g}")


if __name__ == "__main__":
    main()
