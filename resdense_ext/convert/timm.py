"""timm's DenseNet, whose batch norms activate, and its ResNet with everything of that name; and subclasses.

What the engine does not know stays stock and is named: attention (SE and its like), stochastic depth, DropBlock, blur pools,
shortcuts with a pool that pads.
"""

from __future__ import annotations

from torch import nn

from resdense_ext.convert.parts import check_rest, left_alone
from resdense_ext.convert.registry import check_class
from resdense_ext.nn.read import (
    LayerModules,
    PooledModules,
    ResidualModules,
    Unsupported,
    check_untouched,
    own_activation,
    read_children,
    read_projection,
)

__all__ = ["BLOCKS", "CHAINS"]

_DENSENET = "timm.models.densenet"
_RESNET = "timm.models.resnet"
_POOL = "timm.layers.adaptive_avgmax_pool.SelectAdaptivePool2d"


def _norm(norm: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A norm that activates, and its activation."""
    activation = own_activation(norm)
    if activation is None:
        raise Unsupported(f"is {type(norm).__name__}", norm)
    return norm, activation


def _dense_block(block: nn.ModuleDict) -> list[LayerModules]:
    return [_layer(layer) for layer in block.values()]


def _layer(layer: nn.Module) -> LayerModules:
    check_class(layer, f"{_DENSENET}.DenseLayer", "bottleneck_fn")
    check_rest(layer, "norm1", "conv1", "norm2", "conv2")
    return LayerModules(layer, ((*_norm(layer.norm1), layer.conv1), (*_norm(layer.norm2), layer.conv2)), layer.drop_rate)


def _transition(transition: nn.Sequential) -> PooledModules:
    norm, conv, pool = read_children(transition, "norm", "conv", "pool")
    return PooledModules(*_norm(norm), conv, pool)


def _densenet(net: nn.Module) -> list[nn.Module]:
    check_class(net, f"{_DENSENET}.DenseNet", "forward_features", "forward_head")
    return [net.features, *_global_pool(net.global_pool), net.head_drop, net.classifier]


def _global_pool(pool: nn.Module) -> list[nn.Module]:
    try:
        check_class(pool, _POOL)
        check_untouched(pool)
    except Unsupported:
        return [pool]
    return [pool.pool, pool.flatten]


def _basic_block(block: nn.Module) -> ResidualModules:
    check_rest(block, "conv1", "bn1", "act1", "conv2", "bn2", "act2", "downsample")
    units = (block.conv1, block.bn1, block.act1), (block.conv2, block.bn2, None)
    return ResidualModules("post", units, read_projection(block.downsample), block.act2)


def _bottleneck(block: nn.Module) -> ResidualModules:
    check_rest(block, "conv1", "bn1", "act1", "conv2", "bn2", "act2", "conv3", "bn3", "act3", "downsample")
    units = (block.conv1, block.bn1, block.act1), (block.conv2, block.bn2, block.act2), (block.conv3, block.bn3, None)
    return ResidualModules("post", units, read_projection(block.downsample), block.act3)


def _resnet(net: nn.Module) -> list[nn.Module]:
    check_class(net, f"{_RESNET}.ResNet", "forward_features", "forward_head")
    if net.grad_checkpointing:
        raise Unsupported("checkpoints its blocks", net)
    layers = [net.layer1, net.layer2, net.layer3, net.layer4]
    dropout = [nn.Dropout(net.drop_rate).train(net.training)] if net.drop_rate else []
    return [net.conv1, net.bn1, net.act1, net.maxpool, *layers, *_global_pool(net.global_pool), *dropout, net.fc]


BLOCKS = {
    f"{_DENSENET}.DenseBlock": _dense_block,
    f"{_DENSENET}.DenseTransition": _transition,
    f"{_RESNET}.BasicBlock": _basic_block,
    f"{_RESNET}.Bottleneck": _bottleneck,
    "timm.models.dpn.DualPathBlock": left_alone("is a dual path block, for which there is no adapter"),
}
CHAINS = {f"{_DENSENET}.DenseNet": _densenet, f"{_RESNET}.ResNet": _resnet}
