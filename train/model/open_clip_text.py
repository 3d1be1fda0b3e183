"""open_clip's own text tower, which is CLIP's or SigLIP's in transformers under other names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor

CONFIG = "open_clip_config.json"
CLIP_TEXT = (
    ("token_embedding.weight", "embeddings.token_embedding.weight"),
    ("positional_embedding", "embeddings.position_embedding.weight"),
    ("transformer.resblocks.", "encoder.layers."),
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".attn.", ".self_attn."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
    ("ln_final.", "final_layer_norm."),
)
"""Part of a name in open_clip, in transformers."""


def in_clips_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of open_clip's text tower by the names of transformers' CLIPTextModel."""
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for part, other in CLIP_TEXT:
            name = name.replace(part, other)
        if ".in_proj_" not in name:
            named[name] = tensor
            continue
        for part, third in zip("qkv", tensor.chunk(3), strict=True):
            named[name.replace(".in_proj_", f".{part}_proj.")] = third.clone()
    return named


def text_config(directory: Path) -> transformers.PretrainedConfig | None:
    """The config of the text tower that a directory of open_clip's describes; None where it describes none of its own.

    Raises:
        ValueError: the tower is one that transformers does not have.
    """
    try:
        content = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        model = content.get("model_cfg", content)
        text: dict[str, Any] = model["text_cfg"]
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    if "hf_model_name" in text:
        return None
    width, causal = text.get("width", 512), not text.get("no_causal_mask", False)
    shape = {
        "vocab_size": text.get("vocab_size", 49408),
        "hidden_size": width,
        "intermediate_size": int(width * text.get("mlp_ratio", 4.0)),
        "num_hidden_layers": text.get("layers", 12),
        "num_attention_heads": text.get("heads", 8),
        "max_position_embeddings": text.get("context_length", 77),
        "hidden_act": _activation(model, text),
        "layer_norm_eps": (text.get("norm_kwargs") or {}).get("eps", 1e-5),
    }
    pool = text.get("pool_type", "argmax")
    if (causal and pool != "argmax") or (not causal and pool != "last") or text.get("embed_cls"):
        raise ValueError(f"model.text.name {directory}: transformers has no text tower with pool_type {pool} like this")
    if not causal:
        return transformers.SiglipTextConfig(projection_size=model["embed_dim"], **shape)
    return transformers.CLIPTextConfig(projection_dim=model["embed_dim"], **shape)


def _activation(model: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    if model.get("quick_gelu"):
        return "quick_gelu"
    return "gelu_pytorch_tanh" if (text.get("act_kwargs") or {}).get("approximate") == "tanh" else "gelu"
