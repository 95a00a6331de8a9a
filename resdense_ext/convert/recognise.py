"""From a module to what it is turned into: blocks and chains by their adapters, and sequences by what they hold."""

from __future__ import annotations

from typing import Any, Optional

from torch import nn

from resdense_ext.convert import chain, monai, pytorchcv, timm, torchvision
from resdense_ext.convert.classes import (
    Converted,
    ConvertedChain,
    ConvertedDenseBlock,
    ConvertedDualPathBlock,
    ConvertedResidualBlock,
    ConvertedTransition,
    mixin_for,
)
from resdense_ext.convert.registry import adapter_of, read, register_library
from resdense_ext.nn.leaves import Unsupported, check_forward
from resdense_ext.nn.protocols import DualPathModules, LayerModules, PooledModules, ResidualModules

__all__ = ["recognise"]

for library in (torchvision, timm, monai, pytorchcv):
    register_library(library.BLOCKS, library.CHAINS)


def recognise(module: nn.Module) -> Optional[type[Converted]]:
    """The mixin for a module that an adapter knows; None for any other.

    Raises:
        Unsupported: it is a block or a transition, but does something of its own.
        TypeError: its adapter gives something that is none of these.
    """
    kinds = (_block, pytorchcv.recognise, torchvision.recognise, _chain, chain.recognise)
    return next(filter(None, (kind(module) for kind in kinds)), None)


def _block(module: nn.Module) -> Optional[type[Converted]]:
    cls = type(module)
    found = adapter_of(cls)
    if found is None:
        return None
    check_forward(module, found[0])
    return _kind(found[0], read(module, cls))


_KINDS = {
    ResidualModules: ConvertedResidualBlock,
    DualPathModules: ConvertedDualPathBlock,
    PooledModules: ConvertedTransition,
}


def _kind(cls: type[nn.Module], modules: Any) -> type[Converted]:
    if type(modules) in _KINDS:
        return mixin_for(cls, _KINDS[type(modules)])
    if isinstance(modules, list) and all(isinstance(layer, LayerModules) for layer in modules):
        return ConvertedDenseBlock
    wanted = "a list of LayerModules, PooledModules, ResidualModules or DualPathModules"
    raise TypeError(f"the adapter of {cls.__name__}: expected {wanted}, got {modules!r}")


def _chain(module: nn.Module) -> Optional[type[Converted]]:
    """One with something of its own is no error: what is in it is on the engine all the same."""
    cls = type(module)
    found = adapter_of(cls, chain=True)
    if found is None:
        return None
    try:
        check_forward(module, found[0])
        read(module, cls, chain=True)
    except Unsupported:
        return None
    return mixin_for(cls, ConvertedChain)
