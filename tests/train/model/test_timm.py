"""timm's models as image towers: twelve families, each by its smallest model."""

import copy
import sys
import time

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from transformers import MT5Config

from tests.support.activations import kept_for_backward
from tests.support.distributed import run_distributed
from tests.support.exactness import make_batch, make_config, write_text_tower
from train.config import ImageTowerConfig, RunConfig
from train.distributed import all_reduce_sum, rank, world_size
from train.engine.optim import param_groups
from train.model import norm
from train.model.image import ImageTower
from train.model.pair import PairModel, build_model
from train.terms.levels import image_taps, tapped

timm = pytest.importorskip("timm")
SIZE = 32
FAMILIES = {  # how many blocks and stages there are
    "test_resnet": (4, 4),
    "test_vit": (6, 1),
    "test_convnext": (9, 4),
    "test_efficientnet": (5, 5),
    "test_byobnet": (4, 4),
    "test_maxvit": (4, 4),
    "test_coatnet": (5, 4),
    "test_nfnet": (4, 4),
    "test_mambaout": (6, 4),
    "mobilenetv3_small_050": (12, 6),
    "regnetx_002": (13, 4),
    "levit_128s": (9, 3),
}


@pytest.fixture(autouse=True)
def one_thread():
    """These models are too small to be shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tower(name: str, size: int = SIZE, **options) -> ImageTower:
    if not timm.is_model(name):
        pytest.skip(f"this version of timm is without {name}")
    torch.manual_seed(1)
    return ImageTower(ImageTowerConfig(name=f"timm/{name}", **options), size)


def pixels(size: int = SIZE, rows: int = 4) -> torch.Tensor:
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(2))


def run_config(text_tower: str, name: str) -> RunConfig:
    config = make_config(text_tower, "tiled", global_batch=8)
    config.model.image.name = name
    return config


def pair(config: RunConfig) -> PairModel:
    return build_model(config, (0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    """Forward and backward, with recomputation too; every parameter in one layer and with a gradient."""
    plain, recomputing = tower(name), tower(name, checkpointing=True)
    assert (len(plain.blocks), len(plain.stages)) == FAMILIES[name], (plain.blocks, plain.stages)
    layers = plain.layers()
    assert [n for layer in layers for n in layer] == [n for n, _ in plain.named_parameters()]
    assert len(layers) == len(plain.blocks) + 1
    assert all(layer[0].startswith(f"{block}.") for layer, block in zip(layers[1:], plain.blocks, strict=True))

    norm.convert(plain, "batch")
    norm.convert(recomputing, "batch")
    runs = dict.fromkeys(recomputing.blocks, 0)
    for block in runs:
        inner = next(recomputing.get_submodule(block).children())
        inner.register_forward_pre_hook(lambda *_, block=block: runs.update({block: runs[block] + 1}))
    features, kept = kept_for_backward(plain, pixels())
    again, kept_again = kept_for_backward(recomputing, pixels())
    assert features.shape == (4, plain.width) and torch.equal(features, again)
    assert kept_again < 0.9 * kept, kept_again / kept
    for result in (features, again):
        (result * torch.linspace(-1, 1, result.numel()).view_as(result)).sum().backward()
    assert min(runs.values()) == 2, runs
    for (parameter_name, parameter), other in zip(plain.named_parameters(), recomputing.parameters(), strict=True):
        assert parameter.requires_grad and parameter.grad is not None, parameter_name
        assert torch.equal(parameter.grad, other.grad), parameter_name


@pytest.mark.parametrize("name", FAMILIES)
def test_normalization_is_timms_own(name):
    """Converted norms keep what follows them, and give the features that timm's own give."""
    plain = tower(name)
    has_batch_norm = any(isinstance(module, _BatchNorm) for module in plain.modules())
    x = pixels()
    for module in plain.modules():
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    batch, frozen, group = (copy.deepcopy(plain) for _ in range(3))
    for module, kind in ((batch, "batch"), (frozen, "frozen"), (group, "group")):
        norm.convert(module, kind)
        assert not any(type(part).__module__.startswith("timm") for part in module.modules() if is_batch_norm(part))
    assert batch.state_dict().keys() == frozen.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(group(x), plain(x)) == (not has_batch_norm)
        plain.load_state_dict(batch.state_dict())
        close(frozen.train()(x), plain.eval()(x))
        close(batch.eval()(x), plain(x))
        before = {key: value.clone() for key, value in batch.state_dict().items()}
        with norm.recording(batch):
            features = batch.train()(x)
            norm.record(batch)
        assert all(torch.equal(value, before[key]) for key, value in batch.state_dict().items())
        norm.update_running(batch, all_reduce_sum, 1)
        close(features, plain.train()(x))
        for key, value in plain.state_dict().items():  # has moved its statistics by itself
            close(batch.state_dict()[key], value)


