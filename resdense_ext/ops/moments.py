"""The backward of `resdense_ext.ops.conv1x1_bn_add_act` in 16 bits: products of matrices of 16-bit values that add up in float32,
as the matrix units of GPUs do.

Of a map as a matrix ``[M, C]``, which a channels-last one is as it lies in memory, the deviations are made once, rounded, with
columns of ones behind them: ``b = [a - near, 1, 1, 0 ..]``. Then two products have all sums over positions, and two the gradient::

    R = b^T b,  G = g^T b           the last columns are the sums of the deviations and of g
    da = g V + b T / unit           V = s W rounded;  T = unit * [-W^T diag(r dgamma / M) V; an offset; its rounding; 0 ..]

With C inputs and K outputs these read or write ``(11 C + 2 K) M`` values where x has a norm, the passes of that norm's backward
included, and ``(9 C + 2 K) M`` where it has none and a gradient is added to. While it lasts, b and da are as large as x, each.

The point near the mean is what the norm and the activation make of the mean of x. The offset, ``-V^T dbeta / M`` and that of the
deviations' own mean, is of the rounded matrices and goes in before the sum is rounded: rounded on its own it would be wrong by
the same amount at all positions, and so wrong in every sum over them.
"""

from __future__ import annotations

import functools
from typing import Optional

import torch
from torch import Tensor

from resdense_ext.ops.layout import memory_format_of
from resdense_ext.ops.operands import ConvGrads, Fold, Pending
from resdense_ext.ops.reference_backend import ReferenceBackend
from resdense_ext.reference import Conv

__all__ = ["backward", "gram", "suits"]

UNIT = 64.0
"""By which T is multiplied, a power of two: with M positions T's values are some ``M^1/2`` times smaller than V's, which float16
would round to few bits."""

_TILE, _PROGRAMS, _SHORTEST = 128, 264, 512
"""A product with few outputs is made in parts of its positions, as many as fill a card of 132 multiprocessors twice with tiles of
this size, of at least so many positions each. Short chains of sums also round less."""


def suits(x: Tensor, conv: Conv) -> bool:
    """Whether this is the way for a convolution of kernel size 1 without padding, on a backend whose device has matrix units."""
    return conv.groups == 1 and x.dtype == conv.weight.dtype and x.dtype in (torch.bfloat16, torch.float16)


@functools.lru_cache(maxsize=1024)
def _parts(count: int, a: int, b: int) -> int:
    """Into how many parts of one size the positions of a product ``[a, count] [count, b]`` are cut."""
    tiles = -(-a // _TILE) * -(-b // _TILE)
    most = max(1, min(_PROGRAMS // tiles, count // _SHORTEST))
    return next(parts for parts in range(most, 0, -1) if count % parts == 0)


def gram(a: Tensor, b: Tensor) -> Tensor:
    """``a^T b`` of 16-bit matrices ``[M, A]`` and ``[M, B]`` in float32."""
    parts = _parts(len(a), a.shape[1], b.shape[1])
    a, b = (t.view(parts, -1, t.shape[1]) for t in (a, b))
    if a.is_cuda:
        found = torch.bmm(a.mT, b, out_dtype=torch.float32)
    else:  # where the framework has no such product
        found = torch.bmm(a.float().mT, b.float())
    return found[0] if parts == 1 else found.sum(0)


def _matrix(x: Tensor) -> Tensor:
    """A map as ``[positions, C]``; a channels-last one is not copied."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def backward(
    x: Tensor,
    prologue: Optional[Fold],
    conv: Conv,
    fold: Fold,
    g: Tensor,
    into: Optional[Pending],
    backend: ReferenceBackend,
    need_input: bool,
    need_weight: bool,
) -> tuple[ConvGrads, Tensor, Tensor]:
    """As `conv1x1_bn_add_act.backward`, of a convolution of stride 1 that `suits`: also the gradients of its norm's parameters."""
    weight = conv.weight.detach().reshape(len(conv.weight), -1).contiguous()
    dy = _matrix(g.to(weight.dtype))
    b = backend.deviations(x, None if prologue is None else prologue.affine, _center(x, prologue, backend))
    dgamma, dbeta, dW, scaled, terms = backend.moments_terms(gram(b, b), gram(dy, b), weight, fold, UNIT, need_weight)
    dW = None if dW is None else dW.view_as(conv.weight)
    db = None if conv.bias is None or not need_weight else torch.zeros_like(conv.bias)
    found = ConvGrads(None, dW, db, None, None)
    if need_input:
        dx = _data_gradient(x, prologue, (dy, scaled, b, terms), into, backend)
        found = dx._replace(weight=dW, bias=db)
    return found, dgamma, dbeta


def _center(x: Tensor, prologue: Optional[Fold], backend: ReferenceBackend) -> Tensor:
    """The mean of x, or of its first sample: a point some deviations away at most."""
    known = prologue is not None and prologue.count is not None
    return prologue.mean if known else backend.channel_stats(x[:1])[0]


def _data_gradient(
    x: Tensor, prologue: Optional[Fold], products: tuple[Tensor, ...], into: Optional[Pending], backend: ReferenceBackend
) -> ConvGrads:
    """That of x, pending: the sum of two products, straight into the gradient there is where nothing stands between."""
    dy, scaled, b, terms = products
    target = None if into is None or prologue is not None else _matrix(into.dy)
    if target is not None and target.data_ptr() == into.dy.data_ptr() and into.dy.dtype == dy.dtype:
        target.addmm_(dy, scaled).addmm_(b, terms, alpha=1 / UNIT)
        return ConvGrads(into, None, None, None, None)
    da = torch.mm(dy, scaled).addmm_(b, terms, alpha=1 / UNIT)
    da = da.view(len(x), *x.shape[2:], x.shape[1]).movedim(-1, 1).contiguous(memory_format=memory_format_of(x))
    return backend.norm_act_backward(da, x, prologue, into)
