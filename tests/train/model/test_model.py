import copy
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from data_pipeline.batch import MicroBatch
from tests.support.distributed import run_distributed
from train import cli
from train.config import RunConfig
from train.distributed import all_reduce_sum, rank, world_size
from train.engine.optim import build_optimizer, set_lrs
from train.model import norm
from train.model.pair import PairModel, build_model

ROOT = Path(__file__).parents[3]
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def small_config(text_tower: str) -> RunConfig:
    """ResNet-18 and a small BERT with dropout, both from scratch."""
    config = RunConfig()
    config.data.image_size, config.data.max_tokens = 32, 32
    config.model.image.name = "resnet18"
    config.model.text.name, config.model.text.weights = text_tower, "scratch"
    config.model.embed_dim = 24
    return config


@pytest.fixture
def config(text_tower) -> RunConfig:
    return small_config(text_tower)


def make_batches(count: int, rows: int = 3, size: int = 32) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(2)
    batches = []
    for index in range(count):
        length = 8 * (1 + index % 2)
        mask = torch.arange(length) < torch.randint(2, length + 1, (rows, 1), generator=generator)
        images = torch.randint(0, 256, (rows, 3, size, size), generator=generator, dtype=torch.uint8)
        ids = torch.randint(1, 50, (rows, length), generator=generator) * mask
        batches.append(MicroBatch(images, ids, mask.long(), index=index, step=0, keys=[""] * rows))
    return batches


