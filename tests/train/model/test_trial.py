"""Towers that cannot train are found before they do, on a blank micro-batch."""

import inspect
from pathlib import Path

import pytest
import torch
import transformers

from data_pipeline.tokenizer import Tokenizer
from tests.support.small import small_config
from tests.support.vocabulary import write_tokenizer
from train.config import RunConfig
from train.model.pair import PairModel, build_model
from train.model.trial import try_out

SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}


def with_text(directory: Path, config_class: type, **values: object) -> tuple[PairModel, Tokenizer, RunConfig]:
    """A pair whose text tower is of another family."""
    config = small_config(directory)
    takes = inspect.signature(config_class.__init__).parameters
    config_class(**{**SMALL, **{name: value for name, value in values.items() if name in takes}}).save_pretrained(
        directory / "text"
    )
    return build_model(config, [0.5] * 3, [0.25] * 3), Tokenizer(config.model.text.name, 16), config


def test_what_trains_is_left_as_it_is(tmp_path):
    model, tokenizer, config = with_text(tmp_path, transformers.BertConfig)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert try_out(model, tokenizer, config) == []
    assert torch.equal(torch.rand(3), expected), "the random state"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.requires_grad and value.grad is None for value in model.parameters())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("config_class", "values", "unused"),
    [
        (transformers.LongformerConfig, {"attention_window": 8, "pad_token_id": 0}, "query_global"),
        (transformers.LukeConfig, {"entity_vocab_size": 10, "entity_emb_size": 8}, "entity"),
        (transformers.EsmConfig, {"pad_token_id": 0, "mask_token_id": 4}, "contact_head"),
    ],
)
def test_what_no_gradient_reaches_is_kept_from_learning_and_named(tmp_path, config_class, values, unused):
    model, tokenizer, config = with_text(tmp_path, config_class, **values)
    (line,) = try_out(model, tokenizer, config)
    assert line.startswith("the features do not depend on these parameters, which never learn: text.encoder.")
    locked = [name for name, value in model.named_parameters() if not value.requires_grad]
    assert locked and any(unused in name for name in locked)
    outputs = model([model.blank_micro_batch()], [0])
    torch.stack([value.sum() for value in outputs.values()]).sum().backward()
    assert all((value.grad is not None) == value.requires_grad for value in model.parameters())


@pytest.mark.parametrize("config_class", [transformers.ConvBertConfig, transformers.FNetConfig])
def test_features_that_change_with_padding_are_refused(tmp_path, config_class):
    model, tokenizer, config = with_text(tmp_path, config_class, embedding_size=32, type_vocab_size=2)
    with pytest.raises(ValueError, match=r"model\.text\.name .*: the features of a caption change with its padding"):
        try_out(model, tokenizer, config)


def test_a_tokenizer_that_is_larger_than_the_vocabulary_is_refused(tmp_path):
    model, tokenizer, config = with_text(tmp_path, transformers.BertConfig, vocab_size=20)
    with pytest.raises(ValueError, match=r"model\.text\.tokenizer .* has 89 tokens, and model\.text\.name .* knows 20"):
        try_out(model, tokenizer, config)


def test_an_image_that_is_too_small_is_said(tmp_path):
    config = small_config(tmp_path)
    write_tokenizer(tmp_path / "text")
    config.model.image.name, config.data.image_size = "inception_v3", 64
    model, tokenizer = build_model(config, [0.5] * 3, [0.25] * 3), Tokenizer(config.model.text.name, 16)
    with pytest.raises(ValueError, match=r"data\.image_size 64: such images do not go through .* inception_v3 .*2 x 2"):
        try_out(model, tokenizer, config)


def test_an_encoder_that_fails_is_named(tmp_path):
    model, tokenizer, config = with_text(tmp_path, transformers.BertConfig)
    model.text.encoder.embeddings.word_embeddings = torch.nn.Embedding(100, 8)
    with pytest.raises(ValueError, match=r"model\.text\.name .*: captions do not go through it \(RuntimeError: "):
        try_out(model, tokenizer, config)
