"""Dropout and the maxima of windows side by side, of which a byte a maximum is kept.

Stock keeps the mask, the input of the pool, and a number of 8 bytes a maximum. But a maximum's gradient goes to one position of
its window, or to none where that was dropped: a byte says which.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from resdense_ext.functional import dropout_mask

__all__ = ["DROPPED", "dropout_max_pool"]

DROPPED = 255
"""What is kept of a maximum that was dropped; windows have less positions than that."""
_MAX_POOLS = F.max_pool1d, F.max_pool2d, F.max_pool3d


class DropoutMaxPoolFunction(torch.autograd.Function):
    """Keeps the number of every maximum in its window, in row-major order, or `DROPPED`."""

    @staticmethod
    def forward(ctx, x: Tensor, p: float, window: tuple[int, ...]) -> Tensor:
        ctx.window, ctx.layout, ctx.scale, mask = window, (x.shape, x.stride()), 1.0, None
        if p > 0:
            mask, ctx.scale = dropout_mask(x, x.shape[1], p)
            x = (x * mask).mul_(ctx.scale)
        y, places = _MAX_POOLS[len(window) - 1](x, window, return_indices=True)
        first, offsets = _places(x.shape[2:], window, x.device)
        numbers = torch.zeros(x[0, 0].numel(), dtype=torch.uint8, device=x.device)
        numbers[offsets] = torch.arange(len(offsets), dtype=torch.uint8, device=x.device)
        taps = numbers[places - first]
        if mask is not None:
            kept = _planes(mask).gather(2, _planes(places)).view_as(places)
            taps.masked_fill_(~kept, DROPPED)
        ctx.save_for_backward(taps)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        (taps,), (shape, strides) = ctx.saved_tensors, ctx.layout
        first, offsets = _places(shape[2:], ctx.window, taps.device)
        places = F.pad(offsets, (0, DROPPED + 1 - len(offsets)))[taps.long()] + first
        grad = grad * (taps != DROPPED) * ctx.scale
        nothing = torch.empty_strided(shape, strides, dtype=grad.dtype, device=grad.device).zero_()
        return _planes(nothing).scatter(2, _planes(places), _planes(grad)).reshape(shape), None, None


def _planes(t: Tensor) -> Tensor:
    """``[N, C, positions]``"""
    return t.reshape(*t.shape[:2], -1)


def _places(sizes: Sequence[int], window: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Where in a map of these sizes, of which the positions are numbered in row-major order, each window begins, and how far from
    there its positions lie."""
    steps = [math.prod(sizes[at + 1 :]) for at in range(len(sizes))]
    outputs = [size // width for size, width in zip(sizes, window)]
    first = _grid(outputs, [width * step for width, step in zip(window, steps)], device)
    return first, _grid(window, steps, device).flatten()


def _grid(counts: Sequence[int], steps: Sequence[int], device: torch.device) -> Tensor:
    """``sum(i_n * steps[n])`` at every ``(i_0, i_1, ...)`` below the counts."""
    axes = [torch.arange(0, count * step, step, device=device) for count, step in zip(counts, steps)]
    return sum(torch.meshgrid(*axes, indexing="ij"))


def dropout_max_pool(x: Tensor, p: float, window: tuple[int, ...]) -> Tensor:
    """``max_pool(dropout(x, p), window)``, with strides as long as the windows.

    Args:
        x: a dense map ``[N, C, *spatial]`` with one to three spatial dimensions, of one window or more along each.
        p: the probability of a value to be dropped, 0 to 1; the mask is that which `torch.nn.functional.dropout` would draw.
        window: a number a spatial dimension, of less than `DROPPED` positions.
    """
    return DropoutMaxPoolFunction.apply(x, p, window)
