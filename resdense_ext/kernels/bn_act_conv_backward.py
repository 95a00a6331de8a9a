"""The backward of `bn_act_conv`: two implicit matrix products, each with its elementwise work as prologue and epilogue.

The incoming gradient ``dz`` is plain or pending, ``alpha * dy + beta * z + delta``, and is finished as it is read. A padded tap
has no gradient. Both products shift ``dz``, which is the narrow operand of a 3x3; with a stride the weight's shifts ``x``, and
the data's goes through residue classes of positions, so that each meets the taps that reach it and no others.

- Data: ``dy = act'(scale * x + shift) * conv_transposed(dz)``, written or added to the block's gradient times ``scale``; in the
  same pass dbeta and dgamma, from which the last program makes the norm's correction. A 1x1 with C inputs moves ``6 C + 512``
  bytes a position in bfloat16.
- Weight: ``dW = dz^T act(scale * x + shift)``, split over the positions. The last program of a group of splits adds the group
  up, the last group all groups: in one order, whoever comes last.
"""

from __future__ import annotations

import math
from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from resdense_ext.kernels.configs import Config, config_of
from resdense_ext.kernels.geometry import Geometry, class_place, class_tap, class_taps, shifted
from resdense_ext.kernels.launch import ceil_div, launch, programs, tf32, tickets
from resdense_ext.kernels.maps import Map
from resdense_ext.kernels.stats import sum_programs
from resdense_ext.kernels.tiles import (
    activate,
    add_in_memory,
    last_arrival,
    load_tile,
    masked,
    positions_from,
    product,
    rounded,
    row_offsets,
    store_tile,
    sum_rows,
)
from resdense_ext.reference import Activation, Conv

__all__ = [
    "bn_act_conv_bwd_data_kernel",
    "bn_act_conv_bwd_weight_kernel",
    "bn_act_conv_data_backward",
    "bn_act_conv_weight_backward",
]


@triton.jit
def _load_grad(
    dy_ptr, dyn, dys, dyc, z_ptr, zn, zs, zc, alpha_ptr, beta_ptr, delta_ptr,
    sample, place, columns, row_mask, column_mask, PENDING: tl.constexpr, DY_LAST: tl.constexpr, Z_LAST: tl.constexpr,
):  # fmt: skip
    at = columns.to(tl.int64)
    dz = load_tile(dy_ptr, row_offsets(sample, place, dyn, dys), at * dyc, row_mask, column_mask, DY_LAST).to(tl.float32)
    if PENDING:
        z = load_tile(z_ptr, row_offsets(sample, place, zn, zs), at * zc, row_mask, column_mask, Z_LAST).to(tl.float32)
        alpha = tl.load(alpha_ptr + columns, mask=column_mask, other=0.0)
        beta = tl.load(beta_ptr + columns, mask=column_mask, other=0.0)
        delta = tl.load(delta_ptr + columns, mask=column_mask, other=0.0)
        dz = alpha[None, :] * dz + (beta[None, :] * z + delta[None, :])
        dz = tl.where(row_mask[:, None], dz, 0.0)
    return dz


