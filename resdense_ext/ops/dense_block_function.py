"""The dense block as autograd sees it: one node, whatever the number of layers, and with it the unit behind the block."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Optional

import torch
from torch import Tensor

from resdense_ext import reference
from resdense_ext.ops import dense_block as block_engine
from resdense_ext.ops import dense_stage as stage_engine
from resdense_ext.ops.by_reference import by_reference, differentiable, gradients
from resdense_ext.ops.cast import without_autocast
from resdense_ext.ops.dense_block import DenseBlockConfig
from resdense_ext.ops.pooled_unit import PooledUnitConfig
from resdense_ext.ops.ranks import check_one_process
from resdense_ext.ops.reference_backend import ReferenceBackend
from resdense_ext.ops.running import update_running_statistics
from resdense_ext.ops.saved import saved_tensors
from resdense_ext.ops.units import GRADS, UNIT, beside_statistics, flat_tensors, group_of, parameters_of
from resdense_ext.reference import Activation, BatchNorm, DenseLayer, PooledUnit

__all__ = ["DenseBlockFunction", "dense_block"]


class DenseBlockFunction(torch.autograd.Function):
    """Keeps the block buffer (its own output), the statistics, the masks, and the bottlenecks that the policy keeps.

    With a unit behind the block there are two outputs: the unit's, and the buffer, so that its gradient can be differentiated.
    """

    @staticmethod
    def forward(
        ctx,
        config: DenseBlockConfig,
        unit: Optional[PooledUnitConfig],
        norms: list[BatchNorm],
        masks: list[Tensor],
        x: Tensor,
        *tensors,
    ):
        layers, unit_tensors = _split(tensors, unit)
        with without_autocast(x.device):
            if unit is None:
                buffer, stats, kept = block_engine.run(x, layers, masks, *config)
                out = buffer
            else:
                out, buffer, stats, kept = stage_engine.run(x, layers, masks, *config, unit_tensors, *unit)
        # Here, before anything is packed: a checkpoint's recomputation may stop at the packing, and counts all the same.
        statistics = _norm_statistics(config, stats, x.shape[1], layers)
        if unit is not None:
            statistics.append((stats[0], stats[1]))
        counts = [buffer.numel() // buffer.shape[1]] * len(norms)
        update_running_statistics(norms, statistics, counts, [stats[-1]] * len(norms) if config.group else None)
        ctx.set_materialize_grads(False)
        ctx.configs, ctx.counts = (config, unit), (len(tensors), len(masks), len(stats))
        ctx.channels = x.shape[1]
        ctx.save_for_backward(buffer, *tensors, *masks, *stats, *kept)
        return out if unit is None else (out, buffer)

    @staticmethod
    def backward(ctx, *grads: Optional[Tensor]):
        why = "a dense block's output is the buffer of all its feature maps"
        buffer, *saved = saved_tensors(ctx, "dense_block", why)
        saved = iter(saved)
        tensors, masks, stats = (list(islice(saved, size)) for size in ctx.counts)
        config, unit = ctx.configs
        needs = [ctx.needs_input_grad[4], *parameters_of(ctx.needs_input_grad[5 : 5 + len(tensors)])]
        if all(grad is None for grad in grads):
            found = [None] * len(needs)
        elif by_reference(*grads):
            found = _differentiable_backward(grads, buffer, ctx.channels, config, unit, tensors, masks, needs)
        else:
            found = _backward(grads, buffer, config, unit, tensors, masks, stats, list(saved), needs)
        wanted = [value if need else None for value, need in zip(found, needs)]
        return None, None, None, None, wanted[0], *beside_statistics(wanted[1:])


def _backward(grads, buffer, config, unit, tensors, masks, stats, kept, needs) -> list[Optional[Tensor]]:
    layers, unit_tensors = _split(tensors, unit)
    *upstream, grad_buffer = grads
    if upstream and torch.compiler.is_compiling():
        grad_buffer = None  # zeros there, a buffer of them: only a second derivative has more
    with without_autocast(buffer.device):
        if upstream and upstream[0] is not None:
            return stage_engine.run_backward(
                *upstream, grad_buffer, buffer, layers, masks, *config, unit_tensors, *unit, stats, kept, needs
            )
        # No unit behind the block, or none whose output was used.
        of_block = needs[: 1 + len(GRADS) * len(layers) // UNIT]
        found = block_engine.run_backward(grad_buffer, buffer, layers, masks, *config, stats, kept, of_block)
    return found + [None] * (len(needs) - len(found))


def _split(tensors: Sequence[Optional[Tensor]], unit: Optional[PooledUnitConfig]) -> tuple[list, list]:
    """The tensors of the layers and those of the unit behind them."""
    end = len(tensors) - (0 if unit is None else UNIT)
    return list(tensors[:end]), list(tensors[end:])


def _norm_statistics(config, stats, channels: int, tensors) -> list[tuple[Tensor, Tensor]]:
    """Every layer's units' ``(mean, m2)`` of this batch, in the order of the units."""
    mean, m2, *bottleneck = stats
    result, i = [], 0
    for count in config.units:
        result.append((mean[:channels], m2[:channels]))
        if count == 2:
            result.append((bottleneck[0], bottleneck[1]))
            bottleneck = bottleneck[2:]
        i += count
        channels += tensors[UNIT * (i - 1) + 4].shape[0]
    return result


@differentiable
def _differentiable_backward(grads, buffer, channels, config, unit, tensors, masks, needs, create_graph) -> list[Optional[Tensor]]:
    """The gradients as functions that can be differentiated again, through the reference.

    The input is read from the buffer, of which it is the first channels, and everything is aliased: differentiation is to
    stop at these aliases, not to go on to what they are views of.
    """
    check_one_process(config.group)
    x = buffer[:, :channels].view_as(buffer[:, :channels])
    tensors = [t if t is None else t.view_as(t) for t in tensors]
    inputs = [x, *parameters_of(tensors)]
    layers, unit_tensors = _split(tensors, unit)
    y = reference.dense_block(x, config.layers(layers, masks), Activation(config.activation, config.slope))
    outputs = [y]
    if unit is not None:
        activation = Activation(unit.activation, unit.slope)
        outputs = [reference.bn_act_pool(y, unit.unit(*unit_tensors), activation), y]
    return gradients(outputs, grads, inputs, needs, create_graph)


def dense_block(
    x: Tensor,
    layers: Sequence[DenseLayer],
    activation: Activation,
    keep: Sequence[bool],
    backend: ReferenceBackend,
    unit: Optional[PooledUnit] = None,
    unit_activation: Activation = Activation(),
) -> Tensor:
    """The checked call: see `resdense_ext.functional.dense_block`. ``keep`` says whose bottleneck may be kept."""
    tensors = flat_tensors(unit for layer in layers for unit in layer.units)
    norms = [unit.norm for layer in layers for unit in layer.units]
    unit_config = None
    if unit is not None:
        tensors += flat_tensors([(unit.norm, unit.conv)])
        norms.append(unit.norm)
        unit_config = PooledUnitConfig.of(unit, unit_activation, backend.name)
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors))
    kept = [wanted and grad and len(layer.units) == 2 for wanted, layer in zip(keep, layers)]
    config = DenseBlockConfig.of(layers, activation, kept, backend.name, group_of(norms))
    masks = [layer.mask for layer in layers if layer.mask is not None]
    out = DenseBlockFunction.apply(config, unit_config, norms, masks, x, *tensors)
    return out if unit is None else out[0]
