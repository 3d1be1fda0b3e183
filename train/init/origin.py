"""What `init` names: the tensors of a pair, the fields of a config that fit them, and what they were trained with."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from data_pipeline.tokenizer import Tokenizer
from train import cli
from train.config import RunConfig
from train.init import SOURCES
from train.model.text import architecture
from train.model.text_files import tokenizer_name

NEUTRAL = ("dropout", "initializer", "cache", "label", "token_id", "projection", "position_embeddings", "chunk_size")
"""Parts of names in an encoder's config that do not change what its weights mean, or are compared elsewhere."""


@dataclass
class Origin:
    """A pair as it was trained elsewhere, by the names of a pair here."""

    tensors: dict[str, Tensor]
    sha256: str
    """Of the file of its weights."""
    left: list[str] = field(default_factory=list)
    """Its tensors that have no place in a pair, by its own names."""
    fields: dict[str, Sequence[Any]] = field(default_factory=dict)
    """Field of a config -> the values that fit; the first is what to set. Of the text tower it is compared what they
    name."""
    inputs: dict[str, Any] = field(default_factory=dict)
    """Field of `data` -> the value that it was trained with, which a run may have otherwise."""
    activation: str = ""
    """Of the image tower, in transformers' words; empty where its name says it."""
    heads: int = 0
    """Of the image tower's attention, likewise."""


def open_origin(config: RunConfig) -> Origin:
    """What `init` names, for a config that fits it.

    Raises:
        ValueError: there is no such source, it cannot be read, or fields have to be set otherwise: all of them at once.
    """
    kind, _, name = config.init.partition(":")
    if kind not in SOURCES or not name:
        raise ValueError(f"init {config.init}: give {', '.join(f'{known}:MODEL' for known in SOURCES)}")
    module, _, function = SOURCES[kind].rpartition(".")
    origin: Origin = getattr(import_module(module), function)(os.path.expanduser(name))  # noqa: PTH111
    if lines := misfits(config, origin):
        given = "\n  ".join(lines)
        raise ValueError(f"init {config.init}: this model is not of that shape. Set\n  {given}")
    return origin


def misfits(config: RunConfig, origin: Origin) -> list[str]:
    """`field value    (what it is now)` for every field that does not fit."""
    now, lines = cli.flatten(config), []
    for name, values in origin.fields.items():
        if name == "model.text.name":
            problem = _another_encoder(config, str(values[0]))
        elif name == "model.text.tokenizer":
            problem = _another_tokenizer(config, str(values[0]))
        elif name == "model.image.name" and "." in now[name]:  # a class of the user's own: its tensors tell
            problem = ""
        else:
            own = str(now[name]).removeprefix("torchvision/") if name == "model.image.name" else now[name]
            problem = "" if own in values else f"is {now[name]}"
        if problem:
            lines.append(f"{name} {_plain(values[0])}    (now it {problem})")
    return lines


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _another_encoder(config: RunConfig, name: str) -> str:
    """How the config's text encoder differs from the one of that name; empty where it does not."""
    if config.model.text.name == name:
        return ""
    wanted, own = architecture(name, pretrained=False), architecture(config.model.text.name, pretrained=False)
    other = [key for key in wanted if wanted[key] != own.get(key) and not any(part in key for part in NEUTRAL)]
    return f"is {config.model.text.name}, of another {', '.join(other[:3])}" if other else ""


def _another_tokenizer(config: RunConfig, name: str) -> str:
    own = tokenizer_name(config)
    if own == name:
        return ""
    try:
        same = Tokenizer(own, config.data.max_tokens).identity() == Tokenizer(name, config.data.max_tokens).identity()
    except ValueError as error:
        return f"is {own}: {error}"
    return "" if same else f"is {own}, with another vocabulary or other rules"


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory holds the files of a tokenizer."""
    return any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "spiece.model"))
