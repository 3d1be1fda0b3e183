"""Pretrained weights: local files, torchvision's, the Hugging Face hub's; each failure in seconds and with a remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import logging

from data_pipeline.tokenizer import ask_hub

BUILT_IN_BERT = ("bert-base-uncased", "google-bert/bert-base-uncased")
TEXT_REMEDY = (
    "give a directory with its config.json and model.safetensors; --model.text.weights scratch needs the config.json "
    "alone, and no file at all for bert-base-uncased"
)


def read_image_weights(name: str, weights: str) -> dict[str, Tensor]:
    """The state dict of a local .safetensors or .pth file, or of torchvision's weights of that name.

    Args:
        name: torchvision model.
        weights: `model.image.weights`.

    Raises:
        ValueError: there is no such file or name, it holds something else, or it cannot be fetched.
    """
    flag = f"--model.image.weights {weights}"
    path = Path(weights)
    if path.suffix in (".safetensors", ".pth", ".pt"):
        if not path.is_file():
            raise ValueError(f"{flag}: no such file")
        try:
            state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        except Exception as error:  # each format has its own kinds of damage
            raise ValueError(f"{flag} cannot be read as a state dict: {error}") from error
        for wrapper in ("state_dict", "model"):
            state = state.get(wrapper, state) if isinstance(state, dict) else state
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError(f"{flag} is not a state dict: expected tensors by parameter name")
        return state
    members = torchvision.models.get_model_weights(name).__members__
    if weights not in members:
        known = ", ".join(["scratch", *members])
        raise ValueError(f"{flag}: {name} has {known}; or give a local .safetensors or .pth file")
    try:
        return members[weights].get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        remedy = "give a local .safetensors or .pth file, or scratch"
        raise ValueError(f"{flag} cannot be fetched from {members[weights].url} ({error}): {remedy}") from error


def from_hub(load: Callable[..., Any], name: str) -> Any:
    """What `load` makes of a directory or of files in the local cache; only then is the hub asked, and only once.

    Args:
        load: a `from_pretrained` of transformers.
        name: `model.text.name`.

    Raises:
        ValueError: the directory does not hold what is loaded, or the hub does not have it or cannot be reached.
    """
    with _quiet():
        try:
            return load(name, local_files_only=True)
        except Exception as error:  # each file format has its own kinds of damage
            if Path(name).is_dir():
                raise ValueError(f"--model.text.name {name}: cannot be loaded from this directory: {error}") from error
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise ValueError(f"--model.text.name {name}: no such directory; {TEXT_REMEDY}")
        try:
            ask_hub(name)
            return load(name)
        except Exception as error:  # the hub's client has many kinds of failure, which differ between its versions
            problem = f"--model.text.name {name} cannot be had from the Hugging Face hub ({error})"
            raise ValueError(f"{problem}; {TEXT_REMEDY}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own bars and warnings, on every rank, about tensors that are left out on purpose."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
