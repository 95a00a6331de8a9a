"""One call for the kernels of three kinds of pools, which a backend has as operators or as launchers of the same names.

The operators take the activation as its number, the launchers as it is: here it is whatever they take.
"""

from __future__ import annotations

from types import ModuleType
from typing import Optional

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from resdense_ext.ops.layout import empty_map
from resdense_ext.ops.operands import Pending
from resdense_ext.reference import Activation, Pool

__all__ = ["run_pool", "run_pool_backward"]


def run_pool(
    kernels: ModuleType, x: Tensor, scale: Tensor, shift: Tensor, activation: float | Activation, pool: Pool
) -> tuple[Tensor, Optional[Tensor]]:
    """See `resdense_ext.ops.reference_backend.ReferenceBackend.bn_act_pool`."""
    affine = (x, scale, shift, activation)
    if pool.kind == "global":
        return kernels.bn_act_global_pool(*affine), None
    kind, windows = pool.kind, pool.windows
    out = empty_map(x, x.shape[1], x.dtype, pool.outputs(x.shape[2:]))
    if kind == "average":
        kernels.bn_act_avg_pool(*affine, *windows, out)
        return out, None
    taps = torch.empty_like(out, dtype=torch.uint8)
    kernels.bn_act_max_pool(*affine, *windows, out, taps)
    return out, taps


def run_pool_backward(
    kernels: ModuleType,
    grad: Tensor,
    taps: Optional[Tensor],
    x: Tensor,
    vectors: tuple[Tensor, Tensor, Tensor, float | Activation],
    pool: Pool,
    into: Optional[Pending],
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Writes dy, or adds ``scale * dy`` where ``into`` is given; with the sums of dy and of ``dy * (x - center)``.

    ``vectors`` are scale, shift, center and the activation.
    """
    dy = torch.empty_like(x) if into is None else into.dy
    increment_version(dy)
    operands, target = (x, *vectors), (dy, into is not None)
    kind, windows = pool.kind, pool.windows
    if kind == "global":
        return dy, kernels.bn_act_global_pool_backward(grad, *operands, *target)
    if kind == "average":
        return dy, kernels.bn_act_avg_pool_backward(grad, *operands, *windows, *target)
    return dy, kernels.bn_act_max_pool_backward(grad, taps, *operands, *windows, *target)
