"""The CUDA backend: what ``csrc/cuda`` has kernels for in C++, other convolutions by the vendor's libraries.

What moments take beside products is Triton's here, too.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from resdense_ext.ops import _library, conv3x3
from resdense_ext.ops.backend import Affine, Fold, Stats, register
from resdense_ext.ops.compiled import CompiledBackend, slope_of
from resdense_ext.ops.out_of_memory import watch
from resdense_ext.ops.triton import MomentsBackend, architecture_refusal
from resdense_ext.ops.vendor import VendorBackend
from resdense_ext.reference import Activation, BatchNorm, Conv

__all__ = ["CudaBackend"]


class CudaBackend(CompiledBackend, MomentsBackend, VendorBackend):
    name = "cuda"

    def refusal(self, x: Tensor, compute_dtype: torch.dtype, activation: Activation) -> Optional[str]:
        if _library.CUDA_LIBRARY:
            return f"the CUDA library is not loaded: {_library.CUDA_LIBRARY}"
        if not x.is_cuda:
            return f"the input is on {x.device.type}"
        watch()
        return architecture_refusal(x.device) or super().refusal(x, compute_dtype, activation)

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
        if affine is None or mask is not None or conv3x3.refusal(x, conv, out):
            return super().bn_act_conv(x, affine, conv, out, mask, mask_scale, stats, reader)
        scale, shift, activation = affine
        increment_version(out)
        found = torch.ops.resdense.bn_act_conv3x3(x, scale, shift, slope_of(activation), conv.weight, out, stats is not None)
        return self._read(out, found, stats, reader, activation)


register(CudaBackend())
