"""A convolution of an activation, and its backward, as one operator each, ``csrc/convolution``.

It takes the kernels that activate as they multiply where these serve, the dense layers' 1x1 and 3x3, and for all else cuBLAS and
cuDNN on activations in memory: of some samples at a time, and without other copies. On an H200 these libraries run close to the
memory's bandwidth, and so does the pass that writes the activation; `make gpu PART=kernels` times both ways.
"""

from __future__ import annotations

import functools
import math
from typing import Optional

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from resdense_ext.ops.activation import number_of
from resdense_ext.ops.operands import Affine, ConvGrads, Fold, Pending, Prefix, Stats, in_dtype
from resdense_ext.ops.out_of_memory import told
from resdense_ext.ops.reference_backend import ReferenceBackend
from resdense_ext.reference import Activation, BatchNorm, Conv

__all__ = ["SCRATCH", "VendorBackend"]

SCRATCH = 2**28
"""Bytes of an activation that may be in memory at once, and in backward as many of its gradient: a bottleneck of a DenseNet-121's
first block, at a batch of 256 and in 16 bits, has three quarters of that."""

_FUSED_SHARED_MEMORY = 160 * 1024
"""Bytes of shared memory that are enough for a block of any of the dense layers' kernels: ``csrc/cuda`` asserts it."""

_NO_NORM = Fold(Affine(None, None, Activation("identity")), None, None, None)


@functools.cache
def _fuses(device: torch.device) -> bool:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= _FUSED_SHARED_MEMORY


class VendorBackend(ReferenceBackend):
    """In the libraries' way a 1x1 convolution is a matrix product of a channels-last map as it lies in memory."""

    def fuses(self, x: Tensor) -> bool:
        """Whether the device of ``x`` has the shared memory that the dense layers' kernels ask for."""
        return _fuses(x.device)

    def ticket(self, x: Tensor) -> Optional[Tensor]:
        return x.new_zeros(1, dtype=torch.int32) if self.fuses(x) else None

    def chunks(self, x: Tensor, conv: Optional[Conv] = None) -> list[slice]:
        size = max(1, SCRATCH * x.shape[0] // max(x.numel() * x.element_size(), 1))
        return [slice(n, n + size) for n in range(0, x.shape[0], size)] or [slice(0, 0)]

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
        prefix: Optional[Prefix] = None,
    ) -> Optional[Fold]:
        scale, shift, activation = affine or (None, None, Activation())
        weight, bias, padding, dilation, groups, _ = conv
        geometry = (conv.steps, padding, dilation, groups, self.fuses(x), SCRATCH)
        increment_version((out, *(stats or ())))
        found = (None, None) if stats is None or mask is not None else stats
        # The norm that reads what is written is folded with its statistics.
        folds = found is stats and reader is not None and reader.batch_stats
        norm = (reader.eps, *in_dtype(stats.mean.dtype, reader.weight, reader.bias)) if folds else (None, None, None)
        before, whole, ticket = prefix or ((None, None), stats, None)
        operands = (x, scale, shift, number_of(activation), weight, bias, *geometry, out, *found)
        *folded, rstd = told(torch.ops.resdense.bn_act_conv, *operands, *norm, *before, ticket)
        if rstd is not None:
            return Fold(Affine(*folded, activation), whole.mean, rstd, out.numel() // out.shape[1])
        if mask is not None:
            out.mul_(mask).mul_(mask_scale)
            if stats is not None:
                torch.ops.resdense.channel_stats_into(out, *stats)
        return self._folded_reader(out, whole, reader, activation)

    def bn_act_conv_backward(
        self,
        x: Tensor,
        fold: Optional[Fold],
        conv: Conv,
        grad: Tensor | Pending,
        into: Optional[Pending],
        need_weight: bool,
        finish: bool = False,
        overwrite: bool = False,
    ) -> ConvGrads:
        (scale, shift, activation), center, rstd, count, groups = fold or _NO_NORM
        finish = finish and groups is None  # their correction is still to come
        out, beta, delta = (None, None, None) if into is None else (into.dy, into.beta, into.delta)
        if into is not None:
            increment_version((out, beta, delta))
        if overwrite and isinstance(grad, Pending):
            increment_version(grad.dy)
        weight, bias, padding, dilation, groups, _ = conv
        dy, *correction, dweight, dbias, dgamma, dbeta = told(
            torch.ops.resdense.bn_act_conv_backward,
            *(x, scale, shift, center, rstd, math.inf if count is None else count, number_of(activation)),
            *(weight, conv.steps, padding, dilation, groups, self.fuses(x), SCRATCH),
            *(grad if isinstance(grad, Pending) else (grad, None, None, None, None)),
            *(out, beta, delta, finish, need_weight, need_weight and bias is not None, overwrite),
        )
        if correction[0] is not None:
            into = Pending(dy, x, scale, *correction)
        elif finish:
            into = dy
        elif into is None:
            into = Pending.of(dy, x)
        return self._of_groups(fold, ConvGrads(into, dweight, dbias, dgamma, dbeta))
