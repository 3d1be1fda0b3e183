"""transformers' own pairs, tiny, as it saves them: the same embeddings here, from the same pixels and captions."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from data_pipeline.tokenizer import Tokenizer
from tests.support.vocabulary import write_clip_tokenizer, write_sentencepiece_tokenizer, write_tokenizer
from train import cli
from train.config import RunConfig
from train.init.fit import fill
from train.init.origin import open_origin
from train.model.pair import PairModel, build_model

TEXT = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
VISION = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"intermediate_size": 128}
CAPTIONS = ["a red heart", "two", "the number of the drawing"]


def clip(directory: Path) -> nn.Module:
    write_clip_tokenizer(directory)
    end = Tokenizer(str(directory), 16).vocab_size - 1
    text = TEXT | {"max_position_embeddings": 77, "eos_token_id": end, "pad_token_id": end, "bos_token_id": end - 1}
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24)
    return transformers.CLIPModel(config)


def siglip(directory: Path) -> nn.Module:
    write_sentencepiece_tokenizer(directory, reads_padding=True)
    text = TEXT | {"max_position_embeddings": 16, "projection_size": 32}
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=VISION))


def dual_encoder(directory: Path) -> nn.Module:
    write_tokenizer(directory)
    text = transformers.BertConfig(max_position_embeddings=40, **TEXT)
    vision = transformers.CLIPVisionConfig(**VISION)
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=24)
    return transformers.VisionTextDualEncoderModel(config)


PAIRS = {"clip": clip, "siglip": siglip, "dual_encoder": dual_encoder}
FIELDS: dict[str, dict[str, Any]] = {
    "clip": {"model.image.name": "tests.support.vits.Clip", "data.max_tokens": 77},
    "siglip": {"model.image.name": "tests.support.vits.Siglip", "data.max_tokens": 16, "loss.kind": "sigmoid"},
    "dual_encoder": {"model.image.name": "tests.support.vits.Clip", "data.max_tokens": 32},
}


def saved(kind: str, directory: Path) -> nn.Module:
    """transformers' pair of that kind with weights that tell captions apart, in a directory."""
    torch.manual_seed(5)
    model = PAIRS[kind](directory).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, 0.0, 0.3)
        elif parameter.ndim and "logit" not in name:
            nn.init.normal_(parameter, float("weight" in name), 0.2)
    nn.init.constant_(model.logit_scale, 2.5)
    if kind == "siglip":
        nn.init.constant_(model.logit_bias, -7.0)
    model.save_pretrained(directory)
    return model


def fitting(kind: str, directory: Path, **more: Any) -> RunConfig:
    """The configuration that the message of a wrong one asks for."""
    fields = {"data.image_size": 32, "init": f"hf:{directory}"} | FIELDS[kind] | more
    given = [f"--{name}={value}" for name, value in fields.items()]
    with pytest.raises(ValueError, match="is not of that shape") as caught:
        open_origin(cli.parse([*given, "--model.text.weights=scratch"]))
    lines = [line.strip().partition("    (now")[0] for line in str(caught.value).splitlines()[1:]]
    return cli.parse([*given, *(f"--{name}={value}" for name, _, value in (line.partition(" ") for line in lines))])


def started(config: RunConfig) -> tuple[PairModel, list[str]]:
    model = build_model(config, [0.5] * 3, [0.5] * 3, pretrained=False)
    return model.eval(), fill(model, open_origin(config), config)


@torch.no_grad()
def theirs(model: nn.Module, directory: Path, pixels_BCHW: Tensor, max_tokens: int) -> tuple[Tensor, Tensor]:
    """What transformers itself makes of pixels and captions, by its own tokenizer and padding."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    padding = "max_length" if tokenizer.model_input_names == ["input_ids"] else True
    tokens = tokenizer(CAPTIONS, padding=padding, max_length=max_tokens, truncation=True, return_tensors="pt")
    image, text = model.get_image_features(pixels_BCHW), model.get_text_features(**tokens)
    return tuple(nn.functional.normalize(each.pooler_output, dim=-1) for each in (image, text))


@pytest.mark.parametrize("kind", PAIRS)
def test_embeddings_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    theirs_model = saved(kind, tmp_path)
    config = fitting(kind, tmp_path)
    model, lines = started(config)
    assert not [line for line in lines if line.startswith(("fresh", "left"))], lines
    images_BCHW = torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(1)).byte()
    image_BD, text_BD = theirs(theirs_model, tmp_path, model.normalized(images_BCHW), config.data.max_tokens)
    with torch.no_grad():
        ids_BL, mask_BL = Tokenizer(config.model.text.tokenizer, config.data.max_tokens)(CAPTIONS)
        torch.testing.assert_close(model.encode_image(images_BCHW), image_BD, rtol=0, atol=1e-6)
        torch.testing.assert_close(model.encode_text(ids_BL, mask_BL), text_BD, rtol=0, atol=1e-6)
    assert model.log_scale.item() == 2.5
    assert (image_BD @ image_BD.T).min() < 0.99 and (text_BD @ text_BD.T).min() < 0.99
    if kind == "siglip":
        assert model.logit_bias is not None and model.logit_bias.item() == -7


def test_another_image_size_and_context_length_interpolate_positions(tmp_path: Path) -> None:
    saved("clip", tmp_path)
    config = fitting("clip", tmp_path, **{"data.image_size": 48, "data.max_tokens": 100, "model.text.positions": 100})
    model, lines = started(config)
    assert "positions of the image tower are interpolated bicubically, from 17 to 37" in lines
    assert "positions of the text tower are interpolated linearly, from 77 to 100" in lines
    assert any("it was trained with data.image_size 32" in line for line in lines)
    small, _ = started(fitting("clip", tmp_path))
    assert torch.equal(model.image.backbone.pos_embed[:, 0], small.image.backbone.pos_embed[:, 0])


def test_towers_of_another_kind_inside_are_refused(tmp_path: Path) -> None:
    saved("clip", tmp_path)
    config = fitting("clip", tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["vision_config"]["num_attention_heads"] = 4
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"its image tower has 4 heads and quick_gelu, .*Clip has 2 and quick_gelu"):
        started(config)


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        ({"hidden_size": 768, "num_hidden_layers": 12, "patch_size": 32}, "timm/vit_base_patch32_clip_quickgelu_224"),
        (
            {"hidden_size": 1024, "num_hidden_layers": 24, "patch_size": 14, "image_size": 336},
            "timm/vit_large_patch14_clip_quickgelu_336",
        ),
        ({"hidden_size": 24, "num_hidden_layers": 2, "patch_size": 8}, "a class of your own, 24 wide, of 2 layers"),
    ],
)
def test_timms_name_of_the_image_tower_is_said(tmp_path: Path, shape: dict, name: str) -> None:
    saved("clip", tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["vision_config"] |= {"image_size": 224} | shape
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="Set\n") as caught:
        open_origin(cli.parse([f"--init=hf:{tmp_path}", "--model.text.weights=scratch"]))
    assert name in str(caught.value)
