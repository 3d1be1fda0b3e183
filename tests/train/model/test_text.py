import copy
import time

import pytest
import torch
import transformers
from safetensors.torch import save_file

from tests.support.activations import assert_same, gradients
from tests.support.exactness import make_batch, make_config, write_text_tower
from train.config import TextTowerConfig
from train.model.pair import build_model
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


def captions(lengths=(8, 5, 2)) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 100, (len(lengths), 8), generator=torch.Generator().manual_seed(5))
    mask = (torch.arange(8) < torch.tensor(lengths)[:, None]).long()
    return ids, mask


def test_checkpointing_the_text_tower_saves_memory_and_changes_no_gradient(bert):
    plain, checkpointed = (TextTower(TextTowerConfig(name=bert, checkpointing=on)) for on in (False, True))
    features, expected, kept = gradients(plain, *captions())
    features_again, actual, kept_again = gradients(checkpointed, *captions())
    assert torch.equal(features, features_again), "dropout differs"
    assert_same(actual, expected)
    assert kept_again < 0.4 * kept, kept_again / kept


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


@pytest.mark.parametrize("weights", ["pretrained", "scratch"])
def test_a_hub_that_cannot_be_reached_is_said_within_seconds(weights):
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"^model\.text\.name nobody/nothing-of-that-name .* give a directory"):
        TextTower(TextTowerConfig(name="nobody/nothing-of-that-name", weights=weights))
    assert time.monotonic() - start < 15


def test_text_towers_that_cannot_be_built(tmp_path, bert):
    def refused(name, match, **options):
        with pytest.raises(ValueError, match=match) as caught:
            TextTower(TextTowerConfig(name=str(name), **options))
        assert f"model.text.name {name}" in str(caught.value)

    refused(tmp_path / "nowhere", "no such directory; give a directory with its config.json")
    refused(tmp_path, "cannot be loaded from this directory")
    for config in (transformers.GPT2Config(), transformers.BartConfig(), transformers.ViTConfig()):
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


def test_fresh_weights_whatever_the_config_says(bert):
    tower = TextTower(TextTowerConfig(name=bert), pretrained=False)
    stored = TextTower(TextTowerConfig(name=bert))
    assert not torch.equal(next(tower.parameters()), next(stored.parameters()))


def test_captions_in_pieces_have_the_same_features_and_their_dropout_is_the_micro_batchs_own(tmp_path):
    config = make_config(write_text_tower(tmp_path), "tiled", global_batch=14, micro_batch=7)
    batches = make_batch(config)
    for batch in batches:
        batch.lengths = batch.mask_BL.sum(1).tolist()
    whole = build_model(copy.deepcopy(config), (0.5,) * 3, (0.25,) * 3)
    config.model.text.pieces = 3
    pieces = build_model(config, (0.5,) * 3, (0.25,) * 3)
    shapes = []
    pieces.text.register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape)))
    both = pieces(batches, [1, 2])["text"]
    longest = [sorted(batch.lengths)[last] for batch in batches for last in (2, 5, 6)]
    assert shapes == [(rows, -(-length // 8) * 8) for rows, length in zip((3, 3, 1) * 2, longest, strict=True)]
    assert torch.equal(pieces(batches[1:], [2])["text"], both[7:]), "dropout depends on what else a process has"
    assert not torch.equal(pieces(batches[1:], [3])["text"], both[7:])
    for model in (whole, pieces):
        model.text.eval()
    weights = torch.linspace(-1, 1, both.numel()).view_as(both)
    found = []
    for model in (whole, pieces):
        text = model(batches, [1, 2])["text"]
        found.append((text.detach(), *torch.autograd.grad((text * weights).sum(), list(model.text.parameters()))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
