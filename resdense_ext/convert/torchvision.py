"""torchvision's DenseNet and ResNet, their blocks and transitions, and subclasses that keep their forward."""

from __future__ import annotations

import sys
from collections import OrderedDict
from typing import Optional

from torch import Tensor, nn

from resdense_ext.convert.classes import Converted
from resdense_ext.convert.parts import FLATTEN
from resdense_ext.convert.registry import check_class
from resdense_ext.nn.chain import run_chain
from resdense_ext.nn.dispatch import is_transformed
from resdense_ext.nn.leaves import Unsupported, check_forward, read_children, read_projection
from resdense_ext.nn.protocols import LayerModules, PooledModules, ResidualModules

__all__ = ["BLOCKS", "CHAINS", "TorchvisionLayerGetter", "recognise"]

_DENSENET = "torchvision.models.densenet"
_RESNET = "torchvision.models.resnet"
_HEAD = nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), FLATTEN
"""What the DenseNet's forward calls behind its features, as modules."""


def _dense_block(block: nn.ModuleDict) -> list[LayerModules]:
    return [_layer(layer) for layer in block.values()]


def _layer(layer: nn.Module) -> LayerModules:
    check_class(layer, f"{_DENSENET}._DenseLayer", "bn_function")
    units = (layer.norm1, layer.relu1, layer.conv1), (layer.norm2, layer.relu2, layer.conv2)
    return LayerModules(layer, units, layer.drop_rate)


def _transition(transition: nn.Sequential) -> PooledModules:
    return PooledModules(*read_children(transition, "norm", "relu", "conv", "pool"))


def _densenet(net: nn.Module) -> list[nn.Module]:
    return [net.features, *_HEAD, net.classifier]


def _basic_block(block: nn.Module) -> ResidualModules:
    units = (block.conv1, block.bn1, block.relu), (block.conv2, block.bn2, None)
    return ResidualModules("post", units, read_projection(block.downsample), block.relu)


def _bottleneck(block: nn.Module) -> ResidualModules:
    units = (block.conv1, block.bn1, block.relu), (block.conv2, block.bn2, block.relu), (block.conv3, block.bn3, None)
    return ResidualModules("post", units, read_projection(block.downsample), block.relu)


def _resnet(net: nn.Module) -> list[nn.Module]:
    check_class(net, f"{_RESNET}.ResNet", "_forward_impl")
    stem, layers = [net.conv1, net.bn1, net.relu, net.maxpool], [net.layer1, net.layer2, net.layer3, net.layer4]
    return [*stem, *layers, net.avgpool, FLATTEN, net.fc]


BLOCKS = {
    f"{_DENSENET}._DenseBlock": _dense_block,
    f"{_DENSENET}._Transition": _transition,
    f"{_RESNET}.BasicBlock": _basic_block,
    f"{_RESNET}.Bottleneck": _bottleneck,
}
CHAINS = {f"{_DENSENET}.DenseNet": _densenet, f"{_RESNET}.ResNet": _resnet}


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
    """The mixin for torchvision's backbones; None for anything else."""
    library = sys.modules.get("torchvision.models._utils")
    if library is None:
        return None
    try:
        check_forward(module, library.IntermediateLayerGetter)
    except (Unsupported, AttributeError):
        return None
    return TorchvisionLayerGetter if any(isinstance(m, Converted) for m in module.modules()) else None
