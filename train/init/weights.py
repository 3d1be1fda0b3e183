"""The files of a model that another library has saved: where they are, and the tensors in them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from data_pipeline.storage.files import sha256_of
from train.model.weights_file import read_weights


def read_json(path: Path, given: str) -> dict[str, Any]:
    """A JSON object. Raises ValueError naming `given` where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{given}: {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{given}: {path} is not what it should be")
    return content


def read_tensors(directory: Path, names: Sequence[str], given: str) -> tuple[dict[str, Tensor], str]:
    """The tensors of the first file that there is, and its sha256; also of several that `<name>.index.json` lists.

    Raises:
        ValueError: there is none of them, or it is damaged.
    """
    for name in names:
        index = directory / f"{name}.index.json"
        if index.is_file():
            parts = [directory / part for part in sorted(set(read_json(index, given)["weight_map"].values()))]
        elif (directory / name).is_file():
            parts = [directory / name]
        else:
            continue
        tensors: dict[str, Tensor] = {}
        try:
            for part in parts:
                tensors |= read_weights(part)
            digests = [sha256_of(part) for part in parts]
        except (OSError, ValueError) as error:
            raise ValueError(f"{given}: {error}") from error
        return tensors, digests[0] if len(parts) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    raise ValueError(f"{given}: {directory} holds none of {', '.join(names)}")
