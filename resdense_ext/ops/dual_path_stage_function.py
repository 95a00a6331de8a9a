"""The dual path stage as autograd sees it: one node, whatever the number of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Optional

import torch
from torch import Tensor

from resdense_ext import reference
from resdense_ext.ops import dual_path_stage as engine
from resdense_ext.ops.by_reference import by_reference, differentiable, gradients
from resdense_ext.ops.cast import without_autocast
from resdense_ext.ops.dual_path_stage import DualPathStageConfig, saved_inputs, statistics_of, units_of
from resdense_ext.ops.reference_backend import ReferenceBackend
from resdense_ext.ops.running import update_running_statistics
from resdense_ext.ops.saved import saved_tensors
from resdense_ext.ops.units import beside_statistics, flat_tensors, parameters_of
from resdense_ext.reference import Activation, DualPathBlock

__all__ = ["dual_path_stage"]


class DualPathStageFunction(torch.autograd.Function):
    """Keeps the inputs, the buffer of the dense half (its second output), the residual halves between the blocks, the
    statistics, and the inner maps of the blocks that the policy keeps."""

    @staticmethod
    def forward(ctx, config: DualPathStageConfig, blocks: Sequence[DualPathBlock], inputs: int, *tensors):
        xs, tensors = list(tensors[:inputs]), list(tensors[inputs:])
        with without_autocast(xs[0].device):
            residual, dense, stats, kept = engine.run(xs, tensors, *config)
        # Here, before anything is packed: a checkpoint's recomputation may stop at the packing, and counts all the same.
        update_running_statistics([unit.norm for unit in units_of(blocks)], *statistics_of(xs, blocks, stats))
        ctx.set_materialize_grads(False)
        saved = saved_inputs(xs, config.projected)
        ctx.config, ctx.counts = config, (len(saved), len(tensors), len(stats))
        ctx.channels = [x.shape[1] for x in xs]
        ctx.save_for_backward(dense, *saved, *tensors, *stats, *kept)
        return residual, dense

    @staticmethod
    def backward(ctx, *grads: Optional[Tensor]):
        why = "a dual path stage's dense half is the buffer of all its feature maps, and its input is the stage's input"
        dense, *saved = saved_tensors(ctx, "dual_path_stage", why)
        saved = iter(saved)
        xs, tensors, stats = (list(islice(saved, size)) for size in ctx.counts)
        inputs = len(ctx.channels)
        if len(xs) < inputs:
            xs.append(dense[:, : ctx.channels[1]])
        needs = [*ctx.needs_input_grad[3 : 3 + inputs], *parameters_of(ctx.needs_input_grad[3 + inputs : 3 + inputs + len(tensors)])]
        if all(grad is None for grad in grads):
            found: Sequence[Optional[Tensor]] = [None] * len(needs)
        elif by_reference(*grads):
            found = _differentiable_backward(grads, xs, tensors, ctx.config, needs)
        else:
            with without_autocast(dense.device):
                found = engine.run_backward(
                    *grads, dense, xs, tensors, *ctx.config, stats, list(saved), needs
                )
        wanted = [value if need else None for value, need in zip(found, needs)]
        return None, None, None, *wanted[:inputs], *beside_statistics(wanted[inputs:])


@differentiable
def _differentiable_backward(grads, xs, tensors, config, needs, create_graph) -> list[Optional[Tensor]]:
    """The gradients as functions that can be differentiated again, through the reference, of aliases as in a dense block's."""
    xs = [x.view_as(x) for x in xs]
    tensors = [t if t is None else t.view_as(t) for t in tensors]
    inputs = [*xs, *parameters_of(tensors)]
    x = xs[0] if len(xs) == 1 else tuple(xs)
    halves = reference.dual_path_stage(x, config.blocks(tensors), Activation(config.activation, config.slope))
    return gradients(halves, grads, inputs, needs, create_graph)


def dual_path_stage(
    xs: Sequence[Tensor],
    blocks: Sequence[DualPathBlock],
    activation: Activation,
    keep: Sequence[bool],
    backend: ReferenceBackend,
) -> tuple[Tensor, Tensor]:
    """The checked call: see `resdense_ext.functional.dual_path_stage`. ``keep`` says whose inner maps may be kept."""
    tensors = flat_tensors(units_of(blocks))
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*xs, *tensors))
    plan = [("fast" if wanted else "min") if grad else "none" for wanted in keep]
    config = DualPathStageConfig.of(blocks, activation, plan, backend.name)
    return DualPathStageFunction.apply(config, blocks, len(xs), *xs, *tensors)
