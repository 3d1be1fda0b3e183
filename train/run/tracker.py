"""Where a run's numbers go: metrics.jsonl, ledger.jsonl, the screen, Weights & Biases.

Nothing that happens to W&B stops a run: it is said once, and training goes on without it.
"""

from __future__ import annotations

import netrc
import os
import re
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from train import distributed
from train.config import RunConfig
from train.run.records import LEDGER, METRICS, cut, read_records, replace, to_line

# What the screen shows of a step: metric, label, format.
SHOWN = (
    ("loss", "loss", "{:.4f}"),
    ("lr/image", "lr image", "{:.2g}"),
    ("lr/text", "lr text", "{:.2g}"),
    ("temperature", "temperature", "{:.4f}"),
    ("samples_per_second", "samples/s", "{:.0f}"),
    ("data_wait", "data wait", "{:.0%}"),
)
RUN_ID = "wandb_run_id"
REACH_SECONDS = 4
INIT_SECONDS = 20
FINISH_SECONDS = 60
SECRET_NAME = re.compile(r"(api_?key|secret|passw|credential|access_?key|auth|_token$|^token$)", re.IGNORECASE)
SECRET_VALUE = re.compile(
    r"\b(hf_\w{20,}|sk-[\w-]{20,}|gh[pousr]_\w{20,}|(AKIA|ASIA)[A-Z0-9]{16}|wandb_v\d_\w{20,}|[0-9a-f]{40}|eyJ[\w.-]{40,})\b"
)
HIDDEN = "***"


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


class WandbRun:
    """The W&B run of a run directory. Its id is kept there, so that a resumed run continues it.

    Points carry a `step` of our own, the x axis of every chart. After a resume, those that an earlier session has sent
    are not sent again, so that no line runs backwards.

    Args:
        before: what metrics.jsonl held when this session began.
        say: shows a line on the screen.
    """

    def __init__(
        self, config: RunConfig, run_dir: Path, before: Sequence[Mapping[str, Any]], say: Callable[[str], None]
    ):
        self.run_dir, self.say = run_dir, say
        self.run: Any = None
        self._sent = {"train": -1, "eval": -1}
        mode: str = config.tracking.wandb
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE", "auto").replace("dryrun", "offline")
        if mode == "disabled":
            return
        id_file = run_dir / RUN_ID
        resumed = id_file.is_file()
        run_id = id_file.read_text().strip() if resumed else os.urandom(4).hex()
        self._guarded("did not start", lambda: self._start(config, run_id, mode))
        if self.run is None:
            return
        if resumed:
            for record in before:
                kind = _kind(record)
                self._sent[kind] = max(self._sent[kind], record["step"])
        else:
            replace(id_file, f"{run_id}\n")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Send the numbers among `metrics`, unless an earlier session has."""
        if self.run is None or step <= self._sent[_kind(metrics)]:
            return
        numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
        self._guarded("stopped", lambda: self.run.log({**numbers, "step": step}))

    def finish(self, exit_code: int) -> None:
        """Wait for what is not uploaded yet, for a minute at most; the rest stays in the run directory."""
        if self.run is not None:
            self._guarded("did not finish", lambda: self.run.finish(exit_code=exit_code))

    def _start(self, config: RunConfig, run_id: str, mode: str) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        problem = "" if mode == "offline" else why_offline(wandb.setup().settings.base_url, wandb.Settings().base_url)
        mode = "offline" if mode == "offline" or problem else "online"
        wanted: dict[str, Any] = {
            "silent": True,
            "console": "off",
            "init_timeout": INIT_SECONDS,
            "finish_timeout": FINISH_SECONDS,
            # Seconds; what a kill -9 of the whole job can cost of an offline run.
            "x_transaction_log_flush_interval": 1.0,
            "disable_code": True,
            "disable_git": True,
            # What W&B records of the machine includes the command line.
            "x_disable_meta": any(hide(argument) != argument for argument in sys.argv),
        }
        settings = wandb.Settings(**{name: wanted[name] for name in wanted if name in wandb.Settings.model_fields})
        options: dict[str, Any] = {
            "mode": mode,
            "project": config.tracking.project,
            "entity": config.tracking.entity or None,
            "name": config.name,
            "id": run_id,
            "resume": "allow",
            "dir": str(self.run_dir),
            "config": hide(asdict(config)),
            "settings": settings,
        }
        terminal, sys.stdin = sys.stdin, open(os.devnull)  # noqa: SIM115 - it cannot ask for a key where nobody answers
        try:
            try:
                self.run = wandb.init(**options)
            except Exception as error:
                if mode == "offline":
                    raise
                problem = _first_line(error)
                wandb.teardown()  # the id counts as in use until then
                self.run = wandb.init(**options | {"mode": "offline"})
        finally:
            sys.stdin.close()
            sys.stdin = terminal
        if problem:
            self.say(f"W&B: offline, {problem}. To upload: wandb sync {self.run_dir}/wandb/offline-run-*-{run_id}")
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def _guarded(self, what: str, action: Callable[[], object]) -> None:
        """Run `action`; if it fails, say so and do without W&B from then on."""
        try:
            action()
        except Exception as error:
            self.run = None
            self.say(f"W&B {what}, training goes on without it: {_first_line(error)}")


def why_offline(base_url: str, hosted: str = "") -> str:
    """Why W&B at `base_url` cannot be used; empty where it can. Asks nobody; takes REACH_SECONDS at most."""
    if not has_key(base_url, hosted):
        return "no API key is configured (wandb login)"
    answers = []

    def ask() -> None:
        try:
            urllib.request.urlopen(base_url, timeout=REACH_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # an answer, whatever it says
        except (OSError, ValueError) as error:
            if "SSL" not in str(error):  # W&B has certificates of its own
                return
        answers.append(True)

    # A thread, because no timeout ends the look-up of a name.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(REACH_SECONDS)
    return "" if answers else f"{urlsplit(base_url).netloc} does not answer"


def has_key(base_url: str, hosted: str = "") -> bool:
    """Whether W&B finds a key without asking: in WANDB_API_KEY, an identity token file, or the netrc file.

    Args:
        hosted: the address of the hosted service, whose keys may also stand under its older name.
    """
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    candidates = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    path = next((path for name in candidates if (path := Path(name).expanduser()).is_file()), None)
    try:
        hosts = netrc.netrc(path).hosts if path else {}
    except (OSError, netrc.NetrcParseError):
        return False
    ours = [urlsplit(base_url).netloc] + ["api.wandb.ai"] * (base_url == hosted)
    return any(hosts[host][2] for host in ours if host in hosts)


def hide(value: Any, name: str = "") -> Any:
    """`value`, a tree of dicts and lists, without anything that looks like a key: by its name, its form, or because a
    secret environment variable holds it; urls without passwords and queries."""
    if isinstance(value, dict):
        return {key: hide(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [hide(item) for item in value]
    if not isinstance(value, str) or not value:
        return value
    if SECRET_NAME.search(name):
        return HIDDEN
    for key, secret in os.environ.items():
        if SECRET_NAME.search(key) and len(secret) >= 8:
            value = value.replace(secret, HIDDEN)
    value = re.sub(r"(\w+://)[^/@\s]+@", rf"\g<1>{HIDDEN}@", value)
    value = re.sub(r"(\w+://[^\s?]+\?)\S+", rf"\g<1>{HIDDEN}", value)
    return SECRET_VALUE.sub(HIDDEN, value)


def _kind(record: Mapping[str, Any]) -> str:
    return "train" if "loss" in record else "eval"


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
