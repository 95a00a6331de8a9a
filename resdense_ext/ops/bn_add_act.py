"""``act(bn(z) + identity)`` and ``act(bn(z) + bn_d(identity))``, the end of a residual block.

One pass over its operands forward, and one backward up to the norms; where no backend but the reference serves the input it is
plain PyTorch. Kept are ``z``, the output, and the operand of a projection's norm; of a plain shortcut nothing.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from resdense_ext import reference
from resdense_ext.ops import backend as backends
from resdense_ext.ops.activation import activation_numbered
from resdense_ext.ops.add_act import fused_number, kernels_of
from resdense_ext.ops.batch_norm import batch_norm
from resdense_ext.ops.by_reference import by_reference, differentiable
from resdense_ext.ops.layout import walkable_map
from resdense_ext.ops.operands import Affine, Fold
from resdense_ext.ops.running import update_running_statistics
from resdense_ext.ops.saved import saved_tensors
from resdense_ext.reference import Activation, BatchNorm, accumulation_dtype

__all__ = ["bn_add_act"]


class BNAddActFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, weight, bias, identity, identity_weight, identity_bias, norms, folds, number: float):
        projection = (None, None) if folds[1] is None else folds[1].affine[:2]
        out = kernels_of(z).bn_add_act(z, *folds[0].affine[:2], identity, *projection, number)
        shortcut = () if folds[1] is None else (identity, identity_weight, identity_bias)
        ctx.save_for_backward(out, z, weight, bias, *shortcut)
        ctx.norms, ctx.folds, ctx.number = norms, folds, number
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        out, *saved = saved_tensors(ctx, "bn_add_act", "its output tells the derivative of its activation")
        operands = [saved[:3]] + ([saved[3:]] if len(saved) > 3 else [])
        shortcut = (None, None, None)
        if by_reference(grad):
            g = grad * reference.marked_slope(out.detach(), activation_numbered(ctx.number))
            grads = [_differentiable_gradients(g, *of, norm) for of, norm in zip(operands, ctx.norms)]
        else:
            z, identity = (of[0] for of in (*operands, shortcut)[:2])
            fold, identity_fold = ctx.folds
            center = None if identity_fold is None else identity_fold.mean
            grad = walkable_map(grad, like=out)
            g, sum_g, *sums = kernels_of(z).bn_add_act_backward(grad, out, z, fold.mean, identity, center, ctx.number)
            # A plain shortcut's gradient is g itself; of a projection g is free for it in the end.
            targets = (g.clone(), g)
            grads = [_gradients(*of, sum_g) for of in zip(targets, operands, ctx.folds, sums)]
        if len(grads) == 1:
            grads.append((g, None, None))
        return *grads[0], *grads[1], None, None, None


def _gradients(g: Tensor, operands: tuple, fold: Fold, sum_g_xc: Tensor, sum_g: Tensor) -> tuple:
    """Of a norm's input, made in ``g``, its weight and its bias."""
    x, weight, bias = operands
    dgamma = fold.rstd * sum_g_xc
    zero = torch.zeros_like(dgamma)
    correction = (zero, zero) if fold.count is None else fold.correction(sum_g, dgamma)
    kernels_of(g).pending_grad(g, x, fold.affine.scale, *correction)
    return g, None if weight is None else dgamma.to(weight.dtype), None if bias is None else sum_g.to(bias.dtype)


@differentiable
def _differentiable_gradients(
    g: Tensor, x: Tensor, weight: Optional[Tensor], bias: Optional[Tensor], norm: BatchNorm, create_graph: bool
) -> list[Optional[Tensor]]:
    # Of aliases: what they were computed from is not to be walked again.
    x, weight, bias = operands = [None if t is None else t.view_as(t) for t in (x, weight, bias)]
    y = batch_norm(x, norm._replace(weight=weight, bias=bias, momentum=None, num_batches_tracked=None))
    wanted = [t for t in operands if t is not None and t.requires_grad]
    grads = iter(torch.autograd.grad(y, wanted, g, create_graph=create_graph) if wanted else ())
    return [next(grads) if t is not None and t.requires_grad else None for t in operands]


def bn_add_act(
    z: Tensor, norm: BatchNorm, identity: Tensor, identity_norm: Optional[BatchNorm], activation: Activation
) -> Tensor:
    """The checked call: see `resdense_ext.functional.bn_add_act`."""
    number = fused_number(z, activation)
    if number is None:
        shortcut = identity if identity_norm is None else batch_norm(identity, identity_norm)
        return reference.add_act(batch_norm(z, norm), shortcut, activation)
    z, identity = walkable_map(z), walkable_map(identity)
    folds = _fold(z, norm), None if identity_norm is None else _fold(identity, identity_norm)
    projection = (None, None) if identity_norm is None else identity_norm[:2]
    return BNAddActFunction.apply(z, *norm[:2], identity, *projection, (norm, identity_norm), folds, number)


@torch.no_grad()
def _fold(x: Tensor, norm: BatchNorm) -> Fold:
    count = None
    if norm.batch_stats:
        count = x.numel() // x.shape[1]
        mean, m2 = backends.choose(x, x.dtype).channel_stats(x)
        update_running_statistics([norm], [(mean, m2)], [count])
        var = m2 / count
    else:
        dtype = accumulation_dtype(x.dtype)
        mean, var = (t.to(dtype).contiguous() for t in (norm.running_mean, norm.running_var))
    scale, shift, rstd = reference.fold_batch_norm(norm, mean, var)
    return Fold(Affine(scale, shift, Activation("identity")), mean, rstd, count)
