"""The engine of what stands around dense blocks: batch norm, activation, pool and, in a transition, a convolution.

    y = pool(act(scale * x + shift))                    never stored before the pool
    out = y, or W y

The transition's convolution stands behind the pool, with which it commutes: a quarter of the positions, and of the arithmetic.
Backward keeps ``x``, of maxima one byte, and pools again where the convolution's weight has a gradient.

Source: Huang et al., 2017.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from resdense_ext import reference
from resdense_ext.ops.instances import backend_of
from resdense_ext.ops.layout import dense_map, empty_map, memory_format_of
from resdense_ext.ops.operands import Fold, Pending, Stats
from resdense_ext.ops.operator import EngineOperator
from resdense_ext.ops.ranks import Ranks
from resdense_ext.ops.reference_backend import ReferenceBackend
from resdense_ext.ops.units import group_of, wanted_gradients
from resdense_ext.reference import Activation, BatchNorm, Conv, Pool, PooledUnit, accumulation_dtype

__all__ = ["SCHEMA", "PooledUnitConfig", "backward", "forward", "output_like"]

SCHEMA = (
    "Tensor?[] unit, float unit_eps, bool unit_batch_stats, int unit_norm_groups, bool unit_instance, str pool, int[] windows, int groups, "
    "str unit_activation, float unit_slope, str unit_backend, str unit_group"
)

aten = torch.ops.aten


class PooledUnitConfig(NamedTuple):
    """All of a unit that is no tensor, in the operators' types."""

    eps: float
    batch_stats: bool
    norm_groups: int
    instance: bool
    pool: str
    windows: list[int]
    groups: int
    activation: str
    slope: float
    backend: str
    group: str

    @staticmethod
    def of(unit: PooledUnit, activation: Activation, backend: str) -> PooledUnitConfig:
        kind, windows = unit.pool.kind, unit.pool.windows
        norm, groups = unit.norm, 1 if unit.conv is None else unit.conv.groups
        sizes = [n for sizes in windows for n in sizes]
        of_norm = norm.eps, norm.batch_stats, norm.groups, norm.instance
        return PooledUnitConfig(*of_norm, kind, sizes, groups, *activation, backend, group_of([norm]))

    def unit(self, weight, bias, mean, var, conv_weight, conv_bias) -> PooledUnit:
        """The unit as it was given, around other tensors."""
        rank = len(self.windows) // 3
        pool = Pool(self.pool, *(tuple(self.windows[i * rank : (i + 1) * rank]) for i in range(3)))
        conv = None
        if conv_weight is not None:
            ones = (1,) * (conv_weight.dim() - 2)
            conv = Conv(conv_weight, conv_bias, (0,) * len(ones), ones, self.groups)
        norm = BatchNorm(
            weight, bias, mean, var, self.batch_stats, None, self.eps, instance=self.instance, groups=self.norm_groups
        )
        return PooledUnit(norm, pool, conv)

    def fold(self, unit: PooledUnit, stats: Stats, x: Tensor) -> Fold:
        backend = self.backend_for(x)
        return backend.fold(unit.norm, stats, backend.positions(x), Activation(self.activation, self.slope))

    def backend_for(self, x: Tensor) -> ReferenceBackend:
        return backend_of(self.backend, len(x), self.instance)


def forward(x: Tensor, unit: PooledUnit, fold: Fold, backend: ReferenceBackend) -> tuple[Tensor, Optional[Tensor]]:
    """The unit's output, and of maxima their places, as `ReferenceBackend.bn_act_pool` gives them."""
    out, taps = backend.bn_act_pool(x, fold.affine, unit.pool)
    if unit.conv is not None:
        out = reference.convolution(out.to(unit.conv.weight.dtype), unit.conv)
        out = out.contiguous(memory_format=memory_format_of(x))
    return out, taps


