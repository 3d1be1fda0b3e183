"""The towers and the pair that they make."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.model.image import ImageTower
    from train.model.pair import PairModel, build_model
    from train.model.text import TextTower

ROOMS = {"ImageTower": "image", "TextTower": "text", "PairModel": "pair", "build_model": "pair"}

__all__ = ["ImageTower", "PairModel", "TextTower", "build_model"]


def __getattr__(name: str) -> Any:
    # When it is used: the pair imports the terms of the loss, which may not meet it half imported.
    if name not in ROOMS:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(f"{__name__}.{ROOMS[name]}"), name)
