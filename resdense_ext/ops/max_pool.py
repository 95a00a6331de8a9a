"""The maxima of windows, of which a byte each is kept, also behind a dropout.

Stock keeps the mask, the input of the pool, and a number of 8 bytes a maximum. But a maximum's gradient goes to one position of
its window, or to none where that was dropped: a byte says which. The kernels of pools behind norms find it, and take gradients
there, of a padded copy where the last windows reach over the edge. Where they do not serve (no compiled backend, dropouts, second
derivatives, maps that they cannot walk), the framework's operators do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from resdense_ext.functional import dropout_mask
from resdense_ext.ops import backend as backends
from resdense_ext.ops.by_reference import by_reference
from resdense_ext.ops.layout import is_map, map_beside, memory_format_of
from resdense_ext.ops.reference_backend import ReferenceBackend
from resdense_ext.reference import Pool

__all__ = ["DROPPED", "max_pool"]

DROPPED = 255
"""What is kept of a maximum that was dropped; windows have less positions than that."""
_POOLS = F.max_pool1d, F.max_pool2d, F.max_pool3d


class MaxPoolFunction(torch.autograd.Function):
    """Keeps the number of every maximum in its window, in row-major order, or `DROPPED`."""

    @staticmethod
    def forward(ctx, x: Tensor, pool: Pool, p: float) -> Tensor:
        ctx.pool, ctx.layout, ctx.scale, mask = pool, (x.shape, x.stride()), 1.0, None
        ctx.backend = None if p > 0 else _kernels_for(x, pool)
        if ctx.backend is not None:
            y, taps = _maxima(x, pool, ctx.backend)
            ctx.format = memory_format_of(x)
            ctx.save_for_backward(taps)
            return y
        if p > 0:
            mask, ctx.scale = dropout_mask(x, x.shape[1], p)
            x = (x * mask).mul_(ctx.scale)
        of_rank = _POOLS[x.dim() - 3]
        y, places = of_rank(x, *pool.windows, ceil_mode=pool.ceil_mode, return_indices=True)
        first, offsets = _places(x.shape[2:], places.shape[2:], pool, x.device)
        numbers = torch.zeros(_span(pool, x.shape[2:]), dtype=torch.uint8, device=x.device)
        numbers[offsets] = torch.arange(len(offsets), dtype=torch.uint8, device=x.device)
        taps = numbers[places - first]
        if mask is not None:
            taps.masked_fill_(~_planes(mask).gather(2, _planes(places)).view_as(places), DROPPED)
        ctx.save_for_backward(taps)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        (taps,), pool, (shape, strides) = ctx.saved_tensors, ctx.pool, ctx.layout
        if ctx.backend is not None and not by_reference(grad):
            return _maxima_backward(grad, taps, shape, ctx.format, pool, ctx.backend), None, None
        first, offsets = _places(shape[2:], taps.shape[2:], pool, taps.device)
        places = F.pad(offsets, (0, DROPPED + 1 - len(offsets)))[taps.long()] + first
        kept = taps != DROPPED  # of others nothing goes to some place in the map
        places, grad = places * kept, torch.where(kept, grad, 0)
        # Of x the sizes and the format are read alone.
        x = torch.empty_strided(shape, strides, dtype=grad.dtype, device=grad.device)
        dx = _unpool(grad, x, pool, places)
        return dx if ctx.scale == 1 else dx.mul_(ctx.scale), None, None


def _kernels_for(x: Tensor, pool: Pool) -> Optional[ReferenceBackend]:
    """A backend that keeps the places of maxima."""
    if torch.compiler.is_compiling() or not is_map(x):
        return None
    backend = backends.choose(x, x.dtype)
    return None if backend.name == "reference" else backend


def _overhang(sizes: Sequence[int], outputs: Sequence[int], pool: Pool) -> list[int]:
    """How far the last windows reach beyond the map and its padding."""
    dimensions = zip(sizes, outputs, *pool.windows)
    return [max(0, (out - 1) * stride + width - size - 2 * padding) for size, out, width, stride, padding in dimensions]


def _maxima(x: Tensor, pool: Pool, backend: ReferenceBackend) -> tuple[Tensor, Tensor]:
    """Them and their numbers, by the kernels of a norm that does nothing."""
    overhang = _overhang(x.shape[2:], pool.outputs(x.shape[2:]), pool)
    if any(overhang):
        x = F.pad(x, [of for size in reversed(overhang) for of in (0, size)], value=-math.inf)
    return backend.bn_act_pool(x, backend.linear(x).affine, pool._replace(ceil_mode=False))


def _maxima_backward(
    grad: Tensor, taps: Tensor, shape: Sequence[int], format: torch.memory_format, pool: Pool, backend: ReferenceBackend
) -> Tensor:
    """The gradient of a map of this shape, added to zeros, which stand for the map as well: the kernels only look what a norm would
    want to know."""
    overhang = _overhang(shape[2:], taps.shape[2:], pool)
    padded = (*shape[:2], *(size + of for size, of in zip(shape[2:], overhang)))
    dx = torch.empty(padded, dtype=grad.dtype, device=grad.device, memory_format=format).zero_()
    pool, into = pool._replace(ceil_mode=False), backend.pending(dx, dx)
    backend.bn_act_pool_backward(map_beside(taps, grad), taps, dx, backend.linear(dx), pool, into)
    return dx[(..., *map(slice, shape[2:]))].contiguous(memory_format=format)


def _unpool(grad: Tensor, x: Tensor, pool: Pool, places: Tensor) -> Tensor:
    windows = [list(sizes) for sizes in pool.windows]
    if x.dim() == 3:
        windows = [[fill, *sizes] for fill, sizes in zip((1, 1, 0), windows)]
        grad, x, places = (t.unsqueeze(2) for t in (grad, x, places))
        return _unpool(grad, x, Pool(pool.kind, *map(tuple, windows), pool.ceil_mode), places).squeeze(2)
    backward = torch.ops.aten.max_pool2d_with_indices_backward if x.dim() == 4 else torch.ops.aten.max_pool3d_with_indices_backward
    return backward(grad, x, *windows, [1] * (x.dim() - 2), pool.ceil_mode, places)


def _planes(t: Tensor) -> Tensor:
    """``[N, C, positions]``"""
    return t.reshape(*t.shape[:2], -1)


def _steps(sizes: Sequence[int]) -> list[int]:
    """How far apart neighbours along each dimension are in a map whose positions are numbered in row-major order."""
    return [math.prod(sizes[at + 1 :]) for at in range(len(sizes))]


def _span(pool: Pool, sizes: Sequence[int]) -> int:
    """How many of the map's positions lie between the first of a window and the last, both of them too."""
    return 1 + sum((width - 1) * step for width, step in zip(pool.kernel_size, _steps(sizes)))


