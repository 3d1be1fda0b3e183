"""The vision transformers of CLIP and SigLIP as transformers has them, by timm's names; and timm's names of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

PARTS = (
    ("embeddings.patch_embedding.", "patch_embed.proj."),
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.position_embedding.weight", "pos_embed"),
    ("pre_layrnorm.", "norm_pre."),
    ("post_layernorm.", "norm."),
    ("encoder.layers.", "blocks."),
    (".layer_norm1.", ".norm1."),
    (".layer_norm2.", ".norm2."),
    (".self_attn.out_proj.", ".attn.proj."),
    ("head.probe", "attn_pool.latent"),
    ("head.attention.out_proj.", "attn_pool.proj."),
    ("head.layernorm.", "attn_pool.norm."),
    ("head.mlp.", "attn_pool.mlp."),
)
"""Part of a name in transformers, in timm."""

SIZES = {  # width and layers
    (384, 12): "xsmall",
    (512, 12): "medium",
    (640, 12): "betwixt",
    (768, 12): "base",
    (1024, 24): "large",
    (1152, 27): "so400m",
    (1280, 32): "huge",
    (1408, 40): "giant",
    (1536, 40): "giantopt",
    (1664, 48): "gigantic",
}


def to_timm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a CLIPVisionModel or SiglipVisionModel by the names of timm's VisionTransformer."""
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if "position_ids" in name or ".self_attn.k_proj." in name or ".self_attn.v_proj." in name:
            continue
        if ".self_attn.q_proj." in name:  # the three of them are one in timm
            tensor = torch.cat([tensors[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            name = name.replace(".self_attn.q_proj.", ".attn.qkv.")
        if "head.attention.in_proj_" in name:
            kind = name.rpartition("_")[2]
            width = len(tensor) // 3
            named |= {f"attn_pool.q.{kind}": tensor[:width], f"attn_pool.kv.{kind}": tensor[width:]}
            continue
        for part, other in PARTS:
            name = name.replace(part, other)
        if name in ("cls_token", "pos_embed"):
            tensor = tensor.reshape(1, -1, tensor.shape[-1])
        named[name] = tensor
    return named


def timm_models(kind: str, width: int, layers: int, patch: int, size: int, activation: str) -> tuple[str, ...]:
    """timm's models of this shape, for images of that size first, as `model.image.name` has them; where timm has none,
    what a class of one's own would have to be.

    kind: clip or siglip. activation: in transformers' words.
    """
    import timm

    quick = "_quickgelu" if activation == "quick_gelu" and kind == "clip" else ""
    stem = f"vit_{SIZES.get((width, layers), 'none')}_patch{patch}_{kind}{quick}_"
    found = [name for name in timm.list_models(f"{stem}*") if name.removeprefix(stem).isdecimal()]
    found.sort(key=lambda name: abs(int(name.removeprefix(stem)) - size))
    own_class = f"<a class of your own, {width} wide, of {layers} layers, with patches of {patch} pixels>"
    return tuple(f"timm/{name}" for name in found) or (own_class,)


def activation_of(module: Any) -> str:
    """Of a timm VisionTransformer, in transformers' words."""
    act = module.blocks[0].mlp.act
    name = type(act).__name__
    if name == "QuickGELU":
        return "quick_gelu"
    tanh = name == "GELUTanh" or getattr(act, "approximate", "") == "tanh"
    return "gelu_pytorch_tanh" if tanh else name.lower()
