import time

import pytest
import torch
import torchvision
import transformers
from safetensors.torch import save_file
from torch.autograd.graph import saved_tensors_hooks

from train.config import ImageTowerConfig, TextTowerConfig
from train.model.image import ImageTower
from train.model.text import TextTower

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
SMALL = {"vocab_size": 100, "max_position_embeddings": 40, **SIZES}
SMALL_DISTILBERT = {"dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 64}
FAMILY = {
    "bert": transformers.BertConfig(**SMALL),
    "roberta": transformers.RobertaConfig(**SMALL, pad_token_id=1),
    "distilbert": transformers.DistilBertConfig(vocab_size=100, max_position_embeddings=40, **SMALL_DISTILBERT),
    "mpnet": transformers.MPNetConfig(**SMALL),
    "electra": transformers.ElectraConfig(**SMALL, embedding_size=16),
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    """A directory with the weights of a small BERT."""
    directory = tmp_path_factory.mktemp("bert")
    torch.manual_seed(3)
    transformers.BertModel(FAMILY["bert"]).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def resnet18() -> torch.nn.Module:
    torch.manual_seed(4)
    return torchvision.models.resnet18()


def captions(lengths=(8, 5, 2)) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 100, (len(lengths), 8), generator=torch.Generator().manual_seed(5))
    mask = (torch.arange(8) < torch.tensor(lengths)[:, None]).long()
    return ids, mask


def pixels(size: int, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(6))


def gradients(tower: torch.nn.Module, *inputs: torch.Tensor) -> tuple[torch.Tensor, dict, int]:
    """Features, gradients, and the bytes that the forward pass kept for the backward pass."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {parameter.untyped_storage().data_ptr() for parameter in tower.parameters()}
    tower.zero_grad()
    torch.manual_seed(7)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        features = tower(*inputs)
    size = sum(size for address, size in kept.items() if address not in own)
    (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
    return features.detach(), {name: parameter.grad for name, parameter in tower.named_parameters()}, size


def assert_same(first: dict, second: dict):
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


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


def test_checkpointing_the_text_tower_saves_memory_and_changes_no_gradient(bert):
    plain, checkpointed = (TextTower(TextTowerConfig(name=bert, checkpointing=on)) for on in (False, True))
    features, expected, kept = gradients(plain, *captions())
    features_again, actual, kept_again = gradients(checkpointed, *captions())
    assert torch.equal(features, features_again), "dropout differs"
    assert_same(actual, expected)
    assert kept_again < 0.4 * kept, kept_again / kept


def test_checkpointing_that_cannot_work_is_refused():
    with pytest.raises(ValueError, match=r"--model\.image\.checkpointing: alexnet has no blocks"):
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
        assert f"--model.image.weights {path}" in str(caught.value)

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
    with pytest.raises(ValueError, match=r"--model\.image\.weights DEFAULT cannot be fetched .* local \.safetensors"):
        ImageTower(ImageTowerConfig(name="resnet18", weights="DEFAULT"), 64)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("resnet5O", "--model.image.name resnet5O is not a torchvision model; the nearest are resnet50"),
        ("ViT_B_16", "the nearest are vit_b_16"),
        ("squeezenet1_0", "squeezenet1_0 does not end in a linear layer"),
        ("vit_b_16", "--data.image_size 100 is not a multiple of 16"),
        ("maxvit_t", "--data.image_size 100 does not fit --model.image.name maxvit_t"),
    ],
)
def test_image_towers_that_cannot_be_built(name, match):
    with pytest.raises(ValueError, match=match):
        ImageTower(ImageTowerConfig(name=name), 100)


@pytest.mark.parametrize("family", FAMILY)
def test_text_towers(family, tmp_path):
    """From scratch and from weights; every parameter used and in one layer; padding has no influence."""
    FAMILY[family].save_pretrained(tmp_path)
    torch.manual_seed(9)
    scratch = TextTower(TextTowerConfig(name=str(tmp_path), weights="scratch"))
    assert (scratch.width, scratch.vocab_size, len(scratch.blocks)) == (32, 100, 3)
    layers = scratch.layers()
    assert [n for layer in layers for n in layer] == [n for n, _ in scratch.named_parameters()]
    assert len(layers) == 4
    ids, mask = captions()
    features, grads, _ = gradients(scratch, ids, mask)
    assert features.shape == (3, 32) and [name for name, grad in grads.items() if grad is None] == []

    scratch.encoder.save_pretrained(tmp_path)
    loaded = TextTower(TextTowerConfig(name=str(tmp_path))).eval()
    assert_same(loaded.state_dict(), scratch.state_dict())
    with torch.no_grad():
        other = torch.where(mask == 1, ids, 7)
        torch.testing.assert_close(loaded(ids, mask), loaded(other, mask))
        longest = torch.full((1, loaded.max_tokens), 5)
        assert loaded(longest, torch.ones_like(longest)).isfinite().all()
        with pytest.raises((IndexError, RuntimeError)):
            loaded(torch.full((1, loaded.max_tokens + 1), 5), torch.ones(1, loaded.max_tokens + 1, dtype=torch.int64))


def test_pooling(bert):
    ids, mask = captions()
    cls, mean = (TextTower(TextTowerConfig(name=bert, pooling=pooling)).eval() for pooling in ("cls", "mean"))
    with torch.no_grad():
        states = transformers.BertModel.from_pretrained(bert).eval()(ids, mask).last_hidden_state
        torch.testing.assert_close(cls(ids, mask), states[:, 0])
        expected = torch.stack([row[:length].mean(0) for row, length in zip(states, mask.sum(1), strict=True)])
        torch.testing.assert_close(mean(ids, mask), expected)


def test_bert_base_from_scratch_needs_no_files(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tower = TextTower(TextTowerConfig(weights="scratch"))
    assert sum(parameter.numel() for parameter in tower.parameters()) == 108_891_648  # BERT-base without its pooler
    assert (tower.width, tower.max_tokens, len(tower.blocks)) == (768, 512, 12)


def test_fresh_weights_whatever_the_config_says(bert, resnet18, tmp_path):
    save_file(resnet18.state_dict(), tmp_path / "w.safetensors")
    tower = TextTower(TextTowerConfig(name=bert), pretrained=False)
    stored = TextTower(TextTowerConfig(name=bert))
    assert not torch.equal(next(tower.parameters()), next(stored.parameters()))
    config = ImageTowerConfig(name="resnet18", weights=str(tmp_path / "w.safetensors"))
    assert not torch.equal(ImageTower(config, 64, pretrained=False).backbone.conv1.weight, resnet18.conv1.weight)


@pytest.mark.parametrize("weights", ["pretrained", "scratch"])
def test_a_hub_that_cannot_be_reached_is_said_within_seconds(weights):
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"--model\.text\.name nobody/nothing-of-that-name .* give a directory"):
        TextTower(TextTowerConfig(name="nobody/nothing-of-that-name", weights=weights))
    assert time.monotonic() - start < 15


def test_text_towers_that_cannot_be_built(tmp_path, bert):
    def refused(name, match, **options):
        with pytest.raises(ValueError, match=match) as caught:
            TextTower(TextTowerConfig(name=str(name), **options))
        assert f"--model.text.name {name}" in str(caught.value)

    refused(tmp_path / "nowhere", "no such directory; give a directory with its config.json")
    refused(tmp_path, "cannot be loaded from this directory")
    for config in (transformers.GPT2Config(), transformers.T5Config(), transformers.ViTConfig()):
        config.save_pretrained(tmp_path)
        refused(tmp_path, "use an encoder of the BERT family", weights="scratch")
    FAMILY["bert"].save_pretrained(tmp_path)
    refused(tmp_path, "cannot be loaded from this directory")  # has no weights
    state = transformers.BertModel.from_pretrained(bert).state_dict()
    save_file({k: v for k, v in state.items() if "layer.1.output.dense" not in k}, tmp_path / "model.safetensors")
    refused(tmp_path, r"lacks 2 tensors of BertModel \(encoder.layer.1.output.dense.bias")
    save_file(state, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    refused(tmp_path, "cannot be loaded from this directory")
