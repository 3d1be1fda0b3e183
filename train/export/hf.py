"""Target `hf`: a directory for transformers' AutoModel and AutoProcessor, by stock classes where these fit.

    config.json, model.safetensors    a VisionTextDualEncoderModel: timm's image tower (needs timm), a BERT-like encoder
    tokenizer.json ..., preprocessor_config.json    for AutoProcessor
    README.md                         a model card: what the run says of itself, and nothing that was not measured

transformers pools a text by tanh(W x); train/model/names.py says how x itself comes through. A pair that this class
cannot express gets one of its own: see train/export/hf_own.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    CLIPImageProcessor,
    TimmWrapperConfig,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from train.export.apart import embed_apart
from train.export.card import model_card
from train.export.files import padding, write_tokenizer
from train.export.hf_own import check_own, write_own
from train.export.pairs import ROUGH_TIE, Features
from train.export.recipe import has_bias, stock_problems, stock_tensors
from train.export.source import Source
from train.export.target import Target
from train.model import backbone_timm
from train.model.names import DUAL_ENCODER, FLAT, outward, timm_name

EMBED = """
import os, tempfile

kept = tempfile.TemporaryDirectory()
os.environ["HF_MODULES_CACHE"] = kept.name  # of code: what is only checked leaves nothing
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained(directory, trust_remote_code=TRUST).eval()
processor = AutoProcessor.from_pretrained(directory, trust_remote_code=TRUST)


def images(paths):
    pixels = processor(images=[Image.open(path) for path in paths], return_tensors="pt")
    return model.get_image_features(**pixels).pooler_output


def texts(captions):
    tokens = processor(text=captions, padding=PADDING, truncation=True, return_tensors="pt")
    return model.get_text_features(**tokens).pooler_output
"""


class HfTarget(Target):
    """See the module."""

    def check(self, source: Source) -> None:
        if own_reason(source):
            check_own(source)

    def write(self, source: Source, directory: Path) -> None:
        reason = own_reason(source)
        if reason:
            write_own(source, directory)
        else:
            _write_stock(source, directory)
        write_tokenizer(source, directory)
        path = directory / "tokenizer_config.json"
        options = json.loads(path.read_text()) | {"model_max_length": source.config.data.max_tokens}
        options.pop("max_length", None)  # of sentence-transformers, which would win
        path.write_text(json.dumps(options, indent=2))
        (directory / "README.md").write_text(model_card(source, reason))

    def embed(self, source: Source, directory: Path, images: list[Path], captions: list[str]) -> dict[str, Features]:
        own = bool(own_reason(source))
        script = EMBED.replace("TRUST", str(own)).replace("PADDING", repr(padding(source)))
        found = embed_apart(script, sys.executable, directory, images, captions)
        return {"transformers": found if own else found._replace(tie=ROUGH_TIE, other_pixels=True)}

    def notes(self, source: Source) -> list[str]:
        reason = own_reason(source)
        return [f"transformers has no class for {reason}: load it with trust_remote_code=True"] if reason else []


def own_reason(source: Source) -> str:
    """The first field of the recipe that no class of transformers has, with its value; empty where there is none."""
    run, encoder = source.config, source.model.text.encoder
    fields = {
        **stock_problems(source),
        "model.image.projection mlp": run.model.image.projection == "mlp",
        "model.projection_bias true": has_bias(source, "image", "text"),
        f"model.text.pooling {run.model.text.pooling}": run.model.text.pooling not in ("cls", "pooler"),
        "loss.kind sigmoid": run.loss.kind == "sigmoid",
        f"model.text.name of type {encoder.config.model_type}": not hasattr(encoder, "pooler"),
    }
    return next((field for field, there in fields.items() if there), "")


def _write_stock(source: Source, directory: Path) -> None:
    run, model = source.config, source.model
    text = AutoConfig.for_model(**json.loads(model.text.config_file()))
    name = timm_name(run.model.image.name)
    # Extra fields are kept; the pair's projection asks for the width.
    more: dict[str, Any] = {"hidden_size": model.image.width}
    if options := backbone_timm.fixed_options(name, run.data.image_size):
        more["model_args"] = options
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        TimmWrapperConfig(architecture=name, **more),
        text,
        projection_dim=run.model.embed_dim,
        logit_scale_init_value=0.0,
    )
    made = VisionTextDualEncoderModel(config)
    tensors = outward(stock_tensors(source), DUAL_ENCODER)
    if run.model.text.pooling == "cls":
        tensors["text_model.pooler.dense.weight"] = torch.eye(model.text.width) * FLAT
        tensors["text_model.pooler.dense.bias"] = torch.zeros(model.text.width)
        tensors["text_projection.weight"] = tensors["text_projection.weight"] / FLAT
    made.load_state_dict(tensors)
    made.save_pretrained(directory)
    size = source.image_size
    CLIPImageProcessor(
        size={"shortest_edge": round(size / run.data.eval_crop)},
        crop_size={"height": size, "width": size},
        image_mean=source.state.mean,
        image_std=source.state.std,
    ).save_pretrained(directory)
