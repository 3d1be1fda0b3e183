"""`init: duet:RUN`: the newest model of a run, one of its checkpoints, or an export of one to open_clip or hf."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train import checkpoint, cli
from train.init import hf, open_clip
from train.init.origin import Origin
from train.init.weights import read_json
from train.model.names import TORCHVISION_IN_TIMM, names_of_timm
from train.model.text_files import TEXT, TOKENIZER, tokenizer_name, with_own_text
from train.run.directory import CONFIG


def read(name: str) -> Origin:
    """See the module; of a run with `optim.ema` the moving averages.

    Raises:
        ValueError: there is no such run, no whole checkpoint of it, or the export is of another kind.
    """
    directory = Path(name)
    if (directory / open_clip.CONFIG).is_file():
        return open_clip.read(name)
    if (directory / "config.json").is_file():
        if "model_type" not in read_json(directory / "config.json", f"init duet:{name}"):
            raise ValueError(f"init duet:{name}: programs have no tensors by name; give the run, or an export to hf")
        return hf.read(name)
    try:
        path = checkpoint.find(name)
    except ValueError as error:
        raise ValueError(f"init duet:{name}: {error}; give a run that has saved, or one of its checkpoints") from error
    if damage := checkpoint.verify(path):
        raise ValueError(f"init duet:{name}: the checkpoint {path} is damaged ({damage})")
    config, state = with_own_text(cli.load(path / CONFIG), path), checkpoint.load_state(path)
    part = "ema" if config.optim.ema > 0 else "model"
    tensors = checkpoint.load_part(path, part)
    model, text = config.model, config.model.text
    image, encoder, tokenizer = model.image.name, text.name, tokenizer_name(config)
    if (path / TEXT).is_dir():
        encoder, tokenizer = str(path / TEXT), str(path / TOKENIZER)
    fields: dict[str, Sequence[Any]] = {
        "model.image.name": names_of_timm(image) if image in TORCHVISION_IN_TIMM else (image,),
        "model.text.name": (encoder,),
        "model.text.tokenizer": (tokenizer,),
        "model.text.pooling": (text.pooling,),
        "model.embed_dim": (model.embed_dim,),
        "model.image.projection": (model.image.projection,),
        "model.text.projection": (text.projection,),
        "model.projection_bias": (model.projection_bias,),
        "model.multiscale.fuse": (model.multiscale.enabled and model.multiscale.fuse,),
    }
    if model.image.norm == "group":
        fields["model.image.norm"] = ("group",)
    inputs = {
        "data.image_size": config.data.image_size,
        "data.max_tokens": config.data.max_tokens,
        "data.eval_crop": config.data.eval_crop,
        "data.normalize": [state.mean, state.std],
    }
    hashes = json.loads((path / checkpoint.HASHES).read_text())
    for buffer in ("mean", "std"):
        tensors.pop(buffer)
    return Origin(tensors, hashes[f"{part}.safetensors"], [], fields, inputs)
