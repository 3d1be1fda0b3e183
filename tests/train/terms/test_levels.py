import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tests.support.exactness import clip_loss
from tests.train.model.test_model import MEAN, STD, make_batches, small_config
from train import cli
from train.config import ImageTowerConfig, RunConfig
from train.engine.optim import param_groups
from train.evaluation.encode import evaluating
from train.loss.ids import Rows
from train.model.image import ImageTower
from train.model.pair import build_model
from train.terms.levels import AttentionPool, image_taps, weighed, widths
from train.terms.objective import Objective


@pytest.fixture
def off(text_tower) -> RunConfig:
    return small_config(text_tower)


@pytest.fixture
def config(off) -> RunConfig:
    config = copy.deepcopy(off)
    config.model.multiscale.enabled = True
    return config


def stir(model: nn.Module) -> nn.Module:
    """Every parameter of the side heads away from where it starts, so that none of them is without effect."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "level" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def test_attention_pooling_is_multi_head_attention_with_a_learned_query():
    torch.manual_seed(1)
    width, embed_dim, heads = 10, 12, 3
    reference = nn.MultiheadAttention(embed_dim, heads, bias=False, kdim=width, vdim=width, batch_first=True).double()
    query_1D = torch.randn(1, embed_dim, dtype=torch.float64)
    pool = AttentionPool(width, embed_dim, heads).double()
    with torch.no_grad():
        keys_hdC = reference.k_proj_weight.view(heads, -1, width)
        projected_hd = (query_1D @ reference.q_proj_weight.T).view(heads, -1)
        scale = math.sqrt(width) / math.sqrt(embed_dim / heads)
        pool.query_hC.copy_(torch.einsum("hd,hdc->hc", projected_hd, keys_hdC) * scale)
        pool.value_hCd.copy_(reference.v_proj_weight.view(heads, -1, width).mT)
        pool.projection.weight.copy_(reference.out_proj.weight)
        x_BNC = torch.randn(4, 7, width, dtype=torch.float64)
        mask_BN = torch.arange(7) < torch.tensor([[7], [3], [1], [5]])
        expected, _ = reference(query_1D.expand(4, 1, -1), x_BNC, x_BNC, key_padding_mask=~mask_BN)
        torch.testing.assert_close(pool(x_BNC, mask_BN.long()), expected[:, 0])


def test_attention_pooling_starts_as_the_mean():
    pool, x_BNC = AttentionPool(6, 4, 2), torch.randn(3, 5, 6)
    expected = pool.projection(torch.einsum("bc,hcd->bhd", x_BNC.mean(1), pool.value_hCd).flatten(1))
    torch.testing.assert_close(pool(x_BNC), expected)


def test_levels_are_pooled_from_the_towers_own_stages(config):
    """Level by level by hand, from the stages of torchvision and the hidden states of transformers."""
    config.model.multiscale.text_layers = [1, 2, 2]
    model = stir(build_model(config, MEAN, STD)).eval()
    (batch,) = make_batches(1)
    with torch.no_grad():
        outputs = model([batch], [0])
        pixels = batch.images_BCHW.float() / 255
        x = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        net = model.image.backbone
        x = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(x)))))
        images = []
        for stage, pool in zip((net.layer2, net.layer3, net.layer4), model.image_levels.pools, strict=True):
            x = stage(x)
            images.append(F.normalize(pool(x.flatten(2).transpose(1, 2))))
        encoded = model.text.encoder(batch.ids_BL, batch.mask_BL, output_hidden_states=True)
        states = [encoded.hidden_states[layer] for layer in (1, 2, 2)]
        pools = zip(states, model.text_levels.pools, strict=True)
        texts = [F.normalize(pool(state, batch.mask_BL)) for state, pool in pools]
    torch.testing.assert_close(outputs["image_levels"], torch.stack(images, 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs["text_levels"], torch.stack(texts, 1), rtol=1e-5, atol=1e-5)
    assert not any(module._forward_hooks for module in model.image.modules())


def test_padding_has_no_influence_on_levels(config):
    config.model.multiscale.cross_level = True
    model = stir(build_model(config, MEAN, STD)).eval()
    batch = make_batches(2)[1]
    wider = copy.deepcopy(batch)
    wider.ids_BL, wider.mask_BL = F.pad(batch.ids_BL, (0, 8), value=7), F.pad(batch.mask_BL, (0, 8))
    with torch.no_grad():
        expected, actual = (model([one], [0])["text_levels"] for one in (batch, wider))
    torch.testing.assert_close(actual, expected)


def test_without_fusion_the_embedding_is_the_top_vector_and_side_heads_are_not_run(config, off):
    model, plain = stir(build_model(config, MEAN, STD)), build_model(off, MEAN, STD)
    batches = make_batches(2)
    with torch.no_grad():
        outputs, expected = model(batches, [0, 1]), plain(batches, [0, 1])
        for name in ("image", "text", "logit_scale"):
            assert torch.equal(outputs[name], expected[name])
        for name, parameter in model.named_parameters():
            if "level" in name:
                parameter.fill_(math.nan)
        with evaluating(model), evaluating(plain):
            images, ids, mask = batches[0].images_BCHW, batches[0].ids_BL, batches[0].mask_BL
            assert torch.equal(model.encode_image(images), plain.encode_image(images))
            assert torch.equal(model.encode_text(ids, mask), plain.encode_text(ids, mask))


def test_off_adds_nothing_and_on_adds_after_everything(config, off):
    before, after = build_model(off, MEAN, STD), build_model(config, MEAN, STD)
    names = [name for name in after.state_dict() if "level" not in name]
    assert list(before.state_dict()) == names
    assert all(torch.equal(before.state_dict()[name], after.state_dict()[name]) for name in names)


@pytest.mark.parametrize("cross_level", [False, True])
def test_fusion(config, cross_level):
    config.model.multiscale.fuse, config.model.multiscale.cross_level = True, cross_level
    model = build_model(config, MEAN, STD).eval()
    (batch,) = make_batches(1)
    with torch.no_grad():
        start = model([batch], [0])
        top = F.normalize(model.text_projection(model.text(batch.ids_BL, batch.mask_BL)))
        torch.testing.assert_close(start["text"], top, msg="it starts as the top vector")
        outputs = stir(model)([batch], [0])
        mixed = top + (model.text_levels.gates_n[:, None] * outputs["text_levels"]).sum(1)
        torch.testing.assert_close(outputs["text"], F.normalize(mixed))
        assert torch.equal(model.encode_image(batch.images_BCHW), outputs["image"])
        assert torch.equal(model.encode_text(batch.ids_BL, batch.mask_BL), outputs["text"])


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_the_objective_is_that_of_a_plain_reference(kind):
    torch.manual_seed(0)
    config = RunConfig()
    config.model.multiscale.enabled = True
    config.loss.kind, config.model.multiscale.weight, config.model.multiscale.evenness = kind, 0.7, 0.3
    unit = {name: F.normalize(torch.randn(6, 3, 5, dtype=torch.float64), dim=-1) for name in ("image", "text")}
    outputs = {f"{name}_levels": value for name, value in unit.items()}
    outputs |= {name: F.normalize(value.sum(1), dim=-1) for name, value in unit.items()}
    vectors = {"logit_scale": [9.0], "level_scales": [3.0, 5.0, 8.0], "level_shares": [0.5, 0.3, 0.2]}
    if kind == "sigmoid":
        vectors |= {"logit_bias": [-3.0], "level_biases": [-2.0, -1.0, -4.0]}
    outputs |= {name: torch.tensor(values, dtype=torch.float64) for name, values in vectors.items()}

    def plain(image, text, scale, bias):
        if kind == "softmax":
            return clip_loss(image, text, scale)
        logits = scale * image @ text.T + bias
        return -F.logsigmoid((2 * torch.eye(6) - 1) * logits).sum() / 6

    biases = [vectors.get("logit_bias", [0])[0], *vectors.get("level_biases", [0, 0, 0])]
    top = plain(outputs["image"], outputs["text"], 9.0, biases[0])
    levels = [
        plain(unit["image"][:, i], unit["text"][:, i], vectors["level_scales"][i], biases[i + 1]) for i in range(3)
    ]
    shares = vectors["level_shares"]
    spread = sum(-math.log(3 * share) / 3 for share in shares)
    expected = top + 0.7 * (sum(w * level for w, level in zip(shares, levels, strict=True)) + 0.3 * spread)
    parts = [Objective(config)(outputs, Rows(start, start + 3)) for start in (0, 3)]
    torch.testing.assert_close(sum(total for total, _ in parts) / 2, expected)
    for name, value in {"loss": top, "loss/total": expected, "loss/level2": levels[1]}.items():
        torch.testing.assert_close(sum(terms[name] for _, terms in parts) / 2, value)
    assert parts[0][1]["level_weight/3"] == 0.2


@settings(deadline=None, max_examples=10)
@given(losses=st.lists(st.floats(0, 12), min_size=2, max_size=4), evenness=st.floats(0.2, 3))
def test_no_level_can_be_left_out(losses, evenness):
    """Shares that minimize, with losses as they are: the formula, and its lower bound."""
    losses_n = torch.tensor(losses, dtype=torch.float64)
    logits_n = torch.zeros_like(losses_n, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits_n], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def closure():
        optimizer.zero_grad()
        value = weighed(losses_n, logits_n.softmax(0), evenness)
        value.backward()
        return value

    optimizer.step(closure)
    shares_n = logits_n.detach().softmax(0)
    offset_n = evenness / (len(losses) * shares_n) - losses_n
    torch.testing.assert_close(offset_n, offset_n[0].expand_as(offset_n), rtol=1e-3, atol=1e-3)
    bound_n = evenness / (len(losses) * (evenness + losses_n - losses_n.min()))
    assert (shares_n >= bound_n - 1e-4).all()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_with_bf16_and_recomputed_activations(config, checkpointing):
    """Every parameter gets one; recomputing changes none."""
    config.model.multiscale.cross_level = config.model.multiscale.fuse = True
    gradients = []
    for recompute in {False, checkpointing}:
        config.model.image.checkpointing = config.model.text.checkpointing = recompute
        model = stir(build_model(config, MEAN, STD))
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(make_batches(2), [0, 1])
        assert all(value.dtype == torch.float32 for value in outputs.values())
        Objective(config)(outputs, Rows())[0].backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(gradients[0], gradients[-1], strict=True))


def test_side_heads_learn_as_projections_of_their_tower(config):
    config.model.multiscale.fuse = config.model.multiscale.cross_level = True
    model = build_model(config, MEAN, STD)
    groups = {name: group for group in param_groups(model, config) for name in group["names"]}
    for name, parameter in model.named_parameters():
        assert parameter.ndim > 0, f"{name} has no dimension, which DeepSpeed cannot take"
        if "level" in name:
            tower = name.partition("_")[0]
            expected = (tower, "projection") if tower in ("image", "text") else ("shared", "scale")
            assert (groups[name]["tower"], groups[name]["part"]) == expected
            assert (groups[name]["weight_decay"] == 0) == (parameter.ndim == 1)


@pytest.mark.parametrize(
    ("tower", "stages", "layers", "channels"),
    [
        ("swin_t", [], [], [192, 384, 768]),
        ("densenet121", ["features.denseblock4"], [2], [1024]),
    ],
)
def test_other_towers(config, tower, stages, layers, channels):
    config.model.image.name = tower
    config.model.multiscale.image_stages, config.model.multiscale.text_layers = stages, layers
    model = build_model(config, MEAN, STD)
    assert [pool.query_hC.shape[1] for pool in model.image_levels.pools] == channels
    with torch.no_grad():
        assert model(make_batches(1), [0])["image_levels"].shape == (3, len(channels), 24)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["image_stages=[layer7]"], "image_stages layer7: resnet18 has no such module; its stages are layer1, layer2"),
        (["image_stages=[fc]"], r"image_stages fc puts out \[2, 512\]: a map \[B, C, H, W\] or tokens"),
        (["text_layers=[1,2]"], "text_layers has 2 layers for 3 image stages"),
        (["text_layers=[0,1,2]"], "text_layers 0: the text tower has layers 1 to 2"),
        (["heads=5"], "heads 5 does not divide model.embed_dim 24; try 8"),
        (["weight=0"], "weight 0.0 must be above 0"),
        (["evenness=-1"], "evenness -1.0 must be above 0"),
        (["enabled=false", "fuse=true"], "fuse needs model.multiscale.enabled true"),
    ],
)
def test_configs_that_are_refused(config, options, match, tmp_path):
    (tmp_path / "run.yaml").write_text(cli.to_yaml(config))
    flags = [f"--model.multiscale.{option}" for option in options]
    with pytest.raises(ValueError, match=f"^model.multiscale.{match}"):
        build_model(cli.parse(["--config", str(tmp_path / "run.yaml"), *flags]), MEAN, STD)


def test_a_tower_without_stages_has_its_levels_named(config):
    tower, options = ImageTower(ImageTowerConfig(name="vit_b_32"), 32), config.model.multiscale
    blocks = ", ".join(f"encoder.layers.encoder_layer_{i}" for i in (3, 7, 11))
    with pytest.raises(ValueError, match=f"vit_b_32 is not made of 3 stages or more; .* such as {blocks}"):
        image_taps(tower, options, "vit_b_32")
    options.image_stages = blocks.split(", ")
    assert widths(tower, image_taps(tower, options, "vit_b_32"), torch.zeros(2, 3, 32, 32)) == [768] * 3
