"""Real Weights & Biases runs without a server."""

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import wandb
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from data_pipeline.storage.redaction import HIDDEN
from tests.support.wandb_files import history, offline_runs, run_of
from train.config import RunConfig
from train.run.lineage import write_record
from train.run.tracker import Tracker
from train.run.wandb import has_key, why_offline

ROOT = Path(__file__).parents[3]
KEY = "0123456789abcdef0123456789abcdef01234567"

SCRIPT = """
import os, sys, time
from pathlib import Path
from tests.train.run.test_wandb import track
track(Path(sys.argv[1]), mode=sys.argv[2], total=int(sys.argv[3]), each=eval(sys.argv[4]))
"""


@pytest.fixture(autouse=True)
def own_settings(tmp_path, monkeypatch):
    """No key, no configuration, nothing of the machine's own W&B."""
    for name in list(os.environ):
        if name.startswith("WANDB") or name == "NETRC":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    yield
    os.environ.pop("WANDB_SILENT", None)


def track(
    directory: Path, *, mode="auto", resumed=0, total=6, data="data/train", project="duet", each=lambda step: None
) -> None:
    """Steps `resumed` + 1 to `total`, every second one with an evaluation."""
    config = RunConfig(name="small")
    config.tracking.wandb, config.tracking.log_every, config.tracking.project = mode, 1, project
    config.data.train = data
    tracker = Tracker(config, directory, total_steps=total, resumed_step=resumed)
    for step in range(resumed + 1, total + 1):
        tracker.log(step, {"loss": 1 / step, "batch_digest": "00ff"})
        if step % 2 == 0:
            tracker.log(step, {"t2i_R@1": float(step)}, prefix="val/")
        each(step)
    tracker.finish(0, "the end")
    with suppress(ConnectionError):  # where a test has killed it
        wandb.teardown()  # as at the end of a process


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def logged(directory: Path) -> int:
    """Lines of metrics.jsonl."""
    return len((directory / "metrics.jsonl").read_text().splitlines())


def test_without_a_key_the_run_is_kept_offline(tmp_path, capsys):
    track(tmp_path / "run")
    shown = capsys.readouterr().out
    assert shown.startswith("W&B: offline, no API key is configured (wandb login). To upload: wandb sync ")
    (session,) = offline_runs(tmp_path / "run")
    assert run_of(session).run_id == (tmp_path / "run" / "wandb_run_id").read_text().strip()
    assert run_of(session).display_name == "small"
    expected = []
    for step in range(1, 7):
        expected.append({"loss": 1 / step, "step": step})
        expected += [{"val/t2i_R@1": float(step), "step": step}] if step % 2 == 0 else []
    assert history(session) == expected
    metrics = [record.metric for record in session if record.WhichOneof("record_type") == "metric"]
    assert any(metric.name == "step" for metric in metrics)
    assert any(metric.glob_name == "*" and metric.step_metric == "step" for metric in metrics)


def test_a_killed_run_goes_on_in_the_same_w_and_b_run(tmp_path):
    kill = "lambda step: step == 5 and (time.sleep(3), os.kill(os.getpid(), 9))"
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "run"), "auto", "9", kill]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
    wait_for(lambda: len(history(offline_runs(tmp_path / "run")[0])) == 7)  # W&B's own process outlives the trainer
    track(tmp_path / "run", resumed=3, total=9)
    first, second = offline_runs(tmp_path / "run")
    assert run_of(first).run_id == run_of(second).run_id
    for name, expected in (("loss", list(range(1, 10))), ("val/t2i_R@1", [2, 4, 6, 8])):
        steps = [point["step"] for session in (first, second) for point in history(session) if name in point]
        assert steps == expected


def test_a_run_that_was_not_tracked_before_is_sent_from_where_it_resumes(tmp_path):
    track(tmp_path / "run", mode="disabled", total=5)
    assert not (tmp_path / "run" / "wandb").exists() and not (tmp_path / "run" / "wandb_run_id").exists()
    track(tmp_path / "run", mode="offline", resumed=3, total=6)
    (session,) = offline_runs(tmp_path / "run")
    assert [point["step"] for point in history(session) if "loss" in point] == [4, 5, 6]


