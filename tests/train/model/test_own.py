"""Image towers of the user's own, by the dotted path of their class."""

import sys

import pytest
import torch
from torch import nn

from tests.support.exactness import make_batch, make_config, write_text_tower
from train.config import ImageTowerConfig
from train.engine.optim import param_groups
from train.model.image import ImageTower
from train.model.pair import build_model


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())

    def forward(self, x):
        return x + self.layers(x)


class Tower(nn.Module):
    """Says nothing about itself."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.groups = nn.Sequential(*(nn.Sequential(Block(8), Block(8)) for _ in range(3)))
        self.drop = nn.Dropout(dropout)
        self.unused = nn.Linear(2, 2)

    def forward(self, images):
        return self.drop(self.groups(self.stem(images)).mean((2, 3)))


class Speaking(Tower):
    """Says all."""

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.blocks, self.stages, self.channels_last = ["groups.0", "groups.2"], ["groups.1"], True


class Looking(Tower):
    """Goes another way by what it sees, so that it does not go through without data."""

    def forward(self, images):
        return super().forward(images if images.abs().max() < 100 else images / 100)


class Mapping(Tower):
    def forward(self, images):
        return self.groups(self.stem(images))


def tower(cls: type | str, **options) -> ImageTower:
    name = cls if isinstance(cls, str) else f"{__name__}.{cls.__name__}"
    torch.manual_seed(1)
    return ImageTower(ImageTowerConfig(name=name, **options), 32)


@pytest.mark.parametrize("cls", [Tower, Looking])
def test_what_a_tower_does_not_say_is_found_out(cls):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    model = cls()
    torch.set_rng_state(state)
    built = ImageTower(ImageTowerConfig(name=f"{__name__}.{cls.__name__}"), 32)
    assert built.width == 8 and not built.channels_last
    assert built.blocks == [f"backbone.groups.{group}.{block}" for group in range(3) for block in range(2)]
    assert built.stages == ["groups.0", "groups.1", "groups.2"]
    assert [name for name, p in built.named_parameters() if not p.requires_grad] == [
        "backbone.unused.weight",
        "backbone.unused.bias",
    ]
    for name, value in built.backbone.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), "the blank forward has changed it"


def test_what_a_tower_says_is_taken():
    built = tower(Speaking)
    assert built.backbone.image_size == 32
    assert built.blocks == ["backbone.groups.0", "backbone.groups.2"]
    assert built.stages == ["groups.1"] and built.channels_last


def test_an_own_tower_trains_in_a_pair(tmp_path):
    config = make_config(write_text_tower(tmp_path), "tiled", global_batch=8)
    options = config.model.image
    options.name, options.layer_decay, options.locked_stages, options.checkpointing = f"{__name__}.Tower", 0.5, 1, True
    config.model.multiscale.enabled = True
    model = build_model(config, (0.5,) * 3, (0.25,) * 3)
    outputs = model(make_batch(config), [1, 2])
    sum(value.sum() for value in outputs.values()).backward()
    names = {name for group in param_groups(model, config) for name in group["names"]}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == names
    assert "image.backbone.groups.1.0.layers.0.weight" in names
    assert not [name for name in names if "stem" in name or "groups.0" in name or "unused" in name]


def test_options_and_weights(tmp_path, capfd):
    torch.manual_seed(5)
    path, state = tmp_path / "weights.pth", Tower().state_dict()
    torch.save(state, path)
    built = tower(Tower, dropout=0.3, weights=str(path))
    assert built.backbone.drop.p == 0.3
    assert all(torch.equal(value, state[name]) for name, value in built.backbone.state_dict().items())
    assert "in order" not in capfd.readouterr().err
    with pytest.raises(ValueError, match=r"^model\.image\.drop_path 0\.1: .*Tower has no such argument; leave it null"):
        tower(Tower, drop_path=0.1)
    with pytest.raises(ValueError, match=r"^model\.image\.weights DEFAULT: .* has weights in files alone"):
        tower(Tower, weights="DEFAULT")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        (f"{__name__}.Nothing", "cannot be imported"),
        ("no_package.Tower", "cannot be imported"),
        ("os.getcwd", "is not a class derived from torch"),
        (f"{__name__}.Mapping", r"makes \[2, 8, 8, 8\] of two images: it has to return features \[B, D\]"),
    ],
)
def test_what_is_no_tower(name, match):
    with pytest.raises(ValueError, match=rf"^model\.image\.name {name} {match}"):
        tower(name)
    assert "no_package" not in sys.modules
