"""Convolutions of a single volume on a CPU, by oneDNN.

Of one volume with few channels torch takes kernels of its own, which need several times as long (`ConvParams::use_mkldnn` in ATen's
Convolution.cpp); of two it takes oneDNN's. Here these are asked for by their name.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from resdense_ext.ops._library import LIBRARY
from resdense_ext.reference import Conv, TransposedConv

__all__ = ["are_for_onednn", "convolution", "convolution_backward"]

_SLOW = torch._C._ConvBackend.Slow3d, torch._C._ConvBackend.SlowDilated3d
_LARGE = 8
"""A weight of more values than so many times the map's is left to torch: oneDNN's copies of it would take more than the maps do."""


def are_for_onednn(a: Tensor, conv: Conv | TransposedConv) -> bool:
    """Whether torch does not take oneDNN's kernels for the convolution of ``a``, they are there, and what they make of the weight is
    small beside the maps. A transposed one is left to torch."""
    if isinstance(conv, TransposedConv):
        return False
    there = torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()
    if a.dim() != 5 or a.shape[0] != 1 or a.dtype != torch.float32 or a.device.type != "cpu" or not there:
        return False
    if conv.weight.numel() > _LARGE * a.numel():
        return False
    numbers = conv.steps, conv.padding, conv.dilation, False, [0] * 3, conv.groups
    return torch._C._select_conv_backend(a, conv.weight, None, *numbers) in _SLOW


def convolution(a: Tensor, conv: Conv) -> Tensor:
    """`resdense_ext.reference.convolution`."""
    return torch.ops.aten.mkldnn_convolution(a, conv.weight, conv.bias, conv.padding, conv.steps, conv.dilation, 1)


def convolution_backward(
    grad: Tensor, a: Tensor, conv: Conv, need_input: bool, need_weight: bool
) -> tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
    """`resdense_ext.ops.reference_backend.ReferenceBackend.convolution_backward`."""
    numbers = conv.steps, conv.padding, conv.dilation
    dx, weight = torch.ops.resdense.volume_backward(grad, a, conv.weight, *numbers, need_input, need_weight)
    bias = grad.sum((0, 2, 3, 4)) if need_weight and conv.bias is not None else None
    return dx if need_input else None, weight if need_weight else None, bias


def _volume_backward(grad, a, weight, stride, padding, dilation, need_input, need_weight):
    """Of an input that is a tensor of oneDNN's torch asks it whatever its sizes are; only the weight's gradient reads its values."""
    like = a.to_mkldnn() if need_weight else torch.empty(a.shape, layout=torch._mkldnn)
    numbers = stride, padding, dilation, False, [0] * 3, 1
    dx, dweight, _ = torch.ops.aten.convolution_backward(grad, like, weight, None, *numbers, [need_input, need_weight, False])
    return dx if need_input else a.new_empty(0), dweight if need_weight else weight.new_empty(0)


def _fake_volume_backward(grad, a, weight, stride, padding, dilation, need_input, need_weight):
    dx = torch.empty_like(a, memory_format=torch.contiguous_format) if need_input else a.new_empty(0)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format) if need_weight else weight.new_empty(0)
    return dx, dweight


LIBRARY.define(
    "volume_backward(Tensor grad, Tensor a, Tensor weight, int[] stride, int[] padding, int[] dilation, bool need_input, "
    "bool need_weight) -> (Tensor, Tensor)"
)
LIBRARY.impl("volume_backward", _volume_backward, "CPU")
torch.library.register_fake("resdense::volume_backward", _fake_volume_backward, lib=LIBRARY)