def test_outputs(config):
    model = build_model(config, MEAN, STD)
    outputs = model(make_batches(3), [1, 2, 3])
    assert outputs.keys() == {"image", "text", "logit_scale"}
    for name in ("image", "text"):
        assert outputs[name].shape == (9, 24) and outputs[name].dtype == torch.float32
        torch.testing.assert_close(outputs[name].norm(dim=1), torch.ones(9))
    assert outputs["logit_scale"].shape == (1,)
    assert outputs["logit_scale"].item() == pytest.approx(1 / 0.07)
    sum(value.sum() for value in outputs.values()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert model.log_scale.grad.item() == pytest.approx(1 / 0.07), "the gradient of exp is exp"


def test_features_equal_the_towers_own_by_hand(config):
    model = build_model(config, MEAN, STD).eval()
    (batch,) = make_batches(1)
    pixels = (batch.images_BCHW.float() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        image = F.normalize(model.image.backbone(pixels) @ model.image_projection.weight.T)
        hidden = model.text.encoder(batch.ids_BL, batch.mask_BL).last_hidden_state[:, 0]
        text = F.normalize(hidden @ model.text_projection.weight.T)
        outputs = model([batch], [0])
        for actual, expected in ((outputs["image"], image), (outputs["text"], text)):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(model.encode_image(batch.images_BCHW), outputs["image"])
        assert torch.equal(model.encode_text(batch.ids_BL, batch.mask_BL), outputs["text"])


@settings(max_examples=8, deadline=None)
@given(order=st.permutations(range(4)), parts=st.sampled_from([1, 2, 4]))
def test_a_micro_batch_has_the_same_features_wherever_it_runs(order, parts, text_tower):
    """Whatever runs before it, together with it, or has drawn random numbers: dropout and BatchNorm are its own."""
    model = build_model(small_config(text_tower), MEAN, STD)
    batches, seeds = make_batches(4), [10, 11, 12, 13]
    with torch.no_grad():
        expected = [model([batch], [seed]) for batch, seed in zip(batches, seeds, strict=True)]
        torch.rand(5)
        size = 4 // parts
        for start in range(0, 4, size):
            part = order[start : start + size]
            outputs = model([batches[i] for i in part], [seeds[i] for i in part])
            for name in ("image", "text"):
                assert torch.equal(outputs[name], torch.cat([expected[i][name] for i in part]))


def test_dropout_follows_the_seed_and_the_random_state_is_restored(config):
    model = build_model(config, MEAN, STD)
    (batch,) = make_batches(1)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with torch.no_grad():
        first, again, other = (model([batch], [seed])["text"] for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize(("checkpointing", "bf16"), [(False, False), (False, True), (True, False)])
def test_a_replay_has_the_gradient_of_the_first_forward(config, checkpointing, bf16):
    """A first forward without gradients (cached features), another between, then the replay: as if at once.

    In bf16 too: what autocast makes of a weight for one micro-batch is not kept for the next, or autograd would add up
    their gradients in bf16.
    """
    config.model.image.checkpointing = config.model.text.checkpointing = checkpointing
    model = build_model(config, MEAN, STD)
    batches, seeds = make_batches(2), [1, 2]
    at_once, replayed = copy.deepcopy(model), copy.deepcopy(model)
    weights = torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(3))

    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        outputs = at_once(batches, seeds)
    (outputs["image"] * weights[0] + outputs["text"] * weights[1]).sum().backward()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        cached = [replayed([batch], [seed]) for batch, seed in zip(batches, seeds, strict=True)]
    for i, (batch, seed) in enumerate(zip(batches, seeds, strict=True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            outputs = replayed([batch], [seed])
        assert torch.equal(outputs["image"], cached[i]["image"]) and torch.equal(outputs["text"], cached[i]["text"])
        rows = slice(3 * i, 3 * i + 3)
        (outputs["image"] * weights[0, rows] + outputs["text"] * weights[1, rows]).sum().backward()
    for (name, expected), actual in zip(at_once.named_parameters(), replayed.parameters(), strict=True):
        if name != "log_scale":
            torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_copies_of_a_checkpointed_model_use_their_own_weights(config):
    config.model.image.checkpointing = config.model.text.checkpointing = True
    model = build_model(config, MEAN, STD)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    outputs = twin(make_batches(1), [0])
    (outputs["image"].sum() + outputs["text"].sum()).backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for name, p in twin.named_parameters() if name != "log_scale")


def test_autocast_leaves_unit_vectors_and_scale_in_float32(config):
    model = build_model(config, MEAN, STD)
    reference = model(make_batches(2), [1, 2])
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(make_batches(2), [1, 2])
    for name, value in outputs.items():
        assert value.dtype == torch.float32
        assert F.cosine_similarity(value, reference[name], dim=-1).min() > 0.9
    assert torch.equal(outputs["logit_scale"], reference["logit_scale"])
    torch.testing.assert_close(outputs["image"].norm(dim=1), torch.ones(6), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["batch", "sync_batch", "group", "frozen"])
def test_every_norm_trains_under_autocast(config, kind):
    config.model.image.norm = kind
    model = build_model(config, MEAN, STD)
    with torch.autocast("cpu", torch.bfloat16), norm.recording(model):
        outputs = model(make_batches(2), [1, 2])
    outputs["image"].sum().backward()
    norm.update_running(model, all_reduce_sum, 2)
    assert all(p.grad.isfinite().all() for p in model.image.parameters())
    moved = any(m.num_batches_tracked for m in model.modules() if isinstance(m, norm.MicroBatchNorm))
    assert moved == (kind in ("batch", "sync_batch"))


def test_the_sigmoid_loss_gets_a_bias_and_starts_where_siglip_does(config):
    config.loss.kind = "sigmoid"
    model = build_model(config, MEAN, STD)
    outputs = model(make_batches(1), [0])
    assert outputs["logit_bias"].tolist() == [-10]
    assert outputs["logit_scale"].item() == pytest.approx(10)
    outputs["logit_bias"].sum().backward()
    assert model.logit_bias.grad.tolist() == [1]


def test_the_range_of_the_scale_is_that_of_the_config(config):
    config.model.max_logit_scale = 50
    model = build_model(config, MEAN, STD)
    assert model.log_scale_range == pytest.approx((0.0, math.log(50)))
    model.log_scale.data.fill_(model.log_scale_range[1])
    assert model(make_batches(1), [0])["logit_scale"].item() == pytest.approx(50)


def test_fresh_weights_are_a_function_of_the_seed(config):
    torch.manual_seed(1)
    first = build_model(config, MEAN, STD)
    state = torch.random.get_rng_state()
    torch.manual_seed(99)
    again = build_model(config, MEAN, STD)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state), "building has moved the caller's random state"
    config.train.seed = 1
    other = build_model(config, MEAN, STD)
    assert not torch.equal(first.image_projection.weight, other.image_projection.weight)
    assert not torch.equal(first.image.backbone.conv1.weight, other.image.backbone.conv1.weight)


def test_a_tower_that_never_learns_stays_in_evaluation_mode(config):
    config.model.text.locked_until = config.model.image.locked_until = -1
    model = build_model(config, MEAN, STD).train()
    (batch,) = make_batches(1)
    with norm.recording(model):
        outputs = model([batch], [0])
    norm.update_running(model, all_reduce_sum, 1)
    with torch.no_grad():
        assert torch.equal(outputs["text"], model.eval().encode_text(batch.ids_BL, batch.mask_BL))
        assert torch.equal(outputs["image"], model.encode_image(batch.images_BCHW))
    (outputs["image"].sum() + outputs["text"].sum()).backward()
    learning = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learning == {"image_projection.weight", "text_projection.weight"}


def test_the_state_dict_goes_into_a_model_without_its_pretrained_files(config, tmp_path):
    config.model.projection_bias = True
    model = build_model(config, MEAN, STD)
    config.model.image.weights = str(tmp_path / "gone.pth")
    config.model.text.weights = "pretrained"
    bare = build_model(config, [0] * 3, [1] * 3, pretrained=False)
    bare.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(bare.buffers(), model.buffers(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(bare.parameters(), model.parameters(), strict=True))
    assert model.image_projection.bias.shape == model.text_projection.bias.shape == (24,)


def test_the_blank_micro_batch_goes_through(config):
    model = build_model(config, MEAN, STD)
    outputs = model([model.blank_micro_batch()], [0])
    sum(value.sum() for value in outputs.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_captions_longer_than_the_text_towers_positions_are_refused(config):
    config.data.max_tokens = 33
    with pytest.raises(ValueError, match=r"^data\.max_tokens 33 is more than the 32 positions"):
        build_model(config, MEAN, STD)


def test_the_original_recipe_takes_a_step():
    scratch = ["--model.image.weights", "scratch", "--model.text.weights", "scratch"]
    config = cli.parse(["--config", str(ROOT / "train/configs/seed.yaml"), *scratch, "--train.global_batch", "4"])
    model = build_model(config, MEAN, STD)
    shapes = [tuple(projection.weight.shape) for projection in (model.image_projection, model.text_projection)]
    assert shapes == [(768, 2048), (768, 768)] and model.text_projection.bias is not None
    # ResNet-50 without its classifier, BERT-base without its pooler, two linear layers, the scale.
    expected = (25_557_032 - 2049 * 1000) + (109_482_240 - 769 * 768) + 2049 * 768 + 769 * 768 + 1
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    optimizer = build_optimizer(model, config)
    set_lrs(optimizer, config.optim.warmup_steps, 10_000, config.optim)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    outputs = model(make_batches(1, rows=4, size=224), [0])
    logits = outputs["logit_scale"] * outputs["image"] @ outputs["text"].T
    F.cross_entropy(logits, torch.arange(4)).backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all() and not torch.equal(parameter, before[name]), name


def synchronized_features(config: RunConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Image features of this rank's micro-batches of four, the gradient of a weight, and a running mean."""
    config.model.image.norm = "sync_batch"
    # In float64: in float32 one activation that rounds to the other side of zero changes the gradient by a percent.
    model: PairModel = build_model(config, MEAN, STD).double()
    batches = make_batches(4)
    share = 4 // world_size()
    own = range(rank() * share, (rank() + 1) * share)
    with norm.recording(model):
        outputs = model([batches[i] for i in own], list(own))
    weights = torch.randn(12, 24, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    (outputs["image"] * weights[own.start * 3 : own.stop * 3]).sum().backward()
    norm.update_running(model, all_reduce_sum, 4)
    grad = all_reduce_sum(model.image.backbone.conv1.weight.grad)
    return outputs["image"].detach(), grad, model.image.backbone.layer4[1].bn2.running_mean


def test_synchronized_norm_sees_all_micro_batches_of_all_ranks(config):
    image, grad, mean = synchronized_features(copy.deepcopy(config))
    ranks = run_distributed(synchronized_features, 2, config)
    torch.testing.assert_close(torch.cat([result[0] for result in ranks]), image, rtol=1e-4, atol=1e-5)
    for result in ranks:
        assert (result[1] - grad).norm() < 1e-5 * grad.norm()
        torch.testing.assert_close(result[2], mean)


def test_synchronized_norm_refuses_a_tower_whose_dropout_would_depend_on_the_number_of_processes(config):
    config.model.image.name, config.model.image.norm = "mobilenet_v3_small", "sync_batch"
    with pytest.raises(ValueError, match=r"^model\.image\.norm sync_batch: mobilenet_v3_small has dropout"):
        build_model(config, MEAN, STD)
    config.model.image.locked_until = -1
    build_model(config, MEAN, STD)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda images: images / 255, r"not torch.float32: give \(255 \* images\).round\(\).to\(torch.uint8\)"),
        (lambda images: images.long(), r"not torch.int64: give images.to\(torch.uint8\)"),
        (lambda images: images / 64 - 2, "not torch.float32: give the pixels as decoded, not values from -2 to "),
    ],
)
def test_images_that_are_not_pixels_are_refused(config, change, match):
    model = build_model(config, MEAN, STD)
    (batch,) = make_batches(1)
    with pytest.raises(ValueError, match=f"expects uint8 pixels from 0 to 255, {match}"):
        model.encode_image(change(batch.images_BCHW))
