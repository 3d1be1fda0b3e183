"""Shards in, batches out: the same batches on any number of processes, workers and restarts.

The names below are found when they are first used, so that importing the package loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.batch import EvalBatch, MicroBatch
    from data_pipeline.config import AugmentConfig, CaptionConfig, DataConfig, Source
    from data_pipeline.loader import eval_loader, stream_loader, train_loader
    from data_pipeline.order import Mixture, Order, build_order
    from data_pipeline.samples.colors import recolored
    from data_pipeline.samples.image import BadSample
    from data_pipeline.samples.transforms import eval_transform, train_transform
    from data_pipeline.stages.decode import Extras
    from data_pipeline.stages.slots import check_batch
    from data_pipeline.statistics import normalization
    from data_pipeline.storage.manifest import Manifest, load_manifest
    from data_pipeline.tokenizer import Tokenizer

_MODULES = {
    "batch": ("EvalBatch", "MicroBatch"),
    "config": ("AugmentConfig", "CaptionConfig", "DataConfig", "Source"),
    "loader": ("eval_loader", "stream_loader", "train_loader"),
    "order": ("Mixture", "Order", "build_order"),
    "samples.colors": ("recolored",),
    "samples.image": ("BadSample",),
    "samples.transforms": ("eval_transform", "train_transform"),
    "stages.decode": ("Extras",),
    "stages.slots": ("check_batch",),
    "statistics": ("normalization",),
    "storage.manifest": ("Manifest", "load_manifest"),
    "tokenizer": ("Tokenizer",),
}
_MODULE_OF = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}

__all__ = [
    "AugmentConfig",
    "BadSample",
    "CaptionConfig",
    "DataConfig",
    "EvalBatch",
    "Extras",
    "Manifest",
    "MicroBatch",
    "Mixture",
    "Order",
    "Source",
    "Tokenizer",
    "build_order",
    "check_batch",
    "eval_loader",
    "eval_transform",
    "load_manifest",
    "normalization",
    "recolored",
    "stream_loader",
    "train_loader",
    "train_transform",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
