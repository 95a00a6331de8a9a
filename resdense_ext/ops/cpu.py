"""The CPU backend: the bandwidth-bound primitives in C++ (``csrc/cpu``), other convolutions through the framework.

A wide input (a slice of the block buffer) is never activated whole: a 1x1 convolution goes tile by tile through the
cache, any other sample by sample through the framework's convolution.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from resdense_ext.ops import _library
from resdense_ext.ops.backend import Affine, ConvGrads, Fold, Pending, Stats, register
from resdense_ext.ops.compiled import CompiledBackend, slope_of
from resdense_ext.ops.layout import memory_format_of
from resdense_ext.reference import Activation, BatchNorm, Conv, accumulation_dtype

__all__ = ["CpuBackend"]


def _is_matrix_product(conv: Conv) -> bool:
    return conv.groups == 1 and all(size == 1 for size in conv.weight.shape[2:]) and not any(conv.padding)


class CpuBackend(CompiledBackend):
    name = "cpu"

    def refusal(self, x: Tensor, compute_dtype: torch.dtype, activation: Activation) -> Optional[str]:
        if _library.CPU_LIBRARY:
            return f"the CPU library is {_library.CPU_LIBRARY}"
        if x.device.type != "cpu":
            return f"the input is on {x.device.type}"
        if x.dtype != compute_dtype:
            return f"the input is {x.dtype} and the convolutions compute in {compute_dtype}"
        return super().refusal(x, compute_dtype, activation)

    def chunks(self, x: Tensor) -> list[slice]:
        if x.is_contiguous(memory_format=memory_format_of(x)):
            return super().chunks(x)
        return [slice(n, n + 1) for n in range(x.shape[0])]

    def bn_act_conv(
        self,
        x: Tensor,
        affine: Affine,
        conv: Conv,
        out: Tensor,
        mask: Optional[Tensor],
        mask_scale: float,
        stats: Optional[Stats],
        reader: Optional[BatchNorm] = None,
    ) -> Optional[Fold]:
        if mask is not None or not _is_matrix_product(conv):
            return super().bn_act_conv(x, affine, conv, out, mask, mask_scale, stats, reader)
        scale, shift, activation = affine
        bias = None if conv.bias is None else conv.bias.to(accumulation_dtype(x.dtype))
        increment_version(out)
        found = torch.ops.resdense.bn_act_conv1x1(
            x, scale, shift, slope_of(activation), conv.weight.flatten(1), bias, out, stats is not None
        )
        return self._read(out, found, stats, reader, activation)

    def bn_act_conv_backward(
        self, x: Tensor, fold: Fold, conv: Conv, grad: Tensor | Pending, into: Optional[Pending], need_weight: bool
    ) -> ConvGrads:
        # A bias's gradient needs the finished gradient's sum, which only the general path has in memory.
        fused = isinstance(grad, Pending) and into is not None and conv.bias is None and _is_matrix_product(conv)
        if not fused:
            return super().bn_act_conv_backward(x, fold, conv, grad, into, need_weight)
        scale, shift, activation = fold.affine
        increment_version(into.dy)
        weight, *sums = torch.ops.resdense.bn_act_conv1x1_backward(
            x, scale, shift, fold.mean, slope_of(activation), conv.weight.flatten(1), *grad, into.dy, need_weight
        )
        return self._grads(x, fold, weight.view_as(conv.weight) if need_weight else None, None, None, into, *sums)


register(CpuBackend())