def test_the_environment_can_turn_it_off(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    track(tmp_path / "run")
    assert not (tmp_path / "run" / "wandb").exists()
    monkeypatch.setenv("WANDB_MODE", "dryrun")  # as wandb called it first
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    track(tmp_path / "run")
    assert len(offline_runs(tmp_path / "run")) == 1 and "W&B" not in capsys.readouterr().out


def test_its_own_variables_win_over_defaults(tmp_path, monkeypatch, capsys):
    (tmp_path / "elsewhere").mkdir()
    wanted = {"PROJECT": "theirs", "NAME": "shown", "RUN_ID": "trial1", "DIR": str(tmp_path / "elsewhere")}
    for name, value in wanted.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    track(tmp_path / "run", total=1)
    (session,) = offline_runs(tmp_path / "elsewhere")
    run = run_of(session)
    assert (run.project, run.display_name, run.run_id) == ("theirs", "shown", "trial1")
    assert (tmp_path / "run" / "wandb_run_id").read_text() == "trial1\n"
    assert f"wandb sync {tmp_path}/elsewhere/wandb/offline-run-*-trial1" in capsys.readouterr().out
    monkeypatch.setenv("WANDB_RUN_ID", "other")
    track(tmp_path / "run", resumed=1, total=2, project="mine")
    run = run_of(offline_runs(tmp_path / "elsewhere")[1])
    assert (run.project, run.run_id) == ("mine", "trial1"), "a field that is set wins, and a resumed run is what it was"


def test_in_a_sweep_the_agent_chooses_the_run_and_the_real_id_is_written(tmp_path, monkeypatch):
    track(tmp_path / "run", mode="offline", total=1)
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_RUN_ID", "trial2")
    track(tmp_path / "run", mode="offline", total=2)
    run = run_of(offline_runs(tmp_path / "run")[1])
    assert (run.run_id, run.sweep_id) == ("trial2", "sweep1")
    assert (tmp_path / "run" / "wandb_run_id").read_text() == "trial2\n"


def test_the_sweep_of_the_readme_starts_a_run_named_after_its_trial(tmp_path):
    """The command that an agent makes of it, with `python -m train` in the launcher's place."""
    (block,) = re.findall(r"\n    # sweep\.yaml\n((?:    .*\n)+)", (ROOT / "README.md").read_text())
    sweep = yaml.safe_load(textwrap.dedent(block))
    arguments = {name: {"value": one["values"][0]} for name, one in sweep["parameters"].items()}
    filled = {"${env}": ["/usr/bin/env"], "${args}": create_sweep_command_args({"args": arguments})["args"]}
    command = [part for chunk in sweep["command"] for part in filled.get(chunk, [chunk])]
    command = [part.replace("./launch/local.sh", f"{sys.executable} -m train --print_config") for part in command]
    environment = os.environ | {"WANDB_RUN_ID": "trial3"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    config = yaml.safe_load(done.stdout)
    assert config["name"].endswith("trial3"), done.stderr
    flat = {
        f"{section}.{name}": value
        for section, part in config.items()
        if isinstance(part, dict)
        for name, value in part.items()
    }
    assert {name: flat[name] for name in arguments} == {name: one["value"] for name, one in arguments.items()}


def test_a_run_from_another_one_has_that_ones_id_in_its_config(tmp_path):
    (tmp_path / "run").mkdir()
    changed = ["optim.lr: 0.1 -> 0.2"]
    write_record(tmp_path / "run", {"run": "old", "step": 5, "wandb": "abc", "differences": changed})
    track(tmp_path / "run", mode="offline", total=1)
    run = run_of(offline_runs(tmp_path / "run")[0])
    parent = {item.key: json.loads(item.value_json) for item in run.config.update}["parent"]
    assert (parent["wandb_run_id"], parent["differences"]) == ("abc", changed) and run.run_id != "abc"


def test_it_never_asks_on_a_terminal(tmp_path):
    controller, terminal = pty.openpty()
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "run"), "online", "2", "lambda step: None"]
    process = subprocess.Popen(command, cwd=ROOT, stdin=terminal, stdout=subprocess.PIPE, stderr=terminal, text=True)
    out, _ = process.communicate(timeout=300)
    os.close(terminal)
    os.close(controller)
    assert process.returncode == 0
    assert out.splitlines()[-1] == "the end"
    assert len(offline_runs(tmp_path / "run")) == 1


@pytest.fixture
def silent_server():
    """Takes connections and never answers."""
    server = socket.create_server(("127.0.0.1", 0), backlog=50)
    kept = []

    def accept():
        with suppress(OSError):
            while True:
                kept.append(server.accept())

    threading.Thread(target=accept, daemon=True).start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}"
    server.close()


