"""The fake kernels of the operators of ``pool(act(scale * x + shift))``."""

from __future__ import annotations

import torch
from torch import Tensor

from resdense_ext.ops._library import CPU_LIBRARY, LIBRARY
from resdense_ext.reference import accumulation_dtype

__all__: list[str] = []


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
