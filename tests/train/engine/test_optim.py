import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.train.model.test_model import small_config
from train.config import OptimConfig, RunConfig
from train.engine.optim import build_optimizer, lr_at, param_groups, set_lrs
from train.model.pair import PairModel, build_model


@pytest.fixture
def config(text_tower) -> RunConfig:
    config = small_config(text_tower)
    config.optim.warmup_steps = 0
    config.optim.schedule = "constant"
    return config


def make(config: RunConfig) -> PairModel:
    return build_model(config, [0.5] * 3, [0.25] * 3)


def by_name(groups: list[dict]) -> dict[str, dict]:
    names = [name for group in groups for name in group["names"]]
    assert len(names) == len(set(names)), "a parameter is in two groups"
    return {name: group for group in groups for name in group["names"]}


def backward(model: PairModel, seed: int = 0, step: int = 0) -> None:
    batch = replace(model.blank_micro_batch(), step=step)
    batch.images_BCHW.random_(generator=torch.Generator().manual_seed(seed))
    outputs = model([batch], [seed])
    (outputs["image"] @ outputs["text"].T * outputs["logit_scale"]).sum().backward()


schedules = st.builds(
    OptimConfig,
    warmup_steps=st.integers(0, 50),
    schedule=st.sampled_from(["cosine", "constant"]),
    cooldown_steps=st.integers(0, 60),
    min_lr=st.floats(0, 1),
)


@given(step=st.integers(0, 300), total=st.integers(1, 200), config=schedules, unlocked_at=st.integers(-1, 100))
def test_lr_stays_between_zero_and_the_peak(step, total, config, unlocked_at):
    share = lr_at(step, total, config, unlocked_at)
    assert 0 <= share <= 1
    locked = unlocked_at < 0 or step < unlocked_at
    falls = config.schedule == "cosine" or config.cooldown_steps
    assert (share == 0) == locked or (falls and config.min_lr < 1e-6)


@given(total=st.integers(2, 200), config=schedules)
def test_lr_rises_to_the_peak_and_then_never_rises(total, config):
    config.cooldown_steps = min(config.cooldown_steps, max(0, total - config.warmup_steps))
    shares = [lr_at(step, total, config) for step in range(total + 1)]
    warmup, falls = config.warmup_steps, config.schedule == "cosine" or config.cooldown_steps > 0
    for step, share in enumerate(shares[:warmup]):
        assert share == pytest.approx((step + 1) / warmup)
    after = shares[warmup:]
    assert all(later <= earlier for earlier, later in itertools.pairwise(after))
    assert all(share == 1 for share in after) or falls
    if warmup < total:
        assert after[0] == 1
        assert shares[total] == pytest.approx(config.min_lr if falls else 1)


def test_lr_is_a_half_cosine():
    config = OptimConfig(warmup_steps=10, min_lr=0.1)
    assert lr_at(60, 110, config) == pytest.approx(0.55)
    assert lr_at(35, 110, config) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert lr_at(1000, 110, config) == pytest.approx(0.1)


def test_a_constant_lr_cools_down_in_the_last_steps():
    config = OptimConfig(schedule="constant", cooldown_steps=100, min_lr=0.1, warmup_steps=10)
    assert [lr_at(step, 500, config) for step in (10, 399, 400)] == [1, 1, 1]
    assert lr_at(425, 500, config) == pytest.approx(0.1 + 0.9 * (1 - 0.5))
    assert lr_at(499, 500, config) == pytest.approx(0.1 + 0.9 * (1 - math.sqrt(0.99)))
    assert lr_at(425, 1000, config) == 1, "the end of the run says when"


def test_lr_of_a_tower_that_unlocks_warms_up_again_under_the_schedule():
    config = OptimConfig(warmup_steps=10)
    assert [lr_at(step, 100, config, 30) for step in (0, 29)] == [0, 0]
    assert lr_at(30, 100, config, 30) == pytest.approx(0.1 * lr_at(30, 100, config))
    assert lr_at(39, 100, config, 30) == lr_at(39, 100, config)
    assert lr_at(80, 100, config, 30) == lr_at(80, 100, config)


def test_every_parameter_is_in_one_group_and_only_matrices_decay(config):
    model = make(config)
    groups = by_name(param_groups(model, config))
    assert groups.keys() == dict(model.named_parameters()).keys()
    norms = (torch.nn.modules.batchnorm._BatchNorm, torch.nn.LayerNorm)
    exempt = {"log_scale"} | {name for name in groups if name.endswith("bias")}
    for name, module in model.named_modules():
        if isinstance(module, norms):
            exempt.add(f"{name}.weight")
    assert {name for name, group in groups.items() if group["weight_decay"] == 0} == exempt
    assert {group["weight_decay"] for group in groups.values()} == {0.0, config.optim.weight_decay}
    assert groups["text.encoder.embeddings.word_embeddings.weight"]["weight_decay"] > 0
    assert len(param_groups(model, config)) == 7  # two towers with and without decay, two projections, the scale


