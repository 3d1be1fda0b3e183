"""`init: open_clip:MODEL`: a directory that open_clip reads as `local-dir:`, or a repository on the hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.init.origin import Origin, has_tokenizer
from train.init.vits import timm_models
from train.init.weights import read_json, read_tensors
from train.model.fetch import repository
from train.model.names import OPEN_CLIP, inward, names_of_timm
from train.model.open_clip_text import CLIP_TEXT, CONFIG, in_clips_names
from train.model.text_files import TEXT

FILES = tuple(f"open_clip_{name}" for name in ("model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin"))
POOLINGS = {"cls_last_hidden_state_pooler": "cls", "mean_pooler": "mean", "cls_pooler": "pooler"}


def read(name: str) -> Origin:
    """See the module.

    Raises:
        ValueError: it cannot be read or fetched, or has a part that a pair has no words for.
    """
    given = f"init open_clip:{name}"
    directory = repository(name, [(file,) for file in FILES], given)
    content = read_json(directory / CONFIG, given)
    model, pixels = content.get("model_cfg", content), content.get("preprocess_cfg", {})
    tensors, sha256 = read_tensors(directory, FILES, given)
    # On the hub there is often a config.json of transformers' beside it.
    where = name if not Path(name).is_dir() and (directory / "config.json").is_file() else str(directory)
    vision, text = model["vision_cfg"], model["text_cfg"]
    fields: dict[str, Sequence[Any]] = {"model.embed_dim": (model["embed_dim"],)}
    if "positional_embedding" in tensors:  # of a CLIP, whose text half has no prefix
        tensors = {
            key if key.startswith(("visual.", "logit_")) else f"text.{key}": tensor for key, tensor in tensors.items()
        }
    own: dict[str, Tensor] = {}
    quick = bool(model.get("quick_gelu"))
    origin = Origin({}, sha256, fields=fields)
    origin.inputs = {"data.image_size": vision["image_size"], "data.max_tokens": text.get("context_length", 77)}
    if isinstance(pixels.get("mean"), list) and isinstance(pixels.get("std"), list):
        origin.inputs["data.normalize"] = [pixels["mean"], pixels["std"]]
    if "timm_model_name" in vision:
        fields |= _timm_tower(vision, given)
    else:
        own |= _own_tower(vision, tensors, quick, origin, given)
    if "hf_model_name" in text:
        local = (directory / TEXT / "config.json").is_file()
        fields["model.text.name"] = (str(directory / TEXT) if local else text["hf_model_name"],)
        fields |= _transformers_text(text, given)
    else:
        fields["model.text.name"] = (where,)
        fields["model.text.pooling"] = ("last",)
        own |= _own_text(tensors, given)
    if has_tokenizer(directory):
        fields["model.text.tokenizer"] = (where,)
    origin.tensors, origin.left = inward(tensors, OPEN_CLIP)
    origin.tensors |= own
    last = [f"{tower}_projection.{part}bias" for tower in ("image", "text") for part in ("", "fc2.")]
    biased = any(name in origin.tensors for name in last)
    for tower in ("image", "text"):
        weight_DW = origin.tensors.get(f"{tower}_projection.weight")
        if biased and weight_DW is not None:  # here both have one or none has
            origin.tensors.setdefault(f"{tower}_projection.bias", torch.zeros(len(weight_DW)))
    fields["model.projection_bias"] = (biased,)
    for tower in ("image", "text"):
        fields[f"model.{tower}.projection"] = _projections(origin.tensors, f"{tower}_projection")
    return origin


def _projections(tensors: Mapping[str, Tensor], name: str) -> Sequence[str]:
    if (weight_DW := tensors.get(f"{name}.weight")) is None:
        return ("mlp",) if f"{name}.fc1.weight" in tensors else ("none",)
    square = weight_DW.shape[0] == weight_DW.shape[1]
    return ("none", "linear") if square and torch.equal(weight_DW, torch.eye(len(weight_DW))) else ("linear",)


def _timm_tower(vision: Mapping[str, Any], given: str) -> dict[str, Sequence[Any]]:
    name, proj = vision["timm_model_name"], vision.get("timm_proj", "linear")  # "": timm's own classifier
    if proj not in ("linear", "mlp", "none"):
        raise ValueError(f"{given}: timm_proj {proj} of its vision_cfg has no words here")
    if vision.get("timm_pool") in ("abs_attn", "rot_attn"):
        raise ValueError(f"{given}: timm_pool {vision['timm_pool']} of its vision_cfg has no words here")
    return {"model.image.name": names_of_timm(name)}


def _own_tower(
    vision: Mapping[str, Any], tensors: dict[str, Tensor], quick: bool, origin: Origin, given: str
) -> dict[str, Tensor]:
    """open_clip's vision transformer, whose names timm translates itself; taken out of `tensors`."""
    if not isinstance(vision.get("layers"), int) or "visual.proj" not in tensors:
        raise ValueError(f"{given}: its image tower is neither one of timm's nor a vision transformer")
    width, layers, patch = vision["width"], vision["layers"], vision["patch_size"]
    activation = "quick_gelu" if quick else "gelu"
    origin.fields["model.image.name"] = timm_models("clip", width, layers, patch, vision["image_size"], activation)
    origin.activation, origin.heads = activation, width // vision.get("head_width", 64)
    own = {"image_projection.weight": tensors.pop("visual.proj").T.contiguous()}
    for name in [name for name in tensors if name.startswith("visual.")]:
        own[f"image.backbone.{name}"] = tensors.pop(name)
    return own


def _transformers_text(text: Mapping[str, Any], given: str) -> dict[str, Sequence[Any]]:
    pooler, proj = text.get("hf_pooler_type", ""), text.get("hf_proj_type") or text.get("proj") or "none"
    if pooler not in POOLINGS or proj not in ("linear", "none"):
        raise ValueError(f"{given}: hf_pooler_type {pooler} or hf_proj_type {proj} of its text_cfg has no words here")
    return {"model.text.pooling": (POOLINGS[pooler],)}


def _own_text(tensors: dict[str, Tensor], given: str) -> dict[str, Tensor]:
    """open_clip's text transformer by the names of CLIP's in transformers; taken out of `tensors`."""
    own: dict[str, Tensor] = {}
    matrix = tensors.pop("text.text_projection", None)
    if matrix is not None:
        own["text_projection.weight"] = matrix.T.contiguous()
    for kind in ("weight", "bias"):
        if (tensor := tensors.pop(f"text.text_projection.{kind}", None)) is not None:
            own[f"text_projection.{kind}"] = tensor
    names = [name for name in tensors if name.startswith("text.") and not name.endswith("attn_mask")]
    if f"text.{CLIP_TEXT[0][0]}" not in names or "text_projection.weight" not in own:
        raise ValueError(f"{given}: its text tower is neither one of transformers' nor open_clip's own")
    translated = in_clips_names({name.removeprefix("text."): tensors.pop(name) for name in names})
    return own | {f"text.encoder.{name}": tensor for name, tensor in translated.items()}
