import pytest
import torch
import torchvision
from safetensors.torch import save_file

from tests.support.activations import assert_same, gradients
from train.config import ImageTowerConfig
from train.model.image import ImageTower


@pytest.fixture(scope="module")
def resnet18() -> torch.nn.Module:
    torch.manual_seed(4)
    return torchvision.models.resnet18()


def pixels(size: int, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize(
    ("name", "width", "blocks"),
    [
        ("resnet18", 512, 8),
        ("resnext50_32x4d", 2048, 16),
        ("convnext_tiny", 768, 19),
        ("efficientnet_b0", 1280, 18),
        ("regnet_y_400mf", 440, 17),
        ("vit_b_32", 768, 12),
        ("swin_t", 768, 15),
        ("mobilenet_v3_small", 1024, 13),
        ("densenet121", 1024, 7),
        ("googlenet", 1024, 12),
    ],
)
def test_image_towers(name, width, blocks):
    """Features of the right width, every parameter used and in one layer; recomputation changes no gradient."""
    torch.manual_seed(8)
    plain = ImageTower(ImageTowerConfig(name=name), 64)
    checkpointed = ImageTower(ImageTowerConfig(name=name, checkpointing=True), 64)
    checkpointed.load_state_dict(plain.state_dict())
    assert (plain.width, len(plain.blocks)) == (width, blocks)
    layers = plain.layers()
    assert [n for layer in layers for n in layer] == [n for n, _ in plain.named_parameters()]
    assert blocks <= len(layers) <= blocks + 1

    x = pixels(64)
    features, expected, kept = gradients(plain, x)
    assert features.shape == (2, width) and features.dtype == torch.float32
    assert [name for name, grad in expected.items() if grad is None] == []
    features_again, actual, kept_again = gradients(checkpointed, x)
    assert torch.equal(features, features_again)
    assert_same(actual, expected)
    assert kept_again < 0.75 * kept, kept_again / kept


def test_checkpointing_a_resnet_keeps_a_fraction_of_the_activations():
    sizes = [gradients(ImageTower(ImageTowerConfig(checkpointing=on), 64), pixels(64))[2] for on in (False, True)]
    assert sizes[1] < 0.4 * sizes[0], sizes


def test_checkpointing_that_cannot_work_is_refused():
    with pytest.raises(ValueError, match=r"^model\.image\.checkpointing: alexnet has no blocks"):
        ImageTower(ImageTowerConfig(name="alexnet", checkpointing=True), 64)


def test_layers_of_a_resnet():
    layers = ImageTower(ImageTowerConfig(name="resnet18"), 32).layers()
    assert layers[0] == ["backbone.conv1.weight", "backbone.bn1.weight", "backbone.bn1.bias"]
    assert all(name.startswith("backbone.layer4.1.") for name in layers[-1])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_local_state_dict_is_loaded_exactly(tmp_path, resnet18, suffix):
    path = tmp_path / f"weights{suffix}"
    torch.save(resnet18.state_dict(), path) if suffix == ".pth" else save_file(resnet18.state_dict(), path)
    tower = ImageTower(ImageTowerConfig(name="resnet18", weights=str(path)), 64)
    expected = {k: v for k, v in resnet18.state_dict().items() if not k.startswith("fc.")}
    assert_same(dict(tower.backbone.state_dict()), expected)
    resnet18.eval()
    features = tower.eval()(pixels(64))
    assert torch.equal(resnet18.fc(features), resnet18(pixels(64)))


def test_position_embeddings_of_a_vit_are_interpolated_to_the_image_size(tmp_path):
    path = tmp_path / "vit.safetensors"
    vit = torchvision.models.vit_b_32(image_size=64)
    save_file(vit.state_dict(), path)
    config = ImageTowerConfig(name="vit_b_32", weights=str(path))
    assert torch.equal(ImageTower(config, 64).backbone.encoder.pos_embedding, vit.encoder.pos_embedding)
    larger = ImageTower(config, 96).backbone
    assert larger.encoder.pos_embedding.shape == (1, 10, 768)
    assert torch.equal(larger.encoder.pos_embedding[:, 0], vit.encoder.pos_embedding[:, 0])


def test_weights_that_do_not_fit_are_refused(tmp_path, resnet18):
    path = tmp_path / "weights.pth"

    def refused(state, match, name="resnet18"):
        torch.save(state, path)
        with pytest.raises(ValueError, match=match) as caught:
            ImageTower(ImageTowerConfig(name=name, weights=str(path)), 64)
        assert f"model.image.weights {path}" in str(caught.value)

    state = resnet18.state_dict()
    refused(state, "not weights of resnet50: .* missing .*; .* of another shape", name="resnet50")
    refused(state, "not weights of vit_b_32", name="vit_b_32")
    refused({k: v for k, v in state.items() if k != "layer2.0.conv1.weight"}, r"1 missing \(layer2.0.conv1.weight")
    refused(state | {"extra": torch.zeros(1)}, r"1 not in the model \(extra")
    refused({"lr": 3}, "not a state dict")
    path.write_bytes(b"not weights at all")
    with pytest.raises(ValueError, match="cannot be read as a state dict"):
        ImageTower(ImageTowerConfig(name="resnet18", weights=str(path)), 64)
    with pytest.raises(ValueError, match="no such file"):
        ImageTower(ImageTowerConfig(name="resnet18", weights=str(tmp_path / "none.safetensors")), 64)
    with pytest.raises(ValueError, match=r"resnet18 has scratch, IMAGENET1K_V1, DEFAULT; or give a local"):
        ImageTower(ImageTowerConfig(name="resnet18", weights="IMAGENET21K"), 64)


def test_torchvision_weights_without_a_network_are_refused_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(ValueError, match=r"^model\.image\.weights DEFAULT cannot be fetched .* local \.safetensors"):
        ImageTower(ImageTowerConfig(name="resnet18", weights="DEFAULT"), 64)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("resnet5O", "model.image.name resnet5O is not a torchvision model; the nearest are resnet50"),
        ("ViT_B_16", "the nearest are vit_b_16"),
        ("squeezenet1_0", "squeezenet1_0 does not end in a linear layer"),
        ("vit_b_16", "data.image_size 100 is not a multiple of 16"),
        ("maxvit_t", "data.image_size 100 does not fit model.image.name maxvit_t"),
    ],
)
def test_image_towers_that_cannot_be_built(name, match):
    with pytest.raises(ValueError, match=match):
        ImageTower(ImageTowerConfig(name=name), 100)


def test_fresh_weights_whatever_the_config_says(resnet18, tmp_path):
    save_file(resnet18.state_dict(), tmp_path / "w.safetensors")
    config = ImageTowerConfig(name="resnet18", weights=str(tmp_path / "w.safetensors"))
    assert not torch.equal(ImageTower(config, 64, pretrained=False).backbone.conv1.weight, resnet18.conv1.weight)
