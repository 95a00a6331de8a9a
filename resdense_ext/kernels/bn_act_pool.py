"""Pools of ``act(scale * x + shift)``, which is never stored, and their backward: one pass over the maps each.

Backward gathers: an input looks up the windows that cover it, so that no two programs write one place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from resdense_ext.kernels.bn_act import mask_and_sum, mask_tile
from resdense_ext.kernels.launch import launch, programs, tickets
from resdense_ext.kernels.maps import Map
from resdense_ext.kernels.stats import finish_sums
from resdense_ext.kernels.tiles import activate, load_tile, rounded, row_offsets, store_tile, sum_rows
from resdense_ext.kernels.walk import load_vector, tile_at, tiling_of, wide
from resdense_ext.kernels.windows import Windows, check_spatial, input_of, output_of
from resdense_ext.reference import Activation, accumulation_dtype

__all__ = [
    "bn_act_avg_pool",
    "bn_act_avg_pool_backward",
    "bn_act_global_pool",
    "bn_act_global_pool_backward",
    "bn_act_max_pool",
    "bn_act_max_pool_backward",
]


@triton.jit
def bn_act_pool_fwd_kernel(
    x_ptr, xn, xs, xc, scale_ptr, shift_ptr, out_ptr, on, os, oc, taps_ptr, tn, ts, tc, M, S, C, D, H, W, OH, OW,
    MAXIMUM: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    ACT: tl.constexpr, SLOPE: tl.constexpr, LAST: tl.constexpr, OUT_LAST: tl.constexpr, TAPS_LAST: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    sample, place, channels, row_mask, mask = tile_at(tl.program_id(0), tl.program_id(1), M, S, C, BLOCK_M, BLOCK_C)
    scale, shift = load_vector(scale_ptr, channels, mask, WIDE), load_vector(shift_ptr, channels, mask, WIDE)
    result = tl.full((BLOCK_M, BLOCK_C), float("-inf") if MAXIMUM else 0.0, WIDE)
    chosen = tl.full((BLOCK_M, BLOCK_C), -1, tl.int32)
    for tap in range(TAPS):
        at, inside = input_of(place, tap, D, H, W, OH, OW, KERNEL, STRIDE, PADDING)
        inside &= row_mask
        x = load_tile(x_ptr, row_offsets(sample, at, xn, xs), channels * xc, inside, mask, LAST).to(WIDE)
        y = activate(scale * x + shift, SLOPE, ACT)
        if MAXIMUM:
            # As torch chooses among the values as they would have been written: the first of equals, the last NaN.
            y = rounded(y, DTYPE).to(WIDE)
            larger = inside[:, None] & ((y > result) | (y != y) | (chosen < 0))
            result = tl.where(larger, y, result)
            chosen = tl.where(larger, tap, chosen)
        else:
            result += tl.where(inside[:, None], y, 0.0)
    if MAXIMUM:
        rows = row_offsets(sample, place, tn, ts)
        store_tile(taps_ptr, rows, channels * tc, chosen.to(tl.uint8), row_mask, mask, TAPS_LAST)
    else:
        result /= TAPS
    store_tile(out_ptr, row_offsets(sample, place, on, os), channels * oc, rounded(result, DTYPE), row_mask, mask, OUT_LAST)


@triton.jit
def bn_act_pool_bwd_kernel(
    grad_ptr, gn, gs, gc, taps_ptr, tn, ts, tc, x_ptr, xn, xs, xc, scale_ptr, shift_ptr, center_ptr,
    out_ptr, on, os, oc, sums_ptr, part_ptr, ticket_ptr, M, S, C, tiles, H, W, OD, OH, OW,
    MAXIMUM: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, COVERING: tl.constexpr,
    ACCUMULATE: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr,
    GRAD_LAST: tl.constexpr, TAPS_LAST: tl.constexpr, LAST: tl.constexpr, OUT_LAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1)
    sum_dy = tl.zeros((BLOCK_C,), WIDE)
    sum_dy_xc = tl.zeros((BLOCK_C,), WIDE)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        sample, place, channels, row_mask, mask = tile_at(tile, block, M, S, C, BLOCK_M, BLOCK_C)
        grad = tl.zeros((BLOCK_M, BLOCK_C), WIDE)
        for number in range(COVERING):
            at, tap, inside = output_of(place, number, H, W, OD, OH, OW, KERNEL, STRIDE, PADDING)
            inside &= row_mask
            share = load_tile(grad_ptr, row_offsets(sample, at, gn, gs), channels * gc, inside, mask, GRAD_LAST).to(WIDE)
            if MAXIMUM:
                chosen = load_tile(taps_ptr, row_offsets(sample, at, tn, ts), channels * tc, inside, mask, TAPS_LAST)
                share = tl.where(chosen.to(tl.int32) == tap[:, None], share, 0.0)
            grad += share
        if not MAXIMUM:
            grad /= KERNEL[0] * KERNEL[1] * KERNEL[2]
        dy, dy_xc = mask_tile(
            grad, x_ptr, row_offsets(sample, place, xn, xs), channels * xc, scale_ptr, shift_ptr, center_ptr,
            out_ptr, row_offsets(sample, place, on, os), channels * oc, channels, row_mask, mask,
            ACCUMULATE, ACT, SLOPE, LAST, OUT_LAST, WIDE,
        )  # fmt: skip
        sum_dy += dy
        sum_dy_xc += dy_xc
    finish_sums((sum_dy, sum_dy_xc), sums_ptr, part_ptr, ticket_ptr, block, C, WIDE, BLOCK_C)


@triton.jit
def bn_act_global_pool_fwd_kernel(
    x_ptr, xn, xs, xc, scale_ptr, shift_ptr, out_ptr, S, C,
    ACT: tl.constexpr, SLOPE: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    sample = tl.cast(tl.program_id(0), tl.int64)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask, channels = columns < C, columns.to(tl.int64)
    scale, shift = load_vector(scale_ptr, channels, mask, WIDE), load_vector(shift_ptr, channels, mask, WIDE)
    total = tl.zeros((BLOCK_C,), WIDE)
    for first in range(0, S, BLOCK_M):
        place = first + tl.arange(0, BLOCK_M)
        rows = sample * xn + place.to(tl.int64) * xs
        x = load_tile(x_ptr, rows, channels * xc, place < S, mask, LAST).to(WIDE)
        y = activate(scale * x + shift, SLOPE, ACT)
        total += sum_rows(tl.where((place < S)[:, None], y, 0.0))
    tl.store(out_ptr + sample * C + channels, rounded(total / S, out_ptr.dtype.element_ty), mask=mask)


def _pool(
    x: Tensor, scale: Tensor, shift: Tensor, activation: Activation, windows: Windows, out: Tensor, taps: Optional[Tensor]
) -> None:
    m, to = Map.of(x), Map.of(out, "out")
    chosen = to if taps is None else _map_of_taps(taps, windows, x)
    _check_shape(out, "out", windows.pooled(x), "the pooled x")
    if out.numel() == 0:
        return
    tiling = tiling_of(to)
    launch(
        bn_act_pool_fwd_kernel, (tiling.rows, tiling.columns), x,
        x, m.sn, m.ss, m.sc, scale, shift, out, to.sn, to.ss, to.sc, taps, chosen.sn, chosen.ss, chosen.sc,
        to.count, to.S, to.C, *windows.inputs, *windows.outputs[1:],
        MAXIMUM=taps is not None, **windows.constants(), ACT=activation.name, SLOPE=activation.slope,
        LAST=m.last, OUT_LAST=to.last, TAPS_LAST=chosen.last, WIDE=wide(x.dtype), **tiling.constants(),
    )  # fmt: skip


def _pool_backward(
    grad: Tensor,
    taps: Optional[Tensor],
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    center: Tensor,
    activation: Activation,
    windows: Windows,
    out: Tensor,
    accumulate: bool,
) -> tuple[Tensor, Tensor]:
    m, g, to = Map.of(x), Map.of(grad, "grad"), Map.of(out, "out")
    _check_shape(grad, "grad", windows.pooled(x), "the pooled x")
    chosen = g if taps is None else _map_of_taps(taps, windows, x)
    _check_shape(out, "out", x.shape, "x")
    dtype = accumulation_dtype(x.dtype)
    sums = torch.empty((2, m.C), dtype=dtype, device=x.device)
    if x.numel() == 0:
        return sums.zero_().unbind()
    # Of positions side by side every element has its own window, whose arithmetic leaves registers for half as many.
    tiling = tiling_of(m, 4096 if m.last else 2048)
    shared = programs(x, tiling.rows, tiling.columns, 4)
    launch(
        bn_act_pool_bwd_kernel, (shared, tiling.columns), x,
        grad, g.sn, g.ss, g.sc, taps, chosen.sn, chosen.ss, chosen.sc, x, m.sn, m.ss, m.sc, scale, shift, center,
        out, to.sn, to.ss, to.sc,
        sums, torch.empty((2, shared, m.C), dtype=dtype, device=x.device), tickets(x, tiling.columns),
        m.count, m.S, m.C, tiling.rows, *windows.inputs[1:], *windows.outputs,
        MAXIMUM=taps is not None, **windows.constants(), COVERING=windows.covering,
        ACCUMULATE=accumulate, ACT=activation.name, SLOPE=activation.slope,
        GRAD_LAST=g.last, TAPS_LAST=chosen.last, LAST=m.last, OUT_LAST=to.last, WIDE=wide(x.dtype), **tiling.constants(),
    )  # fmt: skip
    return sums.unbind()


def _map_of_taps(taps: Tensor, windows: Windows, x: Tensor) -> Map:
    if taps.dtype != torch.uint8:
        raise ValueError(f"taps: expected dtype torch.uint8, got {taps.dtype}")
    if windows.taps > 255:
        raise ValueError(
            f"kernel_size: expected at most 255 places a window, whose numbers are kept in a byte, got {windows.taps}"
        )
    _check_shape(taps, "taps", windows.pooled(x), "the pooled x")
    return Map.of(taps, "taps")


def _check_shape(t: Tensor, name: str, expected: tuple[int, ...], whose: str) -> None:
    if t.shape != expected:
        raise ValueError(f"{name}: expected shape {tuple(expected)} (that of {whose}), got {tuple(t.shape)}")


def bn_act_avg_pool(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    activation: Activation,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    out: Tensor,
) -> None:
    """``out = average(act(scale * x + shift))`` over whole windows, in which padding counts as zeros."""
    _pool(x, scale, shift, activation, Windows.of(x, kernel_size, stride, padding), out, None)


def bn_act_avg_pool_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    center: Tensor,
    activation: Activation,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    out: Tensor,
    accumulate: bool,
) -> tuple[Tensor, Tensor]:
    """`mask_and_sum` of the gradient that the pool passes back."""
    windows = Windows.of(x, kernel_size, stride, padding)
    return _pool_backward(grad, None, x, scale, shift, center, activation, windows, out, accumulate)


def bn_act_max_pool(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    activation: Activation,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    out: Tensor,
    taps: Tensor,
) -> None:
    """The maxima of ``act(scale * x + shift)``, and in ``taps`` their row-major numbers in their windows (uint8)."""
    _pool(x, scale, shift, activation, Windows.of(x, kernel_size, stride, padding), out, taps)


def bn_act_max_pool_backward(
    grad: Tensor,
    taps: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    center: Tensor,
    activation: Activation,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    out: Tensor,
    accumulate: bool,
) -> tuple[Tensor, Tensor]:
    """`mask_and_sum` of the gradient that the pool passes back to the maxima."""
    windows = Windows.of(x, kernel_size, stride, padding)
    return _pool_backward(grad, taps, x, scale, shift, center, activation, windows, out, accumulate)


def _means(x: Tensor) -> tuple[int, ...]:
    """The shape of one value a sample and channel."""
    return *x.shape[:2], *[1] * (x.dim() - 2)


def bn_act_global_pool(x: Tensor, scale: Tensor, shift: Tensor, activation: Activation) -> Tensor:
    """The mean of ``act(scale * x + shift)`` over all positions of a sample, ``[N, C, 1, ...]``."""
    check_spatial(x)
    m = Map.of(x)
    out = torch.empty(_means(x), dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    tiling = tiling_of(replace(m, N=1))
    launch(
        bn_act_global_pool_fwd_kernel, (m.N, tiling.columns), x, x, m.sn, m.ss, m.sc, scale, shift, out, m.S, m.C,
        ACT=activation.name, SLOPE=activation.slope, LAST=m.last, WIDE=wide(x.dtype), **tiling.constants(),
    )  # fmt: skip
    return out


def bn_act_global_pool_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    center: Tensor,
    activation: Activation,
    out: Tensor,
    accumulate: bool,
) -> tuple[Tensor, Tensor]:
    """`mask_and_sum` of what every position is given: an equal share of its sample's gradient."""
    check_spatial(x)
    _check_shape(out, "out", x.shape, "x")
    _check_shape(grad, "grad", _means(x), "the pooled x")
    share = grad.to(accumulation_dtype(x.dtype)) / Map.of(x).S
    return mask_and_sum(share.expand(x.shape), x, scale, shift, center, activation, out, accumulate)
