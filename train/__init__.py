"""Contrastive pre-training as a library: `from train import build_model, contrastive_loss, loss_gradients, load_model`.

Names are imported when they are first used, so that `import train` costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "LossConfig": "train.config",
    "PairModel": "train.model.pair",
    "RunConfig": "train.config",
    "build_engine": "train.engine.build",
    "build_model": "train.model.pair",
    "class_features": "train.evaluation.zeroshot",
    "contrastive_loss": "train.loss",
    "load_model": "train.checkpoint",
    "loss_gradients": "train.loss",
    "retrieval_metrics": "train.evaluation.retrieval",
    "training_step": "train.step",
    "zeroshot_metrics": "train.evaluation.zeroshot",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
