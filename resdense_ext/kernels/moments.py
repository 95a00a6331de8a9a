"""What the backward of a 16-bit 1x1 convolution and the norm behind it needs beside matrix products; see
`resdense_ext.ops.moments`."""

from __future__ import annotations

from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from resdense_ext.kernels.launch import ceil_div, launch, power_of_two
from resdense_ext.kernels.maps import Map
from resdense_ext.kernels.tiles import activate, load_tile, product, rounded, row_offsets, store_tile, sum_rows
from resdense_ext.kernels.walk import load_vector, tile_at, tiling_of
from resdense_ext.reference import Activation

__all__ = ["deviations", "moments_terms"]

_PRECISION = tl.constexpr("tf32x3")
"""Of the small products, whose operands are float32: three products in tf32 lose nothing of float32 that matters here."""


@triton.jit
def deviations_fwd_kernel(
    x_ptr, xn, xs, xc, scale_ptr, shift_ptr, center_ptr, out_ptr, width, M, S, C,
    AFFINE: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr, LAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_TAIL: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1)
    sample, place, channels, row_mask, mask = tile_at(tl.program_id(0), block, M, S, C, BLOCK_M, BLOCK_C)
    x = load_tile(x_ptr, row_offsets(sample, place, xn, xs), channels * xc, row_mask, mask, LAST).to(tl.float32)
    near = load_vector(center_ptr, channels, mask, tl.float32)
    if AFFINE:
        scale, shift = load_vector(scale_ptr, channels, mask, tl.float32), load_vector(shift_ptr, channels, mask, tl.float32)
        x, near = activate(scale * x + shift, SLOPE, ACT), activate(scale * near + shift, SLOPE, ACT)
    rows = (tl.cast(tl.program_id(0), tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)) * width
    store_tile(out_ptr, rows, channels, rounded(x - near, out_ptr.dtype.element_ty), row_mask, mask, True)
    if block == tl.num_programs(1) - 1:
        behind = tl.arange(0, BLOCK_TAIL)
        tail = tl.where(behind < 2, 1.0, 0.0)[None, :] + tl.zeros((BLOCK_M, BLOCK_TAIL), tl.float32)
        tail = tail.to(out_ptr.dtype.element_ty)
        store_tile(out_ptr, rows, (C + behind).to(tl.int64), tail, row_mask, C + behind < width, True)


def deviations(
    x: Tensor, scale: Optional[Tensor], shift: Optional[Tensor], activation: Activation, center: Tensor, out: Tensor
) -> None:
    """``out[:, :C] = act(scale * x + shift) - act(scale * center + shift)``, then two columns of ones and zeros: ``[M, width]``.

    Without a scale and a shift it is ``x - center``.
    """
    m, width = Map.of(x), out.shape[1]
    tiling = tiling_of(m)
    launch(
        deviations_fwd_kernel, (tiling.rows, tiling.columns), x,
        x, m.sn, m.ss, m.sc, scale, shift, center, out, width, m.count, m.S, m.C,
        AFFINE=scale is not None, ACT=activation.name, SLOPE=activation.slope, LAST=m.last,
        BLOCK_TAIL=power_of_two(width - m.C, 1, width), **tiling.constants(),
    )  # fmt: skip


