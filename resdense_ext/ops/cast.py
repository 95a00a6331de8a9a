"""A block's convolution weights in the dtype of autocast: one launch for all of them, and one for their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

from resdense_ext.reference import Conv, DenseLayer, Unit

__all__ = ["cast_convolutions"]


class CastFunction(torch.autograd.Function):
    """``tensor.to(dtype)`` of every tensor."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *tensors: Tensor):
        ctx.dtypes = [t.dtype for t in tensors]
        ctx.set_materialize_grads(False)
        return tuple(_cast(tensors, [dtype] * len(tensors)))

    @staticmethod
    def backward(ctx, *grads: Optional[Tensor]):
        wanted = [grad is not None for grad in grads]
        given = [grad for grad in grads if grad is not None]
        dtypes = [dtype for dtype, want in zip(ctx.dtypes, wanted) if want]
        if torch.is_grad_enabled():
            cast = iter([grad.to(dtype) for grad, dtype in zip(given, dtypes)])
        else:
            cast = iter(_cast(given, dtypes))
        return None, *(next(cast) if want else None for want in wanted)


def _cast(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    results = [torch.empty_like(t, dtype=dtype) for t, dtype in zip(tensors, dtypes)]
    if results:
        torch._foreach_copy_(results, list(tensors))
    return results


def cast_convolutions(layers: Sequence[DenseLayer], dtype: torch.dtype) -> list[DenseLayer]:
    """The layers with convolutions in ``dtype``; like autocast itself, it leaves float64 alone."""
    convs = [unit.conv for layer in layers for unit in layer.units]
    tensors = [t for conv in convs for t in (conv.weight, conv.bias) if _changes(t, dtype)]
    if not tensors:
        return list(layers)
    cast = iter(CastFunction.apply(dtype, *tensors))

    def read(tensor: Optional[Tensor]) -> Optional[Tensor]:
        return next(cast) if _changes(tensor, dtype) else tensor

    def converted(conv: Conv) -> Conv:
        return conv._replace(weight=read(conv.weight), bias=read(conv.bias))

    return [layer._replace(units=tuple(Unit(unit.norm, converted(unit.conv)) for unit in layer.units)) for layer in layers]


def _changes(tensor: Optional[Tensor], dtype: torch.dtype) -> bool:
    return tensor is not None and tensor.dtype not in (dtype, torch.float64)