@pytest.mark.parametrize(
    ("name", "exempt"),
    [
        ("convnext_tiny", "image.backbone.features.1.0.layer_scale"),
        ("vit_b_32", "image.backbone.class_token"),
        ("swin_t", "image.backbone.features.1.0.attn.relative_position_bias_table"),
    ],
)
def test_vectors_and_position_biases_of_other_backbones_do_not_decay(config, name, exempt):
    config.model.image.name = name
    config.data.image_size = 32
    groups = by_name(param_groups(make(config), config))
    assert groups[exempt]["weight_decay"] == 0


def test_towers_have_their_own_learning_rates_and_layers_decay_below_the_top(config):
    config.optim.lr = 1.0
    config.model.image.lr = 0.5
    config.model.text.layer_decay = 0.1
    groups = by_name(param_groups(make(config), config))
    assert groups["image.backbone.conv1.weight"]["lr"] == groups["image.backbone.layer4.1.conv2.weight"]["lr"] == 0.5
    assert groups["image_projection.weight"]["lr"] == groups["text_projection.weight"]["lr"] == 1.0
    assert groups["log_scale"]["lr"] == 1.0
    for name, expected in {
        "layer.1.output.dense.weight": 1.0,
        "layer.1.output.dense.bias": 1.0,
        "layer.0.attention.self.query.weight": 0.1,
    }.items():
        assert groups[f"text.encoder.encoder.{name}"]["lr"] == pytest.approx(expected)
    assert groups["text.encoder.embeddings.word_embeddings.weight"]["lr"] == pytest.approx(0.01)
    places = {(group["tower"], group["part"]) for group in groups.values()}
    parts = {(tower, part) for tower in ("image", "text") for part in ("tower", "projection")}
    assert places == parts | {("shared", "scale")}


def test_set_lrs_sets_every_group_and_returns_the_rate_of_the_top_of_each_tower(config):
    config.optim.lr, config.optim.warmup_steps = 1.0, 10
    config.model.image.lr = 0.5
    config.model.text.layer_decay = 0.1
    optimizer = build_optimizer(make(config), config)
    assert set_lrs(optimizer, 4, 100, config.optim) == {"image": 0.25, "text": 0.5}
    assert all(group["lr"] == pytest.approx(0.5 * group["base_lr"]) for group in optimizer.param_groups)
    again = set_lrs(optimizer, 4, 100, config.optim, {"image": 2.0})
    assert again == {"image": 0.5, "text": 0.5}, "the rate must not depend on the one before"
    towers = {(group["tower"], group["part"]): group["lr"] for group in optimizer.param_groups}
    assert (towers["image", "projection"], towers["shared", "scale"]) == (1.0, 0.5)


def test_a_step_equals_adamw_by_its_formula(config):
    """The first update of AdamW: -lr * (g / (|g| + eps) + decay * w), after the bias correction."""
    model = make(config)
    optimizer = build_optimizer(model, config)
    groups = by_name(optimizer.param_groups)
    set_lrs(optimizer, 0, 10, config.optim)
    backward(model)
    before = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    gradient = {name: parameter.grad.double() for name, parameter in model.named_parameters()}
    optimizer.step()
    for name, parameter in model.named_parameters():
        update = gradient[name] / (gradient[name].abs() + config.optim.eps)
        expected = before[name] - config.optim.lr * (update + groups[name]["weight_decay"] * before[name])
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-6, msg=name)


def test_a_tower_that_never_learns_has_no_groups_and_no_gradients(config):
    config.model.text.locked_until = -1
    model = make(config)
    optimizer = build_optimizer(model, config)
    assert not any(name.startswith("text.") for name in by_name(optimizer.param_groups))
    assert set_lrs(optimizer, 5, 10, config.optim) == {"image": config.optim.lr, "text": 0.0}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    backward(model)
    optimizer.step()
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert all(parameter.grad is None for parameter in model.text.parameters())
    assert changed == {name for name, _ in model.named_parameters() if not name.startswith("text.")}


def test_a_tower_that_unlocks_later_neither_moves_nor_decays_until_then(config):
    config.model.image.locked_until = 2
    model = make(config)
    optimizer = build_optimizer(model, config)
    start = {name: value.clone() for name, value in model.image.named_parameters()}
    for step in range(3):
        rates = set_lrs(optimizer, step, 10, config.optim)
        backward(model, seed=step, step=step)
        assert any(parameter.grad.any() for parameter in model.image.parameters()) == (step >= 2)
        assert all(parameter.grad.any() for parameter in model.image_projection.parameters())
        optimizer.step()
        optimizer.zero_grad()
        unchanged = [name for name, value in model.image.named_parameters() if torch.equal(value, start[name])]
        assert (rates["image"] == 0) == (step < 2)
        assert len(unchanged) == (len(start) if step < 2 else 0)
    counts = {int(state["step"]) for state in optimizer.state.values()}
    assert counts == {3}, "every parameter has the same number of updates, also one that was locked"