@triton.jit
def moments_weight_kernel(
    r_ptr, g_ptr, weight_ptr, scale_ptr, rstd_ptr, sums_ptr, scaled_ptr, dw_ptr, width, count, K, C,
    WEIGHT: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """``dbeta``, ``dgamma`` and ``dgamma * rstd / count``, ``scale * W``, and the gradient of W: a block of it a program."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row_mask, mask = rows < K, columns < C
    dbeta = tl.load(g_ptr + rows * width + C, mask=row_mask, other=0.0)
    scale = tl.load(scale_ptr + rows, mask=row_mask, other=0.0)
    rstd = tl.load(rstd_ptr + rows, mask=row_mask, other=0.0)

    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, C, INNER):
        of = start + tl.arange(0, INNER)
        weight = load_tile(weight_ptr, rows * C, of, row_mask, of < C, True).to(tl.float32)
        mean = tl.load(r_ptr + C * width + of, mask=of < C, other=0.0) / count
        g = load_tile(g_ptr, rows * width, of, row_mask, of < C, True) - dbeta[:, None] * mean[None, :]
        total += tl.sum(weight * g, 1)
    dgamma = rstd * total
    share = rstd * dgamma / count
    if tl.program_id(1) == 0:
        tl.store(sums_ptr + rows, dbeta, mask=row_mask)
        tl.store(sums_ptr + K + rows, dgamma, mask=row_mask)
        tl.store(sums_ptr + 2 * K + rows, share, mask=row_mask)

    scaled = scale[:, None] * load_tile(weight_ptr, rows * C, columns, row_mask, mask, True).to(tl.float32)
    store_tile(scaled_ptr, rows * C, columns, rounded(scaled, scaled_ptr.dtype.element_ty), row_mask, mask, True)
    if WEIGHT:
        mean = tl.load(r_ptr + C * width + columns, mask=mask, other=0.0) / count
        of_products = tl.zeros((BLOCK, BLOCK), tl.float32)
        for start in range(0, C, INNER):
            of = start + tl.arange(0, INNER)
            weight = load_tile(weight_ptr, rows * C, of, row_mask, of < C, True).to(tl.float32)
            shift = tl.load(r_ptr + C * width + of, mask=of < C, other=0.0)  # the sum of deviations, count * mean
            r = load_tile(r_ptr, of * width, columns, of < C, mask, True) - shift[:, None] * mean[None, :]
            of_products = product(weight, r, of_products, _PRECISION)
        g = load_tile(g_ptr, rows * width, columns, row_mask, mask, True) - dbeta[:, None] * mean[None, :]
        dw = scale[:, None] * (g - share[:, None] * of_products)
        store_tile(dw_ptr, rows * C, columns, rounded(dw, dw_ptr.dtype.element_ty), row_mask, mask, True)


@triton.jit
def moments_products_kernel(
    weight_ptr, scaled_ptr, sums_ptr, out_ptr, unit, K, C, BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """``-unit * W^T diag(share) scaled``: a block of it a program."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row_mask, mask = rows < C, columns < C
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, K, INNER):
        k = start + tl.arange(0, INNER)
        share = tl.load(sums_ptr + 2 * K + k, mask=k < K, other=0.0)
        weight = load_tile(weight_ptr, k * C, rows, k < K, row_mask, True).to(tl.float32) * share[:, None]
        scaled = load_tile(scaled_ptr, k * C, columns, k < K, mask, True).to(tl.float32)
        total = product(tl.trans(weight), scaled, total, _PRECISION)
    store_tile(out_ptr, rows * C, columns, rounded(-unit * total, out_ptr.dtype.element_ty), row_mask, mask, True)


@triton.jit
def moments_offset_kernel(
    r_ptr, scaled_ptr, sums_ptr, out_ptr, unit, width, count, K, C, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The rows behind the products: the offset, what its rounding leaves of it, and zeros."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < C
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK_ROWS):
        k = start + tl.arange(0, BLOCK_ROWS)
        dbeta = tl.load(sums_ptr + k, mask=k < K, other=0.0)
        total += sum_rows(dbeta[:, None] * load_tile(scaled_ptr, k * C, columns, k < K, mask, True).to(tl.float32))
    total *= unit
    for start in range(0, C, BLOCK_ROWS):
        i = start + tl.arange(0, BLOCK_ROWS)
        shift = tl.load(r_ptr + C * width + i, mask=i < C, other=0.0)
        total += sum_rows(shift[:, None] * load_tile(out_ptr, i * C, columns, i < C, mask, True).to(tl.float32))
    offset = -total / count
    first = rounded(offset, out_ptr.dtype.element_ty)
    rest = rounded(offset - first.to(tl.float32), out_ptr.dtype.element_ty)
    tl.store(out_ptr + C * C + columns, first, mask=mask)
    tl.store(out_ptr + (C + 1) * C + columns, rest, mask=mask)
    for row in range(C + 2, width):
        tl.store(out_ptr + row * C + columns, tl.zeros_like(first), mask=mask)


def moments_terms(
    R: Tensor, G: Tensor, weight: Tensor, scale: Tensor, rstd: Tensor, count: int, unit: float, need_weight: bool
) -> tuple[Tensor, Tensor, Optional[Tensor], Tensor, Tensor]:
    """As `ReferenceBackend.moments_terms`, of contiguous matrices."""
    (K, C), width = weight.shape, R.shape[1]
    BLOCK, num_warps = (64, 8) if K * C >= 1 << 18 else (32, 4)  # few reads, or many programs
    sums = torch.empty((3, K), dtype=torch.float32, device=R.device)
    scaled, dw = torch.empty_like(weight), torch.empty_like(weight) if need_weight else None
    terms = weight.new_empty((width, C))
    blocks, columns = ceil_div(K, BLOCK), ceil_div(C, BLOCK)
    launch(
        moments_weight_kernel, (blocks, columns), R,
        R, G, weight, scale, rstd, sums, scaled, dw, width, float(count), K, C,
        WEIGHT=need_weight, BLOCK=BLOCK, INNER=32, num_warps=num_warps,
    )  # fmt: skip
    launch(
        moments_products_kernel, (columns, columns), R,
        weight, scaled, sums, terms, float(unit), K, C, BLOCK=BLOCK, INNER=32, num_warps=num_warps,
    )  # fmt: skip
    launch(
        moments_offset_kernel, (ceil_div(C, 32),), R,
        R, scaled, sums, terms, float(unit), width, float(count), K, C, BLOCK_ROWS=256, BLOCK=32, num_warps=8,
    )  # fmt: skip
    return sums[1], sums[0], dw, scaled, terms
