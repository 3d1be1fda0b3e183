"""Towers with a projection of two layers into the shared space, and with none."""

import pytest
import torch
import torch.nn.functional as F

from tests.support.small import small_config
from train.engine.optim import param_groups
from train.model.pair import PairModel, build_model

MEAN, STD = [0.5] * 3, [0.25] * 3


@pytest.fixture
def config(tmp_path):
    return small_config(tmp_path)


def test_without_a_projection_the_features_are_the_embedding(config):
    config.model.text.projection, config.model.embed_dim = "none", 32
    model = build_model(config, MEAN, STD).eval()
    batch = model.blank_micro_batch()
    outputs = model([batch], [0])
    torch.testing.assert_close(outputs["text"], F.normalize(model.text(batch.ids_BL, batch.mask_BL).float(), dim=-1))
    assert outputs["image"].shape == (2, 32)
    assert parts_of_text(model, config) == {"tower"}


def test_a_locked_tower_without_a_projection_leaves_all_learning_to_the_other(config):
    config.model.text.projection, config.model.embed_dim = "none", 32
    config.model.text.locked_until = -1
    model = build_model(config, MEAN, STD)
    outputs = model([model.blank_micro_batch()], [0])
    assert not outputs["text"].requires_grad
    assert outputs["image"].requires_grad
    assert parts_of_text(model, config) == set()


def parts_of_text(model: PairModel, config) -> set[str]:
    return {group["part"] for group in param_groups(model, config) if group["tower"] == "text"}


@pytest.mark.parametrize("bias", [False, True])
def test_a_projection_of_two_layers_learns_as_one_does_and_its_hidden_layer_is_twice_the_embedding(config, bias):
    config.model.image.projection = config.model.text.projection = "mlp"
    config.model.projection_bias = bias
    model = build_model(config, MEAN, STD).eval()
    batch = model.blank_micro_batch()
    features_BD = model.text(batch.ids_BL, batch.mask_BL)
    weights = model.text_projection.state_dict()
    shapes = {"fc1.weight": (32, 32), "fc1.bias": (32,), "fc2.weight": (16, 32)} | ({"fc2.bias": (16,)} if bias else {})
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == shapes
    hidden_BH = F.gelu(F.linear(features_BD, weights["fc1.weight"], weights["fc1.bias"]))
    expected_BD = F.linear(hidden_BH, weights["fc2.weight"], weights.get("fc2.bias"))
    torch.testing.assert_close(model([batch], [0])["text"], F.normalize(expected_BD.float(), dim=-1))
    assert model.image_projection.fc1.weight.shape == (32, 512) and model.image_projection.fc2.weight.shape == (16, 32)

    groups = {name: group for group in param_groups(model, config) for name in group["names"]}
    for tower in ("image", "text"):
        for name in weights:
            group = groups[f"{tower}_projection.{name}"]
            decay = config.optim.weight_decay if name.endswith("weight") else 0
            assert (group["tower"], group["part"], group["weight_decay"]) == (tower, "projection", decay)


@pytest.mark.parametrize(("tower", "width"), [("image", 512), ("text", 32)])
def test_an_embedding_of_another_length_than_the_features_is_refused(config, tower, width):
    getattr(config.model, tower).projection = "none"
    message = rf"^model\.embed_dim 16: with model\.{tower}\.projection none .* set it to {width}"
    with pytest.raises(ValueError, match=message):
        build_model(config, MEAN, STD)
