"""Backward passes and optimizer steps, alike under one process, DDP and DeepSpeed ZeRO."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.engine.base import Engine
    from train.engine.build import build_engine

__all__ = ["Engine", "build_engine"]


def __getattr__(name: str) -> Any:
    """Without torch until they are used, since light modules of this package are imported on their own."""
    if name == "Engine":
        from train.engine.base import Engine

        return Engine
    if name == "build_engine":
        from train.engine.build import build_engine

        return build_engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
