"""Batch norm and activation, and their backward: one pass over the maps each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resdense_ext.kernels.launch import launch, programs, tickets
from resdense_ext.kernels.maps import Map
from resdense_ext.kernels.stats import finish_sums
from resdense_ext.kernels.tiles import (
    activate,
    load_tile,
    masked,
    rounded,
    row_offsets,
    store_tile,
    sum_rows,
)
from resdense_ext.kernels.walk import load_vector, tile_at, tiling_of, wide
from resdense_ext.reference import Activation, accumulation_dtype

__all__ = ["bn_act", "bn_act_backward", "bn_act_backward_accumulate", "mask_and_sum", "mask_tile"]


@triton.jit
def bn_act_fwd_kernel(
    x_ptr, xn, xs, xc, scale_ptr, shift_ptr, out_ptr, on, os, oc, M, S, C,
    ACT: tl.constexpr, SLOPE: tl.constexpr, LAST: tl.constexpr, OUT_LAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    sample, place, channels, row_mask, mask = tile_at(tl.program_id(0), tl.program_id(1), M, S, C, BLOCK_M, BLOCK_C)
    x = load_tile(x_ptr, row_offsets(sample, place, xn, xs), channels * xc, row_mask, mask, LAST).to(WIDE)
    y = activate(load_vector(scale_ptr, channels, mask, WIDE) * x + load_vector(shift_ptr, channels, mask, WIDE), SLOPE, ACT)
    out_rows = row_offsets(sample, place, on, os)
    store_tile(out_ptr, out_rows, channels * oc, rounded(y, out_ptr.dtype.element_ty), row_mask, mask, OUT_LAST)


@triton.jit
def mask_tile(
    grad, x_ptr, x_rows, x_columns, scale_ptr, shift_ptr, center_ptr, out_ptr, out_rows, out_columns,
    channels, row_mask, mask,
    ACCUMULATE: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr,
    LAST: tl.constexpr, OUT_LAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Writes ``dy = grad * act'`` or adds ``scale * dy``; the tile's sums of dy and of ``dy * (x - center)``."""
    x = load_tile(x_ptr, x_rows, x_columns, row_mask, mask, LAST).to(WIDE)
    scale = load_vector(scale_ptr, channels, mask, WIDE)
    y = scale * x + load_vector(shift_ptr, channels, mask, WIDE)
    dy = tl.where(row_mask[:, None], masked(grad, y, SLOPE, ACT), 0.0)
    sum_dy = sum_rows(dy)
    sum_dy_xc = sum_rows(dy * (x - load_vector(center_ptr, channels, mask, WIDE)))
    if ACCUMULATE:
        dy = load_tile(out_ptr, out_rows, out_columns, row_mask, mask, OUT_LAST).to(WIDE) + scale * dy
    store_tile(out_ptr, out_rows, out_columns, rounded(dy, out_ptr.dtype.element_ty), row_mask, mask, OUT_LAST)
    return sum_dy, sum_dy_xc


@triton.jit
def bn_act_bwd_kernel(
    grad_ptr, gn, gs, gc, x_ptr, xn, xs, xc, scale_ptr, shift_ptr, center_ptr, out_ptr, on, os, oc,
    sums_ptr, part_ptr, ticket_ptr, M, S, C, tiles,
    ACCUMULATE: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr,
    GRAD_LAST: tl.constexpr, LAST: tl.constexpr, OUT_LAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    program, programs, block = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    sum_dy = tl.zeros((BLOCK_C,), WIDE)
    sum_dy_xc = tl.zeros((BLOCK_C,), WIDE)
    for tile in range(program, tiles, programs):
        sample, place, channels, row_mask, mask = tile_at(tile, block, M, S, C, BLOCK_M, BLOCK_C)
        grad = load_tile(grad_ptr, row_offsets(sample, place, gn, gs), channels * gc, row_mask, mask, GRAD_LAST).to(WIDE)
        dy, dy_xc = mask_tile(
            grad, x_ptr, row_offsets(sample, place, xn, xs), channels * xc, scale_ptr, shift_ptr, center_ptr,
            out_ptr, row_offsets(sample, place, on, os), channels * oc, channels, row_mask, mask,
            ACCUMULATE, ACT, SLOPE, LAST, OUT_LAST, WIDE,
        )  # fmt: skip
        sum_dy += dy
        sum_dy_xc += dy_xc
    finish_sums((sum_dy, sum_dy_xc), sums_ptr, part_ptr, ticket_ptr, block, C, WIDE, BLOCK_C)


def bn_act(x: Tensor, scale: Tensor, shift: Tensor, activation: Activation, out: Tensor) -> None:
    """``out = act(scale * x + shift)``."""
    m, to = Map.of(x), Map.of(out, "out")
    if x.numel() == 0:
        return
    tiling = tiling_of(to)
    launch(
        bn_act_fwd_kernel, (tiling.rows, tiling.columns), x,
        x, m.sn, m.ss, m.sc, scale, shift, out, to.sn, to.ss, to.sc, m.count, m.S, m.C,
        ACT=activation.name, SLOPE=activation.slope, LAST=m.last, OUT_LAST=to.last, WIDE=wide(x.dtype), **tiling.constants(),
    )  # fmt: skip


def mask_and_sum(
    grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, center: Tensor, activation: Activation, out: Tensor, accumulate: bool
) -> tuple[Tensor, Tensor]:
    """``out = dy`` or ``out += scale * dy`` with ``dy = grad * act'``; the sums of dy and of its product with ``x - center``."""
    m, g, to = Map.of(x), Map.of(grad, "grad"), Map.of(out, "out")
    dtype = accumulation_dtype(x.dtype)
    sums = torch.empty((2, m.C), dtype=dtype, device=x.device)
    if x.numel() == 0:
        return sums.zero_().unbind()
    tiling = tiling_of(m)
    shared = programs(x, tiling.rows, tiling.columns, 4)
    launch(
        bn_act_bwd_kernel, (shared, tiling.columns), x,
        grad, g.sn, g.ss, g.sc, x, m.sn, m.ss, m.sc, scale, shift, center, out, to.sn, to.ss, to.sc,
        sums, torch.empty((2, shared, m.C), dtype=dtype, device=x.device), tickets(x, tiling.columns),
        m.count, m.S, m.C, tiling.rows,
        ACCUMULATE=accumulate, ACT=activation.name, SLOPE=activation.slope,
        GRAD_LAST=g.last, LAST=m.last, OUT_LAST=to.last, WIDE=wide(x.dtype), **tiling.constants(),
    )  # fmt: skip
    return sums.unbind()


def bn_act_backward(
    grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, center: Tensor, activation: Activation
) -> tuple[Tensor, Tensor]:
    """``grad *= act'(scale * x + shift)``, in place; the sums of that and of its product with ``x - center``, ``[C]``."""
    return mask_and_sum(grad, x, scale, shift, center, activation, grad, False)


def bn_act_backward_accumulate(
    out: Tensor, grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, center: Tensor, activation: Activation
) -> tuple[Tensor, Tensor]:
    """``out += scale * dy`` with dy as in `bn_act_backward`; ``grad`` stays as it is."""
    return mask_and_sum(grad, x, scale, shift, center, activation, out, True)
