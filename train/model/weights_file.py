"""Reading a file of weights, whoever saved it: tensors by name, and nothing else that may be in it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

WRAPPERS = ("state_dict", "model")
"""Where training programs keep the tensors in what they save."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of one that torch has saved, by name; without DDP's `module.`.

    Of such a file only tensors and plain values are unpickled, never code.

    Raises:
        ValueError: there is no such file, or it is damaged or holds something else; beginning with what it is.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # each format has its own kinds of damage
        raise ValueError(f"{path} cannot be read as a state dict: {error}") from error
    for wrapper in WRAPPERS:
        content = content.get(wrapper, content) if isinstance(content, dict) else content
    named = content if isinstance(content, dict) else {}
    tensors = {name.removeprefix("module."): value for name, value in named.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{path} is not a state dict: expected tensors by parameter name")
    return tensors
