"""A convolution by a backend's primitives, on those positions of its input alone that it reads; a transposed one by the framework's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

import torch
from torch import Tensor

from resdense_ext.ops.layout import dense_map, memory_format_of
from resdense_ext.ops.operands import ConvGrads, Fold, Pending, Stats
from resdense_ext.ops.reference_backend import ReferenceBackend
from resdense_ext.reference import BatchNorm, Conv, TransposedConv

__all__ = [
    "convolve",
    "convolve_backward",
    "convolved",
    "finished",
    "is_matrix_product",
    "sampled",
    "sampling",
    "through_memory",
]


def is_matrix_product(conv: Conv) -> bool:
    """Whether every output is made of one position of the input, in its place, and of all its channels."""
    outputs, inputs = conv.weight.shape[:2]
    return conv.groups == 1 and conv.weight.numel() == outputs * inputs and conv.keeps_size


def sampling(conv: Conv | TransposedConv) -> Optional[tuple[slice, ...]]:
    """The positions that a strided convolution of kernel size 1 reads: of these alone it has stride 1. None for any other."""
    whole = any(size != 1 for size in conv.weight.shape[2:]) or any(conv.padding) or all(step == 1 for step in conv.steps)
    if whole or isinstance(conv, TransposedConv):
        return None
    return (slice(None), slice(None), *(slice(None, None, step) for step in conv.steps))


def sampled(x: Tensor, conv: Conv) -> tuple[Tensor, Conv]:
    """The positions alone that are read, and the convolution of these; as they are where there is no `sampling`."""
    at = sampling(conv)
    return (x, conv) if at is None else (dense_map(x[at]), conv._replace(stride=()))


def convolve(
    backend: ReferenceBackend, x: Tensor, fold: Optional[Fold], conv: Conv, out: Tensor, stats: Optional[Stats]
) -> None:
    """See `ReferenceBackend.bn_act_conv`."""
    x, conv = sampled(x, conv)
    backend.bn_act_conv(x, None if fold is None else fold.affine, conv, out, None, 1.0, stats)


def convolved(
    backend: ReferenceBackend, x: Tensor, fold: Optional[Fold], conv: Conv | TransposedConv, reader: Optional[BatchNorm]
) -> tuple[Tensor, Stats]:
    """See `ReferenceBackend.convolved`."""
    if isinstance(conv, TransposedConv):
        a = x if fold is None else backend.bn_act(x, fold.affine)
        z = backend.convolution(a.to(conv.weight.dtype), conv).contiguous(memory_format=memory_format_of(x))
        return z, backend.stats_for(reader, z)
    x, conv = sampled(x, conv)
    return backend.convolved(x, None if fold is None else fold.affine, conv, reader)


def finished(
    backend: ReferenceBackend, x: Tensor, conv: Conv | TransposedConv, grad: Tensor | Pending, need_weight: bool
) -> Tensor | Pending:
    """A gradient that nobody but the convolution's backward reads, as that wants it: what it would finish in a pass and in memory of
    its own is finished in place."""
    if sampling(conv) is not None:
        conv = conv._replace(stride=())
    if not isinstance(grad, Pending) or (isinstance(conv, Conv) and backend.takes_pending(x, conv, need_weight)):
        return grad
    return backend.pending_grad_(grad)


def through_memory(
    backend: ReferenceBackend,
    x: Tensor,
    fold: Optional[Fold],
    grad: Tensor | Pending,
    into: Optional[Pending],
    through: Callable[[Tensor, Tensor], tuple[Tensor, Optional[Tensor], Optional[Tensor]]],
) -> ConvGrads:
    """As `ReferenceBackend.bn_act_conv_backward`, of what is activated in memory: ``through(a, grad)`` takes the finished gradient
    to that, in its layout, and to the weight and the bias."""
    a = x if fold is None else backend.bn_act(x, fold.affine)
    dx, weight, bias = through(a, backend.pending_grad(grad) if isinstance(grad, Pending) else grad)
    del a, grad
    return backend.norm_act_backward(dx, x, fold, into)._replace(weight=weight, bias=bias)


def convolve_backward(
    backend: ReferenceBackend,
    x: Tensor,
    fold: Optional[Fold],
    conv: Conv | TransposedConv,
    grad: Tensor | Pending,
    into: Optional[Pending],
    need_weight: bool,
    finish: bool = False,
    centered: bool = False,
) -> ConvGrads:
    """See `ReferenceBackend.bn_act_conv_backward`; of a sampled input, the gradient goes ``into`` one or is not wanted.

    A ``centered`` gradient is that of a map which nothing reads but norms that subtract its mean: whatever is added to a channel
    makes no difference, so the bias has no gradient but rounding.
    """
    if centered and conv.bias is not None:
        bias, conv = torch.zeros_like(conv.bias), conv._replace(bias=None)
        found = convolve_backward(backend, x, fold, conv, grad, into, need_weight, finish)
        return found._replace(bias=bias if need_weight else None)
    if isinstance(conv, TransposedConv):

        def through(a: Tensor, dz: Tensor) -> tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
            dtype = conv.weight.dtype
            dx, weight, bias = backend.convolution_backward(dz.to(dtype), a.to(dtype), conv, True, need_weight)
            return dx.to(a.dtype).contiguous(memory_format=memory_format_of(a)), weight, bias

        return through_memory(backend, x, fold, grad, into, through)
    at = sampling(conv)
    x, conv = sampled(x, conv)
    if at is None or into is None:
        return backend.bn_act_conv_backward(x, fold, conv, grad, into, need_weight, finish)
    part = into._replace(dy=dense_map(into.dy[at]), z=x)
    grads = backend.bn_act_conv_backward(x, fold, conv, grad, part, need_weight)
    into.dy[at].copy_(part.dy)
    return grads._replace(input=into)
