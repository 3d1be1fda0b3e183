"""`python -m train.evaluate` on a run that was really trained."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import running
from tests.support.pictures import COLOURS
from tests.support.small import write_data
from train.config import RunConfig

SCRIPT = """
import contextlib, io, json, sys
from train import evaluate
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = evaluate.main(arguments)
    print(json.dumps([status, out.getvalue(), err.getvalue()]))
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, RunConfig, dict[str, tuple[int, str, str]]]:
    """A finished run, and status, output and errors of several commands on it."""
    directory = tmp_path_factory.mktemp("run")
    config = running.prepare(directory, steps=2)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        running.run(config, directory)
    run_dir = running.run_dir(config)
    names, unlabelled = directory / "names.txt", write_data(directory / "unlabelled", (4,), classes=False)
    names.write_text("\n".join(COLOURS) + "\n")
    (directory / "two.txt").write_text("red\ngreen\n")
    commands = {
        "retrieval": ["--json"],
        "other precision": ["--json", "--precision", "fp32"],
        "table": ["--task", "retrieval"],
        "other data": ["--data", str(unlabelled), "--json", "--workers", "1"],
        "zeroshot": ["--task", "zeroshot", "--classnames", str(names), "--json"],
        "probe": ["--task", "probe", "--fit", config.data.train, "--json"],
        "probe alone": ["--task", "probe", "--data", config.data.train],
        "corrupted": ["--task", "zeroshot", "--classnames", str(names), "--corrupt", "grey", "--json"],
        "corrupted as a table": ["--corrupt", "jpeg"],
        "no such corruption": ["--corrupt", "fog"],
        "no names": ["--task", "zeroshot"],
        "few names": ["--task", "zeroshot", "--classnames", str(directory / "two.txt")],
        "no classes": ["--task", "probe", "--data", str(unlabelled)],
        "template": ["--task", "zeroshot", "--classnames", str(names), "--templates", str(names)],
        "names for retrieval": ["--classnames", str(names)],
        "fit for zeroshot": ["--task", "zeroshot", "--classnames", str(names), "--fit", config.data.train],
        "no fit data": ["--task", "probe", "--fit", str(directory / "nowhere")],
        "workers": ["--workers", "-1"],
        "no data": ["--data", str(directory / "nowhere")],
    }
    arguments = [["--run", str(run_dir), *options] for options in commands.values()]
    arguments.append(["--run", str(directory / "nowhere")])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(arguments)],
        cwd=running.ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results = [tuple(json.loads(line)) for line in done.stdout.splitlines()]
    return run_dir, config, dict(zip([*commands, "no run"], results, strict=True))


def metrics(finished, name: str) -> dict:
    status, out, err = finished[2][name]
    assert status == 0, err
    return json.loads(out)


def test_retrieval_by_hand_is_what_the_run_has_found(finished):
    found = metrics(finished, "retrieval")
    assert found.pop("task") == "retrieval" and found.pop("run") == str(finished[0])
    assert found.pop("precision") == "bf16"
    assert "step_00000002, in bf16, as the run was trained" in finished[2]["retrieval"][2]
    assert found == json.loads((finished[0] / "results.json").read_text())["val"]
    assert found["n_images"] == 12


def test_another_precision_is_said(finished):
    found = metrics(finished, "other precision")
    assert found["precision"] == "fp32" and found["n_images"] == 12
    assert "in fp32 (--precision; the run was trained in bf16)" in finished[2]["other precision"][2]


def test_without_json_there_is_a_table(finished):
    status, out, _ = finished[2]["table"]
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == ["held-out", "R@1", "R@5", "R@10", "median", "mean", "12"]


def test_corrupted_images(finished):
    plain, found = metrics(finished, "zeroshot"), metrics(finished, "corrupted")
    curves = found.pop("corrupted")
    assert found == plain
    assert [sorted(one) for one in curves.pop("grey")] == [["mean_per_class", "top1", "top5"]] * 5 and not curves
    assert "robustness-zeroshot.html" in finished[2]["corrupted"][2]
    page = (finished[0] / "report" / "robustness-zeroshot.html").read_text()
    assert "step_00000002 of small on" in page and "<th>grey, 5</th>" in page
    status, out, _ = finished[2]["corrupted as a table"]
    assert status == 0 and [line.split()[:2] for line in out.splitlines()[-5:]] == [
        ["jpeg", str(n)] for n in range(1, 6)
    ]


def test_other_data(finished):
    assert metrics(finished, "other data")["n_images"] == 4


def test_zeroshot(finished):
    found = metrics(finished, "zeroshot")
    assert (found["n_images"], found["n_classes"], found["chance_top1"], found["n_unlabelled"]) == (12, 4, 25, 0)
    assert found["n_bad"] == 0
    assert 0 <= found["top1"] <= found["top5"] <= 100


def test_probe(finished):
    found = metrics(finished, "probe")
    assert (found["n_fit"], found["n_images"], found["n_classes"]) == (70, 12, 4)
    status, out, _ = finished[2]["probe alone"]
    alone = {name: float(value) for name, value in map(str.split, out.splitlines())}
    assert status == 0 and alone["n_fit"] + alone["n_images"] == 70


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no names", "zeroshot needs --classnames: a file"),
        ("few names", "manifest.json has the class '2' and 1 more, not among the 2 names listed"),
        ("no classes", "none of the 4 samples has a class"),
        ("template", "--templates: 'red' must hold exactly one {}"),
        ("names for retrieval", "names.txt is for the task zeroshot, not for retrieval"),
        ("fit for zeroshot", "is for the task knn or probe, not for zeroshot"),
        ("no fit data", "nowhere"),
        ("workers", "--workers -1: 0"),
        ("no such corruption", "--corrupt fog: give all, or some of noise,blur,jpeg,grey"),
        ("no data", "nowhere"),
        ("no run", "nowhere: there is no complete checkpoint"),
    ],
)
def test_mistakes_are_named(finished, name, words):
    status, out, err = finished[2][name]
    assert status == 2 and out == ""
    said = err.splitlines()[-1]
    assert said.startswith("error: ") and words in said and "Traceback" not in err
