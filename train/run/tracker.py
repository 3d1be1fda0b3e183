"""Where a run's numbers go: metrics.jsonl, ledger.jsonl, the screen, and Weights & Biases."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

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


class Tracker:
    """A run's log, kept by the main process; on the others every method does nothing.

    A step is the number of optimizer steps done. A run that resumes at a step drops what was logged after that step.
    """

    def __init__(self, config: RunConfig, run_dir: str | Path, *, total_steps: int, resumed_step: int = 0):
        self.is_main = distributed.is_main()
        if not self.is_main:
            return
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self.log_every = max(1, config.tracking.log_every)
        self.total_steps, self.first_step, self.started = total_steps, resumed_step, time.monotonic()
        before = read_records(run_dir / METRICS)
        cut(run_dir / METRICS, lambda record: record["step"] <= resumed_step)
        # The ledger counts steps from 0: its step s is one of those done when s + 1 are.
        cut(run_dir / LEDGER, lambda record: record["step"] < resumed_step)
        # Line buffered: a line is with the operating system when `log` returns, whatever kills the process then.
        self._metrics = open(run_dir / METRICS, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        self._ledger = open(run_dir / LEDGER, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
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
        self._metrics.write(to_line({"step": step, **named}))
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
            self._ledger.writelines(to_line(record) for record in records)

    def message(self, text: str) -> None:
        """A line on the screen that the progress bar does not overwrite."""
        if self.is_main:
            with tqdm.external_write_mode(file=sys.stdout):
                print(text, flush=True)

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
