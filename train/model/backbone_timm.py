"""timm's models as image towers: `model.image.name: timm/vit_tiny_patch16_224`; timm is imported where one is used."""

from __future__ import annotations

import difflib
import importlib
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from train.config import ImageTowerConfig
from train.model.backbone import Backbone, describe
from train.model.pretrained import load_weights, read_state_dict, tags_of, timm_weights

FIELDS = {"dropout": "drop_rate", "drop_path": "drop_path_rate"}


def build(name: str, config: ImageTowerConfig, image_size: int, pretrained: bool) -> Backbone:
    """The model of that name with pooled features in place of its classifier.

    Args:
        name: without `timm/`.
        config: weights, dropout, drop_path.
        image_size: height and width of the images, in pixels; handed to models of a fixed size.
        pretrained: False gives fresh weights whatever the config says.

    Raises:
        ValueError: timm is not installed; the name, the weights or an option are not the model's; the image size does
            not fit it.
    """
    timm = _timm(name)
    _check_name(timm, name)
    options = {keyword: getattr(config, field) for field, keyword in FIELDS.items()}
    module = _model(timm, name, image_size, {key: value for key, value in options.items() if value is not None})
    if config.drop_path and not any(getattr(part, "drop_prob", 0) for part in module.modules()):
        raise ValueError(_not_taken("drop_path", config.drop_path, name))
    if pretrained and config.weights != "scratch":
        _load(timm, module, name, config.weights)
    return describe(module, image_size, f"timm/{name}", channels_last=getattr(module, "output_fmt", "NCHW") == "NHWC")


def _timm(name: str) -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise ValueError(f"model.image.name timm/{name} needs timm ({error}): pip install timm") from error


def _check_name(timm: Any, name: str) -> None:
    model, dot, tag = name.partition(".")
    if timm.is_model(name) and not dot:
        return
    if timm.is_model(model):
        raise ValueError(
            f"model.image.name timm/{name}: the weights have a field of their own; "
            f"set model.image.name to timm/{model} and model.image.weights to {tag}"
        )
    near = difflib.get_close_matches(model.lower(), timm.list_models(), n=5, cutoff=0.4) or ["resnet50"]
    nearest = ", ".join(f"timm/{other}" for other in near)
    tags = ", ".join(tags_of(timm, near[0])[:5]) or "none"
    raise ValueError(
        f"model.image.name timm/{name} is not a timm model; the nearest are {nearest} (weights of the first: {tags})"
    )


def _model(timm: Any, name: str, image_size: int, options: dict[str, float]) -> nn.Module:
    try:
        try:
            return timm.create_model(name, num_classes=0, img_size=image_size, **options)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            return timm.create_model(name, num_classes=0, **options)  # takes images of any size
    except TypeError as error:
        for field, keyword in FIELDS.items():
            if keyword in options and keyword in str(error):
                raise ValueError(_not_taken(field, options[keyword], name)) from error
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(f"data.image_size {image_size} does not fit model.image.name timm/{name}: {error}") from error


def fixed_options(name: str, image_size: int) -> dict[str, int]:
    """What timm's model of that name has to be told of the images: their size, where it takes no other."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            _timm(name).create_model(name, num_classes=0, img_size=image_size)
    except TypeError as error:
        if "img_size" in str(error):
            return {}
    except RuntimeError:  # its constructor looks at values
        pass
    return {"img_size": image_size}


def _not_taken(field: str, value: float, name: str) -> str:
    return f"model.image.{field} {value}: timm's {name} does not take it; leave it null"


def _load(timm: Any, module: nn.Module, name: str, weights: str) -> None:
    state = read_state_dict(weights) or timm_weights(timm, name, weights)
    by_name = partial(adapted, name, module)
    load_weights(module, state, by_name, f"model.image.weights {weights}", f"timm/{name}")


def adapted(name: str, module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model of that name by the module's names, without a classifier.

    By timm's own translation of older names and of open_clip's, and of position embeddings of another image size.
    """
    timm = _timm(name)
    head = set(_with_classifier(timm, name).state_dict()) - set(module.state_dict())
    state = translated(timm.models.model_entrypoint(name).__module__, module, state)
    return {key: value for key, value in state.items() if key not in head}


def translated(file: str, module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names of a model of one of timm's files, such as timm.models.vision_transformer."""
    source = vars(sys.modules[file])
    translate = source.get("checkpoint_filter_fn") or source.get("_filter_fn")
    return state if translate is None else translate(dict(state), module)


def _with_classifier(timm: Any, name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return timm.create_model(name, num_classes=10)
        except RuntimeError:  # its constructor looks at values
            return timm.create_model(name, num_classes=10)
