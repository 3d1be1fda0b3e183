"""What the data of an evaluation lack is said by their manifest, before anything is trained or encoded."""

import json
from pathlib import Path

import pytest

from data_pipeline.commands.index import index
from tests.support.pictures import picture
from tests.support.small import COLOURS, write_data
from tests.support.tars import write_shards
from train.config import EvalTask, RunConfig
from train.evaluation import build_task
from train.evaluation.suite import Suite


def indexed(directory: Path) -> str:
    """The data as `python -m data_pipeline index` leaves them, with their statistics."""
    index([str(path) for path in sorted(directory.glob("*.tar"))], directory / "manifest.json", workers=1)
    return str(directory)


def classes(directory: Path, *labels: str) -> str:
    """Data with these classes, and no captions."""

    def sample(number: int) -> tuple[str, dict[str, bytes]]:
        return f"{number:03d}", {"png": picture(number), "cls": labels[number].encode()}

    return indexed(write_shards(directory, (len(labels),), sample))


@pytest.fixture
def names(tmp_path) -> str:
    (tmp_path / "names.txt").write_text("\n".join(COLOURS) + "\n")
    return str(tmp_path / "names.txt")


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("4", r"manifest.json has the class '4', not among the 4 names listed: .*, so here to 3"),
        ("pink", r"has the class 'pink', not among the 4 names"),
    ],
)
def test_class_names_that_do_not_fit(tmp_path, names, label, message):
    data = classes(tmp_path / "data", "0", label)
    with pytest.raises(ValueError, match=rf"eval.tasks, colours: classnames: .*{message}"):
        config = RunConfig()
        config.eval.tasks = [EvalTask("colours", "zeroshot", data, classnames=names)]
        Suite(config)


def test_an_older_manifest_does_not_list_its_classes(tmp_path, names):
    data = classes(tmp_path / "data", "0", "9")
    path = tmp_path / "data" / "manifest.json"
    content = json.loads(path.read_text())
    del content["statistics"]["classes"]["names"]
    path.write_text(json.dumps(content))
    build_task(EvalTask(task="zeroshot", data=data, classnames=names))
    del content["statistics"]
    path.write_text(json.dumps(content))
    for task in (EvalTask(data=data), EvalTask(task="knn", data=data), EvalTask(task="probe", data=data)):
        build_task(task)


@pytest.mark.parametrize("task", ["zeroshot", "knn", "probe"])
def test_data_without_classes(tmp_path, names, task):
    data = indexed(write_data(tmp_path / "data", (4,), classes=False))
    given = EvalTask(task=task, data=data, classnames=names if task == "zeroshot" else "")
    with pytest.raises(ValueError, match=r"manifest.json: none of the 4 samples has a class: .*--class-column"):
        build_task(given)


@pytest.mark.parametrize("option", ["data", "fit"])
def test_the_option_that_names_no_data_is_said(tmp_path, option):
    given = {"data": classes(tmp_path / "data", "0", "1"), option: str(tmp_path / "gone")}
    with pytest.raises(ValueError, match=f"^{option}: there is no manifest at"):
        build_task(EvalTask(task="knn", **given))


@pytest.mark.parametrize(("task", "what"), [("knn", "k-NN"), ("probe", "a linear probe")])
def test_data_that_cannot_tell_the_classes_apart(tmp_path, task, what):
    tested, one = classes(tmp_path / "a", "0", "1"), classes(tmp_path / "b", "0")
    other = classes(tmp_path / "c", "0", "2")
    with pytest.raises(ValueError, match=f"{what} needs at least two classes, .* have 1"):
        build_task(EvalTask(task=task, data=tested, fit=one))
    with pytest.raises(ValueError, match=f"1 classes .* {what} learns from, such as '1': give `fit`"):
        build_task(EvalTask(task=task, data=tested, fit=other))


def test_retrieval_without_captions(tmp_path):
    with pytest.raises(ValueError, match=r"none of its 2 samples has a caption.* zeroshot, knn or probe"):
        build_task(EvalTask(data=classes(tmp_path / "data", "0", "1")))


def test_data_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"none of its 3 samples can be read; .* inspect"):
        build_task(EvalTask(data=indexed(write_data(tmp_path / "data", (3,), bad=(0, 1, 2)))))
