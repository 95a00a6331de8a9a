"""What has been read of modules, as the functional calls."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Optional

import torch
from torch import Tensor, nn

from resdense_ext import checks, functional
from resdense_ext.nn.leaves import is_frozen_norm
from resdense_ext.nn.protocols import Halves, LayerModules, Policy, PooledModules, SideBySide
from resdense_ext.nn.read import ReadLayers, ReadPooledUnit, ReadResidualBlock
from resdense_ext.nn.recall import Reading, check_once, remembered
from resdense_ext.ops.cast import cast_conv_graph
from resdense_ext.ops.conv_graph_function import conv_graph
from resdense_ext.reference import Activation, ConvGraph, DenseLayer, DualPathBlock, PooledUnit, ResidualBlock

__all__ = [
    "call_conv_graph",
    "call_dense_block",
    "call_dual_path_stage",
    "call_pooled_unit",
    "call_residual_stage",
    "last_norm",
    "options_of",
    "widened",
]


def call_dense_block(
    x: Tensor, reading: Reading[ReadLayers], policy: Policy, behind: Optional[Reading[ReadPooledUnit]] = None
) -> Tensor:
    """A dense block, with masks of its dropouts, and the unit ``behind`` it."""
    modules, layers, activation = reading.value
    unit = None if behind is None else behind.value.unit

    def check() -> None:
        checks.check_dense_block(x, layers)
        for of in modules:
            checks.check_probability("drop_rate", max(of.drop_rate, 0.0))

    check_once([reading], x, check)
    if behind is not None:
        check_once([behind, reading], x, lambda: checks.check_behind(x, layers, unit))
    masked = layers
    if any(of.drop_rate > 0 for of in modules):
        # Masks are drawn behind all checks: an error leaves the random state as it was.
        checks.kept_layers(policy, len(layers))
        masked = [_with_mask(layer, of, x) for layer, of in zip(layers, modules)]
    y = functional.checked_dense_block(x, masked, activation, policy=policy, behind=unit)
    return y if behind is None else _pooled(y)


def _with_mask(layer: DenseLayer, modules: LayerModules, x: Tensor) -> DenseLayer:
    if modules.drop_rate <= 0 or not modules.module.training:
        return layer
    width = layer.units[-1].conv.weight.shape[0]
    mask, scale = functional.dropout_mask(x, width, modules.drop_rate, per_channel=modules.drop_channels)
    return layer._replace(mask=mask, mask_scale=scale)


def call_pooled_unit(x: Tensor, unit: PooledUnit, activation: Activation) -> Tensor:
    """A transition, or a norm, an activation and a pool."""
    options = options_of(activation)
    if unit.conv is not None:
        return _pooled(functional.transition(x, functional.Unit(unit.norm, unit.conv), *unit.pool[1:3], **options))
    return _pooled(functional.bn_act_pool(x, unit.norm, unit.pool.kind, *unit.pool.windows, **options))


def _pooled(y: Tensor) -> Tensor:
    """In the dtype that stock has: a CPU's autocast pools volumes in float32."""
    return y.float() if y.dim() == 5 and y.dtype.itemsize == 2 and y.device.type == "cpu" and checks.autocasts("cpu") else y


def call_residual_stage(x: Tensor, readings: Sequence[Reading[ReadResidualBlock]], policies: Sequence[Policy]) -> Tensor:
    """Residual blocks of the same activations, one after another."""
    blocks = [reading.value.block for reading in readings]
    _, _, activation, last = readings[0].value

    def check() -> None:
        for policy in policies:
            checks.check_policy(policy)
        checks.check_residual_stage(x, blocks)

    check_once(readings, x, check, *policies)
    remember = partial(remembered, readings)
    return functional.checked_residual_stage(x, blocks, activation, [last] * len(blocks), policy=policies, remember=remember)


def call_dual_path_stage(
    x: Tensor | Halves,
    blocks: Sequence[DualPathBlock],
    activation: Activation,
    policies: Sequence[Policy],
    side_by_side: bool,
) -> Halves:
    """Dual path blocks, one after another."""
    keep = [keep for policy in policies for keep in checks.kept_layers(policy, 1)]
    name, slope = activation
    if side_by_side and blocks[0].projection is None and isinstance(x, Tensor):
        x = tuple(x.tensor_split([blocks[0].residual_channels], 1))
    y = functional.dual_path_stage(x, blocks, activation=name, negative_slope=slope, policy=keep)
    return SideBySide(*y) if side_by_side else y


def call_conv_graph(sources: Sequence[Tensor], graph: ConvGraph, policy: Policy) -> tuple[Tensor, ...]:
    """A graph of convolutions, which follow autocast."""
    device = sources[0].device.type
    if checks.autocasts(device):
        graph = cast_conv_graph(graph, torch.get_autocast_dtype(device))
    return conv_graph(sources, graph, policy)


def options_of(activation: Activation) -> dict[str, str | float]:
    """An activation as the functional calls take it."""
    return {"activation": activation.name, "negative_slope": activation.slope}


def widened(y: Tensor, *norms: Optional[nn.Module]) -> Tensor:
    """In the dtype that stock has: torchvision's frozen norm is plain arithmetic, which widens what autocast has narrowed,
    and CUDA's autocast takes group norms in float32."""
    for norm in norms:
        if is_frozen_norm(norm):
            y = y.to(torch.promote_types(y.dtype, norm.weight.dtype))
        elif isinstance(norm, nn.GroupNorm) and y.is_cuda and y.dtype.itemsize == 2 and checks.autocasts("cuda"):
            y = y.float()
    return y


def last_norm(modules: PooledModules) -> tuple[nn.Module, ...]:
    """The norm behind which there is no convolution."""
    return (modules.norm,) if modules.conv is None else ()
