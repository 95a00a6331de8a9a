"""The CUDA backend: what ``csrc/cuda`` has kernels for in C++, the rest in Triton.

None of it has run on a GPU yet; its kernels run on the CPU, under the execution-model shim of the tests.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from resdense_ext.ops import _library
from resdense_ext.ops.backend import register
from resdense_ext.ops.compiled import CompiledBackend
from resdense_ext.ops.triton import TritonBackend, architecture_refusal
from resdense_ext.reference import Activation

__all__ = ["CudaBackend"]


class CudaBackend(CompiledBackend, TritonBackend):
    name = "cuda"

    def refusal(self, x: Tensor, compute_dtype: torch.dtype, activation: Activation) -> Optional[str]:
        if _library.CUDA_LIBRARY:
            return f"the CUDA library is not loaded: {_library.CUDA_LIBRARY}"
        if not x.is_cuda:
            return f"the input is on {x.device.type}"
        return architecture_refusal(x.device) or CompiledBackend.refusal(self, x, compute_dtype, activation)


register(CudaBackend())
