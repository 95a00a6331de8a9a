"""What a batch norm amounts to, a vector an operand: ``scale = weight * rstd`` and ``shift = bias - mean * scale`` where its
statistics are known, and its correction of a gradient where the sums are."""

from __future__ import annotations

from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from resdense_ext.kernels.launch import ceil_div, launch

__all__ = ["correct", "fold", "fold_columns"]


@triton.jit
def fold_columns(mean, var, eps, weight_ptr, bias_ptr, fold_ptr, C, columns, mask, WEIGHT: tl.constexpr, BIAS: tl.constexpr):
    """Writes scale, shift and rstd, the rows of ``fold_ptr``."""
    rstd = tl.rsqrt(var + eps)
    scale = rstd
    if WEIGHT:
        scale = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(rstd.dtype) * rstd
    shift = -mean * scale
    if BIAS:
        shift += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(rstd.dtype)
    tl.store(fold_ptr + columns, scale, mask=mask)
    tl.store(fold_ptr + C + columns, shift, mask=mask)
    tl.store(fold_ptr + 2 * C + columns, rstd, mask=mask)


@triton.jit
def fold_fwd_kernel(
    mean_ptr, var_ptr, count, eps, weight_ptr, bias_ptr, fold_ptr, C,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < C
    mean = tl.load(mean_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    var = tl.load(var_ptr + columns, mask=mask, other=0.0).to(tl.float32) / count
    fold_columns(mean, var, eps, weight_ptr, bias_ptr, fold_ptr, C, columns, mask, WEIGHT, BIAS)


def fold(
    mean: Tensor, var: Tensor, count: float, eps: float, weight: Optional[Tensor], bias: Optional[Tensor]
) -> Tensor:
    """``[3, C]`` in float32: scale, shift and rstd, for a variance of ``var / count``. Vectors are ``[C]`` of any dtype."""
    C, BLOCK = mean.shape[0], 256
    result = torch.empty((3, C), dtype=torch.float32, device=mean.device)
    launch(
        fold_fwd_kernel, (ceil_div(C, BLOCK),), mean, mean, var, float(count), eps, weight, bias, result, C,
        WEIGHT=weight is not None, BIAS=bias is not None, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return result


@triton.jit
def correct_kernel(
    sum_dy_ptr, sum_dy_xc_ptr, scale_ptr, mean_ptr, rstd_ptr, count, beta_ptr, delta_ptr, dgamma_ptr, C,
    ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < C
    rstd = tl.load(rstd_ptr + columns, mask=mask, other=0.0)
    dgamma = rstd * tl.load(sum_dy_xc_ptr + columns, mask=mask, other=0.0)
    shared = tl.load(scale_ptr + columns, mask=mask, other=0.0) / count
    beta = -shared * rstd * dgamma
    mean = tl.load(mean_ptr + columns, mask=mask, other=0.0)
    delta = -(shared * tl.load(sum_dy_ptr + columns, mask=mask, other=0.0) + beta * mean)
    if ACCUMULATE:
        beta += tl.load(beta_ptr + columns, mask=mask, other=0.0)
        delta += tl.load(delta_ptr + columns, mask=mask, other=0.0)
    tl.store(beta_ptr + columns, beta, mask=mask)
    tl.store(delta_ptr + columns, delta, mask=mask)
    tl.store(dgamma_ptr + columns, dgamma, mask=mask)


def correct(
    sum_dy: Tensor, sum_dy_xc: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, count: float, beta: Tensor, delta: Tensor,
    accumulate: bool,
) -> Tensor:  # fmt: skip
    """Writes `resdense_ext.ops.operands.Fold.correction` into ``beta`` and ``delta``, or adds it; returns dgamma. All ``[C]`` in
    float32."""
    C, BLOCK = mean.shape[0], 256
    dgamma = torch.empty_like(sum_dy)
    launch(
        correct_kernel, (ceil_div(C, BLOCK),), mean,
        sum_dy, sum_dy_xc, scale, mean, rstd, float(count), beta, delta, dgamma, C,
        ACCUMULATE=accumulate, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return dgamma
