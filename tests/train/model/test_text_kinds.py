"""Text towers that are no BERT, and multilingual ones: the features are those of transformers' own models."""

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from data_pipeline.tokenizer import Tokenizer
from tests.support.activations import assert_same, gradients
from tests.support.vocabulary import write_clip_tokenizer, write_sentencepiece_tokenizer
from train.config import TextTowerConfig
from train.model.text import TextTower

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SMALL = {"vocab_size": 100, **SIZES}
T5_SIZES = {"vocab_size": 100, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
CONFIGS = {
    "clip": transformers.CLIPTextConfig(
        max_position_embeddings=16, eos_token_id=99, bos_token_id=98, pad_token_id=99, **SMALL
    ),
    "siglip": transformers.SiglipTextConfig(max_position_embeddings=16, projection_size=8, **SMALL),
    "xlm-r": transformers.XLMRobertaConfig(max_position_embeddings=18, pad_token_id=1, **SMALL),
    "mt5": transformers.MT5Config(feed_forward_proj="gated-gelu", **T5_SIZES),
}
CLASSES = {"clip": "CLIPTextModel", "siglip": "SiglipTextModel", "xlm-r": "XLMRobertaModel", "mt5": "MT5EncoderModel"}
POOLING = {"clip": "last", "siglip": "last", "xlm-r": "mean", "mt5": "mean"}


def captions(lengths=(8, 5, 2), end: int = 99) -> tuple[Tensor, Tensor]:
    """Ids that end in `end`, which pads as well."""
    ids_BL = torch.randint(3, 90, (len(lengths), 8), generator=torch.Generator().manual_seed(5))
    mask_BL = (torch.arange(8) < torch.tensor(lengths)[:, None]).long()
    last_BL = torch.arange(8) == torch.tensor(lengths)[:, None] - 1
    return ids_BL.masked_fill((mask_BL == 0) | last_BL, end), mask_BL


def own(kind: str, tmp_path: Path) -> torch.nn.Module:
    """transformers' model of that kind, saved as it saves itself."""
    torch.manual_seed(3)
    model = getattr(transformers, CLASSES[kind])(CONFIGS[kind]).eval()
    for name, parameter in model.named_parameters():
        if "bias" in name or "norm" in name:
            torch.nn.init.normal_(parameter, 0.5, 0.2)
    model.save_pretrained(tmp_path)
    return model


@torch.no_grad()
def pooled(kind: str, model: torch.nn.Module, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """What transformers itself makes of captions, before any projection."""
    if kind == "siglip":
        return model(ids_BL).last_hidden_state[:, -1]
    output = model(input_ids=ids_BL, attention_mask=mask_BL)
    if kind == "clip":
        return output.pooler_output
    rows = zip(output.last_hidden_state, mask_BL.sum(1).tolist(), strict=True)
    return torch.stack([row_LD[:length].mean(0) for row_LD, length in rows])


@pytest.mark.parametrize("kind", CONFIGS)
def test_features_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    model = own(kind, tmp_path)
    tower = TextTower(TextTowerConfig(name=str(tmp_path), pooling=POOLING[kind])).eval()
    ids_BL, mask_BL = captions()
    if kind == "siglip":  # its tokenizer fills captions with tokens like others
        mask_BL = torch.ones_like(mask_BL)
    expected_BD = pooled(kind, model, ids_BL, mask_BL)
    with torch.no_grad():
        torch.testing.assert_close(tower(ids_BL, mask_BL), expected_BD, rtol=1e-5, atol=1e-6)
        if kind != "siglip":
            other_BL = torch.where(mask_BL == 1, ids_BL, 7)
            torch.testing.assert_close(tower(other_BL, mask_BL), expected_BD, rtol=1e-5, atol=1e-6)
            wider = [torch.nn.functional.pad(each_BL, (0, 3)) for each_BL in (ids_BL, mask_BL)]
            torch.testing.assert_close(tower(*wider), expected_BD, rtol=1e-5, atol=1e-6)
    assert tower.reads_padding == (kind == "siglip")


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_parameter_learns_and_its_file_builds_it_again(kind: str, tmp_path: Path) -> None:
    CONFIGS[kind].save_pretrained(tmp_path)
    config = TextTowerConfig(name=str(tmp_path), weights="scratch", pooling=POOLING[kind])
    torch.manual_seed(9)
    tower = TextTower(config)
    assert (tower.width, tower.vocab_size, len(tower.blocks)) == (32, 100, 2)
    assert tower.max_tokens == (1 << 20 if kind == "mt5" else 16)
    layers = tower.layers()
    assert [n for layer in layers for n in layer] == [n for n, _ in tower.named_parameters()] and len(layers) == 3
    features_BD, grads, _ = gradients(tower, *captions())
    assert features_BD.shape == (3, 32) and [name for name, grad in grads.items() if grad is None] == []

    (tmp_path / "config.json").write_bytes(tower.config_file())
    again = TextTower(config)
    assert again.config_file() == tower.config_file()
    again.load_state_dict(tower.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(*captions()), tower.eval()(*captions()))
    recomputing = TextTower(TextTowerConfig(**{**vars(config), "checkpointing": True})).train()
    recomputing.load_state_dict(tower.state_dict())
    assert_same(gradients(recomputing, *captions())[1], gradients(tower.train(), *captions())[1])


def test_the_text_half_of_a_pair_is_taken(tmp_path: Path) -> None:
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    pair = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=CONFIGS["clip"].to_dict(), vision_config={"image_size": 16, "patch_size": 8, **vision}
        )
    ).eval()
    pair.save_pretrained(tmp_path)
    tower = TextTower(TextTowerConfig(name=str(tmp_path), pooling="last")).eval()
    with torch.no_grad():
        expected_BD = pair.text_model(*captions()).pooler_output
        torch.testing.assert_close(tower(*captions()), expected_BD, rtol=1e-5, atol=1e-6)


