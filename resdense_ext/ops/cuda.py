"""The CUDA backend: what ``csrc/cuda`` has kernels for in C++, other convolutions by the vendor's libraries.

What moments take beside products is Triton's here, too.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from resdense_ext.ops import _library
from resdense_ext.ops.backend import register
from resdense_ext.ops.compiled import CompiledBackend
from resdense_ext.ops.triton import MomentsBackend, architecture_refusal
from resdense_ext.ops.vendor import VendorBackend

__all__ = ["CudaBackend"]


class CudaBackend(CompiledBackend, MomentsBackend, VendorBackend):
    name = "cuda"

    def refusal(self, x: Tensor, compute_dtype: torch.dtype) -> Optional[str]:
        if _library.CUDA_LIBRARY:
            return f"the CUDA library is not loaded: {_library.CUDA_LIBRARY}"
        if not x.is_cuda:
            return f"the input is on {x.device.type}"
        return architecture_refusal(x.device) or super().refusal(x, compute_dtype)


register(CudaBackend())
