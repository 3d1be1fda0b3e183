"""The two encoders: any torchvision classification backbone, any encoder of the BERT family.

Shapes: B samples, C channels, H height, W width of an image; L tokens of a caption; D features.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torchvision
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.regnet import AnyStage
from torchvision.models.vision_transformer import Encoder, interpolate_embeddings

from train.config import ImageTowerConfig, TextTowerConfig
from train.model.pretrained import BUILT_IN_BERT, from_hub, read_image_weights

HEADS = ("fc", "classifier", "head", "heads")
CONTAINERS = (nn.Sequential, nn.ModuleList, AnyStage, Encoder)


class ImageTower(nn.Module):
    """A torchvision classification backbone without its last linear layer.

    Args:
        config: name, weights, checkpointing.
        image_size: height and width of the images, in pixels.
        pretrained: False gives fresh weights whatever the config says, for weights that are loaded afterwards.

    Attributes:
        width: length D of the features.
        blocks: names of the repeated blocks, bottom to top.
        stages: names of the groups of blocks, bottom to top.

    Raises:
        ValueError: the name or the weights are unknown, do not fit, or cannot be had.
    """

    def __init__(self, config: ImageTowerConfig, image_size: int, pretrained: bool = True) -> None:
        super().__init__()
        self.backbone = _build_backbone(config.name, image_size)
        self.width, head = _remove_head(self.backbone, config.name)
        if pretrained and config.weights != "scratch":
            _load_image_weights(self.backbone, config, head, image_size)
        self.blocks = [f"backbone.{name}" for name in _blocks(self.backbone)]
        self.stages = _stages(self.backbone, [name.removeprefix("backbone.") for name in self.blocks])
        if config.checkpointing:
            if not self.blocks:
                raise ValueError(
                    f"--model.image.checkpointing: {config.name} has no blocks to recompute; set it to false"
                )
            _recompute_blocks(self, self.blocks)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Normalized images, float [B, 3, H, W] -> features [B, D]."""
        return self.backbone(images_BCHW)

    def layers(self) -> list[list[str]]:
        """Names of all parameters, grouped by layer (stem, then one per block), bottom to top."""
        return _layers(self, self.blocks)


class TextTower(nn.Module):
    """A BERT-family encoder without pooler, and the pooling of its last hidden states.

    Args:
        config: name, weights, pooling, checkpointing.
        pretrained: False gives fresh weights whatever the config says, for weights that are loaded afterwards.

    Attributes:
        width: length D of the features.
        blocks: names of the transformer layers, bottom to top.
        max_tokens: longest caption that there are positions for, in tokens.
        vocab_size: number of token ids.

    Raises:
        ValueError: the encoder is unknown, is of another family, does not fit its weights, or cannot be had.
    """

    def __init__(self, config: TextTowerConfig, pretrained: bool = True) -> None:
        super().__init__()
        self.encoder = _build_encoder(config.name, pretrained and config.weights == "pretrained")
        self.pooling = config.pooling
        self.width: int = self.encoder.config.hidden_size
        self.vocab_size: int = self.encoder.config.vocab_size
        self.max_tokens = _positions(self.encoder)
        self.blocks = [f"encoder.{name}" for name in _transformer_layers(self.encoder)]
        if not self.blocks:
            raise ValueError(f"--model.text.name {config.name}: no transformer layers found; use a BERT-family encoder")
        if config.checkpointing:
            _recompute_blocks(self, self.blocks)

    def forward(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Token ids and mask (1: token, 0: padding), int64 [B, L] -> features [B, D]."""
        return self.pool(self.hidden_states(ids_BL, mask_BL), mask_BL)

    def hidden_states(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Token ids and mask, int64 [B, L] -> the last layer's [B, L, D]."""
        return self.encoder(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state

    def pool(self, hidden_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """Hidden states [B, L, D] -> [B, D]: the first token's, or the mean over tokens that are not padding."""
        if self.pooling == "cls":
            return hidden_BLD[:, 0]
        weights_BL1 = mask_BL.unsqueeze(-1).float()
        return (hidden_BLD.float() * weights_BL1).sum(1) / weights_BL1.sum(1)

    def layers(self) -> list[list[str]]:
        """Names of all parameters, grouped by layer (embeddings, then one per transformer layer), bottom to top."""
        return _layers(self, self.blocks)


# ------------------------------------------------------------------------------------------------------------- image


def image_tower_names() -> list[str]:
    """The torchvision classification models."""
    return torchvision.models.list_models(module=torchvision.models)


def _build_backbone(name: str, image_size: int) -> nn.Module:
    known = image_tower_names()
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, n=5, cutoff=0.4) or known
        raise ValueError(f"--model.image.name {name} is not a torchvision model; the nearest are {', '.join(near)}")
    options: dict = {}
    if name.startswith("vit_"):
        patch = _patch_size(name)
        if image_size % patch:
            raise ValueError(f"--data.image_size {image_size} is not a multiple of {patch}, the patch size of {name}")
        options["image_size"] = image_size
    elif name.startswith("maxvit"):
        options["input_size"] = (image_size, image_size)
    elif name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True}
    try:
        return torchvision.models.get_model(name, weights=None, **options)
    except ValueError as error:
        raise ValueError(f"--data.image_size {image_size} does not fit --model.image.name {name}: {error}") from error


def _patch_size(vit: str) -> int:
    return int(vit.rpartition("_")[2])


def _remove_head(backbone: nn.Module, name: str) -> tuple[int, str]:
    """Replaces the last linear layer by the identity; returns its input width and its name."""
    for attribute in HEADS:
        head = getattr(backbone, attribute, None)
        if isinstance(head, nn.Linear):
            setattr(backbone, attribute, nn.Identity())
            return head.in_features, attribute
        if isinstance(head, nn.Sequential):
            last, linear = list(head.named_children())[-1]
            if isinstance(linear, nn.Linear):
                setattr(head, last, nn.Identity())
                return linear.in_features, f"{attribute}.{last}"
    raise ValueError(f"--model.image.name {name} does not end in a linear layer; use another, such as resnet50")


def _load_image_weights(backbone: nn.Module, config: ImageTowerConfig, head: str, image_size: int) -> None:
    flag = f"--model.image.weights {config.weights}"
    state = read_image_weights(config.name, config.weights)
    state = {name: value for name, value in state.items() if not name.startswith((f"{head}.", "AuxLogits.", "aux"))}
    if config.name.startswith("vit_"):
        # Position embeddings of another image size are interpolated (arXiv 2010.11929, section 3.2).
        try:
            state = interpolate_embeddings(image_size, _patch_size(config.name), state)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{flag} are not weights of {config.name}: {error!r}") from error
    own = backbone.state_dict()
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    wrong = [name for name in own if name in state and own[name].shape != state[name].shape]
    extra = [name for name in state if name not in own]
    if missing or wrong or extra:
        parts = {"missing": missing, "of another shape": wrong, "not in the model": extra}
        counts = "; ".join(f"{len(names)} {what} ({names[0]} ...)" for what, names in parts.items() if names)
        raise ValueError(f"{flag} are not weights of {config.name}: {counts}")
    backbone.load_state_dict(state, strict=False)


# -------------------------------------------------------------------------------------------------------------- text


def _build_encoder(name: str, pretrained: bool) -> transformers.PreTrainedModel:
    if name in BUILT_IN_BERT and not pretrained:
        config = transformers.BertConfig()  # is that architecture, so no hub is asked
    else:
        config = from_hub(transformers.AutoConfig.from_pretrained, name)
    # The family is told by its objective: encoders that see the whole caption are trained on masked words.
    family = not config.is_encoder_decoder and type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    if not family or type(config) not in transformers.MODEL_MAPPING or not hasattr(config, "hidden_size"):
        raise ValueError(f"--model.text.name {name} is of type {config.model_type}: use an encoder of the BERT family")
    encoder_class: Any = transformers.MODEL_MAPPING[type(config)]
    options: dict = {}
    if "add_pooling_layer" in inspect.signature(encoder_class.__init__).parameters:
        options["add_pooling_layer"] = False  # parameters that no gradient reaches would stop DDP
    if encoder_class._supports_sdpa:
        options["attn_implementation"] = "sdpa"
    if not pretrained:
        return transformers.AutoModel.from_config(config, dtype=torch.float32, **options)
    load = partial(encoder_class.from_pretrained, dtype=torch.float32, output_loading_info=True, **options)
    encoder, info = from_hub(load, name)
    # transformers only warns, and leaves fresh weights where the file has none or others.
    problems = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in info[kind])
    if problems:
        raise ValueError(
            f"--model.text.name {name}: its weights file lacks {len(problems)} tensors of {encoder_class.__name__} "
            f"({problems[0]} ...); use matching files, or --model.text.weights scratch"
        )
    return encoder


