"""Where a run's numbers go: metrics.jsonl, ledger.jsonl, the screen, and Weights & Biases."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_pipeline.storage.redaction import redact_urls
from train import distributed
from train.config import RunConfig
from train.run.records import LEDGER, METRICS, cut, read_records, to_line
from train.run.wandb import WandbRun

# What the screen shows of a step: metric, label, format.
SHOWN = (
    ("loss", "loss", "{:.4f}"),
    ("lr/image", "lr image", "{:.2g}"),
    ("lr/text", "lr text", "{:.2g}"),
    ("temperature", "temperature", "{:.4f}"),
    ("samples_per_second", "samples/s", "{:.0f}"),
    ("data_wait", "data wait", "{:.0%}"),
)


class _Log:
    """A file of records that grows."""

    def __init__(self, path: Path):
        self.path, self._descriptor = path, -1

    def open(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Open it with those of its records that `keep` says yes to."""
        cut(self.path, keep)
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def write(self, lines: str) -> None:
        """All lines are with the operating system when it returns, whatever kills the process then."""
        data = lines.encode()
        while data and self._descriptor >= 0:
            data = data[os.write(self._descriptor, data) :]

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1


class Tracker:
    """A run's log, kept by the main process; on the others every method but `check` does nothing.

    A step is the number of optimizer steps done. A run that resumes at a step drops what was logged after that step.

    Attributes:
        problem: why a log could not be written; empty where it could. `check` ends the run of all ranks for it.
    """

    def __init__(self, config: RunConfig, run_dir: str | Path, *, total_steps: int, resumed_step: int = 0):
        self.is_main, self.problem = distributed.is_main(), ""
        if not self.is_main:
            return
        run_dir = Path(run_dir)
        self.log_every = max(1, config.tracking.log_every)
        self.total_steps, self.first_step, self.started = total_steps, resumed_step, time.monotonic()
        self._metrics, self._ledger = _Log(run_dir / METRICS), _Log(run_dir / LEDGER)
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            before = read_records(run_dir / METRICS)
            self._metrics.open(lambda record: record["step"] <= resumed_step)
            # The ledger counts steps from 0: its step s is one of those done when s + 1 are.
            self._ledger.open(lambda record: record["step"] < resumed_step)
        except OSError as error:
            self._fail(run_dir / METRICS, error)
            return
        self._wandb = WandbRun(config, run_dir, before, self.message)
        quiet = not sys.stderr.isatty()
        self._bar = tqdm(total=total_steps, initial=resumed_step, unit="step", dynamic_ncols=True, disable=quiet)

    def log(self, step: int, metrics: Mapping[str, Any], prefix: str = "") -> None:
        """Metrics after `step` steps: of training, or under a prefix such as `val/` of an evaluation.

        metrics.jsonl gets all of them, the screen and W&B training metrics every `tracking.log_every` steps.
        """
        if not self.is_main:
            return
        named = {prefix + name: value for name, value in metrics.items()}
        self._write(self._metrics, [{"step": step, **named}])
        if prefix:
            self._wandb.log(step, named)
            return
        shown = "  ".join(f"{label} {form.format(metrics[key])}" for key, label, form in SHOWN if key in metrics)
        self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update(step - self.first_step - self._bar.n if self._bar.disable else step - self._bar.n)
        if step % self.log_every == 0 or step == self.total_steps:
            self._wandb.log(step, named)
            if self._bar.disable:
                print(f"step {step}/{self.total_steps}  {shown}  eta {self._eta(step)}", flush=True)

    def ledger(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Samples that were bad and replaced, one line each of ledger.jsonl. Each record has its `step`, from 0."""
        if self.is_main:
            self._write(self._ledger, records)

    def check(self) -> None:
        """All ranks call it together: before a checkpoint, which must not be ahead of the logs.

        Raises:
            ValueError: on all ranks, where a log could not be written.
        """
        if problem := distributed.broadcast_object(self.problem):
            raise ValueError(problem)

    def _write(self, log: _Log, records: Sequence[Mapping[str, Any]]) -> None:
        try:
            log.write("".join(to_line(record) for record in records))
        except OSError as error:
            self._fail(log.path, error)

    def _fail(self, path: Path, error: OSError) -> None:
        """Keep the first problem, and write no more: a log with a gap would say what was not so."""
        self.problem = self.problem or (
            f"{error.filename or path} could not be written: {error.strerror}. Free or mend the disk and start again: "
            "the same command resumes from the newest checkpoint, which is whole"
        )
        self._metrics.close()
        self._ledger.close()

    def message(self, text: str) -> None:
        """A line on the screen that the progress bar does not overwrite."""
        if self.is_main:
            with tqdm.external_write_mode(file=sys.stdout):
                print(redact_urls(text), flush=True)

    def finish(self, exit_code: int = 0, text: str = "") -> None:
        """Close everything, with a last line on the screen; W&B marks a run with another exit code than 0 as failed."""
        if not self.is_main:
            return
        self._bar.close()
        if text:
            self.message(text)
        self._wandb.finish(exit_code)
        self._metrics.close()
        self._ledger.close()

    def _eta(self, step: int) -> str:
        done = max(1, step - self.first_step)
        return tqdm.format_interval((self.total_steps - step) * (time.monotonic() - self.started) / done)
