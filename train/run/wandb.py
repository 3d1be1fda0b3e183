"""Weights & Biases. Nothing that happens to it stops a run: it is said once, and training continues without it.

Its own variables win over defaults: WANDB_PROJECT, WANDB_NAME, WANDB_RUN_ID (of a run that is not resumed), WANDB_DIR,
WANDB_MODE, as an agent of a sweep sets them, and those that Duet has no field for.
"""

from __future__ import annotations

import netrc
import os
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from data_pipeline.storage.files import write_atomically
from data_pipeline.storage.redaction import redact
from train.config import RunConfig, TrackingConfig
from train.run.lineage import read_record

RUN_ID = "wandb_run_id"
REACH_SECONDS = 4
INIT_SECONDS = 20
FINISH_SECONDS = 60


class WandbRun:
    """The W&B run of a run directory. Its id is kept there, so that a resumed run continues it; a run that started from
    another one has a W&B run of its own, whose config has the parent's id.

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
        mode = wanted_mode(config)
        if mode == "disabled":
            return
        id_file = run_dir / RUN_ID
        kept = id_file.read_text().strip() if id_file.is_file() else ""
        run_id = kept or os.environ.get("WANDB_RUN_ID") or os.urandom(4).hex()
        self._guarded("did not start", lambda: self._start(config, run_id, mode))
        if self.run is None:
            return
        if self.run.id == kept:
            for record in before:
                kind = _kind(record)
                self._sent[kind] = max(self._sent[kind], record["step"])
        else:  # in a sweep it is the agent's, whatever was asked for
            self._guarded("stopped", lambda: write_atomically(id_file, f"{self.run.id}\n"))

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
            "x_disable_meta": any(redact(argument) != argument for argument in sys.argv),
        }
        settings = wandb.Settings(**{name: wanted[name] for name in wanted if name in wandb.Settings.model_fields})
        directory = os.environ.get("WANDB_DIR") or str(self.run_dir)
        options: dict[str, Any] = {
            "mode": mode,
            "name": os.environ.get("WANDB_NAME") or config.name,
            "resume": "allow",
            "dir": directory,
            "config": redact(_described(config, self.run_dir)),
            "settings": settings,
        }
        if not os.environ.get("WANDB_SWEEP_ID"):  # whose agent has chosen these
            is_default = config.tracking.project == TrackingConfig.project
            options["project"] = (is_default and os.environ.get("WANDB_PROJECT")) or config.tracking.project
            options |= {"entity": config.tracking.entity or None, "id": run_id}
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
            self.say(f"W&B: offline, {problem}. To upload: wandb sync {directory}/wandb/offline-run-*-{self.run.id}")
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def _guarded(self, what: str, action: Callable[[], object]) -> None:
        """Run `action`; if it fails, say so and do without W&B from then on."""
        try:
            action()
        except Exception as error:
            self.run = None
            self.say(f"W&B {what}, training continues without it: {_first_line(error)}")


def wanted_mode(config: RunConfig) -> str:
    """auto, online, offline or disabled: `tracking.wandb`, or WANDB_MODE where that is auto."""
    if config.tracking.wandb != "auto":
        return config.tracking.wandb
    return os.environ.get("WANDB_MODE", "auto").replace("dryrun", "offline")  # as wandb called it first


def _described(config: RunConfig, run_dir: Path) -> dict[str, Any]:
    """The configuration as W&B shows it; of a run with a parent, also its W&B run and what was changed."""
    described = asdict(config)
    if record := read_record(run_dir):
        described["parent"] |= {"wandb_run_id": record["wandb"], "differences": record["differences"]}
    return described


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
        hosted: the address of the hosted service, whose keys may also be under its older name.
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


def _kind(record: Mapping[str, Any]) -> str:
    return "train" if "loss" in record else "eval"


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
