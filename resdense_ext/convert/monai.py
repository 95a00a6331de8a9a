"""MONAI's DenseNet and ResNet in one, two and three dimensions, and subclasses that keep their forward."""

from __future__ import annotations

from typing import Any

from torch import nn

from resdense_ext.convert.parts import FLATTEN, check_rest, layer_with_dropout
from resdense_ext.convert.registry import check_class
from resdense_ext.nn.leaves import Unsupported, check_forward, check_untouched, read_children, read_projection
from resdense_ext.nn.protocols import LayerModules, PooledModules, ResidualModules

__all__ = ["BLOCKS", "CHAINS"]

_DENSENET = "monai.networks.nets.densenet"
_RESNET = "monai.networks.nets.resnet"
_UNITS = "norm1", "relu1", "conv1", "norm2", "relu2", "conv2"


def _dense_block(block: nn.Sequential) -> list[LayerModules]:
    return [_layer(layer) for layer in block]


def _layer(layer: nn.Module) -> LayerModules:
    check_class(layer, f"{_DENSENET}._DenseLayer")
    check_rest(layer, "layers")
    inner = layer.layers
    check_forward(inner, nn.Sequential)
    check_untouched(inner)
    dropout = ("dropout",) if "dropout" in inner._modules else ()
    *modules, last = read_children(inner, *_UNITS, *dropout)
    units = tuple(modules[:3]), (*modules[3:5], inner.conv2)
    return layer_with_dropout(layer, units, last if dropout else None)


def _transition(transition: nn.Sequential) -> PooledModules:
    return PooledModules(*read_children(transition, "norm", "relu", "conv", "pool"))


def _densenet(net: nn.Module) -> list[nn.Module]:
    return [net.features, net.class_layers]


def _basic_block(block: nn.Module) -> ResidualModules:
    check_rest(block, "conv1", "bn1", "act", "conv2", "bn2", "downsample")
    units = (block.conv1, block.bn1, block.act), (block.conv2, block.bn2, None)
    return ResidualModules("post", units, _projection(block.downsample), block.act)


def _bottleneck(block: nn.Module) -> ResidualModules:
    check_rest(block, "conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "act", "downsample")
    units = (block.conv1, block.bn1, block.act), (block.conv2, block.bn2, block.act), (block.conv3, block.bn3, None)
    return ResidualModules("post", units, _projection(block.downsample), block.act)


def _projection(downsample: Any) -> tuple[nn.Module, ...]:
    if downsample is not None and not isinstance(downsample, nn.Module):
        raise Unsupported("has a shortcut that pads with zeros (type A), and no projection")
    return read_projection(downsample)


def _resnet(net: nn.Module) -> list[nn.Module]:
    pool = [] if net.no_max_pool else [net.maxpool]
    layers = [net.layer1, net.layer2, net.layer3, net.layer4]
    head = [] if net.fc is None else [net.fc]
    return [net.conv1, net.bn1, net.act, *pool, *layers, net.avgpool, FLATTEN, *head]


BLOCKS = {
    f"{_DENSENET}._DenseBlock": _dense_block,
    f"{_DENSENET}._Transition": _transition,
    f"{_RESNET}.ResNetBlock": _basic_block,
    f"{_RESNET}.ResNetBottleneck": _bottleneck,
}
CHAINS = {f"{_DENSENET}.DenseNet": _densenet, f"{_RESNET}.ResNet": _resnet}
