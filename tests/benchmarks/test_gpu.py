"""The script for a GPU runs from end to end on a CPU, with its smallest sizes."""

import json
import time

import pytest
import torch

from tests.benchmarks.gpu import __main__ as gpu
from tests.benchmarks.gpu.bench import Bench
from tests.benchmarks.gpu.results import tables
from tests.benchmarks.gpu.stages import STAGES, Stage


def named(name: str) -> Stage:
    return next(stage for stage in STAGES if stage.name == name)


def failures(stages: dict) -> list[str]:
    rows = [(name, row, found) for name, stage in stages.items() for row, found in stage["rows"].items()]
    return [f"{name}, {row}: {found['error']}" for name, row, found in rows if "error" in found]


def test_a_stage_measures(tmp_path):
    bench = Bench(tmp_path / "rows.json", 3600, tiny=True)
    named("loss").run(bench)  # most others need a process of their own, which has one precision
    saved = json.loads((tmp_path / "rows.json").read_text())
    assert saved == json.loads(json.dumps(bench.rows)) and len(saved) > 3
    assert not failures({"loss": {"rows": saved}})


def test_a_row_that_fails_and_time_that_is_over_are_recorded(tmp_path):
    bench = Bench(tmp_path / "rows.json", 3600, tiny=True)
    bench.row("broken", lambda: {"speed": 1 / 0})
    bench.row("whole", lambda: {"speed": 1.0})
    bench.deadline = time.monotonic()
    bench.row("late", lambda: {"speed": 2.0})
    saved = json.loads((tmp_path / "rows.json").read_text())
    assert "ZeroDivisionError" in saved["broken"]["error"]
    assert saved["whole"]["speed"] == 1.0
    assert saved["late"] == {"error": "no time was left"}
    text = tables({"stages": {"speed": {"state": "done", "rows": saved}}})
    assert "| whole | 1 |" in text and "ZeroDivisionError" in text


def test_a_gpu_that_fails_ends_the_stage_after_its_first_error_is_kept(tmp_path, monkeypatch):
    bench = Bench(tmp_path / "rows.json", 3600, tiny=True)
    bench.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: 1 / 0)  # as every call does from then on
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench.row("first", lambda: {"speed": 1.0})
    assert "synchronize" in json.loads((tmp_path / "rows.json").read_text())["first"]["error"]


@pytest.mark.slow
def test_all_stages_in_their_own_processes(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    assert gpu.main(["--tiny", "--minutes", "9", "--json", str(path)]) == 0
    results = json.loads(path.read_text())
    assert list(results["stages"]) == [stage.name for stage in STAGES]
    assert not failures(results["stages"])
    assert "## exactness-bf16: done" in capsys.readouterr().out


@pytest.mark.slow
def test_a_stage_that_breaks_or_lasts_too_long_leaves_the_others_alone(tmp_path, monkeypatch):
    path = tmp_path / "gpu.json"
    monkeypatch.setattr(gpu, "STAGES", STAGES[:1])
    assert gpu.main(["--minutes", "1", "--json", str(path)]) == 1
    (stage,) = json.loads(path.read_text())["stages"].values()
    assert stage["state"] == "failed" and "--tiny tries the script" in stage["error"]
    assert gpu.main(["--tiny", "--minutes", "0.001", "--json", str(path)]) == 1
    (stage,) = json.loads(path.read_text())["stages"].values()
    assert stage["state"] == "cut off"