def is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_layer_decay_and_locking_know_every_layer(name, tmp_path):
    tower(name)  # or skip
    config = run_config(write_text_tower(tmp_path), f"timm/{name}")
    options = config.model.image
    options.layer_decay, options.locked_stages = 0.5, 1
    model = pair(config)
    blocks, stages = FAMILIES[name]
    groups = [group for group in param_groups(model, config) if group["part"] == "tower" and group["tower"] == "image"]
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sorted(n for group in groups for n in group["names"]) == sorted(n for n in learning if n[:6] == "image.")
    rates = {group["base_lr"] / config.optim.lr for group in groups}
    locked = model.image.stages[0] if stages > 1 else model.image.blocks[0].removeprefix("backbone.")
    below = sum(block.startswith(f"backbone.{locked}") for block in model.image.blocks)
    assert rates >= {0.5**depth for depth in range(blocks - below)}
    names = [n for n, _ in model.image.backbone.named_parameters()]
    expected = names[: 1 + max(number for number, n in enumerate(names) if n.startswith(f"{locked}."))]
    assert [n for n in names if f"image.backbone.{n}" not in learning] == expected


def gradients(text_tower: str, name: str, pooling: str) -> dict[str, torch.Tensor]:
    """Of the mean over all micro-batches; a rank has its share of them."""
    config = run_config(text_tower, name)
    config.model.text.pooling = pooling
    model = pair(config)
    wrapped = DistributedDataParallel(model) if world_size() > 1 else model
    share = 2 // world_size()
    outputs = wrapped(
        make_batch(config)[rank() * share : (rank() + 1) * share], [3 + rank() * share + i for i in range(share)]
    )
    used = [outputs[key].sum(1) for key in ("image", "text")] + [outputs["logit_scale"].expand(len(outputs["image"]))]
    torch.stack(used).square().mean().backward()
    return {n: parameter.grad for n, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("name", "pooling"), [("timm/test_efficientnet", "cls"), ("tests.train.model.test_own.Tower", "mean")]
)
def test_two_ranks_have_the_gradient_of_one(name, pooling, tmp_path):
    """The second has a parameter that its features do not depend on: DDP would wait for it for ever. Its text tower is
    the encoder of an mT5."""
    text_tower = write_text_tower(tmp_path)
    if pooling == "mean":
        sizes = {"vocab_size": 1000, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
        MT5Config(**sizes).save_pretrained(text_tower)
    expected = gradients(text_tower, name, pooling)
    for actual in run_distributed(gradients, 2, text_tower, name, pooling):
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(actual[key], value, rtol=1e-3, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["test_mambaout", "test_convnext"])
def test_maps_of_every_layout_are_read_as_positions(name, tmp_path):
    config = run_config(write_text_tower(tmp_path), f"timm/{name}")
    model = tower(name)
    assert model.channels_last == (name == "test_mambaout")
    levels, _ = tapped(model, image_taps(model, config.model.multiscale, name), pixels())
    channels = [model.backbone.feature_info[stage]["num_chs"] for stage in (1, 2, 3)]
    assert [x_BNC.shape[2] for x_BNC in levels.values()] == channels


def test_models_of_a_fixed_size_are_built_for_the_images(tmp_path):
    path = tmp_path / "vit.safetensors"
    vit = timm.create_model("test_vit", img_size=64)
    save_file(vit.state_dict(), path)
    same, larger = (tower("test_vit", size, weights=str(path)).backbone for size in (64, 96))
    assert torch.equal(same.pos_embed, vit.pos_embed)
    assert same.pos_embed.shape[1] == 1 + 4**2 and larger.pos_embed.shape[1] == 1 + 6**2
    assert larger(pixels(96)).shape == (4, 64)
    assert torch.equal(larger.pos_embed[:, 0], vit.pos_embed[:, 0])
    with pytest.raises(ValueError, match=r"^data\.image_size 40.*timm/test_vit"):
        tower("test_vit", 40)
    config = run_config(write_text_tower(tmp_path), "timm/test_vit")
    config.data.eval_size = 40
    with pytest.raises(ValueError, match=r"^data\.eval_size 40: such images do not go through .*timm/test_vit"):
        build_model(config, [0.5] * 3, [0.25] * 3)


def test_dropout_and_drop_path_are_handed_on(tmp_path):
    model = tower("test_efficientnet", dropout=0.2, drop_path=0.1).backbone
    assert model.drop_rate == 0.2
    assert max(getattr(module, "drop_prob", 0) for module in model.modules()) > 0
    for name in ("dla34", "hrnet_w18_small"):  # the second one of timm 1.0.20 takes it and does nothing with it
        with pytest.raises(ValueError, match=rf"^model\.image\.drop_path 0\.1: timm's {name} does not take it"):
            tower(name, drop_path=0.1)
    config = run_config(write_text_tower(tmp_path), "timm/test_efficientnet")
    config.model.image.norm = "sync_batch"
    pair(config)
    for name in ("dropout", "drop_path"):
        setattr(config.model.image, name, 0.1)
        with pytest.raises(ValueError, match="sync_batch: timm/test_efficientnet has dropout"):
            pair(config)
        setattr(config.model.image, name, None)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("timm/resnet5O", r"is not a timm model; the nearest are timm/resnet50.* \(weights of the first: a1_in1k, "),
        ("timm/resnet50.a1_in1k", "set model.image.name to timm/resnet50 and model.image.weights to a1_in1k"),
        ("google/vit", "google/ is no family of models: take torchvision/, timm/"),
        ("test_vit", "one of timm's is timm/test_vit"),
    ],
)
def test_names_that_are_not_known(name, match):
    with pytest.raises(ValueError, match=rf"^model\.image\.name {name}.*{match}"):
        ImageTower(ImageTowerConfig(name=name), SIZE)