def _transformer_layers(encoder: nn.Module) -> list[str]:
    """Names of the transformer layers: the items of the longest list of modules."""
    lists = [(name, module) for name, module in encoder.named_modules() if isinstance(module, nn.ModuleList)]
    name, layers = max(lists, key=lambda item: len(item[1]), default=("", []))
    return [f"{name}.{i}" for i in range(len(layers))]


def _positions(encoder: transformers.PreTrainedModel) -> int:
    """The longest input. RoBERTa and its kin count positions from the padding id + 1 on."""
    positions = encoder.config.max_position_embeddings
    embeddings = getattr(getattr(encoder, "embeddings", None), "position_embeddings", None)
    padding = getattr(embeddings, "padding_idx", None)
    return positions if padding is None else positions - padding - 1


# ------------------------------------------------------------------------------------------------------------ layers


def _blocks(module: nn.Module, prefix: str = "") -> list[str]:
    """Names of the repeated blocks, bottom to top: what a container holds that itself is made of several modules."""
    names = []
    for name, child in module.named_children():
        if type(child) in CONTAINERS:
            names += _blocks(child, f"{prefix}{name}.")
        elif any(True for _ in child.children()):
            names.append(f"{prefix}{name}")
    return names


def _stages(module: nn.Module, blocks: list[str]) -> list[str]:
    """Names of the innermost sequences of blocks, such as a ResNet's layer1 to layer4."""
    parents = list(dict.fromkeys(name.rpartition(".")[0] for name in blocks))
    innermost = [name for name in parents if not any(other.startswith(f"{name}.") for other in parents)]
    return [name for name in innermost if isinstance(module.get_submodule(name), nn.Sequential)]


def _layers(module: nn.Module, blocks: list[str]) -> list[list[str]]:
    """Parameter names in order, where every block opens a new layer; what follows a block belongs to its layer."""
    layers: list[list[str]] = [[]]
    current = None
    for name, _ in module.named_parameters():
        block = next((block for block in blocks if name.startswith(f"{block}.")), None)
        if block is not None and block != current:
            layers.append([])
            current = block
        layers[-1].append(name)
    return [layer for layer in layers if layer]


def _recompute_blocks(module: nn.Module, blocks: list[str]) -> None:
    """Lets these blocks keep only their inputs for the backward pass (arXiv 1604.06174)."""
    for name in blocks:
        block = module.get_submodule(name)
        block.forward = partial(_recompute, block.forward)


def _recompute(forward: Callable, *inputs, **options):
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    return checkpoint(forward, *inputs, use_reentrant=False, **options)
