"""Which convolutions the CUDA operator ``bn_act_conv3x3`` serves."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from resdense_ext.reference import Conv

__all__ = ["refusal"]

_MOST_INPUTS, _MOST_OUTPUTS = 256, 64


def refusal(x: Tensor, conv: Conv, out: Tensor) -> Optional[str]:
    """Why the operator cannot compute ``conv`` of ``x`` into ``out``; None where it can (on a GPU, that is)."""
    if tuple(conv.weight.shape[2:]) != (3, 3) or conv.groups != 1 or conv.bias is not None:
        return "it is no 3x3 convolution of one group and without a bias"
    if not tuple(conv.padding) == tuple(conv.dilation) == conv.steps == (1, 1):
        return f"its padding is {tuple(conv.padding)}, its dilation {tuple(conv.dilation)} and its stride {conv.steps}"
    if x.dtype not in (torch.bfloat16, torch.float16) or not x.dtype == conv.weight.dtype == out.dtype:
        return f"the dtypes of input, weight and output are {x.dtype}, {conv.weight.dtype} and {out.dtype}"
    for name, t, most in (("input", x, _MOST_INPUTS), ("output", out, _MOST_OUTPUTS)):
        if t.shape[1] % 8 or not 0 < t.shape[1] <= most:
            return f"the {name} has {t.shape[1]} channels, not a multiple of 8 and at most {most}"
        if not _has_aligned_rows(t):
            return f"the {name} is not channels_last with the channels of every position aligned to 16 bytes"
    return None


def _has_aligned_rows(t: Tensor) -> bool:
    """Aligned in memory, and of one stride: what the operator asks of the rows of a map's channels."""
    n, _, height, width = t.shape
    strides = [stride for size, stride in zip((n, height, width), (t.stride(0), *t.stride()[2:])) if size > 1]
    one_stride = height == 1 or width == 1 or t.stride(2) == width * t.stride(3)
    aligned = t.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in strides)
    return t.stride(1) == 1 and one_stride and aligned
