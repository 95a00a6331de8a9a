"""``scale = weight * rstd`` and ``shift = bias - mean * scale`` of a batch norm whose statistics are known."""

from __future__ import annotations

from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from resdense_ext.kernels.launch import ceil_div, launch

__all__ = ["fold", "fold_columns"]


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
