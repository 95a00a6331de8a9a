"""The operators of ``pool(act(scale * x + shift))``: fake kernels, and the reference where CUDA alone has a compiled kernel.

The reference computes in three spatial dimensions, of which a map's missing ones come first, with size 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resdense_ext import reference
from resdense_ext.ops._library import CPU_LIBRARY, LIBRARY
from resdense_ext.reference import Activation, accumulation_dtype

__all__: list[str] = []

aten = torch.ops.aten


def _sums(x: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(x.new_empty(x.shape[1], dtype=accumulation_dtype(x.dtype)) for _ in range(2))


def _bn_act_avg_pool(x, scale, shift, negative_slope, kernel_size, stride, padding, out):
    return None


def _bn_act_avg_pool_backward(grad, x, scale, shift, center, negative_slope, kernel_size, stride, padding, out, accumulate):
    return _sums(x)


def _bn_act_max_pool(x, scale, shift, negative_slope, kernel_size, stride, padding, out, taps):
    return None


def _bn_act_max_pool_backward(
    grad, taps, x, scale, shift, center, negative_slope, kernel_size, stride, padding, out, accumulate
):
    return _sums(x)


def _bn_act_global_pool(x, scale, shift, negative_slope):
    return x.new_empty(*x.shape[:2], *[1] * (x.dim() - 2))


def _bn_act_global_pool_backward(grad, x, scale, shift, center, negative_slope, out, accumulate):
    return _sums(x)


def _deep(x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], *[1] * (5 - x.dim()), *x.shape[2:])


def _write(out: Tensor, name: str, pooled: Tensor) -> None:
    pooled = pooled.view(*pooled.shape[:2], *pooled.shape[7 - out.dim() :])
    if out.shape != pooled.shape:
        raise RuntimeError(f"{name}: expected shape {tuple(pooled.shape)} (that of the pooled x), got {tuple(out.shape)}")
    out.copy_(pooled)


def _windows(kernel_size: list[int], stride: list[int], padding: list[int]) -> tuple[list[int], list[int], list[int]]:
    missing = 3 - len(kernel_size)
    return [1] * missing + kernel_size, [1] * missing + stride, [0] * missing + padding


def _byte_windows(kernel_size: list[int], stride: list[int], padding: list[int]) -> tuple[list[int], list[int], list[int]]:
    taps = math.prod(kernel_size)
    if taps > 255:
        raise RuntimeError(f"kernel_size: expected at most 255 places a window, whose numbers are kept in a byte, got {taps}")
    return _windows(kernel_size, stride, padding)


def _activated(x: Tensor, scale: Tensor, shift: Tensor, negative_slope: float) -> Tensor:
    """Not rounded to the dtype of ``x``."""
    activation = Activation("leaky_relu", negative_slope)
    return _deep(reference.apply_pending(x.to(scale.dtype), scale, shift, activation))


def _renumbered(places: Tensor, sizes: list[int], starts: list[Tensor], others: list[int]) -> Tensor:
    """Row-major numbers in a box of ``sizes``, of a map ``[N, C, *outputs]``, as those in the box of size ``others`` that
    begins ``starts`` before it."""
    _, height, width = sizes
    result = torch.zeros_like(places)
    for place, start, other in zip((places // (height * width), places // width % height, places % width), starts, others):
        result = result * other + place + start
    return result


def _starts(windows, outputs: torch.Size, device: torch.device) -> list[Tensor]:
    """Where the windows begin in the map, one tensor a dimension, each along its own."""
    _, stride, padding = windows
    along = [torch.arange(outputs[i], device=device) * stride[i] - padding[i] for i in range(3)]
    return [along[0][:, None, None], along[1][:, None], along[2]]


def _bn_act_avg_pool_cpu(x, scale, shift, negative_slope, kernel_size, stride, padding, out):
    y = _activated(x, scale, shift, negative_slope)
    _write(out, "out", aten.avg_pool3d(y, *_windows(kernel_size, stride, padding)))


def _bn_act_max_pool_cpu(x, scale, shift, negative_slope, kernel_size, stride, padding, out, taps):
    windows = _byte_windows(kernel_size, stride, padding)
    y = _activated(x, scale, shift, negative_slope)
    largest, places = aten.max_pool3d_with_indices(y, *windows)
    starts = _starts(windows, places.shape[2:], x.device)
    _write(out, "out", largest)
    _write(taps, "taps", _renumbered(places, y.shape[2:], [-start for start in starts], windows[0]))


def _bn_act_global_pool_cpu(x, scale, shift, negative_slope):
    y = _activated(x, scale, shift, negative_slope)
    return y.mean((2, 3, 4)).to(x.dtype).view(*x.shape[:2], *[1] * (x.dim() - 2))


def _mask_and_sum(gradient: Tensor, x, scale, shift, center, negative_slope, out, accumulate):
    gradient, y = gradient.view(x.shape), _activated(x, scale, shift, negative_slope).view(x.shape)
    dy = gradient * reference.activation_slope(y, Activation("leaky_relu", negative_slope))
    reduced = [0, *range(2, x.dim())]
    sums = dy.sum(reduced), (dy * (x - reference.per_channel(center, x))).sum(reduced)
    out.copy_(out + reference.per_channel(scale, x) * dy if accumulate else dy)
    return sums


def _bn_act_avg_pool_backward_cpu(grad, x, scale, shift, center, negative_slope, kernel_size, stride, padding, out, accumulate):
    wide, windows = _deep(x).to(scale.dtype), _windows(kernel_size, stride, padding)
    gradient = aten.avg_pool3d_backward(_deep(grad).to(scale.dtype), wide, *windows, False, True, None)
    return _mask_and_sum(gradient, x, scale, shift, center, negative_slope, out, accumulate)


def _bn_act_max_pool_backward_cpu(
    grad, taps, x, scale, shift, center, negative_slope, kernel_size, stride, padding, out, accumulate
):
    wide, windows = _deep(x).to(scale.dtype), _byte_windows(kernel_size, stride, padding)
    taps = _deep(taps).long()
    places = _renumbered(taps, windows[0], _starts(windows, taps.shape[2:], x.device), wide.shape[2:])
    grad = _deep(grad).to(scale.dtype)
    gradient = aten.max_pool3d_with_indices_backward(grad, wide, *windows, [1, 1, 1], False, places)
    return _mask_and_sum(gradient, x, scale, shift, center, negative_slope, out, accumulate)


def _bn_act_global_pool_backward_cpu(grad, x, scale, shift, center, negative_slope, out, accumulate):
    gradient = (grad.to(scale.dtype) / math.prod(x.shape[2:])).expand(x.shape)
    return _mask_and_sum(gradient, x, scale, shift, center, negative_slope, out, accumulate)


if CPU_LIBRARY is None:  # else there are no such operators
    for fake in (
        _bn_act_avg_pool,
        _bn_act_avg_pool_backward,
        _bn_act_max_pool,
        _bn_act_max_pool_backward,
        _bn_act_global_pool,
        _bn_act_global_pool_backward,
    ):
        torch.library.register_fake(f"resdense::{fake.__name__[1:]}", fake, lib=LIBRARY)
        LIBRARY.impl(fake.__name__[1:], globals()[f"{fake.__name__}_cpu"], "CPU")
