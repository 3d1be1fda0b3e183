"""Where a program makes the host wait for the device, counted on a CPU."""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_ROOT = str(Path(__file__).parents[2])
# Operators that a GPU answers with a number, or with a tensor whose shape depends on values.
_OPERATORS = {
    "_local_scalar_dense",
    "_linalg_eigh",  # which then looks whether it has converged
    "equal",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "repeat_interleave",
}
_METHODS = {Tensor.cpu, Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.new_tensor}


class Syncs:
    """Within it, counts what would wait for a GPU; `at` has the count of each place, "file:line operator".

    On a CPU no copy to the host is seen where the tensor is there already, so calls of `cpu`, `tolist` and `numpy`
    count, and of `new_tensor`, which copies from it, whatever the tensor; copies by `to` do not.
    """

    def __init__(self) -> None:
        self.at: Counter[str] = Counter()
        self._modes = (_Functions(self), _Operators(self))

    def __enter__(self) -> Syncs:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def note(self, operator: str) -> None:
        """Count one wait, at the innermost line of the repository or, outside of it, of the caller."""
        frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
        ours = [frame for frame in frames if frame.filename.startswith(_ROOT) and "/.venv/" not in frame.filename]
        inside = [frame for frame in frames if "/torch/" not in frame.filename]
        place = inside[-1] if inside and "site-packages" in inside[-1].filename else ours[-1]
        self.at[f"{place.filename.rpartition('/')[2]}:{place.lineno} {operator}"] += 1


class _Functions(TorchFunctionMode):
    def __init__(self, syncs: Syncs) -> None:
        super().__init__()
        self.syncs = syncs

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _METHODS:
            self.syncs.note(func.__name__)
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, syncs: Syncs) -> None:
        super().__init__()
        self.syncs = syncs

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1]
        )
        if name in _OPERATORS or by_mask:
            self.syncs.note(name)
        return func(*args, **(kwargs or {}))