@pytest.fixture
def slow_server():
    """Answers with one byte per second and connection."""
    server = socket.create_server(("127.0.0.1", 0))

    def drip():
        with suppress(OSError):
            connection, _ = server.accept()
            for byte in b"HTTP/1.0 200 slow" + b"w" * 60:
                connection.send(bytes([byte]))
                time.sleep(1)

    threading.Thread(target=drip, daemon=True).start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}"
    server.close()


def test_looking_for_a_server_is_bounded(silent_server, slow_server, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with socket.create_server(("127.0.0.1", 0)) as free:
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    for url in (silent_server, slow_server, closed, "http://no-such-host.invalid"):
        begin = time.monotonic()
        assert "does not answer" in why_offline(url)
        assert time.monotonic() - begin < 8


def test_a_server_that_never_answers_leaves_the_run_offline(tmp_path, silent_server, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", silent_server)
    track(tmp_path / "run", mode="online")
    shown = capsys.readouterr()
    assert "W&B: offline, 127.0.0.1:" in shown.out and "does not answer" in shown.out
    assert KEY not in shown.out + shown.err
    assert len(history(offline_runs(tmp_path / "run")[0])) == 9


def test_a_server_that_refuses_leaves_the_run_offline(tmp_path, monkeypatch, capsys):
    # This one answers, so that W&B starts online and fails there.
    server = subprocess.Popen(
        [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", server.stdout.readline().split("(")[1].split("/)")[0])
        track(tmp_path / "run")
    finally:
        server.kill()
        server.communicate()
    assert "W&B: offline, " in capsys.readouterr().out
    assert len(history(offline_runs(tmp_path / "run")[0])) == 9


def test_a_key_that_cannot_be_one_leaves_the_run_offline(tmp_path, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=lambda: server.accept()[0].sendall(b"HTTP/1.0 404 no\r\n\r\n"), daemon=True).start()
        monkeypatch.setenv("WANDB_API_KEY", "short")
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        track(tmp_path / "run")
    assert "W&B: offline, WANDB_API_KEY invalid" in capsys.readouterr().out
    assert len(offline_runs(tmp_path / "run")) == 1


def kill_service(step: int) -> None:
    """At the second step, kill the process that W&B has started beside this one."""
    if step == 2:
        children = subprocess.run(
            ["ps", "--ppid", str(os.getpid()), "-o", "pid=,args="], capture_output=True, text=True
        )
        pids = [int(line.split()[0]) for line in children.stdout.splitlines() if "wandb-core" in line]
        assert pids
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.5)


def test_w_and_b_dying_does_not_stop_the_run(tmp_path, capsys):
    track(tmp_path / "run", total=40, each=kill_service)
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] == "the end"
    assert shown.count("training continues without it") == 1
    assert logged(tmp_path / "run") == 60


def test_a_broken_w_and_b_does_not_stop_the_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "wandb.py").write_text("raise ImportError('libfoo is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb")
    track(tmp_path / "run")
    assert "W&B did not start, training continues without it: libfoo is missing" in capsys.readouterr().out
    assert logged(tmp_path / "run") == 9


def test_a_directory_that_cannot_be_made_does_not_stop_the_run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb").write_text("a file where W&B wants a directory")
    track(tmp_path / "run")
    assert logged(tmp_path / "run") == 9


def test_case_17_no_secret_leaves_the_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "my-very-own-key")
    url = "https://user:hunter2@host/data/manifest.json?signature=abcdef"
    monkeypatch.setattr(sys, "argv", ["train", "--data.train", url])
    track(tmp_path / "run", data=f"{url} {KEY} my-very-own-key")
    (session,) = offline_runs(tmp_path / "run")
    config = {item.key: json.loads(item.value_json) for item in run_of(session).config.update}
    assert config["data"]["train"] == f"https://{HIDDEN}@host/data/manifest.json?{HIDDEN} {HIDDEN} {HIDDEN}"
    assert config["data"]["max_tokens"] == 77 and config["model"]["text"]["tokenizer"] == ""
    for path in (tmp_path / "run" / "wandb").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not any(secret in content for secret in (b"hunter2", b"signature=", KEY.encode(), b"very-own"))


def test_where_a_key_is_found(tmp_path, monkeypatch):
    host, own = "https://api.example.org", tmp_path / "elsewhere"
    assert not has_key(host)
    (tmp_path / "home" / ".netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    assert has_key(host, hosted=host)
    assert not has_key(host, hosted="https://api.example.com")  # a server of one's own
    own.write_text(f"machine api.example.org login user password {KEY}\n")
    monkeypatch.setenv("NETRC", str(own))
    assert has_key(host)
    own.write_text("machine api.example.org login")  # damaged
    assert not has_key(host)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert has_key(host)
