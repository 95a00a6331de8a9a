"""The backward of ``act(scale * z + shift + identity)`` up to its batch norms: each map is read once and one is written."""

from __future__ import annotations

from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from resdense_ext.kernels.launch import launch, programs, tickets
from resdense_ext.kernels.maps import Map
from resdense_ext.kernels.stats import finish_sums
from resdense_ext.kernels.tiles import load_tile, marked, rounded, row_offsets, store_tile, sum_rows
from resdense_ext.kernels.walk import load_vector, tile_at, tiling_of, wide
from resdense_ext.reference import Activation, accumulation_dtype

__all__ = ["bn_add_act_backward"]


@triton.jit
def bn_add_act_bwd_kernel(
    grad_ptr, dn, ds, dc, out_ptr, on, os, oc, z_ptr, zn, zs, zc, identity_ptr, in_, is_, ic, g_ptr, gn, gs, gc,
    center_ptr, identity_center_ptr, sums_ptr, part_ptr, ticket_ptr, M, S, C, tiles,
    PROJECTED: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr,
    GRAD_LAST: tl.constexpr, OUT_LAST: tl.constexpr, Z_LAST: tl.constexpr, IDENTITY_LAST: tl.constexpr, G_LAST: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1)
    sum_g = tl.zeros((BLOCK_C,), WIDE)
    sum_g_zc = tl.zeros((BLOCK_C,), WIDE)
    sum_g_ic = tl.zeros((BLOCK_C,), WIDE)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        sample, place, channels, row_mask, mask = tile_at(tile, block, M, S, C, BLOCK_M, BLOCK_C)
        grad = load_tile(grad_ptr, row_offsets(sample, place, dn, ds), channels * dc, row_mask, mask, GRAD_LAST).to(WIDE)
        out = load_tile(out_ptr, row_offsets(sample, place, on, os), channels * oc, row_mask, mask, OUT_LAST).to(WIDE)
        g = marked(grad, out, SLOPE, ACT)
        sum_g += sum_rows(g)
        z = load_tile(z_ptr, row_offsets(sample, place, zn, zs), channels * zc, row_mask, mask, Z_LAST).to(WIDE)
        sum_g_zc += sum_rows(g * (z - load_vector(center_ptr, channels, mask, WIDE)))
        if PROJECTED:
            rows = row_offsets(sample, place, in_, is_)
            identity = load_tile(identity_ptr, rows, channels * ic, row_mask, mask, IDENTITY_LAST).to(WIDE)
            sum_g_ic += sum_rows(g * (identity - load_vector(identity_center_ptr, channels, mask, WIDE)))
        g_rows = row_offsets(sample, place, gn, gs)
        store_tile(g_ptr, g_rows, channels * gc, rounded(g, g_ptr.dtype.element_ty), row_mask, mask, G_LAST)
    if PROJECTED:
        finish_sums((sum_g, sum_g_zc, sum_g_ic), sums_ptr, part_ptr, ticket_ptr, block, C, WIDE, BLOCK_C)
    else:
        finish_sums((sum_g, sum_g_zc), sums_ptr, part_ptr, ticket_ptr, block, C, WIDE, BLOCK_C)


def bn_add_act_backward(
    grad: Tensor,
    out: Tensor,
    z: Tensor,
    center: Tensor,
    identity: Optional[Tensor],
    identity_center: Optional[Tensor],
    activation: Activation,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``g = grad * act'``, and its sums alone, with ``z - center`` and, of a projection, with ``identity - identity_center``."""
    projected = identity is not None
    g = torch.empty_like(out)
    d, o, m, to = Map.of(grad, "grad"), Map.of(out, "out"), Map.of(z, "z"), Map.of(g, "g")
    i = Map.of(identity, "identity") if projected else m
    dtype = accumulation_dtype(z.dtype)
    sums = torch.empty((2 + projected, m.C), dtype=dtype, device=z.device)
    if z.numel() == 0:
        sums.zero_()
    else:
        tiling = tiling_of(to)
        shared = programs(z, tiling.rows, tiling.columns, 4)
        launch(
            bn_add_act_bwd_kernel, (shared, tiling.columns), z,
            grad, d.sn, d.ss, d.sc, out, o.sn, o.ss, o.sc, z, m.sn, m.ss, m.sc, identity, i.sn, i.ss, i.sc,
            g, to.sn, to.ss, to.sc, center, identity_center,
            sums, torch.empty((len(sums), shared, m.C), dtype=dtype, device=z.device), tickets(z, tiling.columns),
            to.count, to.S, to.C, tiling.rows,
            PROJECTED=projected, ACT=activation.name, SLOPE=activation.slope,
            GRAD_LAST=d.last, OUT_LAST=o.last, Z_LAST=m.last, IDENTITY_LAST=i.last, G_LAST=to.last, WIDE=wide(z.dtype),
            **tiling.constants(),
        )  # fmt: skip
    return g, *sums.unbind(), *(() if projected else (sums.new_empty(0),))
