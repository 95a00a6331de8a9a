"""timm's DenseNet and DPN, whose batch norms activate, and its ResNet with everything of that name; and subclasses.

What the engine does not know stays stock and is named: attention (SE and its like), stochastic depth, DropBlock, blur pools,
shortcuts with a pool that pads.
"""

from __future__ import annotations

from torch import nn

from resdense_ext.convert.parts import check_rest
from resdense_ext.convert.registry import check_class
from resdense_ext.nn.leaves import Unsupported, check_untouched, own_activation, read_children, read_projection
from resdense_ext.nn.protocols import DualPathModules, LayerModules, PooledModules, ResidualModules

__all__ = ["BLOCKS", "CHAINS"]

_DENSENET = "timm.models.densenet"
_RESNET = "timm.models.resnet"
_DPN = "timm.models.dpn"
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


def _dual_path_block(block: nn.Module) -> DualPathModules:
    """The names of a projection and of what a "b" block activates for its last two convolutions are theirs."""
    check_rest(block, "c1x1_w_s1", "c1x1_w_s2", "c1x1_a", "c3x3_b", "c1x1_c", "c1x1_c1", "c1x1_c2")
    projection = block.c1x1_w_s2 if block.c1x1_w_s1 is None else block.c1x1_w_s1
    if block.c1x1_c1 is not None and block.c1x1_c2 is not None:
        last = *_bn_act(block.c1x1_c), (block.c1x1_c1, block.c1x1_c2)
    else:
        last = _bn_act_conv(block.c1x1_c)
    units = _bn_act_conv(block.c1x1_a), _bn_act_conv(block.c3x3_b), last
    return DualPathModules(units, None if projection is None else _bn_act_conv(projection), block.num_1x1_c, side_by_side=True)


def _bn_act(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    check_class(module, f"{_DPN}.BnAct")
    check_untouched(module)
    return _norm(module.bn)


def _bn_act_conv(module: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
    check_class(module, f"{_DPN}.BnActConv2d")
    check_untouched(module)
    return *_norm(module.bn), module.conv


def _dpn(net: nn.Module) -> list[nn.Module]:
    check_class(net, f"{_DPN}.DPN", "forward_features", "forward_head")
    if net.grad_checkpointing:
        raise Unsupported("checkpoints its blocks", net)
    dropout = [nn.Dropout(net.drop_rate).train(net.training)] if net.drop_rate > 0 else []
    return [*_dpn_features(net.features), *_global_pool(net.global_pool), *dropout, net.classifier, net.flatten]


def _dpn_features(features: nn.Module) -> list[nn.Module]:
    """Opened up at both ends, where norms are that may share a node with the pools behind them."""
    try:
        check_untouched(features)
        stem, *blocks, end = features
        check_class(stem, "timm.layers.conv_bn_act.ConvNormAct")
        check_rest(stem, "conv", "bn")
        check_class(end, f"{_DPN}.BnAct")
        check_untouched(stem)
        check_untouched(end)
    except Unsupported:
        return [features]
    return [stem.conv, stem.bn, *blocks, end.bn]


BLOCKS = {
    f"{_DENSENET}.DenseBlock": _dense_block,
    f"{_DENSENET}.DenseTransition": _transition,
    f"{_RESNET}.BasicBlock": _basic_block,
    f"{_RESNET}.Bottleneck": _bottleneck,
    f"{_DPN}.DualPathBlock": _dual_path_block,
}
CHAINS = {f"{_DENSENET}.DenseNet": _densenet, f"{_RESNET}.ResNet": _resnet, f"{_DPN}.DPN": _dpn}