def test_without_timm_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"timm/test_vit needs timm .* pip install timm"):
        tower("test_vit")


def test_a_tag_is_taken_from_the_cache_of_the_hub(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    expected = timm.create_model("test_vit", img_size=SIZE).state_dict()
    entry = tmp_path / "models--timm--test_vit.r160_in1k"
    for folder in ("refs", "snapshots/0"):
        (entry / folder).mkdir(parents=True)
    (entry / "refs" / "main").write_text("0")
    save_file(expected, entry / "snapshots" / "0" / "model.safetensors")
    for weights in ("DEFAULT", "r160_in1k"):
        state = tower("test_vit", weights=weights).backbone.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in state.items())


def test_a_tag_that_cannot_be_had_is_said_within_seconds(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    start = time.monotonic()
    with pytest.raises(
        ValueError, match=r"DEFAULT cannot be fetched from https://huggingface\.co/timm/test_vit\.r160_in1k"
    ) as caught:
        tower("test_vit", weights="DEFAULT")
    assert time.monotonic() - start < 15
    assert "copy the model.safetensors" in str(caught.value) and "tags of timm/test_vit are r160_in1k" in str(
        caught.value
    )
    with pytest.raises(ValueError, match="weights a1: the tags of timm/test_vit are r160_in1k; give DEFAULT, a tag"):
        tower("test_vit", weights="a1")
