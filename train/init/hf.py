"""`init: hf:MODEL`: a CLIP, SigLIP or VisionTextDualEncoder of transformers, in a directory or on its hub; or the class
that train/export writes where transformers has none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from data_pipeline.storage.hub import WEIGHTS
from data_pipeline.tokenizer import first_line
from train.init.origin import Origin, has_tokenizer
from train.init.vits import timm_models, to_timm
from train.init.weights import read_json, read_tensors
from train.model.fetch import repository
from train.model.names import DUAL_ENCODER, FLAT, OWN_CODE, Table, inward, names_of_timm
from train.model.text_files import TEXT as ENCODER

FILES = ("model.safetensors", "pytorch_model.bin")
KINDS = ("clip", "siglip", "vision-text-dual-encoder")
CLIP: Table = (
    ("image.backbone.", "vision_model."),
    ("image_projection.", "visual_projection."),
    ("text.encoder.", "text_model."),
    ("text_projection.", "text_projection."),
    ("log_scale", "logit_scale"),
)
SIGLIP: Table = (
    ("image.backbone.", "vision_model."),
    ("text_projection.", "text_model.head."),
    ("text.encoder.", "text_model."),
    ("log_scale", "logit_scale"),
    ("logit_bias", "logit_bias"),
)
IMAGE, TEXT = "image.backbone.", "text.encoder."


def read(name: str) -> Origin:
    """See the module.

    Raises:
        ValueError: it cannot be read or fetched, is of another kind, or has a part that a pair has no words for.
    """
    given = f"init hf:{name}"
    directory = repository(name, WEIGHTS, given)
    content = read_json(directory / "config.json", given)
    if (kind := content.get("model_type")) == "duet":
        return _own_code(directory, content, given)
    if kind not in KINDS:
        raise ValueError(f"{given} is of type {kind}: give one of type {', '.join(KINDS)}")
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers has many kinds of failure
        raise ValueError(f"{given}: its config.json cannot be read: {first_line(error)}") from error
    tensors, sha256 = read_tensors(directory, FILES, given)
    origin = _dual_encoder(config, tensors, given) if kind == KINDS[2] else _pair(kind, config, tensors)
    origin.sha256 = sha256
    where = str(directory) if Path(name).is_dir() else name
    origin.fields["model.text.name"] = (where,)
    if has_tokenizer(directory):
        origin.fields["model.text.tokenizer"] = (where,)
    origin.inputs |= _inputs(directory, given)
    return origin


def _own_code(directory: Path, content: Mapping[str, Any], given: str) -> Origin:
    """What train/export/hf_own.py has written. Its code is not run: the tensors are all that is needed."""
    tensors, sha256 = read_tensors(directory, FILES, given)
    named, left = inward(tensors, OWN_CODE)
    name, timms = content["image_model"], content["image_library"] == "timm"
    pixels = read_json(directory / "preprocessor_config.json", given)
    fields: dict[str, Sequence[Any]] = {
        "model.image.name": names_of_timm(name) if timms else (name,),
        "model.text.name": (str(directory / ENCODER),),
        "model.text.tokenizer": (str(directory),),
        "model.text.pooling": (content["text_pooling"],),
        "model.embed_dim": (content["projection_dim"],),
        "model.image.projection": (content["image_projection"],),
        "model.text.projection": (content["text_projection"],),
        "model.projection_bias": (content["projection_bias"],),
    }
    inputs = {
        "data.image_size": pixels["image_size"],
        "data.eval_crop": pixels["eval_crop"],
        "data.normalize": [pixels["image_mean"], pixels["image_std"]],
    }
    return Origin(named, sha256, left, fields, inputs)


def _pair(kind: str, config: Any, tensors: Mapping[str, Tensor]) -> Origin:
    vision, text = config.vision_config, config.text_config
    named, left = inward(_same_names(tensors), CLIP if kind == "clip" else SIGLIP)
    return Origin(
        _with_timm_names(named),
        "",
        left,
        {
            "model.image.name": _timm(kind, vision),
            "model.text.pooling": ("last",),
            "model.embed_dim": (config.projection_dim if kind == "clip" else vision.hidden_size,),
            "model.image.projection": ("linear" if kind == "clip" else "none",),
            "model.text.projection": ("linear",),
            "model.projection_bias": (kind == "siglip",),
        },
        {"data.image_size": vision.image_size, "data.max_tokens": text.max_position_embeddings},
        activation=vision.hidden_act,
        heads=vision.num_attention_heads,
    )


def _dual_encoder(config: Any, tensors: Mapping[str, Tensor], given: str) -> Origin:
    vision, text = config.vision_config, config.text_config
    tensors = _same_names(tensors)
    fields: dict[str, Sequence[Any]] = {
        "model.embed_dim": (config.projection_dim,),
        "model.image.projection": ("linear",),
        "model.text.projection": ("linear",),
        "model.projection_bias": (False,),
    }
    origin = Origin({}, "", fields=fields, inputs={"data.max_tokens": getattr(text, "max_position_embeddings", 0)})
    if vision.model_type == "timm_wrapper":
        origin.tensors, origin.left = inward(tensors, DUAL_ENCODER)
        fields["model.image.name"] = names_of_timm(vision.architecture)
    elif vision.model_type == "clip_vision_model":
        named, origin.left = inward(tensors, CLIP)
        origin.tensors = _with_timm_names(named)
        fields["model.image.name"] = _timm("clip", vision)
        origin.activation, origin.heads = vision.hidden_act, vision.num_attention_heads
        origin.inputs["data.image_size"] = vision.image_size
    else:
        raise ValueError(
            f"{given}: its image tower is of type {vision.model_type}, which pools through tanh; "
            "those of type timm_wrapper and clip_vision_model can be had"
        )
    if text.model_type == "clip_text_model":
        fields["model.text.pooling"] = ("last",)
    else:
        fields["model.text.pooling"] = ("cls" if _is_flat(origin) else "pooler",)
    return origin


def _is_flat(origin: Origin) -> bool:
    """Whether the pooler lets the first token's vector through (an export of Duet's); then it is taken out."""
    matrix, bias = (origin.tensors.get(f"{TEXT}pooler.dense.{kind}") for kind in ("weight", "bias"))
    if matrix is None or bias is None or bias.any() or not torch.equal(matrix, torch.eye(len(matrix)) * FLAT):
        return False
    for kind in ("weight", "bias"):
        del origin.tensors[f"{TEXT}pooler.dense.{kind}"]
    origin.tensors["text_projection.weight"] = origin.tensors["text_projection.weight"] * FLAT
    return True


def _same_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as transformers has them now: halves within a pair had one more part before. Without tables of numbers."""
    named = {}
    for name, tensor in tensors.items():
        for half in ("vision_model.", "text_model."):
            name = name.replace(half * 2, half)
        if not name.endswith("position_ids"):
            named[name] = tensor
    return named


def _with_timm_names(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    image = to_timm({name.removeprefix(IMAGE): tensor for name, tensor in named.items() if name.startswith(IMAGE)})
    others = {name: tensor for name, tensor in named.items() if not name.startswith(IMAGE)}
    return others | {f"{IMAGE}{name}": tensor for name, tensor in image.items()}


def _timm(kind: str, vision: Any) -> Sequence[str]:
    shape = (vision.hidden_size, vision.num_hidden_layers, vision.patch_size)
    return timm_models(kind, *shape, size=vision.image_size, activation=vision.hidden_act)


def _inputs(directory: Path, given: str) -> dict[str, Any]:
    path = directory / "preprocessor_config.json"
    if not path.is_file():
        return {}
    pixels = read_json(path, given)
    inputs: dict[str, Any] = {}
    if "image_mean" in pixels and "image_std" in pixels:
        inputs["data.normalize"] = [pixels["image_mean"], pixels["image_std"]]
    crop = pixels.get("crop_size")
    if size := crop.get("height") if isinstance(crop, dict) else crop:
        inputs["data.image_size"] = size
    return inputs
