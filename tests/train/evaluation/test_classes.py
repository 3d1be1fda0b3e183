"""Zero-shot classification and the linear probe."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.tokenizer import Tokenizer
from tests.support.small import small_config
from train.evaluation.classes import accuracy, class_indices, labelled, read_entries, read_names, read_templates
from train.evaluation.encode import Encoder, Features
from train.evaluation.knn import neighbour_metrics
from train.evaluation.probe import fit, linear, probe_metrics, split_by_key
from train.evaluation.templates import TEMPLATES
from train.evaluation.zeroshot import class_features, zeroshot_metrics
from train.model.pair import build_model


def features(classes: list[str | None]) -> Features:
    size = len(classes)
    keys = [f"part-000000.tar/{row}" for row in range(size)]
    return Features(torch.eye(size), torch.eye(size), torch.arange(size), keys, [""] * size, classes, [])


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32), images=st.integers(1, 20), classes=st.integers(1, 8))
def test_accuracy_equals_its_definition(seed, images, classes):
    generator = np.random.default_rng(seed)
    scores_NC = generator.integers(0, 4, size=(images, classes)).astype(np.float64)  # with many ties
    right_N = generator.integers(classes, size=images)
    ranks = [1 + sum(np.delete(row, right) >= row[right]) for row, right in zip(scores_NC, right_N, strict=True)]
    hits = {row: [rank == 1 for rank, right in zip(ranks, right_N, strict=True) if right == row] for row in right_N}
    found = accuracy(torch.from_numpy(scores_NC), right_N)
    assert found["top1"] == pytest.approx(100 * np.mean([rank <= 1 for rank in ranks]))
    assert found["top5"] == pytest.approx(100 * np.mean([rank <= 5 for rank in ranks]))
    assert found["mean_per_class"] == pytest.approx(100 * np.mean([np.mean(hit) for hit in hits.values()]))
    assert found["chance_top1"] == pytest.approx(100 / classes)
    assert found["chance_top5"] == pytest.approx(100 * min(1, 5 / classes))


def test_constant_features_classify_nothing():
    found = zeroshot_metrics(torch.full((9, 4), 0.5), torch.full((10, 4), 0.5), np.arange(9))
    assert found["top1"] == found["top5"] == found["mean_per_class"] == 0


def test_nearest_class_wins():
    found = zeroshot_metrics(torch.eye(6), torch.eye(6), np.array([0, 1, 2, 3, 3, 3]))
    assert found["top1"] == pytest.approx(100 * 4 / 6)
    assert found["mean_per_class"] == pytest.approx(100 * (3 + 1 / 3) / 4)


@pytest.mark.parametrize("tower", ["image", "class"])
def test_features_that_are_not_finite_are_refused(tower):
    image_ND, class_CD = torch.eye(4), torch.eye(4)
    (image_ND if tower == "image" else class_CD)[1, 2] = torch.nan
    with pytest.raises(ValueError, match=f"1 of 4 {tower} features"):
        zeroshot_metrics(image_ND, class_CD, np.arange(4))


def test_a_class_is_the_direction_of_its_sentences(tmp_path):
    config = small_config(tmp_path)
    model, tokenizer = build_model(config, (0.5,) * 3, (0.25,) * 3), Tokenizer(config.model.text.name, 32)
    with torch.no_grad():
        for parameter in model.text.parameters():
            parameter.mul_(30 if parameter.ndim > 1 else 1)  # fresh weights hardly tell sentences apart
    names, templates = ["red heart", "drawing", "a blue shard of the sea"], ["{}", "a picture of {}, number 7", "{}!"]
    config.eval.batch = 2
    class_CD = class_features(Encoder(model, config, tokenizer), names, templates)
    model.eval()
    with torch.no_grad():
        for row, name in enumerate(names):
            each = [model.encode_text(*tokenizer([template.format(name)])) for template in templates]
            mean_D = torch.cat(each).mean(0)
            assert mean_D.norm() < 0.98
            assert torch.allclose(class_CD[row], F.normalize(mean_D, dim=0), atol=1e-4)


@pytest.mark.parametrize("template", ["a picture", "{} and {}", "{c} and {}"])
def test_a_template_has_one_place_for_the_name(template, tmp_path):
    (tmp_path / "sentences.txt").write_text(f"a {{}}\n{template}\n")
    with pytest.raises(ValueError, match="templates: "):
        read_templates(tmp_path / "sentences.txt")


@pytest.mark.parametrize(
    "content",
    [
        "a photo of a {c}.\n\nart of {}\n",
        '["a photo of a {c}.", "art of {c}"]',
        "```bash\nclasses = [\n    'x',\n]\n\ntemplates = [\n    'a photo of a {}.',\n    'art of {}',\n]\n```\n",
    ],
    ids=["lines", "JSON", "CLIP's prompts.md"],
)
def test_templates_in_the_forms_that_there_are(content, tmp_path):
    (tmp_path / "sentences").write_text(content)
    assert read_templates(tmp_path / "sentences") == ["a photo of a {}.", "art of {}"]


def test_clips_own_templates_are_known_by_name():
    assert len(set(TEMPLATES["imagenet"])) == 80 and all(one.count("{}") == 1 for one in TEMPLATES["imagenet"])
    assert TEMPLATES["imagenet"][0] == "a bad photo of a {}." and TEMPLATES["imagenet"][-1] == "a tattoo of the {}."


def test_classes_are_numbers_or_names():
    assert class_indices(["1", "red", "0", "blue"], ["blue", "red"], "data").tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("content", ["2", "-1", "green"])
def test_a_class_that_is_not_listed_is_named(content):
    with pytest.raises(ValueError, match=f"classnames: data has the class '{content}', not among the 2 .* here to 1"):
        class_indices(["0", content], ["blue", "red"], "data")


def test_samples_without_a_class_are_left_out_and_counted():
    some = features(["0", None, "1", None, "0"])
    found = labelled(some, "data")
    assert found.keys == [some.keys[row] for row in (0, 2, 4)] and found.classes == ["0", "1", "0"]
    assert torch.equal(found.image_ND, some.image_ND[[0, 2, 4]]) and found.counts == {"n_unlabelled": 2, "n_bad": 0}
    with pytest.raises(ValueError, match="data: none of the 2 samples has a class"):
        labelled(features([None, None]), "data")


def test_entries_of_a_file(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("red\n\n deep blue \n\n")
    assert read_entries("classnames", path, "classes") == ["red", "", "deep blue"]
    path.write_text("\n")
    with pytest.raises(ValueError, match=r"classnames: .*names.txt is empty"):
        read_entries("classnames", path, "classes")
    path.write_text("[red]")
    with pytest.raises(ValueError, match=r"classnames: the list in .*names.txt cannot be read"):
        read_entries("classnames", path, "classes")
    with pytest.raises(ValueError, match=r"templates: cannot read .*missing.txt"):
        read_templates(tmp_path / "missing.txt")


def test_class_names_keep_their_numbers(tmp_path, capsys):
    path = tmp_path / "names.txt"
    path.write_text("\ufeffred\n deep blue \n\n", encoding="utf-8")
    assert read_names(path) == ["red", "deep blue"]
    path.write_text("red\n\nblue\n")
    with pytest.raises(ValueError, match=r"classnames: line 2 of .*names.txt is empty"):
        read_names(path)
    assert capsys.readouterr().err == ""


def test_equal_class_names_are_said_and_are_two_classes(tmp_path, capsys):
    path = tmp_path / "names.txt"
    path.write_text("missile\nblue\nmissile\n")
    names = read_names(path)
    assert names == ["missile", "blue", "missile"]
    assert "1 name(s) to more than one class, such as 'missile' to classes 0, 2" in capsys.readouterr().err
    assert class_indices(["2", "0", "missile"], names, "data").tolist() == [2, 0, 0]


def clusters(seed: int, per_class: int, spread: float) -> tuple[torch.Tensor, list[str]]:
    """Unit vectors around the same three directions for every seed, with the names of their classes."""
    centers = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.randn(3 * per_class, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = torch.arange(3 * per_class) % 3
    return F.normalize(centers[rows] + spread * noise, dim=-1).float(), [f"class {row}" for row in rows.tolist()]


def test_the_fit_is_the_minimum():
    x_ND, _ = clusters(1, 20, 1.0)
    x_ND, classes_N, l2 = x_ND.double(), torch.arange(60) % 3, 1e-2
    weight_CD, bias_C = (part.clone().requires_grad_() for part in fit(x_ND, classes_N, 3, l2))
    loss = F.cross_entropy(linear(x_ND, weight_CD, bias_C), classes_N) + l2 / 2 * weight_CD.square().sum()
    loss.backward()
    # The problem is convex: where the gradient vanishes is the minimum.
    assert weight_CD.grad.abs().max() < 1e-5 and bias_C.grad.abs().max() < 1e-5


def test_probe_separates_what_can_be_separated_and_generalizes():
    found = probe_metrics(*clusters(1, 40, 0.15), *clusters(2, 30, 0.15))
    assert found["top1"] == found["mean_per_class"] == 100
    assert (found["n_fit"], found["n_images"], found["n_classes"]) == (120, 90, 3)


def test_probe_of_noise_is_chance():
    noise = torch.randn(600, 8, generator=torch.Generator().manual_seed(3))
    classes = [f"class {row % 3}" for row in range(300)]
    found = probe_metrics(noise[:300], classes, noise[300:], classes)
    assert abs(found["top1"] - found["chance_top1"]) < 12


def test_probe_does_not_depend_on_scale_and_offset():
    (fit_ND, fit_classes), (test_ND, test_classes) = clusters(1, 40, 0.8), clusters(2, 30, 0.8)
    plain = probe_metrics(fit_ND, fit_classes, test_ND, test_classes)
    moved = probe_metrics(1e-3 * fit_ND + 0.3, fit_classes, 1e-3 * test_ND + 0.3, test_classes)
    assert moved["l2"] == plain["l2"] and moved["top1"] == pytest.approx(plain["top1"], abs=1.2)


def test_probe_needs_classes():
    x_ND, classes = clusters(1, 4, 0.1)
    with pytest.raises(ValueError, match="at least two classes"):
        probe_metrics(x_ND, ["one"] * 12, x_ND, classes)
    with pytest.raises(ValueError, match=r"in the data that a linear probe learns from, such as 'class 2'.*`fit`"):
        probe_metrics(x_ND, ["class 0", "class 1"] * 6, x_ND, classes)
    with pytest.raises(ValueError, match="none of the 12 samples fell into the tested fifth"):
        probe_metrics(x_ND, classes, x_ND[:0], [])
    x_ND[0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        probe_metrics(x_ND, classes, x_ND, classes)


def test_the_split_is_a_fifth_by_key():
    keys = [f"part-000000.tar/{number}" for number in range(2000)]
    tested = split_by_key(keys)
    assert 0.15 < tested.mean() < 0.25
    assert np.array_equal(split_by_key(keys[::-1])[::-1], tested)


def test_neighbours_vote_as_defined():
    (fit_ND, fit_classes), (test_ND, test_classes) = clusters(1, 30, 0.9), clusters(2, 20, 0.9)
    names = sorted(set(fit_classes))
    right = 0
    for feature_D, label in zip(test_ND.double(), test_classes, strict=True):
        scores = fit_ND.double() @ feature_D
        votes = dict.fromkeys(names, 0.0)
        for row in sorted(range(len(scores)), key=lambda row: -scores[row])[:7]:
            votes[fit_classes[row]] += math.exp(scores[row] / 0.07)
        right += max(names, key=votes.__getitem__) == label
    found = neighbour_metrics(fit_ND, fit_classes, test_ND, test_classes, k=7, chunk=9)
    assert found["top1"] == pytest.approx(100 * right / 60) and 40 < found["top1"] < 100
    assert (found["n_fit"], found["n_images"], found["n_classes"]) == (90, 60, 3)


def test_an_image_is_not_its_own_neighbour():
    x_ND, classes = torch.eye(6), ["a", "a", "b", "b", "b", "b"]
    with_itself = neighbour_metrics(x_ND, classes, x_ND, classes, k=1)
    assert with_itself["top1"] == 100
    alone = neighbour_metrics(x_ND, classes, x_ND, classes, k=99, chunk=4, leave_out_self=True)
    assert alone["top1"] == pytest.approx(100 * 4 / 6), "all others vote alike: the larger class wins"


def test_neighbours_need_classes():
    x_ND, classes = clusters(1, 4, 0.1)
    with pytest.raises(ValueError, match="at least two classes"):
        neighbour_metrics(x_ND, ["one"] * 12, x_ND, classes, k=3)
    with pytest.raises(ValueError, match="in the data that k-NN learns from, such as 'class 2'"):
        neighbour_metrics(x_ND, ["class 0", "class 1"] * 6, x_ND, classes, k=3)