def backward(
    grad: Tensor,
    x: Tensor,
    taps: Optional[Tensor],
    unit: PooledUnit,
    fold: Fold,
    backend: ReferenceBackend,
    into: Optional[Pending],
    needs: Sequence[bool],
) -> tuple[Optional[Pending], list[Optional[Tensor]]]:
    """The gradient of ``x``, pending, and those of the norm's weight and bias and of the convolution's.

    ``needs`` says of these five which are wanted; where none of the first three is, there is no pending gradient.
    """
    norm_grads: tuple[Optional[Tensor], ...] = (None, None)
    conv_grads: tuple[Optional[Tensor], ...] = (None, None)
    conv, pending = unit.conv, None
    if conv is not None:
        pooled, _ = backend.bn_act_pool(x, fold.affine, unit.pool)
        rank = x.dim() - 2
        grad, *conv_grads = aten.convolution_backward(
            grad,
            pooled.to(conv.weight.dtype),
            conv.weight,
            None if conv.bias is None else [conv.weight.shape[0]],
            [1] * rank,
            conv.padding,
            conv.dilation,
            False,
            [0] * rank,
            conv.groups,
            [any(needs[:3]), *needs[3:]],
        )
        del pooled
    if any(needs[:3]):
        # The framework picks the layout of its gradient by its own rules, and a user's may have any.
        grad = grad.to(x.dtype).contiguous(memory_format=memory_format_of(x))
        pending, _, _, *norm_grads = backend.bn_act_pool_backward(grad, taps, x, fold, unit.pool, into)
    return pending, [*norm_grads, *conv_grads]


def _bn_act_pool(x: Tensor, tensors, *numbers) -> tuple[Tensor, Tensor, list[Tensor]]:
    config = PooledUnitConfig(*numbers)
    unit, backend = config.unit(*tensors), config.backend_for(x)
    x = dense_map(x)
    none = x.new_empty(0, dtype=accumulation_dtype(x.dtype))
    stats = Stats(*backend.channel_stats(x)) if config.batch_stats else Stats(none, none.clone())
    ranks = Ranks(config.group, x.numel() // x.shape[1])
    ranks.merge_(stats)
    out, taps = forward(x, unit, config.fold(unit, stats, x), backend)
    total = [ranks.total] if config.group else []
    return out, x.new_empty(0, dtype=torch.uint8) if taps is None else taps, [*stats, *total]


def _bn_act_pool_backward(grad: Tensor, x: Tensor, tensors, *rest) -> list[Tensor]:
    *numbers, taps, (mean, m2, *total), needs = rest
    config = PooledUnitConfig(*numbers)
    unit, backend = config.unit(*tensors), config.backend_for(x)
    x = dense_map(x)
    fold = config.fold(unit, Stats(mean, m2), x)
    pending, values = backward(grad, x, taps if taps.numel() else None, unit, fold, backend, None, needs)
    ranks = Ranks(config.group, x.numel() // x.shape[1], *total)
    dx = backend.pending_grad_(ranks.share_(pending)) if needs[0] else None
    return wanted_gradients([v if need else None for v, need in zip((dx, *values), needs)], [x], tensors)


def output_like(x: Tensor, tensors, config: PooledUnitConfig) -> Tensor:
    """An empty tensor in the shape, dtype and layout of the unit's output."""
    unit = config.unit(*tensors)
    sizes = unit.pool.outputs(x.shape[2:])
    if unit.conv is None:
        return empty_map(x, x.shape[1], x.dtype, sizes)
    return empty_map(x, unit.conv.weight.shape[0], unit.conv.weight.dtype, sizes)


def _bn_act_pool_fake(x: Tensor, tensors, *numbers) -> tuple[Tensor, Tensor, list[Tensor]]:
    config = PooledUnitConfig(*numbers)
    out = output_like(x, tensors, config)
    taken = config.pool == "maximum" and config.backend != "reference"
    taps = empty_map(x, x.shape[1], torch.uint8, out.shape[2:]) if taken else x.new_empty(0, dtype=torch.uint8)
    stats = [*Stats.room(x, config.unit(*tensors).norm, len(x) if config.instance else 1)]
    return out, taps, [*stats, x.new_empty(1, dtype=torch.float64)] if config.group else stats


def _bn_act_pool_backward_fake(grad: Tensor, x: Tensor, tensors, *rest) -> list[Tensor]:
    targets = (dense_map(x), tensors[0], tensors[1], tensors[4], tensors[5])
    return [torch.empty_like(target) if need else x.new_empty(0) for need, target in zip(rest[-1], targets)]


run = EngineOperator(f"bn_act_pool(Tensor x, {SCHEMA}) -> (Tensor out, Tensor taps, Tensor[] stats)", _bn_act_pool, _bn_act_pool_fake)
run_backward = EngineOperator(
    f"bn_act_pool_backward(Tensor grad, Tensor x, {SCHEMA}, Tensor taps, Tensor[] stats, bool[] needs) -> Tensor[]",
    _bn_act_pool_backward,
    _bn_act_pool_backward_fake,
)
