"""What adapters of several libraries read alike."""

from __future__ import annotations

from typing import Optional

from torch import nn

from resdense_ext.nn.leaves import Unsupported, check_untouched
from resdense_ext.nn.protocols import LayerModules

__all__ = ["FLATTEN", "check_rest", "is_nothing", "layer_with_dropout"]

FLATTEN = nn.Flatten(1)
"""What many a forward does without a module."""

_DROPS_CHANNELS = {nn.Dropout: False, nn.Dropout1d: True, nn.Dropout2d: True, nn.Dropout3d: True}


def is_nothing(module: Optional[nn.Module]) -> bool:
    """Whether it is None, or a `torch.nn.Identity` without hooks."""
    if module is None:
        return True
    try:
        check_untouched(module)
    except Unsupported:
        return False
    return type(module) is nn.Identity


def check_rest(module: nn.Module, *known: str) -> None:
    """Raises Unsupported where the module holds more than these, and it is not nothing: attention, stochastic depth, ..."""
    for name, inner in module._modules.items():
        if name not in known and not is_nothing(inner):
            raise Unsupported(f"is {type(inner).__name__}, which the engine does not know", inner)


def layer_with_dropout(
    layer: nn.Module, units: tuple[tuple[nn.Module, ...], ...], dropout: Optional[nn.Module]
) -> LayerModules:
    """A dense layer whose dropout, if it has one, is a module."""
    if dropout is None:
        return LayerModules(layer, units)
    check_untouched(layer)
    if type(dropout) not in _DROPS_CHANNELS:
        raise Unsupported(f"is {dropout}", dropout)
    return LayerModules(dropout, units, dropout.p, _DROPS_CHANNELS[type(dropout)])
