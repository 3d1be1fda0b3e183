"""The text tower: any encoder of the BERT family, the text half of CLIP and SigLIP, or the encoder of a T5.

Shapes: B samples, L tokens of a caption, D features.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from data_pipeline.tokenizer import ROUND_TO
from train.config import TextTowerConfig
from train.model.layers import group_by_layer, lock, recompute_blocks
from train.model.open_clip_text import text_config
from train.model.pretrained import BUILT_IN_BERT, from_hub

# Fields of an encoder's config that say who wrote it, and how, not what it is.
NOT_COMPARED = ("transformers_version", "architectures", "auto_map", "dtype", "torch_dtype")
ANY_LENGTH = 1 << 20
"""Positions of an encoder that knows only how far apart two tokens are."""


class Kind(NamedTuple):
    """Encoders that are no BERT: their class in transformers, and the poolings that their features can be had by."""

    encoder: str
    poolings: tuple[str, ...]


BERT_POOLINGS = ("cls", "mean", "last", "pooler")
KINDS = {
    "clip_text_model": Kind("CLIPTextModel", ("last",)),
    "siglip_text_model": Kind("SiglipTextModel", ("last", "mean")),
    "t5": Kind("T5EncoderModel", ("mean", "last")),
    "mt5": Kind("MT5EncoderModel", ("mean", "last")),
    "umt5": Kind("UMT5EncoderModel", ("mean", "last")),
}
"""By type, where that is not one that is trained on masked words."""


class TextTower(nn.Module):
    """An encoder without its head, and the pooling of its last hidden states.

    Args:
        config: name, weights, pooling, positions, how many layers never learn, checkpointing.
        pretrained: False gives fresh weights whatever the config says, for weights that are loaded afterwards.

    Attributes:
        width: length D of the features.
        blocks: names of the transformer layers, bottom to top.
        max_tokens: longest caption that there are positions for, in tokens.
        vocab_size: number of token ids.
        reads_padding: whether captions have to be filled with padding that counts as tokens.

    Raises:
        ValueError: the encoder is unknown, is of another family, does not fit its weights, or cannot be fetched.
    """

    def __init__(self, config: TextTowerConfig, pretrained: bool = True) -> None:
        super().__init__()
        self.encoder = _build_encoder(config, pretrained and config.weights == "pretrained")
        self.pooling = config.pooling
        self.width: int = self.encoder.config.hidden_size
        self.vocab_size: int = self.encoder.config.vocab_size
        self.max_tokens = _positions(self.encoder)
        self.reads_padding = self.encoder.config.model_type == "siglip_text_model"
        self.blocks = [f"encoder.{name}" for name in _transformer_layers(self.encoder)]
        if not self.blocks:
            raise ValueError(f"model.text.name {config.name}: no transformer layers found; take another encoder")
        if config.locked_layers > len(self.blocks):
            raise ValueError(
                f"model.text.locked_layers {config.locked_layers}: {config.name} has {len(self.blocks)} layers; give "
                "at most that, or model.text.locked_until -1 for a tower that never learns"
            )
        self._masks_in_full = _takes_masks_in_full(self.encoder)
        lock(self, self.blocks[: config.locked_layers])
        if config.checkpointing:
            recompute_blocks(self, self.blocks)

    def forward(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Token ids and mask (1: token, 0: padding), int64 [B, L] -> features [B, D]."""
        return self.pool(self.hidden_states(ids_BL, mask_BL), mask_BL)

    def hidden_states(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Token ids and mask, int64 [B, L] -> the last layer's [B, L, D]."""
        if self._masks_in_full:
            return _hidden_by_full_mask(self.encoder, ids_BL, mask_BL)
        return self.encoder(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state

    def pool(self, hidden_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """Hidden states [B, L, D] -> [B, D], as `model.text.pooling` says; padding is left out."""
        return pooled(self.encoder, self.pooling, hidden_BLD, mask_BL)

    def config_file(self) -> bytes:
        """A config.json; a directory that holds it, as `name`, builds this encoder again, with fresh weights."""
        config = self.encoder.config.to_dict()  # defaults too: another version of transformers may have others
        config = {key: value for key, value in config.items() if key != "auto_map" and not key.startswith("_")}
        return (json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()

    def layers(self) -> list[list[str]]:
        """Names of all parameters, grouped by layer (embeddings, then one per transformer layer), bottom to top."""
        return group_by_layer(self, self.blocks)


def in_pieces(
    tower: Callable[[Tensor, Tensor], Tensor], pieces: int, ids_BL: Tensor, mask_BL: Tensor, lengths: Sequence[int]
) -> Tensor:
    """Features [B, D] of a micro-batch, sorted by length and cut into pieces, each with no more padding than it needs.

    A function of the micro-batch alone, dropout included. Of 64 captions of the web the longest has three times the
    tokens of the average one.

    Args:
        lengths: of each caption, in tokens; on the host, which would have to wait for a GPU to know them.
    """
    order_B = mask_BL.sum(1).argsort(stable=True)
    ids_BL, mask_BL = ids_BL[order_B], mask_BL[order_B]
    rows, ordered = -(-len(lengths) // pieces), sorted(lengths)
    features = []
    for first in range(0, len(ordered), rows):
        own = slice(first, first + rows)
        longest = -(-ordered[own][-1] // ROUND_TO) * ROUND_TO
        features.append(tower(ids_BL[own, :longest], mask_BL[own, :longest]))
    sorted_BD = torch.cat(features)
    return torch.zeros_like(sorted_BD).index_copy(0, order_B, sorted_BD)


def pooled(encoder: nn.Module, pooling: str, hidden_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """An encoder's hidden states [B, L, D] -> [B, D]: cls, mean, last or pooler. mask: 1 is a token, 0 is padding."""
    if pooling == "cls":
        return hidden_BLD[:, 0]
    if pooling == "pooler":
        return encoder.get_submodule("pooler")(hidden_BLD)
    if pooling == "last":
        last_B11 = (mask_BL.sum(1) - 1).clamp_min(0).view(-1, 1, 1)
        return hidden_BLD.gather(1, last_B11.expand(-1, 1, hidden_BLD.shape[2]))[:, 0]
    weights_BL1 = mask_BL.unsqueeze(-1).float()
    return (hidden_BLD.float() * weights_BL1).sum(1) / weights_BL1.sum(1)


def architecture(name: str, pretrained: bool, positions: int = 0) -> dict[str, Any]:
    """Every field of an encoder's config that its features depend on, wherever it was loaded from.

    positions: as in the config; where it is given, it is no longer the encoder that says how many there are.

    Raises:
        ValueError: there is no such encoder, or it cannot be fetched.
    """
    config = _encoder_config(name, pretrained).to_dict()
    left_out = (*NOT_COMPARED, "max_position_embeddings") if positions else NOT_COMPARED
    return {key: value for key, value in config.items() if key not in left_out and not key.startswith("_")}


def _encoder_config(name: str, pretrained: bool) -> transformers.PretrainedConfig:
    """The encoder's own config; of a pair such as CLIP's, that of its text half."""
    if name in BUILT_IN_BERT and not pretrained:
        return transformers.BertConfig()  # transformers' default is BERT-base: no hub is asked
    config = text_config(Path(name)) or from_hub(transformers.AutoConfig.from_pretrained, name)
    half = getattr(config, "text_config", None)
    config = half if isinstance(half, transformers.PretrainedConfig) else config
    if config.model_type in KINDS and getattr(config, "is_encoder_decoder", False):
        config.is_encoder_decoder = config.use_cache = False  # as transformers has it of the encoder alone
    return config


def _build_encoder(given: TextTowerConfig, pretrained: bool) -> transformers.PreTrainedModel:
    config = _encoder_config(given.name, pretrained)
    encoder_class, options = _encoder_class(given, config)
    if not pretrained:
        encoder = _fresh(encoder_class, config, options)
    else:
        load = partial(encoder_class.from_pretrained, dtype=torch.float32, output_loading_info=True, **options)
        load = partial(load, config=config) if config.model_type in KINDS else load
        encoder, info = from_hub(load, given.name, weights=True)
        # Where the file lacks a tensor or has another shape, transformers only warns and leaves fresh weights.
        lacking = {str(key) for kind in ("missing_keys", "mismatched_keys") for key in info[kind]}
        if problems := sorted(key for key in lacking if not key.startswith("head.")):  # SigLIP's, which is left out
            raise ValueError(
                f"model.text.name {given.name}: its weights file lacks {len(problems)} tensors of "
                f"{encoder_class.__name__} ({problems[0]} ...); use matching files, or model.text.weights scratch"
            )
    encoder = without_head(encoder)
    if given.pooling == "pooler" and not type(encoder.pooler).__name__.endswith("Pooler"):
        raise ValueError(
            f"model.text.pooling pooler: {type(encoder).__name__} has no layer of that kind; set it to cls or mean"
        )
    return _stretched(encoder, given.positions)


def _encoder_class(given: TextTowerConfig, config: transformers.PretrainedConfig) -> tuple[Any, dict[str, Any]]:
    """The class of an encoder and the options that it is made with."""
    kind = KINDS.get(config.model_type)
    # What shows the BERT family is the objective: encoders that see the whole caption are trained on masked words.
    bert = not config.is_encoder_decoder and type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    known = bert and type(config) in transformers.MODEL_MAPPING and hasattr(config, "hidden_size")
    if kind is None and not known:
        raise ValueError(
            f"model.text.name {given.name} is of type {config.model_type}: use an encoder of the BERT family, or one "
            f"of type {', '.join(KINDS)}"
        )
    encoder_class: Any = getattr(transformers, kind.encoder) if kind else transformers.MODEL_MAPPING[type(config)]
    has_pooler = "add_pooling_layer" in inspect.signature(encoder_class.__init__).parameters
    poolings = kind.poolings if kind else BERT_POOLINGS[: None if has_pooler else -1]
    if given.pooling not in poolings:
        raise ValueError(
            f"model.text.pooling {given.pooling}: {given.name} is of type {config.model_type}, whose captions are "
            f"pooled by {' or '.join(poolings)}; set it to that"
        )
    options: dict[str, Any] = {}
    if has_pooler:
        # DDP would wait for parameters that no gradient reaches.
        options["add_pooling_layer"] = given.pooling == "pooler"
    if encoder_class._supports_sdpa:
        options["attn_implementation"] = "sdpa"
    return encoder_class, options


def _fresh(encoder_class: Any, config: transformers.PretrainedConfig, options: dict) -> transformers.PreTrainedModel:
    if config.model_type in KINDS:
        return encoder_class._from_config(config, dtype=torch.float32, **options)
    return transformers.AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False, **options)


def without_head(encoder: Any) -> Any:
    """What makes the last hidden states: of a T5 its stack, whose token embeddings have one name there."""
    if type(encoder).__name__ in ("T5EncoderModel", "MT5EncoderModel", "UMT5EncoderModel"):
        return encoder.encoder
    encoder = getattr(encoder, "text_model", encoder)  # of CLIP and SigLIP, before transformers 5.24
    if isinstance(getattr(encoder, "head", None), nn.Linear):
        encoder.head = nn.Identity()
    return encoder


def _stretched(encoder: Any, positions: int) -> Any:
    """The encoder with another number of positions, interpolated from those that it has; as it is where that is 0."""
    if not positions or positions == _positions(encoder):
        return encoder
    if _positions(encoder) == ANY_LENGTH:
        raise ValueError(f"model.text.positions {positions}: this encoder takes captions of any length; leave it 0")
    config = copy.deepcopy(encoder.config)
    config.max_position_embeddings += positions - _positions(encoder)
    options = {"add_pooling_layer": False} if getattr(encoder, "pooler", 1) is None else {}
    longer = without_head(type(encoder)(config, **options))
    weights = encoder.state_dict()
    for name in filter(is_position_table, weights):
        weights[name] = resampled(weights[name], len(longer.state_dict()[name]), first_position(encoder))
    longer.load_state_dict(weights)
    return longer


def _hidden_by_full_mask(encoder: nn.Module, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """[B, L, D], by a mask for each pair of tokens.

    From a mask for each token transformers makes this one, unless nothing is padding, for which it has to look: in
    every forward pass the host would wait for a GPU.
    """
    mask_BHLL = mask_BL.bool()[:, None, None].expand(-1, -1, mask_BL.shape[1], -1)
    return encoder(input_ids=ids_BL, attention_mask=mask_BHLL).last_hidden_state


@torch.no_grad()
def _takes_masks_in_full(encoder: Any) -> bool:
    """Whether an encoder makes the same of a mask for each pair of tokens; some read the mask of tokens elsewhere."""
    if encoder.config._attn_implementation != "sdpa":
        return False
    ids_BL = torch.arange(8, device=encoder.device).view(2, 4) % encoder.config.vocab_size
    mask_BL = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]], device=encoder.device)
    training = encoder.training
    encoder.eval()
    try:
        by_token = encoder(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
        by_pair = _hidden_by_full_mask(encoder, ids_BL, mask_BL)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    finally:
        encoder.train(training)
    return bool((by_token == by_pair)[mask_BL > 0].all())


def is_position_table(name: str) -> bool:
    """Whether a tensor of a text encoder has a row for each position."""
    return name.endswith(("position_embeddings.weight", "position_embedding.weight"))


def resampled(tensor_PD: Tensor, rows: int, first: int) -> Tensor:
    """Position embeddings [P, D] interpolated linearly to `rows` rows; the `first` ones, of no position, stay."""
    table_1DP = tensor_PD[first:].float().T[None]
    moved_1DQ = F.interpolate(table_1DP, rows - first, mode="linear", align_corners=False)
    return torch.cat([tensor_PD[:first], moved_1DQ[0].T.to(tensor_PD.dtype)])


def _transformer_layers(encoder: nn.Module) -> list[str]:
    """Names of the transformer layers: the items of the longest list of modules."""
    lists = [(name, module) for name, module in encoder.named_modules() if isinstance(module, nn.ModuleList)]
    name, layers = max(lists, key=lambda item: len(item[1]), default=("", []))
    return [f"{name}.{i}" for i in range(len(layers))]


def _positions(encoder: Any) -> int:
    """The longest input."""
    positions = getattr(encoder.config, "max_position_embeddings", ANY_LENGTH)
    return positions - first_position(encoder)


def first_position(encoder: Any) -> int:
    """Row of the first token in the table of positions: RoBERTa and its kin count from the padding id + 1 on."""
    embeddings = getattr(getattr(encoder, "embeddings", None), "position_embeddings", None)
    padding = getattr(embeddings, "padding_idx", None)
    return 0 if padding is None else padding + 1
