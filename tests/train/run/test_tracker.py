"""metrics.jsonl, ledger.jsonl and the screen."""

import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.distributed import run_distributed
from train.config import RunConfig
from train.run.records import cut, read_history, read_records, to_line
from train.run.tracker import Tracker

ROOT = Path(__file__).parents[3]
METRICS = {"loss": 2.5, "lr/image": 1e-3, "lr/text": 1e-5, "temperature": 0.07, "samples_per_second": 310.0}

SCRIPT = """
import sys, time
from train.config import RunConfig
from train.run.tracker import Tracker
config = RunConfig()
config.tracking.wandb, config.tracking.log_every = "disabled", 5
tracker = Tracker(config, sys.argv[1], total_steps=int(sys.argv[2]))
for step in range(1, int(sys.argv[2]) + 1):
    time.sleep(float(sys.argv[3]))
    tracker.log(step, {"loss": 1 / step, "lr/image": 1e-3, "temperature": 0.07, "data_wait": 0.25})
tracker.message("a message")
tracker.finish(0, "the end")
"""


def quiet(log_every: int = 10) -> RunConfig:
    config = RunConfig()
    config.tracking.wandb, config.tracking.log_every = "disabled", log_every
    return config


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def start(*arguments: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, **options)


def test_every_step_is_one_line(tmp_path):
    tracker = Tracker(quiet(), tmp_path, total_steps=3)
    for step in (1, 2, 3):
        tracker.log(step, METRICS | {"batch_digest": "00ff"})
    tracker.log(3, {"t2i_R@1": 12.5}, prefix="val/")
    expected = [{"step": step, **METRICS, "batch_digest": "00ff"} for step in (1, 2, 3)]
    # Whole on the disk before the run has ended.
    assert lines(tmp_path / "metrics.jsonl") == [*expected, {"step": 3, "val/t2i_R@1": 12.5}]
    tracker.finish(0)
    assert read_history(tmp_path) == [*expected[:2], {**expected[2], "val/t2i_R@1": 12.5}]


def test_numbers_that_are_not_finite_stay_json(tmp_path):
    tracker = Tracker(quiet(), tmp_path, total_steps=1)
    tracker.log(1, {"loss": float("nan"), "grad_norm": float("inf"), "temperature": 0.07})
    tracker.finish(1)

    def refuse(name):
        raise AssertionError(name)

    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == {"step": 1, "loss": None, "grad_norm": None, "temperature": 0.07}


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    tracker = Tracker(quiet(), tmp_path, total_steps=9)
    for step in range(1, 8):
        tracker.ledger([{"step": step - 1, "key": f"bad {step}", "cause": "truncated"}])
        tracker.log(step, {"loss": float(step)})
        if step in (4, 6):
            tracker.log(step, {"t2i_R@1": float(step)}, prefix="val/")
    tracker.finish(1)
    tracker = Tracker(quiet(), tmp_path, total_steps=9, resumed_step=4)
    assert [record["step"] for record in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 4]
    # Steps 0 to 3 are the four that were done.
    assert [record["step"] for record in lines(tmp_path / "ledger.jsonl")] == [0, 1, 2, 3]
    for step in range(5, 10):
        tracker.log(step, {"loss": -float(step)})
    tracker.finish(0)
    assert [record["loss"] for record in read_history(tmp_path)] == [1, 2, 3, 4, -5, -6, -7, -8, -9]


def test_case_01_kill_9_loses_no_logged_step_and_resuming_mends_the_file(tmp_path):
    process = start(tmp_path, 100000, 0.002, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 50/"):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 99999, "lo')  # a write that was cut short
    steps = [record["step"] for record in read_records(tmp_path / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 50
    Tracker(quiet(), tmp_path, total_steps=100000, resumed_step=40).finish(0)
    assert [record["step"] for record in lines(tmp_path / "metrics.jsonl")] == list(range(1, 41))


@settings(deadline=None)
@given(steps=st.lists(st.integers(0, 20), max_size=12), at=st.integers(0, 20), torn=st.integers(0, 400))
def test_cutting_keeps_every_whole_line_up_to_a_step(tmp_path_factory, steps, at, torn):
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    records = [{"step": step, "loss": step / 3, "text": "a\nb é"} for step in steps]
    content = "".join(map(to_line, records)).encode()
    path.write_bytes(content[:torn])
    whole = content[:torn].count(b"\n")
    if torn < len(content) and content[torn : torn + 1] == b"\n":
        whole += 1  # only the end of the line is missing: its record is whole
    cut(path, lambda record: record["step"] <= at)
    assert lines(path) == [record for record in records[:whole] if record["step"] <= at]
    assert not path.read_bytes() or path.read_bytes().endswith(b"\n")


def test_cutting_a_file_that_needs_no_cut_leaves_it_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(to_line({"step": 1}))
    before = path.stat()
    cut(path, lambda record: True)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_without_a_terminal_a_line_every_few_steps(tmp_path):
    done = start(tmp_path, 12, 0, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = done.communicate(timeout=300)
    shown = out.splitlines()
    assert [line.split("  ")[0] for line in shown] == ["step 5/12", "step 10/12", "step 12/12", "a message", "the end"]
    assert "loss 0.2000  lr image 0.001  temperature 0.0700  data wait 25%  eta 00:00" in shown[0]
    assert err == ""


def test_on_a_terminal_a_bar(tmp_path):
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 160))
    process = start(tmp_path, 12, 0.05, stdout=subprocess.PIPE, stderr=terminal, text=True)
    out, _ = process.communicate(timeout=300)
    os.close(terminal)
    os.set_blocking(controller, False)
    drawn = os.read(controller, 65536).decode()
    os.close(controller)
    assert out.splitlines() == ["a message", "the end"]
    assert "12/12" in drawn and "loss 0.0833" in drawn and "data wait 25%" in drawn


def _log_on_a_rank(directory: Path) -> None:
    tracker = Tracker(quiet(), directory, total_steps=2)
    tracker.log(1, METRICS)
    tracker.ledger([{"step": 0}])
    tracker.message("hello")
    tracker.finish(0, "bye")


def test_only_the_main_process_writes(tmp_path):
    run_distributed(_log_on_a_rank, 2, tmp_path)
    assert len(lines(tmp_path / "metrics.jsonl")) == len(lines(tmp_path / "ledger.jsonl")) == 1


def test_logging_costs_little(tmp_path):
    tracker = Tracker(quiet(), tmp_path, total_steps=2000)
    begin = time.perf_counter()
    for step in range(1, 2001):
        tracker.log(step, METRICS)
    seconds = time.perf_counter() - begin
    tracker.finish(0)
    assert seconds / 2000 < 0.005
