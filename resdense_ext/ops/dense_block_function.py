"""The dense block as autograd sees it: one node, whatever the number of layers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Optional

import torch
from torch import Tensor

from resdense_ext import reference
from resdense_ext.ops.backend import ReferenceBackend
from resdense_ext.ops.dense_block import GRADS, UNIT, DenseBlockConfig, flat_tensors
from resdense_ext.ops.running import update_running_statistics
from resdense_ext.reference import Activation, BatchNorm, DenseLayer

__all__ = ["DenseBlockFunction", "dense_block"]


class DenseBlockFunction(torch.autograd.Function):
    """Keeps the block buffer (its own output), the statistics, the masks, and the bottlenecks that the policy keeps."""

    @staticmethod
    def forward(ctx, config: DenseBlockConfig, norms: list[BatchNorm], masks: list[Tensor], x: Tensor, *tensors):
        with _without_autocast(x.device):
            out, stats, kept = torch.ops.resdense.dense_block(x, tensors, masks, *config)
        # Here, before anything is packed: a checkpoint's recomputation may stop at the packing, and counts all the same.
        update_running_statistics(norms, _norm_statistics(config, stats, x.shape[1], tensors), out.numel() // out.shape[1])
        ctx.config, ctx.counts = config, (len(tensors), len(masks), len(stats))
        ctx.channels = x.shape[1]
        ctx.save_for_backward(out, *tensors, *masks, *stats, *kept)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        try:
            out, *saved = ctx.saved_tensors
        except RuntimeError as error:
            if "inplace operation" not in str(error):
                raise
            raise RuntimeError(
                "dense_block: its output, or a parameter of it, was changed in place after the forward, and the backward needs "
                f"it as it was (a dense block's output is the buffer of all its feature maps): {error}"
            ) from error
        saved = iter(saved)
        tensors, masks, stats = (list(islice(saved, size)) for size in ctx.counts)
        needs = [ctx.needs_input_grad[3]]
        for unit in range(len(ctx.config.eps)):
            needs += [ctx.needs_input_grad[4 + UNIT * unit + position] for position in GRADS]
        if torch.is_grad_enabled():
            grads = _differentiable_backward(grad, out, ctx.channels, ctx.config, tensors, masks, needs)
        else:
            with _without_autocast(out.device):
                grads = torch.ops.resdense.dense_block_backward(
                    grad, out, tensors, masks, *ctx.config, stats, list(saved), needs
                )
        wanted = [value if need else None for value, need in zip(grads, needs)]
        result: list[Optional[Tensor]] = []
        for unit in range(len(ctx.config.eps)):
            weight, bias, conv_weight, conv_bias = wanted[1 + 4 * unit : 5 + 4 * unit]
            result += [weight, bias, None, None, conv_weight, conv_bias]
        return None, None, None, wanted[0], *result


def _without_autocast(device: torch.device):
    """The engine has its dtypes already; an inner convolution is to take them as they are."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _norm_statistics(config, stats, channels: int, tensors) -> list[tuple[Tensor, Tensor]]:
    """Every unit's ``(mean, m2)`` of this batch, in the order of the units."""
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


def _differentiable_backward(grad, out, channels, config, tensors, masks, needs) -> list[Optional[Tensor]]:
    """The gradients as functions that can be differentiated again, through the reference.

    The input is read from the output, of which it is the first channels, and everything is aliased: differentiation is to
    stop at these aliases, not to go on to what they are views of.
    """
    x = out[:, :channels].view_as(out[:, :channels])
    tensors = [t if t is None else t.view_as(t) for t in tensors]
    inputs = [x] + [tensors[UNIT * u + p] for u in range(len(config.eps)) for p in GRADS]
    wanted = [value for value, need in zip(inputs, needs) if need]
    y = reference.dense_block(x, config.layers(tensors, masks), Activation(config.activation, config.slope))
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]


def dense_block(
    x: Tensor, layers: Sequence[DenseLayer], activation: Activation, policy: str, backend: ReferenceBackend
) -> Tensor:
    """The checked call: see `resdense_ext.functional.dense_block`."""
    tensors = flat_tensors(layers)
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors))
    keep = [policy == "fast" and grad and len(layer.units) == 2 for layer in layers]
    config = DenseBlockConfig.of(layers, activation, keep, backend.name)
    masks = [layer.mask for layer in layers if layer.mask is not None]
    norms = [unit.norm for layer in layers for unit in layer.units]
    return DenseBlockFunction.apply(config, norms, masks, x, *tensors)
