"""The towers and the pair that they make."""

from train.model.pair import PairModel, build_model

__all__ = ["PairModel", "build_model"]
