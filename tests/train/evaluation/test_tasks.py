"""An evaluation of one's own, known to this test alone: registered, it runs in training and by hand alike."""

import json
from typing import ClassVar

import pytest

from tests.support import running, training
from train import evaluate
from train.config import EvalTask
from train.evaluation import TASKS, build_task, find_task
from train.evaluation.encode import Encoder
from train.evaluation.task import Evaluation, Task
from train.run.records import read_records


class Letters(Task):
    """How near images are to their texts, and how long the texts are."""

    options: ClassVar = {"fit": "a letter"}
    scores: ClassVar = {"nearness": max}

    def measure(self, encoder: Encoder) -> Evaluation:
        found = encoder.features(self.manifest)
        nearness = (found.image_ND[found.image_of_text_M] * found.text_MD).sum(-1).mean()
        count = sum(caption.count(self.given.fit) for caption in found.captions)
        return Evaluation({"nearness": float(nearness), "letters": float(count)}, found)

    @staticmethod
    def table(metrics) -> str:
        return f"{metrics['letters']:.0f} letters"


def test_an_own_evaluation_runs_in_training_and_by_hand(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(TASKS, "letters", Letters)
    config = running.prepare(tmp_path, steps=3)
    config.eval.tasks = [EvalTask("spelling", "letters", every=2, fit="e")]
    training.finish(config)

    records = [record for record in read_records(running.run_dir(config) / "metrics.jsonl") if "loss" not in record]
    seen = [(record["step"], record["spelling/letters"]) for record in records if "spelling/letters" in record]
    assert [step for step, _ in seen] == [2, 3], "every 2 steps, and at the end"
    assert all(record["spelling/eval_seconds"] >= 0 for record in records if "spelling/letters" in record)
    assert seen[0][1] > 12, "an e in every of the 12 first captions, which begin with `the`"
    results = json.loads((running.run_dir(config) / "results.json").read_text())
    assert results["tasks"]["spelling"]["task"] == "letters"
    assert f"{seen[0][1]:.0f} letters" in capfd.readouterr().out

    by_hand = ["--run", str(running.run_dir(config)), "--json", "--task"]
    assert evaluate.main([*by_hand, "spelling"]) == 0
    named = json.loads(capfd.readouterr().out)
    assert named.pop("precision") == "fp32"
    assert {"task": "spelling", "run": str(running.run_dir(config)), **results["tasks"]["spelling"]["metrics"]} == named
    assert evaluate.main([*by_hand, "letters", "--fit", "d"]) == 0
    assert json.loads(capfd.readouterr().out)["letters"] != named["letters"]
    assert evaluate.main([*by_hand, "leters"]) == 2
    assert "task leters: give one of retrieval" in capfd.readouterr().err


def test_an_option_that_a_task_does_not_read_is_refused():
    with pytest.raises(ValueError, match="fit x is for the task knn or probe, not for zeroshot"):
        build_task(EvalTask(task="zeroshot", data="somewhere", fit="x"))
    with pytest.raises(ValueError, match=r"task prob: .* did you mean probe"):
        find_task("prob")