@triton.jit
def bn_act_conv_bwd_data_kernel(
    dy_ptr, dyn, dys, dyc, z_ptr, zn, zs, zc, alpha_ptr, beta_ptr, delta_ptr,
    weight_ptr, wk, wc, wt,
    x_ptr, xn, xs, xc, scale_ptr, shift_ptr, mean_ptr, rstd_ptr,
    out_ptr, on, os, oc,
    part_ptr, ticket_ptr, norm_weight_ptr, norm_bias_ptr, correction_beta_ptr, correction_delta_ptr, count,
    M, S, C, K, D, H, W, OD, OH, OW, dilation_d, dilation_h, dilation_w,
    PENDING: tl.constexpr, ACCUMULATE: tl.constexpr, CORRECT: tl.constexpr,
    ACT: tl.constexpr, SLOPE: tl.constexpr,
    DY_LAST: tl.constexpr, Z_LAST: tl.constexpr, X_LAST: tl.constexpr, OUT_LAST: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, PRECISION: tl.constexpr,
    CLASSES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # The column blocks of one tile of positions run side by side, and find its gradient in the second-level cache.
    blocks = tl.cdiv(C, BLOCK_N)
    block, program, programs = tl.program_id(0) % blocks, tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < C
    output_steps = tl.cdiv(K, BLOCK_K)
    plane = programs * C
    part = part_ptr + program * C  # in two planes: the sums of dy and of dy * (x - mean)
    tiles = tl.cdiv(M, BLOCK_M)
    for tile in range(program, tiles * CLASSES, programs):
        # Class by class, so that every program has its share of those with many taps and of those with few.
        residue = tile // tiles if CLASSES > 1 else 0
        first = tl.cast(tile - residue * tiles, tl.int64) * BLOCK_M
        row_mask = first + tl.arange(0, BLOCK_M) < M
        sample, place = positions_from(first, S, BLOCK_M)
        taps = KERNEL[0] * KERNEL[1] * KERNEL[2]
        if STRIDE is not None:
            place, inside = class_place(residue, place, D, H, W, STRIDE)
            row_mask &= inside
            taps = class_taps(residue, KERNEL, STRIDE, PADDING)

        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(taps * output_steps):
            tap = step // output_steps
            outputs = (step - tap * output_steps) * BLOCK_K + tl.arange(0, BLOCK_K)
            output_mask = outputs < K
            if STRIDE is None:
                offset, valid = shifted(
                    place, tap, D, H, W, OH, OW, dilation_d, dilation_h, dilation_w, -1, KERNEL, STRIDE, PADDING
                )
                at_output = place + offset
            else:
                tap, at_output, valid = class_tap(place, residue, tap, H, W, OD, OH, OW, KERNEL, STRIDE, PADDING)
            dz = _load_grad(
                dy_ptr, dyn, dys, dyc, z_ptr, zn, zs, zc, alpha_ptr, beta_ptr, delta_ptr,
                sample, at_output, outputs, valid & row_mask, output_mask, PENDING, DY_LAST, Z_LAST,
            )  # fmt: skip
            weight = tl.load(
                weight_ptr + outputs[:, None].to(tl.int64) * wk + columns[None, :].to(tl.int64) * wc + tap * wt,
                mask=output_mask[:, None] & column_mask[None, :],
                other=0.0,
            )
            acc = product(rounded(dz, weight.dtype), weight, acc, PRECISION)

        at = columns.to(tl.int64)
        scale = tl.load(scale_ptr + columns, mask=column_mask, other=0.0)
        shift = tl.load(shift_ptr + columns, mask=column_mask, other=0.0)
        mean = tl.load(mean_ptr + columns, mask=column_mask, other=0.0)
        x = load_tile(x_ptr, row_offsets(sample, place, xn, xs), at * xc, row_mask, column_mask, X_LAST).to(tl.float32)
        y = scale[None, :] * x + shift[None, :]
        dy = tl.where(row_mask[:, None], masked(acc, y, SLOPE, ACT), 0.0)
        add_in_memory(part, columns, column_mask, sum_rows(dy), tile == program)
        add_in_memory(part + plane, columns, column_mask, sum_rows(dy * (x - mean[None, :])), tile == program)
        tl.debug_barrier()
        out_rows = row_offsets(sample, place, on, os)
        if ACCUMULATE:
            dy = scale[None, :] * dy
            dy += load_tile(out_ptr, out_rows, at * oc, row_mask, column_mask, OUT_LAST).to(tl.float32)
        store_tile(out_ptr, out_rows, at * oc, rounded(dy, out_ptr.dtype.element_ty), row_mask, column_mask, OUT_LAST)

    if last_arrival(ticket_ptr + block, programs):
        dbeta = sum_programs(part_ptr, programs, C, columns, column_mask, tl.float32)
        sum_dy_xc = sum_programs(part_ptr + plane, programs, C, columns, column_mask, tl.float32)
        scale = tl.load(scale_ptr + columns, mask=column_mask, other=0.0)
        mean = tl.load(mean_ptr + columns, mask=column_mask, other=0.0)
        rstd = tl.load(rstd_ptr + columns, mask=column_mask, other=0.0)
        dgamma = rstd * sum_dy_xc
        tl.store(norm_bias_ptr + columns, dbeta, mask=column_mask)
        tl.store(norm_weight_ptr + columns, dgamma, mask=column_mask)
        if CORRECT:
            shared = scale / count
            beta = -shared * rstd * dgamma
            delta = -(shared * dbeta + beta * mean)
            if ACCUMULATE:
                beta += tl.load(correction_beta_ptr + columns, mask=column_mask, other=0.0)
                delta += tl.load(correction_delta_ptr + columns, mask=column_mask, other=0.0)
            tl.store(correction_beta_ptr + columns, beta, mask=column_mask)
            tl.store(correction_delta_ptr + columns, delta, mask=column_mask)


@triton.jit
def bn_act_conv_bwd_weight_kernel(
    dy_ptr, dyn, dys, dyc, z_ptr, zn, zs, zc, alpha_ptr, beta_ptr, delta_ptr,
    x_ptr, xn, xs, xc, scale_ptr, shift_ptr,
    dweight_ptr, wk, wc, wt,
    part_ptr, ticket_ptr, group,
    M, S, C, K, D, H, W, OH, OW, dilation_d, dilation_h, dilation_w,
    PENDING: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr, DY_LAST: tl.constexpr, Z_LAST: tl.constexpr, X_LAST: tl.constexpr,
    COMPUTE: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # BLOCK_M input channels by BLOCK_N output channels of one tap, summed over BLOCK_K positions at a time.
    split, splits = tl.program_id(0), tl.num_programs(0)
    block = tl.program_id(1)
    output_blocks, channel_blocks = tl.cdiv(K, BLOCK_N), tl.cdiv(C, BLOCK_M)
    tap = block // (output_blocks * channel_blocks)
    channels = block // output_blocks % channel_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = block % output_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    channel_mask, output_mask = channels < C, outputs < K
    scale = tl.load(scale_ptr + channels, mask=channel_mask, other=0.0)
    shift = tl.load(shift_ptr + channels, mask=channel_mask, other=0.0)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in range(split, tl.cdiv(M, BLOCK_K), splits):
        first = tl.cast(tile, tl.int64) * BLOCK_K
        row_mask = first + tl.arange(0, BLOCK_K) < M
        sample, place = positions_from(first, S, BLOCK_K)
        offset, valid = shifted(
            place, tap, D, H, W, OH, OW, dilation_d, dilation_h, dilation_w, -1, KERNEL, STRIDE, PADDING
        )
        valid = valid & row_mask
        if STRIDE is None:
            at_output, at_input, input_mask = place + offset, place, row_mask
        else:
            at_output, at_input, input_mask = place, place + offset, valid
        dz = _load_grad(
            dy_ptr, dyn, dys, dyc, z_ptr, zn, zs, zc, alpha_ptr, beta_ptr, delta_ptr,
            sample, at_output, outputs, valid, output_mask, PENDING, DY_LAST, Z_LAST,
        )  # fmt: skip
        rows = row_offsets(sample, at_input, xn, xs)
        x = load_tile(x_ptr, rows, channels.to(tl.int64) * xc, input_mask, channel_mask, X_LAST).to(tl.float32)
        a = activate(scale[None, :] * x + shift[None, :], SLOPE, ACT)
        acc = product(tl.trans(rounded(a, COMPUTE)), rounded(dz, COMPUTE), acc, PRECISION)

    size = tl.cast(KERNEL[0] * KERNEL[1] * KERNEL[2] * C, tl.int64) * K  # where C is 1 it is no tensor, but known when compiled
    at = ((tap * C + channels[:, None]) * K + outputs[None, :]).to(tl.int64)
    mask = channel_mask[:, None] & output_mask[None, :]
    tl.store(part_ptr + split * size + at, acc, mask=mask)
    groups = tl.cdiv(splits, group)
    leader = split // group * group
    own_tickets = ticket_ptr + block * (groups + 1)
    members = tl.minimum(group, splits - leader)
    if last_arrival(own_tickets + split // group, members):
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for member in range(leader, leader + members):
            total += tl.load(part_ptr + member * size + at, mask=mask, other=0.0, cache_modifier=".cg")
        tl.store(part_ptr + leader * size + at, total, mask=mask)
        if last_arrival(own_tickets + groups, groups):
            total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for leader_of_group in range(0, splits, group):
                total += tl.load(part_ptr + leader_of_group * size + at, mask=mask, other=0.0, cache_modifier=".cg")
            dweight = dweight_ptr + outputs[None, :].to(tl.int64) * wk + channels[:, None].to(tl.int64) * wc + tap * wt
            tl.store(dweight, rounded(total, dweight_ptr.dtype.element_ty), mask=mask)


def _grad_arguments(dy: Tensor, pending: Optional[tuple[Tensor, ...]]) -> tuple[tuple, dict]:
    """Of the gradient as `_load_grad` takes it: the pointers and strides, and the constants."""
    grad = Map.of(dy, "dy")
    constants = dict(PENDING=pending is not None, DY_LAST=grad.last)
    if pending is None:
        return (dy, grad.sn, grad.ss, grad.sc, None, 0, 0, 0, None, None, None), dict(constants, Z_LAST=False)
    z, alpha, beta, delta = pending
    raw = Map.of(z, "z")
    arguments = (dy, grad.sn, grad.ss, grad.sc, z, raw.sn, raw.ss, raw.sc, alpha, beta, delta)
    return arguments, dict(constants, Z_LAST=raw.last)


def bn_act_conv_data_backward(
    dy: Tensor,
    pending: Optional[tuple[Tensor, Tensor, Tensor, Tensor]],
    conv: Conv,
    x: Tensor,
    fold: tuple[Tensor, Tensor, Tensor, Tensor],
    count: Optional[int],
    activation: Activation,
    out: Tensor,
    correction: Optional[tuple[Tensor, Tensor]],
    config: Optional[Config] = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient of ``x`` behind the activation, and what the norm gets; see `ReferenceBackend.bn_act_conv_backward`.

    Args:
        dy, pending: the gradient of the convolution's output; ``z, alpha, beta, delta`` where it is pending.
        conv: without groups, and with dilation 1 unless it keeps the size.
        x: the input map; ``fold`` its norm's scale, shift, mean and rstd, ``[C]`` in float32, over ``count`` positions (None:
            running statistics, which have no correction).
        out: written with dy; with ``scale * dy`` added where ``correction`` is given.
        correction: beta and delta, ``[C]`` in float32, to be added to.

    Returns:
        The gradients of the norm's weight and bias, and the correction's beta and delta: all ``[C]``, float32.
    """
    source, target, geometry = Map.of(x), Map.of(out, "out"), Geometry.of(x, conv)
    C, K, S = source.C, conv.weight.shape[0], geometry.class_size
    M = source.N * S
    config = config or config_of("bn_act_conv_backward_data", x.device, conv.weight.dtype, geometry.kind, K, C)
    blocks = ceil_div(C, config.BLOCK_N)
    shared = programs(x, ceil_div(M, config.BLOCK_M) * geometry.classes, blocks, config.each)
    norm_weight, norm_bias = (torch.empty(C, dtype=torch.float32, device=x.device) for _ in range(2))
    beta, delta = correction or (
        (torch.zeros if count is None else torch.empty)((2, C), dtype=torch.float32, device=x.device).unbind()
    )
    arguments, constants = _grad_arguments(dy, pending)
    weight = Map.of(conv.weight, "weight")  # its taps are positions
    scale, shift, mean, rstd = fold
    launch(
        bn_act_conv_bwd_data_kernel, (shared * blocks,), x,
        *arguments,
        conv.weight, weight.sn, weight.sc, weight.ss,
        x, source.sn, source.ss, source.sc, scale, shift, mean, rstd,
        out, target.sn, target.ss, target.sc,
        torch.empty((2, shared, C), dtype=torch.float32, device=x.device), tickets(x, blocks),
        norm_weight, norm_bias, beta, delta, float(count or 0),
        M, S, C, K, *geometry.sizes, *geometry.outputs, *geometry.dilation,
        ACCUMULATE=correction is not None, CORRECT=count is not None, ACT=activation.name, SLOPE=activation.slope,
        X_LAST=source.last, OUT_LAST=target.last, PRECISION=tf32(), CLASSES=geometry.classes,
        **geometry.constants(), **constants, **config.constants(),
    )  # fmt: skip
    return norm_weight, norm_bias, beta, delta


_COMPUTE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def bn_act_conv_weight_backward(
    dy: Tensor,
    pending: Optional[tuple[Tensor, Tensor, Tensor, Tensor]],
    conv: Conv,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    activation: Activation,
    config: Optional[Config] = None,
) -> Tensor:
    """The gradient of the convolution's weight, in its dtype and memory format. Arguments as in the data gradient."""
    source, geometry = Map.of(x), Geometry.of(x, conv)
    C, K, S = source.C, conv.weight.shape[0], math.prod(geometry.outputs)
    M = source.N * S
    config = config or config_of("bn_act_conv_backward_weight", x.device, conv.weight.dtype, geometry.kind, C, K)
    blocks = geometry.taps * ceil_div(C, config.BLOCK_M) * ceil_div(K, config.BLOCK_N)
    splits = programs(x, ceil_div(M, config.BLOCK_K), blocks, config.each)
    group = math.isqrt(splits - 1) + 1
    dweight = torch.empty_like(conv.weight)
    weight = Map.of(dweight, "weight")
    arguments, constants = _grad_arguments(dy, pending)
    launch(
        bn_act_conv_bwd_weight_kernel, (splits, blocks), x,
        *arguments,
        x, source.sn, source.ss, source.sc, scale, shift,
        dweight, weight.sn, weight.sc, weight.ss,
        torch.empty((splits, dweight.numel()), dtype=torch.float32, device=x.device),
        tickets(x, blocks * (ceil_div(splits, group) + 1)), group,
        M, S, C, K, *geometry.sizes, *geometry.outputs[1:], *geometry.dilation,
        ACT=activation.name, SLOPE=activation.slope, X_LAST=source.last, COMPUTE=_COMPUTE[conv.weight.dtype],
        PRECISION=tf32(),
        **geometry.constants(), **constants, **config.constants(),
    )  # fmt: skip
    return dweight
