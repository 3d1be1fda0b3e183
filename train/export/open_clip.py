"""Target `open_clip`: a directory for `open_clip.create_model_and_transforms("local-dir:OUT")`, without a network.

    open_clip_config.json          both towers, and the preprocessing of images
    open_clip_model.safetensors    weights, by open_clip's names
    text/config.json               the text encoder's architecture
    tokenizer.json ...             the tokenizer, for open_clip.get_tokenizer("local-dir:OUT")

open_clip finds the text encoder by a full path: after moving OUT, change `hf_model_name` in open_clip_config.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from train.export.apart import embed_apart
from train.export.files import write_tokenizer
from train.export.pairs import ROUGH_TIE, Features
from train.export.recipe import has_bias, refuse, stock_problems, stock_tensors
from train.export.source import Source
from train.export.target import Target
from train.model.names import OPEN_CLIP, outward, timm_name
from train.model.text_files import TEXT

CONFIG = "open_clip_config.json"
POOLERS = {"cls": "cls_last_hidden_state_pooler", "mean": "mean_pooler", "pooler": "cls_pooler"}
ENCODERS = ("bert", "roberta", "xlm-roberta")
EMBED = """
import open_clip
from PIL import Image

name = f"local-dir:{directory}"
model, _, preprocess = open_clip.create_model_and_transforms(name)
model.eval()
tokenizer = open_clip.get_tokenizer(name)


def images(paths):
    return model.encode_image(torch.stack([preprocess(Image.open(path)) for path in paths]))


def texts(captions):
    return model.encode_text(tokenizer(captions))
"""


class OpenClipTarget(Target):
    """See the module. python: an interpreter that has open_clip; default: this one."""

    def check(self, source: Source) -> None:
        refuse("open_clip", stock_problems(source))
        if (share := source.config.data.eval_crop) != 1:
            # It resizes the shorter side to the image size, and takes the middle.
            raise ValueError(
                f"data.eval_crop {share} cannot be expressed by the target open_clip: give `crop` 1 to export it "
                "with all of the middle to look at; the target torch takes any model"
            )
        encoder = source.model.text.encoder.config
        refuse(
            "open_clip",
            {
                f"model.projection_bias true, with an embedding longer than the {source.model.text.width} features of "
                "the text tower,": has_bias(source, "text") and source.model.text.width < source.config.model.embed_dim,
                f"model.text.name of type {encoder.model_type}": encoder.model_type not in ENCODERS,
                f"model.text.pooling {source.config.model.text.pooling}": source.model.text.pooling not in POOLERS,
                # It takes this token for padding, wherever it is.
                f"model.text.tokenizer with padding token {source.tokenizer.pad_id}, the encoder's being "
                f"{encoder.pad_token_id},": encoder.pad_token_id != source.tokenizer.pad_id,
            },
        )

    def write(self, source: Source, directory: Path) -> None:
        (directory / TEXT).mkdir()
        (directory / TEXT / "config.json").write_bytes(source.model.text.config_file())
        write_tokenizer(source, directory)
        (directory / CONFIG).write_text(json.dumps(config(source, directory / TEXT), indent=2) + "\n")
        tensors = outward(without_text_bias(stock_tensors(source), source), OPEN_CLIP)
        tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        save_file(tensors, directory / "open_clip_model.safetensors")

    def embed(self, source: Source, directory: Path, images: list[Path], captions: list[str]) -> dict[str, Features]:
        found = embed_apart(EMBED, self.python or sys.executable, directory, images, captions)
        return {"open_clip": found._replace(tie=ROUGH_TIE, other_pixels=True)}

    def settle(self, directory: Path, final: Path) -> None:
        content = json.loads((directory / CONFIG).read_text())
        content["model_cfg"]["text_cfg"]["hf_model_name"] = str(final.resolve() / TEXT)
        (directory / CONFIG).write_text(json.dumps(content, indent=2) + "\n")


def without_text_bias(tensors: dict[str, Tensor], source: Source) -> dict[str, Tensor]:
    """The pair's tensors with the bias of the text projection, which open_clip has none of, in the encoder's last norm.

    What follows that norm is the pooling, which leaves a constant alone, and the projection W: for a constant c with
    W c = b, adding c before W is adding b after it.
    """
    if (bias_D := tensors.pop("text_projection.bias", None)) is None:
        return tensors
    weight_DW, blocks = tensors["text_projection.weight"].double(), source.model.text.blocks
    constant_W = torch.linalg.lstsq(weight_DW, bias_D.double().unsqueeze(1)).solution[:, 0]
    name = f"text.{blocks[-1]}.output.LayerNorm.bias"
    return tensors | {name: (tensors[name].double() + constant_W).float()}


def config(source: Source, text: Path) -> dict[str, Any]:
    """open_clip's configuration; `text` is where the text encoder's config.json is."""
    run, model = source.config, source.model
    vision_cfg = {
        "timm_model_name": timm_name(run.model.image.name),
        "timm_model_pretrained": False,
        "timm_pool": "",  # its own
        "timm_proj": "mlp" if run.model.image.projection == "mlp" else "linear",
        "timm_proj_bias": has_bias(source, "image"),
        "image_size": source.image_size,
    }
    text_cfg = {
        "hf_model_name": str(text.resolve()),
        "hf_model_pretrained": False,
        "hf_tokenizer_name": "local",  # from this directory, whatever it says
        "hf_pooler_type": POOLERS[run.model.text.pooling],
        "hf_proj_type": "linear",
        "context_length": run.data.max_tokens,
    }
    content: dict[str, Any] = {"embed_dim": run.model.embed_dim, "vision_cfg": vision_cfg, "text_cfg": text_cfg}
    if model.logit_bias is not None:
        content["init_logit_bias"] = 0.0  # that there is one
    pixels = {
        "size": source.image_size,
        "mean": source.state.mean,
        "std": source.state.std,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    return {"model_cfg": content, "preprocess_cfg": pixels}
