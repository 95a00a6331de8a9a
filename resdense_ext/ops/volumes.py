"""Convolutions of a single volume on a CPU, by oneDNN.

Of one volume with few channels torch takes kernels of its own, which need ten times as long (`ConvParams::use_mkldnn` in ATen's
Convolution.cpp); of two it takes oneDNN's. Here these are asked for by their name.
"""

from __future__ import annotations

import math
from typing import Optional

import torch
from torch import Tensor

from resdense_ext.ops._library import LIBRARY
from resdense_ext.reference import Conv

__all__ = ["are_for_onednn", "convolution", "convolution_backward"]

_FEW = 20480
"""torch's bound, of the values of a plane through all channels."""


def are_for_onednn(a: Tensor, conv: Conv) -> bool:
    """Whether oneDNN has to be asked by its name for the convolution of ``a``."""
    return (
        a.dim() == 5
        and a.shape[0] == 1
        and a.dtype == torch.float32
        and a.device.type == "cpu"
        and conv.groups == 1
        and min(conv.weight.shape[3:]) <= 3
        and 0 < math.prod(a.shape[1:4]) <= _FEW
        and torch._C._get_mkldnn_enabled()
        and torch.backends.mkldnn.is_available()
    )


def convolution(a: Tensor, conv: Conv) -> Tensor:
    """`resdense_ext.reference.convolution`."""
    return torch.ops.aten.mkldnn_convolution(a, conv.weight, conv.bias, conv.padding, conv.steps, conv.dilation, 1)


def convolution_backward(
    grad: Tensor, a: Tensor, conv: Conv, need_weight: bool
) -> tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
    """The gradients of ``a``, of the weight and of the bias; the latter two where they are needed."""
    dx, weight = torch.ops.resdense.volume_backward(
        grad, a, conv.weight, conv.steps, conv.padding, conv.dilation, need_weight
    )
    bias = grad.sum((0, 2, 3, 4)) if need_weight and conv.bias is not None else None
    return dx, weight if need_weight else None, bias


def _volume_backward(grad, a, weight, stride, padding, dilation, need_weight):
    """Of tensors in oneDNN's own layouts, for which torch asks it whatever their sizes are."""
    wanted = [True, need_weight, False]
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        grad.to_mkldnn(), a.to_mkldnn(), weight, None, stride, padding, dilation, False, [0] * 3, 1, wanted
    )
    return dx.to_dense(), dweight if need_weight else weight.new_empty(0)


def _fake_volume_backward(grad, a, weight, stride, padding, dilation, need_weight):
    dx = torch.empty_like(a, memory_format=torch.contiguous_format)
    return dx, torch.empty_like(weight) if need_weight else weight.new_empty(0)


LIBRARY.define(
    "volume_backward(Tensor grad, Tensor a, Tensor weight, int[] stride, int[] padding, int[] dilation, bool need_weight) "
    "-> (Tensor, Tensor)"
)
LIBRARY.impl("volume_backward", _volume_backward, "CPU")
torch.library.register_fake("resdense::volume_backward", _fake_volume_backward, lib=LIBRARY)
