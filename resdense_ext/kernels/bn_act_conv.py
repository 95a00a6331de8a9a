"""A convolution whose prologue is a batch norm with its activation, and whose epilogue takes the statistics of the result.

One implicit matrix product ``[positions, taps * C] x [taps * C, K]``: any kernel, one to three dimensions, dilation or
stride, both memory formats, in and out of slices of a block's buffer. A padded tap adds 0, not ``act(shift)``.

Bytes of a 1x1 (bfloat16, C inputs, 128 outputs): ``2 C + 256`` a position, of a 3x3 from 128 to 32 channels 320. Programs are
persistent and keep their statistics in registers; the last to finish merges what all have left, and folds the reader's norm.
"""

from __future__ import annotations

from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from resdense_ext.kernels.configs import Config, config_of
from resdense_ext.kernels.fold import fold_columns
from resdense_ext.kernels.geometry import Geometry, shifted
from resdense_ext.kernels.launch import ceil_div, launch, programs, tf32, tickets
from resdense_ext.kernels.maps import Map
from resdense_ext.kernels.stats import merge_programs
from resdense_ext.kernels.tiles import (
    activate,
    add_in_memory,
    last_arrival,
    load_tile,
    positions_from,
    product,
    rounded,
    row_offsets,
    store_tile,
    sum_rows,
)
from resdense_ext.reference import Activation, BatchNorm, Conv

__all__ = ["bn_act_conv", "bn_act_conv_fwd_kernel"]


