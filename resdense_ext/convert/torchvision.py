"""torchvision's DenseNet, its dense blocks and transitions, and subclasses that keep their forward."""

from __future__ import annotations

import sys
from typing import Optional

from torch import Tensor, nn

from resdense_ext.convert.classes import Converted, ConvertedChain, ConvertedDenseBlock, ConvertedTransition
from resdense_ext.nn.engine import is_transformed, run_features
from resdense_ext.nn.read import LayerModules, PooledModules, Unsupported, check_forward, read_children

__all__ = ["TorchvisionDenseBlock", "TorchvisionDenseNet", "TorchvisionTransition", "recognise"]

_LIBRARY = "torchvision.models.densenet"


class TorchvisionDenseBlock(ConvertedDenseBlock):
    def layer_modules(self) -> list[LayerModules]:
        return [_layer(layer) for layer in self.values()]


class TorchvisionTransition(ConvertedTransition):
    def pooled_modules(self) -> PooledModules:
        return PooledModules(*read_children(self, "norm", "relu", "conv", "pool"))


class TorchvisionDenseNet(Converted):
    def forward(self, x: Tensor) -> Tensor:
        if is_transformed(x) or not isinstance(self.features, ConvertedChain):
            return self.stock_forward(x)
        return self.classifier(run_features(self.features, x))


def recognise(module: nn.Module) -> Optional[type[Converted]]:
    """The mixin for a module of torchvision's; None for anything else.

    Raises:
        Unsupported: it is a block or a transition, but does something of its own.
    """
    # Where torchvision's module is not loaded, none of its classes exists.
    library = sys.modules.get(_LIBRARY)
    if library is None:
        return None
    if isinstance(module, library._DenseBlock):
        check_forward(module, library._DenseBlock)
        for layer in module.values():
            _layer(layer)
        return TorchvisionDenseBlock
    if isinstance(module, library._Transition):
        check_forward(module, nn.Sequential)
        TorchvisionTransition.pooled_modules(module)
        return TorchvisionTransition
    if isinstance(module, library.DenseNet) and _runs(module, library.DenseNet):
        return TorchvisionDenseNet
    return None


def _runs(module: nn.Module, owner: type[nn.Module]) -> bool:
    try:
        check_forward(module, owner)
    except Unsupported:
        return False
    return True


def _layer(layer: nn.Module) -> LayerModules:
    check_forward(layer, sys.modules[_LIBRARY]._DenseLayer, "bn_function")
    units = (layer.norm1, layer.relu1, layer.conv1), (layer.norm2, layer.relu2, layer.conv2)
    return LayerModules(layer, units, layer.drop_rate)
