"""torchvision's DenseNet: ``torchvision.models.densenet._DenseBlock`` and subclasses that keep its forward."""

from __future__ import annotations

import sys
from typing import Optional

from torch import nn

from resdense_ext.convert.classes import ConvertedDenseBlock
from resdense_ext.nn.engine import LayerModules, check_forward

__all__ = ["TorchvisionDenseBlock", "recognise"]

_LIBRARY = "torchvision.models.densenet"


class TorchvisionDenseBlock(ConvertedDenseBlock):
    def layer_modules(self) -> list[LayerModules]:
        return [_layer(layer) for layer in self.values()]


def recognise(module: nn.Module) -> Optional[type[ConvertedDenseBlock]]:
    """The mixin for a block of torchvision's; None for anything else.

    Raises:
        Unsupported: it is such a block, but does something of its own.
    """
    # Where torchvision's module is not loaded, none of its classes exists.
    library = sys.modules.get(_LIBRARY)
    if library is None or not isinstance(module, library._DenseBlock):
        return None
    check_forward(module, library._DenseBlock)
    for layer in module.values():
        _layer(layer)
    return TorchvisionDenseBlock


def _layer(layer: nn.Module) -> LayerModules:
    check_forward(layer, sys.modules[_LIBRARY]._DenseLayer, "bn_function")
    units = (layer.norm1, layer.relu1, layer.conv1), (layer.norm2, layer.relu2, layer.conv2)
    return LayerModules(layer, units, layer.drop_rate)
