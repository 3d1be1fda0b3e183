"""Target `hf`: a directory for transformers' AutoModel and AutoProcessor, by stock classes alone.

    config.json, model.safetensors    a VisionTextDualEncoderModel: timm's image tower (needs timm), a BERT-like encoder
    tokenizer.json ..., preprocessor_config.json    for AutoProcessor
    README.md                         a model card: what the run says of itself, and nothing that was not measured

transformers pools a text by tanh(W x); train/model/names.py says how x itself comes through.
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
from train.export.files import write_tokenizer
from train.export.pairs import ROUGH_TIE, Features
from train.export.recipe import check_recipe, has_bias, refuse, stock_tensors
from train.export.source import Source
from train.export.target import Target
from train.model.names import DUAL_ENCODER, FLAT, outward, timm_name

EMBED = """
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained(directory).eval()
processor = AutoProcessor.from_pretrained(directory)


def images(paths):
    pixels = processor(images=[Image.open(path) for path in paths], return_tensors="pt")
    return model.get_image_features(**pixels).pooler_output


def texts(captions):
    tokens = processor(text=captions, padding=True, truncation=True, return_tensors="pt")
    return model.get_text_features(**tokens).pooler_output
"""


class HfTarget(Target):
    """See the module."""

    def check(self, source: Source) -> None:
        check_recipe("hf", source)
        run = source.config
        refuse(
            "hf",
            {
                "model.image.projection mlp": run.model.image.projection == "mlp",
                "model.projection_bias true": has_bias(source, "image", "text"),
                f"model.text.pooling {run.model.text.pooling}": run.model.text.pooling not in ("cls", "pooler"),
                "loss.kind sigmoid, whose bias": run.loss.kind == "sigmoid",
            },
        )

    def write(self, source: Source, directory: Path) -> None:
        run, model = source.config, source.model
        text = AutoConfig.for_model(**json.loads(model.text.config_file()))
        # Extra fields are kept; the pair's projection asks for this one.
        width: dict[str, Any] = {"hidden_size": model.image.width}
        vision = TimmWrapperConfig(architecture=timm_name(run.model.image.name), **width)
        config = VisionTextDualEncoderConfig.from_vision_text_configs(
            vision, text, projection_dim=run.model.embed_dim, logit_scale_init_value=0.0
        )
        made = VisionTextDualEncoderModel(config)
        names = made.state_dict()
        if "text_model.pooler.dense.weight" not in names:
            raise ValueError(
                f"model.text.name of type {text.model_type} cannot be expressed by the target hf: no pooler"
            )
        tensors = outward(stock_tensors(source), DUAL_ENCODER)
        if run.model.text.pooling == "cls":
            tensors["text_model.pooler.dense.weight"] = torch.eye(model.text.width) * FLAT
            tensors["text_model.pooler.dense.bias"] = torch.zeros(model.text.width)
            tensors["text_projection.weight"] = tensors["text_projection.weight"] / FLAT
        made.load_state_dict(tensors)
        made.save_pretrained(directory)
        write_tokenizer(source, directory)
        path = directory / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": run.data.max_tokens}, indent=2))
        self._write_pixels(source, directory)
        (directory / "README.md").write_text(model_card(source))

    def _write_pixels(self, source: Source, directory: Path) -> None:
        size = source.image_size
        CLIPImageProcessor(
            size={"shortest_edge": round(size / source.config.data.eval_crop)},
            crop_size={"height": size, "width": size},
            image_mean=source.state.mean,
            image_std=source.state.std,
        ).save_pretrained(directory)

    def embed(self, source: Source, directory: Path, images: list[Path], captions: list[str]) -> dict[str, Features]:
        found = embed_apart(EMBED, sys.executable, directory, images, captions)
        return {"transformers": found._replace(tie=ROUGH_TIE, other_pixels=True)}
