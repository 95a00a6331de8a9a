"""A stem, a transition or a head by itself, as autograd sees it: one node that keeps its input."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from resdense_ext import reference
from resdense_ext.ops import pooled_unit
from resdense_ext.ops.by_reference import by_reference, differentiable, gradients
from resdense_ext.ops.cast import without_autocast
from resdense_ext.ops.pooled_unit import PooledUnitConfig
from resdense_ext.ops.ranks import check_one_process
from resdense_ext.ops.reference_backend import ReferenceBackend
from resdense_ext.ops.running import update_running_statistics
from resdense_ext.ops.saved import saved_tensors
from resdense_ext.ops.units import UNIT, flat_tensors, parameters_of
from resdense_ext.reference import Activation, BatchNorm, PooledUnit

__all__ = ["bn_act_pool"]


class BNActPoolFunction(torch.autograd.Function):
    """Keeps the input, its statistics and, of maxima, a byte each."""

    @staticmethod
    def forward(ctx, config: PooledUnitConfig, norm: BatchNorm, x: Tensor, *tensors):
        with without_autocast(x.device):
            out, taps, stats = pooled_unit.run(x, tensors, *config)
        mean, m2, *total = stats
        update_running_statistics([norm], [(mean, m2)], [x.numel() // x.shape[1]], total or None)
        ctx.config = config
        ctx.save_for_backward(x, *tensors, taps, *stats)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, *saved = saved_tensors(ctx, "bn_act_pool", "its activation is computed again from its input")
        (*tensors, taps), stats = saved[: UNIT + 1], saved[UNIT + 1 :]
        needs = [ctx.needs_input_grad[2], *parameters_of(ctx.needs_input_grad[3 : 3 + UNIT])]
        if by_reference(grad):
            grads = _differentiable_backward(grad, x, tensors, ctx.config, needs)
        else:
            with without_autocast(x.device):
                grads = pooled_unit.run_backward(grad, x, tensors, *ctx.config, taps, stats, needs)
        dx, weight, bias, conv_weight, conv_bias = (value if need else None for value, need in zip(grads, needs))
        return None, None, dx, weight, bias, None, None, conv_weight, conv_bias


@differentiable
def _differentiable_backward(grad, x, tensors, config, needs, create_graph) -> list[Optional[Tensor]]:
    """The gradients as functions that can be differentiated again, through the reference, of aliases as in a dense block's."""
    check_one_process(config.group)
    x = x.view_as(x)
    tensors = [t if t is None else t.view_as(t) for t in tensors]
    inputs = [x, *parameters_of(tensors)]
    y = reference.bn_act_pool(x, config.unit(*tensors), Activation(config.activation, config.slope))
    return gradients([y], [grad], inputs, needs, create_graph)


def bn_act_pool(x: Tensor, unit: PooledUnit, activation: Activation, backend: ReferenceBackend) -> Tensor:
    """The checked call: see `resdense_ext.functional.bn_act_pool` and `resdense_ext.functional.transition`."""
    config = PooledUnitConfig.of(unit, activation, backend.name)
    return BNActPoolFunction.apply(config, unit.norm, x, *flat_tensors([(unit.norm, unit.conv)]))
