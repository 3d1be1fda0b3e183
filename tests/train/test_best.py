"""Evaluations while a run trains: three of two kinds on two ranks, the best checkpoint, the end of patience."""

import json
import shutil

import pytest

from tests.support import running, training
from tests.support.distributed import run_distributed
from tests.support.small import COLOURS
from train import checkpoint, evaluate, loop
from train.checks import check
from train.config import EvalTask, RunConfig
from train.evaluation.best import Best
from train.run.records import read_history


def watched(**values) -> RunConfig:
    config = RunConfig()
    config.data.train, config.data.val, config.checkpoint.best, config.eval.every = "train", "val", "val/t2i_R@1", 1
    for name, value in values.items():
        setattr(config.checkpoint if name == "best" else config.train, name, value)
    return config


def test_best_is_the_first_of_the_highest_and_patience_counts_the_rest():
    best = Best(watched(patience=3))
    seen = [best.update(step, value) for step, value in enumerate([10.0, 30.0, float("nan"), 30.0, 20.0], start=1)]
    assert seen == [True, True, False, False, False]
    assert (best.step, best.value, best.waited, best.exhausted) == (2, 30.0, 3, True)


def test_less_is_better_for_positions():
    best = Best(watched(best="val/i2t_mean_rank"))
    assert [best.update(step, value) for step, value in enumerate([9.0, 4.0, 5.0])] == [True, True, False]
    assert not best.exhausted, "without patience a run goes to its end"


def test_a_resumed_run_knows_its_best_by_what_is_kept():
    history = [{"step": step, "loss": 1.0, "val/t2i_R@1": value} for step, value in ((2, 5.0), (4, 9.0), (6, 8.0))]
    history.insert(1, {"step": 3, "loss": 1.0})
    assert (best := Best(watched(patience=2), history, kept=[4, 6])).step == 4 and best.waited == 1
    assert Best(watched(), history, kept=[6]).step == 6, "what is no longer there cannot be the best"
    history.append({"step": 8, "val/t2i_R@1": None})
    assert Best(watched(patience=2), history, kept=[4, 6, 8]).exhausted, "NaN is an evaluation that is not better"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"best": "val/recall"}, "checkpoint.best val/recall: no evaluation has it; there are val/t2i_R@1"),
        ({"best": "", "patience": 1}, "train.patience 1: give checkpoint.best"),
    ],
)
def test_a_metric_that_nothing_makes_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        check(watched(**values))


def test_patience_needs_evaluations():
    config = watched(patience=2)
    config.eval.every = 0
    with pytest.raises(ValueError, match=r"train.patience 2: give eval.every"):
        check(config)


def _train(config: RunConfig) -> tuple[int, int]:
    status = loop.run(config)
    steps = [record["step"] for record in running.metrics(config)]
    return status, max(steps)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> RunConfig:
    """A run on two ranks whose metric cannot get better after its first evaluation, since nothing is learned."""
    directory = tmp_path_factory.mktemp("best")
    config = running.prepare(directory, steps=8)
    config.optim.lr = 0.0
    (directory / "names.txt").write_text("\n".join(COLOURS) + "\n")
    config.eval.every, config.eval.tasks = (
        2,
        [
            EvalTask("colours", "zeroshot", classnames=str(directory / "names.txt"), templates="imagenet", every=1),
            EvalTask("near", "knn", fit=config.data.train, neighbours=5),
        ],
    )
    config.model.image.norm = "frozen"
    config.checkpoint.every, config.checkpoint.keep, config.checkpoint.best = 1, 1, "colours/top1"
    config.train.patience = 4
    assert run_distributed(_train, 2, config) == [(0, 5), (0, 5)], "all ranks stop after steps 1 to 5"
    return config


def test_the_best_is_kept_beside_the_newest(finished):
    assert checkpoint.steps(running.run_dir(finished)) == [1, 5]
    assert checkpoint.best(running.run_dir(finished)) == "step_00000001"
    results = json.loads((running.run_dir(finished) / "results.json").read_text())
    assert results["best"]["step"] == 1 and results["steps"] == 5


def test_every_task_is_logged_when_it_is_due(finished):
    history = read_history(running.run_dir(finished))
    due = {name: [r["step"] for r in history if name in r] for name in ("colours/top1", "near/top1", "val/t2i_R@1")}
    assert due == {"colours/top1": [1, 2, 3, 4, 5], "near/top1": [2, 4, 5], "val/t2i_R@1": [2, 4, 5]}


@pytest.mark.parametrize(("task", "step"), [("val", ""), ("colours", "best"), ("near", "5")])
def test_by_hand_are_the_same_numbers(finished, task, step, capfd):
    arguments = ["--run", str(running.run_dir(finished)), "--task", task, "--json", *(["--step", step] if step else [])]
    assert evaluate.main(arguments) == 0
    found = json.loads(capfd.readouterr().out)
    record = read_history(running.run_dir(finished))[1 if step == "best" else -1]
    logged = {name.partition("/")[2]: value for name, value in record.items() if name.startswith(f"{task}/")}
    assert {name: found[name] for name in logged if name != "eval_seconds"} == {
        name: value for name, value in logged.items() if name != "eval_seconds"
    }


def test_a_step_that_is_not_there_is_named(finished):
    for step, words in (("3", "has no such checkpoint. There are: 1, 5"), ("newest", "There are: 1, 5")):
        with pytest.raises(ValueError, match=rf"step {step}: .*{words}"):
            checkpoint.find(running.run_dir(finished), step)


def test_an_interrupted_run_keeps_its_best_and_its_patience(finished, tmp_path):
    run = running.run_dir(finished)
    copy = tmp_path / "runs" / run.name
    shutil.copytree(run, copy)
    (copy / "results.json").unlink()
    (copy / "checkpoints" / "best").unlink()  # killed between saving it and naming it
    finished = RunConfig(**{**vars(finished), "runs_dir": str(tmp_path / "runs")})
    training.finish(finished)
    assert checkpoint.best(copy) == "step_00000001" and checkpoint.steps(copy) == [1, 5]
    assert json.loads((copy / "results.json").read_text())["steps"] == 5, "patience was at its end before"
