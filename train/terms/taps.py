"""What modules inside a tower put out, from one forward of the tower.

Shape suffixes: B samples, N positions (pixels of a map, or tokens), C channels, D features.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


def tapped(tower: nn.Module, names: Sequence[str], *inputs: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """One forward of a tower: positions [B, N, C] that its modules `names` put out, and its features [B, D]."""
    outputs: dict[str, Tensor | tuple] = {}

    def keep(name: str):
        return lambda _module, _inputs, output: outputs.update({name: output})

    handles = [tower.get_submodule(name).register_forward_hook(keep(name)) for name in dict.fromkeys(names)]
    try:
        features_BD = tower(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    channels_last = getattr(tower, "channels_last", False)
    return {name: _positions(output, channels_last) for name, output in outputs.items()}, features_BD


def _positions(output: Tensor | tuple, channels_last: bool) -> Tensor:
    x = output[0] if isinstance(output, tuple) else output
    if x.ndim == 4:
        return x.flatten(1, 2) if channels_last else x.flatten(2).mT
    return x
