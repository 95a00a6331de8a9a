"""The residual block as autograd sees it: one node, whatever is inside."""

from __future__ import annotations

from itertools import islice
from typing import Optional

import torch
from torch import Tensor

from resdense_ext import reference
from resdense_ext.ops import residual_block as engine
from resdense_ext.ops.by_reference import by_reference, differentiable
from resdense_ext.ops.cast import without_autocast
from resdense_ext.ops.ranks import check_one_process
from resdense_ext.ops.reference_backend import ReferenceBackend
from resdense_ext.ops.residual_maps import ResidualBlockConfig, counts_of, norms_of, plan_of, reads_out, units_of
from resdense_ext.ops.running import update_running_statistics
from resdense_ext.ops.saved import saved_tensors
from resdense_ext.ops.units import GRADS, flat_tensors, parameters_of
from resdense_ext.reference import Activation, ResidualBlock

__all__ = ["residual_block"]


class ResidualBlockFunction(torch.autograd.Function):
    """Keeps the input, the output where backward reads it, the statistics, and the maps that the policy keeps."""

    @staticmethod
    def forward(ctx, config: ResidualBlockConfig, block: ResidualBlock, x: Tensor, *tensors):
        with without_autocast(x.device):
            out, stats, kept = engine.run(x, tensors, *config)
        # Here, before anything is packed: a checkpoint's recomputation may stop at the packing, and counts all the same.
        totals = stats[-1].split(1) if config.group else None
        update_running_statistics(norms_of(block), list(zip(stats[::2], stats[1::2])), counts_of(x, block), totals)
        ctx.config, ctx.counts = config, (len(tensors), len(stats))
        _, last = config.activations
        ctx.save_for_backward(out if reads_out(last) else None, x, *tensors, *stats, *kept)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        why = "a residual block's output tells the derivative of its activation, and its input is the block's input"
        out, x, *saved = saved_tensors(ctx, "residual_block", why)
        saved = iter(saved)
        tensors, stats = (list(islice(saved, size)) for size in ctx.counts)
        needs = [ctx.needs_input_grad[2], *parameters_of(ctx.needs_input_grad[3 : 3 + len(tensors)])]
        if by_reference(grad):
            found = _differentiable_backward(grad, x, tensors, ctx.config, needs)
        else:
            with without_autocast(x.device):
                found = engine.run_backward(
                    grad, out, x, tensors, *ctx.config, stats, list(saved), needs
                )
        wanted = [value if need else None for value, need in zip(found, needs)]
        result: list[Optional[Tensor]] = []
        for at in range(1, len(wanted), len(GRADS)):
            weight, bias, conv_weight, conv_bias = wanted[at : at + len(GRADS)]
            result += [weight, bias, None, None, conv_weight, conv_bias]
        return None, None, wanted[0], *result


@differentiable
def _differentiable_backward(grad, x, tensors, config, needs, create_graph) -> list[Optional[Tensor]]:
    """The gradients as functions that can be differentiated again, through the reference, of aliases as in a dense block's."""
    check_one_process(config.group)
    x = x.view_as(x)
    tensors = [t if t is None else t.view_as(t) for t in tensors]
    inputs = [x, *parameters_of(tensors)]
    wanted = [value for value, need in zip(inputs, needs) if need]
    y = reference.residual_block(x, config.block(tensors), *config.activations)
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=create_graph, allow_unused=True))
    return [next(found) if need else None for need in needs]


def residual_block(
    x: Tensor, block: ResidualBlock, activation: Activation, last: Activation, policy: str, backend: ReferenceBackend
) -> Tensor:
    """The checked call: see `resdense_ext.functional.residual_block`."""
    tensors = flat_tensors(units_of(block))
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors))
    plan = plan_of(x, block, last, policy if grad else "min", block.units[0].conv.weight.dtype)
    config = ResidualBlockConfig.of(block, activation, last, plan, backend.name)
    return ResidualBlockFunction.apply(config, block, x, *tensors)

