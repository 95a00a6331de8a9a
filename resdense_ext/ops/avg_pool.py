"""The averages of windows, for which nothing is kept: stock keeps the pool's input for its sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from resdense_ext import reference
from resdense_ext.ops.reference_backend import unpool
from resdense_ext.reference import Pool

__all__ = ["avg_pool"]


class AvgPoolFunction(torch.autograd.Function):
    """Keeps nothing."""

    @staticmethod
    def forward(ctx, x: Tensor, pool: Pool) -> Tensor:
        ctx.pool, ctx.layout, ctx.dtype = pool, (x.shape, x.stride()), x.dtype
        return reference.pool(x, pool)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x = torch.empty_strided(*ctx.layout, dtype=ctx.dtype, device=grad.device)  # whose sizes and format are read alone
        return unpool(grad, x, ctx.pool), None


def avg_pool(x: Tensor, pool: Pool) -> Tensor:
    """The averages of ``x``, ``[N, C, *spatial]`` with one to three spatial dimensions; padding counts as zeros."""
    return AvgPoolFunction.apply(x, pool)
