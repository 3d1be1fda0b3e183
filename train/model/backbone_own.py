"""An image tower of the user's own: `model.image.name: my_package.MyTower`."""

from __future__ import annotations

import importlib
import inspect
from functools import partial

from torch import Tensor, nn

from train.config import ImageTowerConfig
from train.model.backbone import Backbone, describe
from train.model.backbone_timm import translated
from train.model.pretrained import load_weights, read_state_dict


def build(path: str, config: ImageTowerConfig, image_size: int, pretrained: bool) -> Backbone:
    """An instance of the class at a dotted path.

    The class derives from nn.Module; its instances make features [B, D] of normalized images, float [B, 3, H, W]. It is
    called with image_size, dropout and drop_path, where it has such arguments. It may have the attributes `blocks` and
    `stages`, names of modules inside it from bottom to top, and `channels_last`, whether these put out maps as
    [B, H, W, C]. Otherwise blocks are the items of its sequences, and stages are these sequences. The width D is found
    from a blank image.

    Args:
        config: weights (scratch or a file), dropout, drop_path.
        image_size: height and width of the images, in pixels.
        pretrained: False gives fresh weights whatever the config says.

    Raises:
        ValueError: there is no such class, it does not take an option, or the weights do not fit it.
    """
    cls = _class(path)
    takes = inspect.signature(cls).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
    options: dict = {"image_size": image_size} if "image_size" in takes else {}
    for field in ("dropout", "drop_path"):
        if (value := getattr(config, field)) is not None:
            if field not in takes and not anything:
                raise ValueError(f"model.image.{field} {value}: {path} has no such argument; leave it null")
            options[field] = value
    module = cls(**options)
    if pretrained and config.weights != "scratch":
        given = f"model.image.weights {config.weights}"
        if (state := read_state_dict(config.weights)) is None:
            raise ValueError(f"{given}: {path} has weights in files alone; give a .safetensors or .pth, or scratch")
        load_weights(module, state, partial(adapted, module), given, path)
    says = {name: getattr(module, name) for name in ("blocks", "stages") if _is_names(getattr(module, name, None))}
    return describe(module, image_size, path, channels_last=getattr(module, "channels_last", False) is True, **says)


def adapted(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the module's names; where its class is derived from one of timm's, by timm's own translation."""
    files = [base.__module__ for base in type(module).__mro__ if base.__module__.startswith("timm.models.")]
    if not files:
        return dict(state)
    own = module.state_dict()
    named = translated(files[0], module, state)
    return {name: tensor for name, tensor in named.items() if name in own or not name.startswith("head.")}


def _class(path: str) -> type[nn.Module]:
    package, _, name = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(package), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"model.image.name {path} cannot be imported ({error}): run where `python -c 'import {package}'` works"
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ValueError(f"model.image.name {path} is not a class derived from torch.nn.Module")
    return cls


def _is_names(value: object) -> bool:
    # A module with the name `blocks` is what the blocks are in, not their names.
    return isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
