"""Convolutions by the vendor's libraries, on activations in memory: of some samples at a time, and without other copies.

On an H200 this is faster than kernels that activate as they multiply: cuBLAS and cuDNN run close to the memory's bandwidth, and so
does the pass that writes the activation; `make gpu PART=kernels` times both. All of a convolution is one operator, ``csrc/vendor``.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from resdense_ext.ops.backend import Affine, ConvGrads, Fold, Pending, ReferenceBackend, Stats
from resdense_ext.ops.compiled import slope_of
from resdense_ext.ops.out_of_memory import told
from resdense_ext.reference import Activation, BatchNorm, Conv

__all__ = ["SCRATCH", "VendorBackend"]

SCRATCH = 2**28
"""Bytes of an activation that may be in memory at once, and in backward as many of its gradient: a bottleneck of a DenseNet-121's
first block, at a batch of 256 and in 16 bits, has three quarters of that."""

_NONE = (None, None, None, None)


class VendorBackend(ReferenceBackend):
    """A 1x1 convolution is a matrix product of a channels-last map as it lies in memory."""

    def chunks(self, x: Tensor) -> list[slice]:
        size = max(1, SCRATCH * x.shape[0] // max(x.numel() * x.element_size(), 1))
        return [slice(n, n + size) for n in range(0, x.shape[0], size)] or [slice(0, 0)]

    def finished(self, pending: Pending) -> Tensor:
        return self.pending_grad_(pending)

    def bn_act_conv(
        self,
        x: Tensor,
        affine: Optional[Affine],
        conv: Conv,
        out: Tensor,
        mask: Optional[Tensor],
        mask_scale: float,
        stats: Optional[Stats],
        reader: Optional[BatchNorm] = None,
    ) -> Optional[Fold]:
        scale, shift, activation = affine or (None, None, Activation())
        weight, bias, padding, dilation, groups, _ = conv
        increment_version(out)
        geometry = (conv.steps, padding, dilation, groups, SCRATCH)
        told(torch.ops.resdense.bn_act_conv, x, scale, shift, slope_of(activation), weight, bias, *geometry, out)
        if mask is not None:
            out.mul_(mask).mul_(mask_scale)
        return self._read(out, self.channel_stats(out) if stats else (), stats, reader, activation)

    def bn_act_conv_backward(
        self, x: Tensor, fold: Optional[Fold], conv: Conv, grad: Tensor | Pending, into: Optional[Pending], need_weight: bool
    ) -> ConvGrads:
        scale = shift = center = out = None
        slope = 1.0
        if fold is not None:
            (scale, shift, activation), center, *_ = fold
            slope = slope_of(activation)
        if into is not None:
            out = into.dy
            increment_version(out)
        weight, bias, padding, dilation, groups, _ = conv
        upstream = grad if isinstance(grad, Pending) else (grad, *_NONE)
        dy, dweight, dbias, *sums = told(
            torch.ops.resdense.bn_act_conv_backward, x, scale, shift, center, slope, weight, conv.steps, padding, dilation, groups,
            SCRATCH, *upstream, out, need_weight, need_weight and bias is not None,
        )  # fmt: skip
        return self._grads(x, fold, dweight, dbias, dy, into, *sums)
