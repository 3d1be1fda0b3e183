"""All that Duet has to know of a GPU, measured in one go: python -m tests.benchmarks.gpu --minutes 8 --json OUT

    python -m tests.benchmarks.gpu --tiny --json OUT      tries the script, on a CPU too, with the smallest sizes

Needs this repository and torch, torchvision, transformers and accelerate; no network and no data. Every stage runs in a
process of its own, so that none can break the next, and has its share of the time, in which an early one leaves its
rest to those that follow. OUT is written again after every measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.benchmarks.gpu.results import last_lines, tables, write_json
from tests.benchmarks.gpu.stages import STAGES, Stage

ROOT = Path(__file__).parents[3]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="all stages together end within (default: 8)")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="results (default: gpu.json)")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes, to try the script on any machine")
    parser.add_argument("--only", nargs="+", choices=[stage.name for stage in STAGES], help="these stages alone")
    parser.add_argument("--table", type=Path, help="print the tables of this file and measure nothing")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.table:
        print(tables(json.loads(options.table.read_text())))
        return 0
    stages = [stage for stage in STAGES if not options.only or stage.name in options.only]
    if options.stage:
        run_stage(next(stage for stage in STAGES if stage.name == options.stage), options)
        return 0
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: sys.exit("stopped"))
    return Run(stages, options).run()


def run_stage(stage: Stage, options: argparse.Namespace) -> None:
    """In a stage's own process: imports, tells by a file without rows, begins when the line with its seconds comes."""
    import torch

    from tests.benchmarks.gpu.bench import Bench

    stage.load()
    write_json(options.json, {})
    seconds = float(sys.stdin.readline())
    if not options.tiny and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here: --tiny tries the script without one")
    stage.run(Bench(options.json, seconds, options.tiny))


class Run:
    """Starts the stages one after the other and gathers what they have written."""

    def __init__(self, stages: list[Stage], options: argparse.Namespace) -> None:
        self.stages, self.options = stages, options
        self.ends = time.monotonic() + 60 * options.minutes
        self.results: dict[str, Any] = {"minutes": options.minutes, "tiny": options.tiny, "stages": {}}
        self.started: list[subprocess.Popen] = []

    def run(self) -> int:
        with tempfile.TemporaryDirectory() as directory:
            self.directory = Path(directory)
            try:
                # The next one imports its libraries while this one measures.
                following = self.start(0)
                for number, stage in enumerate(self.stages):
                    process, following = following, self.start(number + 1)
                    self.follow(number, stage, process)
            finally:
                for process in self.started:
                    end(process)
                print(tables(self.results), flush=True)
        failed = [name for name, stage in self.results["stages"].items() if stage["state"] != "done"]
        if failed:
            print(f"not done: {', '.join(failed)}; see {self.options.json}", file=sys.stderr)
        return 1 if failed or len(self.results["stages"]) < len(self.stages) else 0

    def paths(self, number: int) -> tuple[Path, Path]:
        """A stage's rows, and what it prints."""
        return self.directory / f"{number}.json", self.directory / f"{number}.log"

    def start(self, number: int) -> subprocess.Popen | None:
        if number == len(self.stages):
            return None
        rows, log = self.paths(number)
        command = [sys.executable, "-m", __package__, "--stage", self.stages[number].name, "--json", str(rows)]
        process = subprocess.Popen(
            [*command, *["--tiny"] * self.options.tiny],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=os.setpgrp,  # with the processes that it starts, it can be ended as a group
        )
        self.started.append(process)
        return process

    def follow(self, number: int, stage: Stage, process: subprocess.Popen | None) -> None:
        """Let a stage begin, and end it where its time is over."""
        assert process is not None and process.stdin is not None
        rows, log = self.paths(number)
        while process.poll() is None and not rows.exists() and time.monotonic() < self.ends:
            time.sleep(0.1)
        began, left = time.monotonic(), self.ends - time.monotonic()
        seconds = max(0.0, left) * stage.weight / sum(other.weight for other in self.stages[number:])
        print(f"{stage.name}: {seconds:.0f} s at most", file=sys.stderr, flush=True)
        entry: dict[str, Any] = {"state": "cut off", "rows": {}}
        self.results["stages"][stage.name] = entry
        with suppress(BrokenPipeError):  # it has failed already; its log says why
            process.stdin.write(f"{seconds}\n")
            process.stdin.close()
        while process.poll() is None and time.monotonic() < began + seconds:
            time.sleep(0.2)
            self.gather(number, entry, began)
        state = process.poll()
        end(process)
        if state is None:
            entry["error"] = f"ended after its {seconds:.0f} s"
        elif state == 0:
            entry["state"] = "done"
        else:
            entry |= {"state": "failed", "error": f"exit {state}: {last_lines(log.read_text())}"}
        self.gather(number, entry, began)

    def gather(self, number: int, entry: dict[str, Any], began: float) -> None:
        rows, _ = self.paths(number)
        found = json.loads(rows.read_text()) if rows.exists() else {}
        if found != entry["rows"] or entry["state"] != "cut off" or "error" in entry:
            entry |= {"seconds": round(time.monotonic() - began, 1), "rows": found}
            write_json(self.options.json, self.results)


def end(process: subprocess.Popen) -> None:
    """This process and those that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    sys.exit(main())