def test_the_encoders_own_pooling_layer(tmp_path: Path) -> None:
    torch.manual_seed(3)
    bert = transformers.BertModel(transformers.BertConfig(max_position_embeddings=16, **SMALL)).eval()
    bert.save_pretrained(tmp_path)
    tower = TextTower(TextTowerConfig(name=str(tmp_path), pooling="pooler")).eval()
    with torch.no_grad():
        torch.testing.assert_close(tower(*captions()), bert(*captions()).pooler_output, rtol=1e-5, atol=1e-6)
    _, grads, _ = gradients(tower.train(), *captions())
    assert [name for name, grad in grads.items() if grad is None] == []


@pytest.mark.parametrize("kind", ["clip", "siglip", "xlm-r"])
def test_other_positions_are_interpolated(kind: str, tmp_path: Path) -> None:
    own(kind, tmp_path)
    options = {"name": str(tmp_path), "pooling": POOLING[kind]}
    plain, longer = (TextTower(TextTowerConfig(positions=number, **options)) for number in (16, 32))
    assert (plain.max_tokens, longer.max_tokens) == (16, 32)
    (name,) = [name for name in plain.state_dict() if "position_embedding" in name]
    before_PD, after_QD = plain.state_dict()[name], longer.state_dict()[name]
    first = 2 if kind == "xlm-r" else 0
    assert torch.equal(before_PD[:first], after_QD[:first])
    before_PD, after_QD = before_PD[first:], after_QD[first:]
    torch.testing.assert_close(after_QD[2:-2:2], 0.75 * before_PD[1:-1] + 0.25 * before_PD[:-2])
    torch.testing.assert_close(after_QD[3:-1:2], 0.75 * before_PD[1:-1] + 0.25 * before_PD[2:])
    others = {key: value for key, value in longer.state_dict().items() if key != name}
    assert_same(others, {key: value for key, value in plain.state_dict().items() if key != name})
    ids_BL = torch.full((1, 32), 5)
    assert longer.eval()(ids_BL, torch.ones_like(ids_BL)).isfinite().all()


def test_poolings_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    for kind, pooling, right in (("clip", "cls", "last"), ("mt5", "cls", "mean or last"), ("siglip", "pooler", "last")):
        CONFIGS[kind].save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=rf"^model\.text\.pooling {pooling}: .* pooled by {right}"):
            TextTower(TextTowerConfig(name=str(tmp_path), weights="scratch", pooling=pooling))
    CONFIGS["mt5"].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.text\.positions 20: .* any length; leave it 0"):
        TextTower(TextTowerConfig(name=str(tmp_path), weights="scratch", pooling="mean", positions=20))


def test_clips_tokenizer_ends_a_cut_caption_in_the_end_of_the_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer(str(write_clip_tokenizer(tmp_path)), 12)
    ids_BL, mask_BL = tokenizer(["A cat", "a caption that is too long by far"])
    end = tokenizer.vocab_size - 1
    assert mask_BL.sum(1).tolist() == [6, 12] and ids_BL[0, 5:].tolist() == [end] * 7 and ids_BL[1, -1] == end
    assert ids_BL[:, 0].tolist() == [end - 1] * 2


def test_siglips_tokenizer_fills_captions_and_its_files_keep_that(tmp_path: Path) -> None:
    tokenizer = Tokenizer(str(write_sentencepiece_tokenizer(tmp_path / "a", reads_padding=True)), 16)
    plain = Tokenizer(str(write_sentencepiece_tokenizer(tmp_path / "b")), 16)
    ids_BL, mask_BL = tokenizer(["a red heart", "two"])
    assert ids_BL.shape == (2, 16) and mask_BL.all() and not tokenizer([])[1].numel()
    short_BL, short_mask_BL = plain(["a red heart", "two"])
    assert short_BL.shape == (2, 8) and torch.equal(ids_BL[:, :8], short_BL) and not short_mask_BL.all()
    plain.fills = True  # as the text tower asks for
    for number, made in enumerate((tokenizer, plain)):
        (tmp_path / str(number)).mkdir()
        for name, content in made.files().items():
            (tmp_path / str(number) / name).write_bytes(content)
        assert torch.equal(Tokenizer(str(tmp_path / str(number)), 16)(["two"])[1], torch.ones(1, 16).long())