@triton.jit
def bn_act_conv_fwd_kernel(
    x_ptr, xn, xs, xc,
    scale_ptr, shift_ptr,
    weight_ptr, wk, wc, wt, bias_ptr,
    mask_ptr, mn, ms, mc, mask_scale,
    out_ptr, on, os, oc,
    mean_ptr, m2_ptr, part_ptr, part_count_ptr, ticket_ptr,
    norm_weight_ptr, norm_bias_ptr, running_mean_ptr, running_var_ptr, eps, fold_ptr,
    M, S, C, K, D, H, W, OH, OW, dilation_d, dilation_h, dilation_w,
    ACT: tl.constexpr, SLOPE: tl.constexpr, X_LAST: tl.constexpr, OUT_LAST: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    BIAS: tl.constexpr, MASK: tl.constexpr, STATS: tl.constexpr,
    FOLD: tl.constexpr, FOLD_WEIGHT: tl.constexpr, FOLD_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < K
    channel_steps = tl.cdiv(C, BLOCK_K)

    if STATS:
        plane = programs * K
        part = part_ptr + program * K  # in three planes: the center, the sums of the deviations from it and of their squares
        seen = 0.0
    for tile in range(program, tl.cdiv(M, BLOCK_M), programs):
        first = tl.cast(tile, tl.int64) * BLOCK_M
        row_mask = first + tl.arange(0, BLOCK_M) < M
        sample, place = positions_from(first, S, BLOCK_M)
        x_rows = row_offsets(sample, place, xn, xs)

        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(TAPS * channel_steps):
            tap = step // channel_steps
            channels = (step - tap * channel_steps) * BLOCK_K + tl.arange(0, BLOCK_K)
            channel_mask = channels < C
            offset, valid = shifted(
                place, tap, D, H, W, OH, OW, dilation_d, dilation_h, dilation_w, 1, KERNEL, STRIDE, PADDING
            )
            valid = valid & row_mask
            x = load_tile(x_ptr, x_rows + offset.to(tl.int64) * xs, channels.to(tl.int64) * xc, valid, channel_mask, X_LAST)
            scale = tl.load(scale_ptr + channels, mask=channel_mask, other=0.0)
            shift = tl.load(shift_ptr + channels, mask=channel_mask, other=0.0)
            a = activate(x.to(tl.float32) * scale[None, :] + shift[None, :], SLOPE, ACT)
            if TAPS > 1 or STRIDE is not None:
                a = tl.where(valid[:, None], a, 0.0)
            weight = tl.load(
                weight_ptr + columns[None, :].to(tl.int64) * wk + channels[:, None].to(tl.int64) * wc + tap * wt,
                mask=channel_mask[:, None] & column_mask[None, :],
                other=0.0,
            )
            acc = product(rounded(a, weight.dtype), weight, acc, PRECISION)

        if BIAS:
            acc += tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
        if MASK:
            mask_rows = row_offsets(sample, place, mn, ms)
            keep = tl.load(
                mask_ptr + mask_rows[:, None] + columns[None, :].to(tl.int64) * mc,
                mask=row_mask[:, None] & column_mask[None, :],
                other=0.0,
            )
            acc = rounded(acc, weight_ptr.dtype.element_ty).to(tl.float32) * keep.to(tl.float32) * mask_scale
        result = rounded(acc, out_ptr.dtype.element_ty)
        store_tile(
            out_ptr, row_offsets(sample, place, on, os), columns.to(tl.int64) * oc, result, row_mask, column_mask, OUT_LAST
        )
        if STATS:
            value = result.to(tl.float32)
            rows = tl.sum(row_mask.to(tl.float32))
            if tile == program:
                # Deviations from the first tile's mean: with n tiles a later mean costs at most a factor n of rounding.
                tl.store(part + columns, sum_rows(tl.where(row_mask[:, None], value, 0.0)) / rows, mask=column_mask)
            tl.debug_barrier()
            center = tl.load(part + columns, mask=column_mask, other=0.0)
            d = tl.where(row_mask[:, None], value - center[None, :], 0.0)
            add_in_memory(part + plane, columns, column_mask, sum_rows(d), tile == program)
            add_in_memory(part + 2 * plane, columns, column_mask, sum_rows(d * d), tile == program)
            seen += rows

    if STATS:
        tl.debug_barrier()
        center = tl.load(part + columns, mask=column_mask, other=0.0)
        sum_d = tl.load(part + plane + columns, mask=column_mask, other=0.0)
        sum_dd = tl.load(part + 2 * plane + columns, mask=column_mask, other=0.0)
        tl.store(part_count_ptr + program, seen)
        tl.store(part + columns, center + sum_d / seen, mask=column_mask)
        tl.store(
            part + plane + columns,
            tl.maximum(sum_dd - sum_d * (sum_d / seen), 0.0, propagate_nan=tl.PropagateNan.ALL),
            mask=column_mask,
        )
        if last_arrival(ticket_ptr + tl.program_id(1), programs):
            count = M * 1.0
            mean, m2 = merge_programs(
                part_ptr, part_ptr + plane, part_count_ptr, programs, count, K, columns, column_mask
            )
            tl.store(mean_ptr + columns, mean, mask=column_mask)
            tl.store(m2_ptr + columns, m2, mask=column_mask)
            if FOLD:
                fold_columns(
                    mean, m2 / count, eps, norm_weight_ptr, norm_bias_ptr, fold_ptr, K, columns, column_mask,
                    FOLD_WEIGHT, FOLD_BIAS,
                )  # fmt: skip
    elif FOLD:
        if program == 0:
            mean = tl.load(running_mean_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)
            var = tl.load(running_var_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)
            fold_columns(
                mean, var, eps, norm_weight_ptr, norm_bias_ptr, fold_ptr, K, columns, column_mask, FOLD_WEIGHT, FOLD_BIAS
            )


def bn_act_conv(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    activation: Activation,
    conv: Conv,
    out: Tensor,
    mask: Optional[Tensor],
    mask_scale: float,
    stats: Optional[tuple[Tensor, Tensor]],
    reader: Optional[BatchNorm],
    config: Optional[Config] = None,
) -> Optional[Tensor]:
    """``out = conv(act(scale * x + shift)) * mask * mask_scale``; see `ReferenceBackend.bn_act_conv`.

    Args:
        x, out: maps of float32, bfloat16 or float16. ``out`` is written.
        scale, shift: ``[C]``, float32.
        conv: without groups, and with dilation 1 unless it keeps the size; its weight has the dtype of the products.
        mask: broadcasts to ``out``; a dropout mask of any dtype.
        stats: ``[K]`` twice, float32: mean and sum of squared deviations of what is written, which are written too.
        reader: the norm whose fold, ``[3, K]`` float32, is returned: by ``stats`` or, where it has none, its running ones.
        config: other than the table's, to compare configurations.
    """
    source, target, geometry = Map.of(x), Map.of(out, "out"), Geometry.of(x, conv)
    K, M = target.C, target.count
    config = config or config_of("bn_act_conv", x.device, conv.weight.dtype, geometry.kind, source.C, K)
    blocks = ceil_div(K, config.BLOCK_N)
    shared = programs(x, ceil_div(M, config.BLOCK_M), blocks, config.each)
    parts = counts = ticket = folded = None
    if stats is not None:
        parts = torch.empty((3, shared, K), dtype=torch.float32, device=x.device)
        counts = torch.empty(shared, dtype=torch.float32, device=x.device)
        ticket = tickets(x, blocks)
    if reader is not None:
        folded = torch.empty((3, K), dtype=torch.float32, device=x.device)
    norm = reader or BatchNorm()
    dropout = None if mask is None else Map.of(mask.expand(out.shape), "mask")
    weight = Map.of(conv.weight, "weight")  # its taps are positions
    launch(
        bn_act_conv_fwd_kernel, (shared, blocks), x,
        x, source.sn, source.ss, source.sc,
        scale, shift,
        conv.weight, weight.sn, weight.sc, weight.ss, conv.bias,
        mask, *(dropout.sn, dropout.ss, dropout.sc) if dropout else (0, 0, 0), float(mask_scale),
        out, target.sn, target.ss, target.sc,
        *stats or (None, None), parts, counts, ticket,
        norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps, folded,
        M, target.S, source.C, K, *geometry.sizes, *geometry.outputs[1:], *geometry.dilation,
        ACT=activation.name, SLOPE=activation.slope, X_LAST=source.last, OUT_LAST=target.last,
        BIAS=conv.bias is not None, MASK=mask is not None, STATS=stats is not None,
        FOLD=reader is not None, FOLD_WEIGHT=norm.weight is not None, FOLD_BIAS=norm.bias is not None, PRECISION=tf32(),
        **geometry.constants(), **config.constants(),
    )  # fmt: skip
    return folded
