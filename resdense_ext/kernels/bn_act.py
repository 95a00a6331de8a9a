"""Batch norm and activation, and their backward: one pass over the maps each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resdense_ext.kernels.launch import launch, programs, tickets
from resdense_ext.kernels.maps import Map
from resdense_ext.kernels.stats import sum_programs
from resdense_ext.kernels.tiles import (
    activate,
    activation_slope,
    last_arrival,
    load_tile,
    rounded,
    row_offsets,
    store_tile,
    sum_rows,
)
from resdense_ext.kernels.walk import load_vector, tile_at, tiling_of, wide
from resdense_ext.reference import Activation, accumulation_dtype

__all__ = ["bn_act", "bn_act_backward", "bn_act_backward_accumulate"]


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
def bn_act_bwd_kernel(
    grad_ptr, gn, gs, gc, x_ptr, xn, xs, xc, scale_ptr, shift_ptr, center_ptr, out_ptr, on, os, oc,
    sum_dy_ptr, sum_dy_xc_ptr, part_ptr, ticket_ptr, M, S, C, tiles,
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
        x = load_tile(x_ptr, row_offsets(sample, place, xn, xs), channels * xc, row_mask, mask, LAST).to(WIDE)
        scale = load_vector(scale_ptr, channels, mask, WIDE)
        y = scale * x + load_vector(shift_ptr, channels, mask, WIDE)
        dy = grad * activation_slope(y, SLOPE, ACT)
        if ACT == "relu":
            dy = tl.where(y <= 0, 0.0, grad)  # 0 whatever comes, infinities too
        dy = tl.where(row_mask[:, None], dy, 0.0)
        sum_dy += sum_rows(dy)
        sum_dy_xc += sum_rows(dy * (x - load_vector(center_ptr, channels, mask, WIDE)))
        out_rows = row_offsets(sample, place, on, os)
        if ACCUMULATE:
            dy = load_tile(out_ptr, out_rows, channels * oc, row_mask, mask, OUT_LAST).to(WIDE) + scale * dy
        store_tile(out_ptr, out_rows, channels * oc, rounded(dy, out_ptr.dtype.element_ty), row_mask, mask, OUT_LAST)

    columns = block * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = columns < C
    xc_part_ptr = part_ptr + programs * C
    tl.store(part_ptr + program * C + columns, sum_dy, mask=mask)
    tl.store(xc_part_ptr + program * C + columns, sum_dy_xc, mask=mask)
    if last_arrival(ticket_ptr + block, programs):
        tl.store(sum_dy_ptr + columns, sum_programs(part_ptr, programs, C, columns, mask, WIDE), mask=mask)
        tl.store(sum_dy_xc_ptr + columns, sum_programs(xc_part_ptr, programs, C, columns, mask, WIDE), mask=mask)


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


def _backward(grad, x, scale, shift, center, activation, out, accumulate) -> tuple[Tensor, Tensor]:
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
        *sums.unbind(), torch.empty((2, shared, m.C), dtype=dtype, device=x.device), tickets(x, tiling.columns),
        m.count, m.S, m.C, tiling.rows,
        ACCUMULATE=accumulate, ACT=activation.name, SLOPE=activation.slope,
        GRAD_LAST=g.last, LAST=m.last, OUT_LAST=to.last, WIDE=wide(x.dtype), **tiling.constants(),
    )  # fmt: skip
    return sums.unbind()


def bn_act_backward(
    grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, center: Tensor, activation: Activation
) -> tuple[Tensor, Tensor]:
    """``grad *= act'(scale * x + shift)``, in place; the sums of that and of its product with ``x - center``, ``[C]``."""
    return _backward(grad, x, scale, shift, center, activation, grad, False)


def bn_act_backward_accumulate(
    out: Tensor, grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, center: Tensor, activation: Activation
) -> tuple[Tensor, Tensor]:
    """``out += scale * dy`` with dy as in `bn_act_backward`; ``grad`` stays as it is."""
    return _backward(grad, x, scale, shift, center, activation, out, True)
