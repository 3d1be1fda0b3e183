"""Sets in CLIP_benchmark's layout are read as they are."""

from pathlib import Path

import pytest

from tests.support.small import COLOURS, write_data
from train.config import EvalTask, RunConfig
from train.evaluation import build_task
from train.evaluation.suite import Suite
from train.evaluation.zeroshot import Zeroshot


@pytest.fixture
def colours(tmp_path) -> Path:
    """A classification set with one split, `test`; the folder of that."""
    data = write_data(tmp_path / "colours" / "test", (4,)).parent
    folder = data if data.name == "colours" else data.parent
    (folder / "dataset_type.txt").write_text("classification\n")
    (folder / "classnames.txt").write_text("\n".join(COLOURS) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a {c} thing\n")
    return folder / "test"


def test_task_classes_and_sentences_are_those_beside_the_data(colours):
    for data in (colours, colours / "manifest.json", colours / "part-000000.tar"):
        task = build_task(EvalTask(data=str(data)))
        assert isinstance(task, Zeroshot)
        assert task.names == list(COLOURS) and task.templates == ["a {} thing"]


def test_what_is_given_wins(colours, tmp_path):
    (tmp_path / "names.txt").write_text("one\ntwo\nthree\nfour\n")
    task = build_task(EvalTask(data=str(colours), classnames=str(tmp_path / "names.txt"), templates="imagenet"))
    assert isinstance(task, Zeroshot) and task.names[0] == "one" and len(task.templates) == 80
    for kind in ("retrieval", "knn"):
        assert build_task(EvalTask(task=kind, data=str(colours))).given.task == kind


def test_a_run_names_its_tasks_alike(colours):
    config = RunConfig()
    config.data.val = str(colours)
    config.eval.tasks = [EvalTask("colours")]
    assert {name: task.given.task for name, task in Suite(config).tasks.items()} == {
        "val": "retrieval",
        "colours": "zeroshot",
    }


def test_without_them_a_set_is_for_retrieval(colours):
    (colours.parent / "dataset_type.txt").write_text("something else")
    assert build_task(EvalTask(data=str(colours))).given.task == "retrieval"
    (colours.parent / "dataset_type.txt").unlink()
    assert build_task(EvalTask(data=str(colours))).given.task == "retrieval"
    (colours.parent / "classnames.txt").unlink()
    with pytest.raises(ValueError, match=r"zeroshot needs `classnames`.*classnames.txt beside the data"):
        build_task(EvalTask(task="zeroshot", data=str(colours)))
