"""The text tower: any encoder of the BERT family.

Shapes: B samples, L tokens of a caption, D features.
"""

from __future__ import annotations

import inspect
import json
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from train.config import TextTowerConfig
from train.model.layers import group_by_layer, lock, recompute_blocks
from train.model.pretrained import BUILT_IN_BERT, from_hub

# Fields of an encoder's config that say who wrote it, and how, not what it is.
NOT_COMPARED = ("transformers_version", "architectures", "auto_map", "dtype", "torch_dtype")


class TextTower(nn.Module):
    """A BERT-family encoder without pooler, and the pooling of its last hidden states.

    Args:
        config: name, weights, pooling, how many layers never learn, checkpointing.
        pretrained: False gives fresh weights whatever the config says, for weights that are loaded afterwards.

    Attributes:
        width: length D of the features.
        blocks: names of the transformer layers, bottom to top.
        max_tokens: longest caption that there are positions for, in tokens.
        vocab_size: number of token ids.

    Raises:
        ValueError: the encoder is unknown, is of another family, does not fit its weights, or cannot be fetched.
    """

    def __init__(self, config: TextTowerConfig, pretrained: bool = True) -> None:
        super().__init__()
        self.encoder = _build_encoder(config.name, pretrained and config.weights == "pretrained")
        self.pooling = config.pooling
        self.width: int = self.encoder.config.hidden_size
        self.vocab_size: int = self.encoder.config.vocab_size
        self.max_tokens = _positions(self.encoder)
        self.blocks = [f"encoder.{name}" for name in _transformer_layers(self.encoder)]
        if not self.blocks:
            raise ValueError(f"model.text.name {config.name}: no transformer layers found; use a BERT-family encoder")
        if config.locked_layers > len(self.blocks):
            raise ValueError(
                f"model.text.locked_layers {config.locked_layers}: {config.name} has {len(self.blocks)} layers; give "
                "at most that, or model.text.locked_until -1 for a tower that never learns"
            )
        lock(self, self.blocks[: config.locked_layers])
        if config.checkpointing:
            recompute_blocks(self, self.blocks)

    def forward(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Token ids and mask (1: token, 0: padding), int64 [B, L] -> features [B, D]."""
        return self.pool(self.hidden_states(ids_BL, mask_BL), mask_BL)

    def hidden_states(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Token ids and mask, int64 [B, L] -> the last layer's [B, L, D]."""
        return self.encoder(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state

    def pool(self, hidden_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """Hidden states [B, L, D] -> [B, D]: the first token's, or the mean over tokens that are not padding."""
        if self.pooling == "cls":
            return hidden_BLD[:, 0]
        weights_BL1 = mask_BL.unsqueeze(-1).float()
        return (hidden_BLD.float() * weights_BL1).sum(1) / weights_BL1.sum(1)

    def config_file(self) -> bytes:
        """A config.json; a directory that holds it, as `name`, builds this encoder again, with fresh weights."""
        config = self.encoder.config.to_dict()  # defaults too: another version of transformers may have others
        config = {key: value for key, value in config.items() if key != "auto_map" and not key.startswith("_")}
        return (json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()

    def layers(self) -> list[list[str]]:
        """Names of all parameters, grouped by layer (embeddings, then one per transformer layer), bottom to top."""
        return group_by_layer(self, self.blocks)


def architecture(name: str, pretrained: bool) -> dict[str, Any]:
    """Every field of an encoder's config that its features depend on, wherever it was loaded from.

    Raises:
        ValueError: there is no such encoder, or it cannot be fetched.
    """
    config = _encoder_config(name, pretrained).to_dict()
    return {key: value for key, value in config.items() if key not in NOT_COMPARED and not key.startswith("_")}


def _encoder_config(name: str, pretrained: bool) -> transformers.PretrainedConfig:
    if name in BUILT_IN_BERT and not pretrained:
        return transformers.BertConfig()  # transformers' default is BERT-base: no hub is asked
    return from_hub(transformers.AutoConfig.from_pretrained, name)


def _build_encoder(name: str, pretrained: bool) -> transformers.PreTrainedModel:
    config = _encoder_config(name, pretrained)
    # What shows the family is the objective: encoders that see the whole caption are trained on masked words.
    family = not config.is_encoder_decoder and type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    if not family or type(config) not in transformers.MODEL_MAPPING or not hasattr(config, "hidden_size"):
        raise ValueError(f"model.text.name {name} is of type {config.model_type}: use an encoder of the BERT family")
    encoder_class: Any = transformers.MODEL_MAPPING[type(config)]
    options: dict = {}
    if "add_pooling_layer" in inspect.signature(encoder_class.__init__).parameters:
        options["add_pooling_layer"] = False  # DDP would wait for parameters that no gradient reaches
    if encoder_class._supports_sdpa:
        options["attn_implementation"] = "sdpa"
    if not pretrained:
        return transformers.AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False, **options)
    load = partial(encoder_class.from_pretrained, dtype=torch.float32, output_loading_info=True, **options)
    encoder, info = from_hub(load, name)
    # Where the file lacks a tensor or has another shape, transformers only warns and leaves fresh weights.
    problems = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in info[kind])
    if problems:
        raise ValueError(
            f"model.text.name {name}: its weights file lacks {len(problems)} tensors of {encoder_class.__name__} "
            f"({problems[0]} ...); use matching files, or model.text.weights scratch"
        )
    return encoder


def _transformer_layers(encoder: nn.Module) -> list[str]:
    """Names of the transformer layers: the items of the longest list of modules."""
    lists = [(name, module) for name, module in encoder.named_modules() if isinstance(module, nn.ModuleList)]
    name, layers = max(lists, key=lambda item: len(item[1]), default=("", []))
    return [f"{name}.{i}" for i in range(len(layers))]


def _positions(encoder: transformers.PreTrainedModel) -> int:
    """The longest input. RoBERTa and its kin count positions from the padding id + 1 on."""
    positions = encoder.config.max_position_embeddings
    embeddings = getattr(getattr(encoder, "embeddings", None), "position_embeddings", None)
    padding = getattr(embeddings, "padding_idx", None)
    return positions if padding is None else positions - padding - 1
