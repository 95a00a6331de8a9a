"""Convolutions by the vendor's libraries, on activations in memory: of some samples at a time, and without other copies.

On an H200 this is faster than kernels that activate as they multiply: cuBLAS and cuDNN run close to the memory's bandwidth, and so
does the pass that writes the activation; `make gpu PART=kernels` times both.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from resdense_ext.ops.backend import Pending, ReferenceBackend
from resdense_ext.ops.convolve import is_matrix_product
from resdense_ext.ops.layout import empty_map
from resdense_ext.reference import Conv, accumulation_dtype

__all__ = ["SCRATCH", "VendorBackend"]

SCRATCH = 2**28
"""Bytes of an activation that may be in memory at once, and in backward as many of its gradient: a bottleneck of a DenseNet-121's
first block, at a batch of 256 and in 16 bits, has three quarters of that."""


def _rows(x: Tensor) -> Optional[Tensor]:
    """A map as a matrix ``[positions, channels]``, as channels-last ones and slices of their channels lie in memory; None where that
    would copy it."""
    try:
        return x.movedim(1, -1).view(x.numel() // x.shape[1], x.shape[1])
    except RuntimeError:
        return None


class VendorBackend(ReferenceBackend):
    """A 1x1 convolution is a matrix product of a channels-last map as it lies in memory."""

    def chunks(self, x: Tensor) -> list[slice]:
        size = max(1, SCRATCH * x.shape[0] // max(x.numel() * x.element_size(), 1))
        return [slice(n, n + size) for n in range(0, x.shape[0], size)] or [slice(0, 0)]

    def finished(self, pending: Pending) -> Tensor:
        return self.pending_grad_(pending)

    def convolve(self, a: Tensor, conv: Conv, out: Tensor) -> None:
        rows, products = _rows(a), _rows(out)
        if rows is None or products is None or conv.bias is not None or not is_matrix_product(conv):
            return super().convolve(a, conv, out)
        torch.mm(rows, conv.weight.flatten(1).T, out=products)

    def convolution_backward(
        self, grad: Tensor, a: Tensor, conv: Conv, need_weight: bool
    ) -> tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
        bias = None
        if conv.bias is not None and need_weight:
            # Of some samples only: it is not rounded before all have been added up.
            bias = grad.sum((0, *range(2, grad.dim())), dtype=accumulation_dtype(grad.dtype))
        conv = conv._replace(bias=None)
        dz, rows = _rows(grad), _rows(a)
        if dz is None or rows is None or not is_matrix_product(conv):
            dx, weight, _ = super().convolution_backward(grad, a, conv, need_weight)
        else:
            dx = empty_map(a, a.shape[1], a.dtype)
            torch.mm(dz, conv.weight.flatten(1), out=_rows(dx))
            weight = (dz.T @ rows).view_as(conv.weight) if need_weight else None
        return dx, weight, bias
