"""What `--profile FIRST:LAST` writes: a trace of these steps, and their dearest operations by the calling place.

The trace opens in a browser's trace viewer or in Perfetto; sections of train.timing are regions in it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from train import distributed

DIRECTORY = "profile"
DEAREST = 10
OWN = re.compile(r"^(?:.*/)?((?:train|data_pipeline)/[\w/]+\.py)\((\d+)\): (\w+)$")
NOT_OPERATION = re.compile(r"<built-in|nn\.Module: |.*\.py\(\d+\): ")
CPU = torch.autograd.DeviceType.CPU


def steps_of(text: str) -> tuple[int, int] | None:
    """The first and the last step that `tracking.profile` asks for, from 1; None for an empty one.

    Raises:
        ValueError: it names no steps.
    """
    if not text:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", text)
    first, last = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= first <= last:
        raise ValueError(
            f"tracking.profile {text}: give the first and the last step, such as 20:22; steps count from 1"
        )
    return first, last


class StepProfiler:
    """Profiles the steps that a run was asked to, in this process, and writes what it saw into the run's directory.

    Args:
        steps: `tracking.profile`; ranks: `tracking.profile_ranks`.
        say: shows a line on the screen.
    """

    def __init__(self, directory: Path, steps: str, ranks: str, device: torch.device, say: Callable[[str], None]):
        wanted = steps_of(steps) if ranks == "all" or distributed.is_main() else None
        self.first, self.last = wanted or (0, 0)
        self.directory, self.device, self.say = directory / DIRECTORY, device, say
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """Step number `step`, from 1, begins."""
        if self.last and self.first <= step <= self.last and self._profile is None:
            gpu = [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *gpu], with_stack=True)
            self._profile.start()

    def after(self, step: int) -> None:
        """Step number `step` is over. What cannot be written is said; it does not end the run."""
        if self._profile is None or step < self.last:
            return
        stopped, self._profile, self.last = self._profile, None, 0
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        stopped.stop()
        base = self.directory / f"steps_{self.first}-{step}_rank_{distributed.rank()}"
        lines = table(dearest(stopped.events(), self.device.type == "cuda"), step - self.first + 1)
        try:
            self.directory.mkdir(exist_ok=True)
            stopped.export_chrome_trace(f"{base}.json.gz")
            Path(f"{base}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        except (OSError, RuntimeError) as error:
            self.say(f"tracking.profile: {base} could not be written: {error}")
            return
        self.say("\n".join([f"profile of steps {self.first} to {step}: {base}.json.gz (trace), .txt:", *lines]))


def dearest(events: Any, on_gpu: bool) -> list[tuple[float, int, str, str]]:
    """The dearest operations: seconds of their own, calls, operation, the place in the repository that calls it.

    Those of a backward pass are found at the place of the forward pass that they belong to.
    """
    sites: dict[tuple[int, int], str] = {}  # of forward operations, by their thread and number in it
    for event in events:
        if event.sequence_nr >= 0 and event.scope == 0 and event.fwd_thread in (0, None):
            sites.setdefault((event.thread, event.sequence_nr), _site(event, {}))
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    calls: dict[tuple[str, str], int] = defaultdict(int)
    for event in events:
        own = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        if not own or event.device_type != CPU or NOT_OPERATION.match(event.name):
            continue  # Python's own time is not an operation's
        key = event.name, _site(event, sites)
        seconds[key] += own
        calls[key] += 1
    order = sorted(seconds, key=seconds.__getitem__, reverse=True)[:DEAREST]
    return [(seconds[key], calls[key], *key) for key in order]


def table(rows: list[tuple[float, int, str, str]], steps: int) -> list[str]:
    """Lines for the screen: milliseconds and calls of a step, operation, place."""
    lines = [f"{'ms/step':>9} {'calls':>6}  {'operation':<44}  called in"]
    for seconds, calls, name, site in rows:
        lines.append(f"{1e3 * seconds / steps:9.2f} {calls / steps:6.0f}  {name[:44]:<44}  {site}")
    return lines


def _site(event: Any, sites: dict[tuple[int, int], str]) -> str:
    """The innermost function of the repository around an operation, and the innermost module around it."""
    module, parent = "", event
    while parent is not None:
        if parent.sequence_nr >= 0 and (found := sites.get((parent.fwd_thread, parent.sequence_nr))):
            return f"{found} (backward)"
        if not module and (named := re.match(r"nn\.Module: (\w+?)(?:_\d+)?$", parent.name)):
            module = f"{named[1]}, "
        if own := OWN.match(parent.name):
            return f"{module}{own[1]}:{own[2]} {own[3]}"
        parent = parent.cpu_parent
    return f"{module}elsewhere"
