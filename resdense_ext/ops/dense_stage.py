"""A dense block and the transition or head behind it as one: the block's buffer never leaves, and has one gradient.

The unit behind the block reads the buffer with the statistics that came with its channels, and its backward begins the
gradient D to which the block's layers add; so no gradient of the whole buffer is handed over, copied and corrected.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resdense_ext.ops import backend as backends
from resdense_ext.ops import dense_block, pooled_unit
from resdense_ext.ops.dense_block import BufferGradient, DenseBlockConfig
from resdense_ext.ops.operands import Stats
from resdense_ext.ops.operator import EngineOperator
from resdense_ext.ops.pooled_unit import PooledUnitConfig
from resdense_ext.ops.units import parameters_of, wanted_gradients

__all__: list[str] = []

_BLOCK = len(DenseBlockConfig._fields)


def _split(numbers) -> tuple[DenseBlockConfig, list, PooledUnitConfig, list]:
    """The block's config, the unit's tensors and config, and what comes behind."""
    block, (tensors, *unit) = numbers[:_BLOCK], numbers[_BLOCK:]
    size = len(PooledUnitConfig._fields)
    return DenseBlockConfig(*block), tensors, PooledUnitConfig(*unit[:size]), unit[size:]


def _dense_stage(x: Tensor, tensors, masks, *numbers) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    config, unit_tensors, unit_config, _ = _split(numbers)
    buffer, stats, kept = dense_block.forward(x, tensors, masks, config, unit_config.batch_stats)
    unit = unit_config.unit(*unit_tensors)
    fold = unit_config.fold(unit, Stats(*stats[:2]), buffer)
    out, _ = pooled_unit.forward(buffer, unit, fold, backends.get(config.backend))
    return out, buffer, stats, kept


def _dense_stage_backward(grad: Tensor, grad_buffer, buffer: Tensor, tensors, masks, *numbers) -> list[Tensor]:
    config, unit_tensors, unit_config, (stats, kept, needs) = _split(numbers)
    unit = unit_config.unit(*unit_tensors)
    needs, unit_needs = needs[:-4], [any(needs[:-4]), *needs[-4:]]
    D = torch.zeros_like(buffer) if grad_buffer is None else torch.empty_like(buffer).copy_(grad_buffer)
    gradient = BufferGradient.of(D)
    fold = unit_config.fold(unit, Stats(*stats[:2]), buffer)
    into = gradient.pending(buffer, 0, buffer.shape[1])
    backend = backends.get(config.backend)
    _, values = pooled_unit.backward(grad, buffer, None, unit, fold, backend, into, unit_needs)
    gradient = gradient._replace(deferred=unit_config.batch_stats)
    grads = dense_block.backward(gradient, buffer, tensors, masks, config, stats, kept, needs)
    found = [v if need else None for v, need in zip(values, unit_needs[1:])]
    _, *unit_grads = wanted_gradients([None, *found], [buffer], unit_tensors)
    return grads + unit_grads


def _dense_stage_fake(x: Tensor, tensors, masks, *numbers) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    config, unit_tensors, unit_config, _ = _split(numbers)
    buffer, stats, kept = dense_block.forward_fake(x, tensors, masks, config)
    return pooled_unit.output_like(buffer, unit_tensors, unit_config), buffer, stats, kept


def _dense_stage_backward_fake(grad: Tensor, grad_buffer, buffer: Tensor, tensors, masks, *numbers) -> list[Tensor]:
    config, unit_tensors, _, (_, _, needs) = _split(numbers)
    grads = dense_block.backward_fake(buffer, tensors, masks, config, needs[:-4])
    return grads + [
        torch.empty_like(target) if need else buffer.new_empty(0) for need, target in zip(needs[-4:], parameters_of(unit_tensors))
    ]


_SCHEMA = f"{dense_block.SCHEMA}, {pooled_unit.SCHEMA}"
run = EngineOperator(
    f"dense_stage(Tensor x, {_SCHEMA}) -> (Tensor out, Tensor buffer, Tensor[] stats, Tensor[] kept)",
    _dense_stage,
    _dense_stage_fake,
)
run_backward = EngineOperator(
    f"dense_stage_backward(Tensor grad, Tensor? grad_buffer, Tensor buffer, {_SCHEMA}, Tensor[] stats, Tensor[] kept, "
    "bool[] needs) -> Tensor[]",
    _dense_stage_backward,
    _dense_stage_backward_fake,
)
