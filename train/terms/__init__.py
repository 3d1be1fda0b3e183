"""Optional terms of the loss: one file, one dataclass of the config and one row of TERMS each."""

from __future__ import annotations

from typing import Any

from train.config import ModelConfig
from train.terms.base import Encoded, Term
from train.terms.levels import Levels
from train.terms.views import Views
from train.terms.words import Words

__all__ = ["TERMS", "Encoded", "Term", "check", "enabled", "extras"]

TERMS: dict[str, type[Term]] = {"levels": Levels, "views": Views, "words": Words}
"""In the order in which their heads are made, run and added to the loss."""


def enabled(config: ModelConfig) -> list[Term]:
    """The terms that the config asks for."""
    return [term for term in (kind(config) for kind in TERMS.values()) if term.enabled]


def check(config: ModelConfig) -> None:
    """Raises ValueError for the first term whose fields do not fit each other."""
    for kind in TERMS.values():
        kind(config).check()


def extras(config: ModelConfig) -> dict[str, Any]:
    """Fields of data_pipeline's Extras that the terms need."""
    return {name: value for term in enabled(config) for name, value in term.extras().items()}
