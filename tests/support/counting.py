"""A stand-in for a long training run: real process group and signals, steps of 50 ms, a checkpoint that holds a number.

counting.py DIRECTORY STEPS: appends `step world` lines to DIRECTORY/log and keeps the step in DIRECTORY/checkpoint.
"""

import sys
import time
from pathlib import Path

from train import distributed
from train.engine.start import start
from train.run.signals import EXIT_PREEMPTED, StopRequest


def main(directory: Path, steps: int) -> int:
    stop = StopRequest()
    start()
    checkpoint = directory / "checkpoint"
    step = int(checkpoint.read_text()) if checkpoint.exists() else 0
    while step < steps:
        time.sleep(0.05)
        step += 1
        if distributed.is_main():
            with (directory / "log").open("a") as log:
                log.write(f"{step} {distributed.world_size()}\n")
        if distributed.any_rank(bool(stop.name)):
            if distributed.is_main():
                checkpoint.write_text(str(step))
            distributed.barrier()
            print(f"stopped at {step} by {stop.name or 'another rank'}", flush=True)
            return EXIT_PREEMPTED
    print(f"finished {step}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