def _places(sizes: Sequence[int], outputs: Sequence[int], pool: Pool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each window begins, in numbers of the map's positions, and how far from there its positions lie."""
    steps = _steps(sizes)
    begin = -sum(padding * step for padding, step in zip(pool.padding, steps))
    first = begin + _grid(outputs, [stride * step for stride, step in zip(pool.stride, steps)], device)
    return first, _grid(pool.kernel_size, steps, device).flatten()


def _grid(counts: Sequence[int], steps: Sequence[int], device: torch.device) -> Tensor:
    """``sum(i_n * steps[n])`` at every ``(i_0, i_1, ...)`` below the counts."""
    axes = [torch.arange(0, count * step, step, device=device) for count, step in zip(counts, steps)]
    return sum(torch.meshgrid(*axes, indexing="ij"))


def max_pool(x: Tensor, pool: Pool, p: float = 0.0) -> Tensor:
    """The maxima of ``dropout(x, p)``, as torch's pools of ``x.dim() - 2`` spatial dimensions have them.

    Args:
        x: a dense map ``[N, C, *spatial]`` with one to three spatial dimensions.
        pool: of maxima, with windows of less than `DROPPED` positions.
        p: the probability of a value to be dropped, 0 to 1; the mask is that which `torch.nn.functional.dropout` would draw.
    """
    return MaxPoolFunction.apply(x, pool, p)
