"""Sets in CLIP_benchmark's layout are read as they are."""

import io
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from data_pipeline.__main__ import main
from data_pipeline.storage.manifest import load_manifest
from tests.support.pictures import picture
from tests.support.small import COLOURS, write_data
from train import evaluate
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


def test_other_data_bring_their_own_classes_and_sentences(colours, tmp_path):
    other = write_data(tmp_path / "other" / "test", (4,))
    (tmp_path / "other" / "dataset_type.txt").write_text("classification\n")
    (tmp_path / "other" / "classnames.txt").write_text("\n".join(reversed(COLOURS)) + "\n")
    config = RunConfig()
    config.eval.tasks = [EvalTask("colours", data=str(colours), every=5)]
    options = evaluate.make_parser().parse_args(["--run", "r", "--task", "colours", "--data", str(other)])
    task = build_task(evaluate.described(options, config))
    assert isinstance(task, Zeroshot) and task.names == list(COLOURS)[::-1] and task.given.every == 5


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


def exported(folder: Path, samples: list[dict], **beside: list[str]) -> Path:
    """As clip_benchmark 1.6.2's webdataset_builder writes a set of one split: the folder of that, with a manifest."""
    (folder / "test").mkdir(parents=True)
    for name, lines in beside.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    with webdataset.ShardWriter(str(folder / "test" / "%d.tar"), maxcount=5, verbose=0) as sink:
        for number, sample in enumerate(samples):
            image = io.BytesIO()
            Image.open(io.BytesIO(picture(number))).convert("RGB").save(image, format="webp", lossless=True)
            sink.write({"__key__": f"s{number:07d}", "webp": image.getvalue(), **sample})
    (folder / "test" / "nshards.txt").write_text("3\n")
    rule = "lines" if "dataset_type" in beside else "whole"
    assert main(["index", str(folder / "test"), "--captions", rule, "--workers", "1"]) == 0
    return folder / "test"


def test_an_exported_set_of_classes_says_nowhere_that_it_is_one(tmp_path):
    beside = {"classnames": list(COLOURS), "zeroshot_classification_templates": ["a {c} picture", "a drawing of {c}."]}
    data = exported(tmp_path / "colours", [{"cls": number % len(COLOURS)} for number in range(12)], **beside)
    assert load_manifest(data).statistics["uncaptioned"] == 12
    for place in (data, data / "manifest.json", data / "{0..2}.tar"):
        task = build_task(EvalTask(data=str(place)))
        assert isinstance(task, Zeroshot) and task.names == list(COLOURS)
        assert task.templates == ["a {} picture", "a drawing of {}."]


def test_an_exported_set_of_captions_is_for_retrieval(tmp_path):
    texts = [{"txt": f"a picture\\nno. {number}\na drawing\nx"} for number in range(12)]
    data = exported(tmp_path / "captions", texts, dataset_type=["retrieval"])
    task = build_task(EvalTask(data=str(data)))
    assert task.given.task == "retrieval" and task.manifest.captions == "lines"
    assert task.manifest.statistics["captions_per_image"]["mean"] == 3


def test_an_exported_set_of_several_classes_per_image_is_refused(tmp_path):
    data = exported(tmp_path / "several", [{"cls": 1}] * 3, dataset_type=["multilabel"], classnames=["a", "b"])
    with pytest.raises(ValueError, match=r"dataset_type\.txt says multilabel, and several classes per image"):
        build_task(EvalTask(data=str(data)))
