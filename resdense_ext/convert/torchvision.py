"""torchvision's DenseNet and ResNet, their blocks and transitions, and subclasses that keep their forward."""

from __future__ import annotations

import sys
from collections import OrderedDict
from types import ModuleType
from typing import Optional

from torch import Tensor, nn

from resdense_ext.convert.classes import (
    Converted,
    ConvertedChain,
    ConvertedDenseBlock,
    ConvertedResidualBlock,
    ConvertedTransition,
)
from resdense_ext.nn.engine import is_transformed, run_chain, run_features
from resdense_ext.nn.read import (
    LayerModules,
    PooledModules,
    ResidualModules,
    Unsupported,
    check_forward,
    check_untouched,
    read_children,
)

__all__ = [
    "TorchvisionBasicBlock",
    "TorchvisionBottleneck",
    "TorchvisionDenseBlock",
    "TorchvisionDenseNet",
    "TorchvisionLayerGetter",
    "TorchvisionResNet",
    "TorchvisionTransition",
    "recognise",
]


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


class TorchvisionBasicBlock(ConvertedResidualBlock):
    def residual_modules(self) -> ResidualModules:
        units = (self.conv1, self.bn1, self.relu), (self.conv2, self.bn2, None)
        return ResidualModules("post", units, _projection(self.downsample), self.relu)


class TorchvisionBottleneck(ConvertedResidualBlock):
    def residual_modules(self) -> ResidualModules:
        units = (self.conv1, self.bn1, self.relu), (self.conv2, self.bn2, self.relu), (self.conv3, self.bn3, None)
        return ResidualModules("post", units, _projection(self.downsample), self.relu)


class TorchvisionResNet(Converted):
    def forward(self, x: Tensor) -> Tensor:
        if is_transformed(x):
            return self.stock_forward(x)
        x = run_chain([self.conv1, self.bn1, self.relu, self.maxpool], x)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
        return self.fc(self.avgpool(x).flatten(1))


class TorchvisionLayerGetter(Converted):
    """What stands for a backbone in torchvision's detection and segmentation models."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if is_transformed(x):
            return self.stock_forward(x)
        out, links = OrderedDict(), []
        for name, module in self.items():
            links.append(module)
            if name in self.return_layers:
                x, links = run_chain(links, x), []
                out[self.return_layers[name]] = x
        return out


def recognise(module: nn.Module) -> Optional[type[Converted]]:
    """The mixin for a module of torchvision's; None for anything else.

    Raises:
        Unsupported: it is a block or a transition, but does something of its own.
    """
    # Where one of torchvision's modules is not loaded, none of its classes exists.
    for path, recognise_in in _RECOGNISE.items():
        library = sys.modules.get(path)
        mixin = None if library is None else recognise_in(module, library)
        if mixin is not None:
            return mixin
    return None


def _densenet(module: nn.Module, library: ModuleType) -> Optional[type[Converted]]:
    if isinstance(module, library._DenseBlock):
        check_forward(module, library._DenseBlock)
        for layer in module.values():
            _layer(layer)
        return TorchvisionDenseBlock
    if isinstance(module, library._Transition):
        check_forward(module, nn.Sequential)
        TorchvisionTransition.pooled_modules(module)
        return TorchvisionTransition
    return TorchvisionDenseNet if _runs(module, library.DenseNet) else None


def _resnet(module: nn.Module, library: ModuleType) -> Optional[type[Converted]]:
    blocks = {library.BasicBlock: TorchvisionBasicBlock, library.Bottleneck: TorchvisionBottleneck}
    for owner, mixin in blocks.items():
        if isinstance(module, owner):
            check_forward(module, owner)
            mixin.residual_modules(module)
            return mixin
    return TorchvisionResNet if _runs(module, library.ResNet, "_forward_impl") else None


def _layer_getter(module: nn.Module, library: ModuleType) -> Optional[type[Converted]]:
    runs = _runs(module, library.IntermediateLayerGetter)
    return TorchvisionLayerGetter if runs and any(isinstance(m, Converted) for m in module.modules()) else None


_DENSENET = "torchvision.models.densenet"
_RECOGNISE = {
    _DENSENET: _densenet,
    "torchvision.models.resnet": _resnet,
    "torchvision.models._utils": _layer_getter,
}


def _runs(module: nn.Module, owner: type[nn.Module], *methods: str) -> bool:
    """Whether it is an ``owner`` that runs the owner's forward."""
    try:
        check_forward(module, owner, *methods)
    except Unsupported:
        return False
    return True


def _projection(downsample: Optional[nn.Module]) -> tuple[nn.Module, ...]:
    """The convolution and the norm of a projection shortcut; nothing for the identity."""
    if downsample is None:
        return ()
    check_forward(downsample, nn.Sequential)
    check_untouched(downsample)
    return tuple(read_children(downsample, "0", "1"))


def _layer(layer: nn.Module) -> LayerModules:
    check_forward(layer, sys.modules[_DENSENET]._DenseLayer, "bn_function")
    units = (layer.norm1, layer.relu1, layer.conv1), (layer.norm2, layer.relu2, layer.conv2)
    return LayerModules(layer, units, layer.drop_rate)
