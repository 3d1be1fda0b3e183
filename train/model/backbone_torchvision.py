"""torchvision's classification models as image towers: `model.image.name: resnet50`."""

from __future__ import annotations

import difflib

import torchvision
from torch import Tensor, nn
from torchvision.models import SwinTransformer
from torchvision.models.vision_transformer import interpolate_embeddings

from train.config import ImageTowerConfig
from train.model.backbone import Backbone
from train.model.layers import find_blocks, find_stages, is_container
from train.model.pretrained import load_weights, read_state_dict, torchvision_weights

HEADS = ("fc", "classifier", "head", "heads")
FIELDS = {"dropout": "dropout", "drop_path": "stochastic_depth_prob"}


def build(name: str, config: ImageTowerConfig, image_size: int, pretrained: bool) -> Backbone:
    """The model of that name without its last linear layer.

    Args:
        config: weights, dropout, drop_path.
        image_size: height and width of the images, in pixels.
        pretrained: False gives fresh weights whatever the config says.

    Raises:
        ValueError: the name, the weights or an option are not the model's, or the image size does not fit it.
    """
    module = _model(name, config, image_size)
    width, head = _remove_head(module, name)
    if pretrained and config.weights != "scratch":
        _load(module, name, config.weights, head, image_size)
    blocks = find_blocks(module, is_container)
    stages = [stage for stage in find_stages(module, blocks) if isinstance(module.get_submodule(stage), nn.Sequential)]
    return Backbone(module, width, blocks, stages, channels_last=isinstance(module, SwinTransformer))


def names() -> list[str]:
    """The models that there are."""
    return torchvision.models.list_models(module=torchvision.models)


def _model(name: str, config: ImageTowerConfig, image_size: int) -> nn.Module:
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, n=5, cutoff=0.4) or known
        raise ValueError(
            f"model.image.name {name} is not a torchvision model; the nearest are {', '.join(near)}; "
            f"one of timm's is timm/{name}, one of your own the dotted path of its class"
        )
    if name.startswith("vit_") and image_size % (patch := _patch_size(name)):
        raise ValueError(f"data.image_size {image_size} is not a multiple of {patch}, the patch size of {name}")
    options = fixed_options(name, image_size) | {
        keyword: getattr(config, field) for field, keyword in FIELDS.items() if getattr(config, field) is not None
    }
    try:
        return torchvision.models.get_model(name, weights=None, **options)
    except TypeError as error:
        for field, keyword in FIELDS.items():
            if keyword in options and keyword in str(error):
                message = (
                    f"model.image.{field} {options[keyword]}: torchvision's {name} does not take it; leave it null"
                )
                raise ValueError(message) from error
        raise
    except ValueError as error:
        raise ValueError(f"data.image_size {image_size} does not fit model.image.name {name}: {error}") from error


def fixed_options(name: str, image_size: int) -> dict:
    """What torchvision's model of that name has to be told whatever the config says."""
    if name.startswith("vit_"):
        return {"image_size": image_size}
    if name.startswith("maxvit"):
        return {"input_size": (image_size, image_size)}
    return {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}


def _patch_size(vit: str) -> int:
    return int(vit.rpartition("_")[2])


def _remove_head(module: nn.Module, name: str) -> tuple[int, str]:
    """Replaces the last linear layer by the identity; returns its input width and its name."""
    for attribute in HEADS:
        head = getattr(module, attribute, None)
        if isinstance(head, nn.Linear):
            setattr(module, attribute, nn.Identity())
            return head.in_features, attribute
        if isinstance(head, nn.Sequential):
            last, linear = list(head.named_children())[-1]
            if isinstance(linear, nn.Linear):
                setattr(head, last, nn.Identity())
                return linear.in_features, f"{attribute}.{last}"
    raise ValueError(f"model.image.name {name} does not end in a linear layer; use another, such as resnet50")


def head_of(module: nn.Module) -> str:
    """The name of the linear layer that was removed from a model."""
    names = [name for name, part in module.named_modules() if name.split(".")[0] in HEADS and type(part) is nn.Identity]
    return names[-1]


def _load(module: nn.Module, name: str, weights: str, head: str, image_size: int) -> None:
    state = read_state_dict(weights) or torchvision_weights(name, weights)

    def by_name(state: dict[str, Tensor]) -> dict[str, Tensor]:
        left = (f"{head}.", "AuxLogits.", "aux")
        return adapted(name, image_size, {key: value for key, value in state.items() if not key.startswith(left)})

    load_weights(module, state, by_name, f"model.image.weights {weights}", name)


def adapted(name: str, image_size: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model of that name, with position embeddings of this image size."""
    if not name.startswith("vit_"):
        return state
    # Position embeddings of another image size are interpolated (arXiv 2010.11929, section 3.2).
    return interpolate_embeddings(image_size, _patch_size(name), state)
