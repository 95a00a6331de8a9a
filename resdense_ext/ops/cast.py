"""Autocast: convolution weights in its dtype, one launch for a block's and one for their gradients; and none inside."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Optional

import torch
from torch import Tensor

from resdense_ext.checks import has_autocast
from resdense_ext.ops.by_reference import by_reference
from resdense_ext.reference import Conv, ConvGraph, DenseLayer, DualPathBlock, Resampling, ResidualBlock, Unit

__all__ = [
    "cast_conv_graph",
    "cast_convolution",
    "cast_convolutions",
    "cast_dual_path_blocks",
    "cast_residual_blocks",
    "without_autocast",
]


class CastFunction(torch.autograd.Function):
    """``tensor.to(dtype)`` of every tensor."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *tensors: Tensor):
        ctx.dtypes = [t.dtype for t in tensors]
        ctx.set_materialize_grads(False)
        cast = tuple(_cast(tensors, [dtype] * len(tensors)))
        # Of several outputs all have a gradient where one has; a frozen weight's would be computed, and what it takes be kept.
        ctx.mark_non_differentiable(*[made for made, need in zip(cast, ctx.needs_input_grad[1:]) if not need])
        return cast

    @staticmethod
    def backward(ctx, *grads: Optional[Tensor]):
        wanted = [grad is not None for grad in grads]
        given = [grad for grad in grads if grad is not None]
        dtypes = [dtype for dtype, want in zip(ctx.dtypes, wanted) if want]
        if by_reference(*grads):
            cast = iter([grad.to(dtype) for grad, dtype in zip(given, dtypes)])
        else:
            cast = iter(_cast(given, dtypes))
        return None, *(next(cast) if want else None for want in wanted)


def _cast(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    if torch.compiler.is_compiling():
        # The compiler makes few launches of these; torch 2.11's would leave out of a backward what is only written in place.
        return [t.to(dtype) for t, dtype in zip(tensors, dtypes)]
    results = [torch.empty_like(t, dtype=dtype) for t, dtype in zip(tensors, dtypes)]
    if results:
        torch._foreach_copy_(results, list(tensors))
    return results


def cast_convolution(conv: Conv, dtype: torch.dtype) -> Conv:
    """One convolution in ``dtype``; like autocast itself, it leaves float64 alone."""
    weight, bias = (t.to(dtype) if _changes(t, dtype) else t for t in (conv.weight, conv.bias))
    return conv._replace(weight=weight, bias=bias)


def cast_convolutions(layers: Sequence[DenseLayer], dtype: torch.dtype) -> list[DenseLayer]:
    """The layers with convolutions as `cast_convolution` gives them."""
    convs = iter(_cast_convs([unit.conv for layer in layers for unit in layer.units], dtype))
    return [layer._replace(units=tuple(Unit(unit.norm, next(convs)) for unit in layer.units)) for layer in layers]


def cast_residual_blocks(blocks: Sequence[ResidualBlock], dtype: torch.dtype) -> list[ResidualBlock]:
    """The blocks with convolutions as `cast_convolution` gives them."""
    convs = [conv for block in blocks for conv in (*(unit.conv for unit in block.units), block.shortcut and block.shortcut.conv)]
    cast, made = iter(_cast_convs(convs, dtype)), []
    for block in blocks:
        units, conv = tuple(Unit(unit.norm, next(cast)) for unit in block.units), next(cast)
        made.append(block._replace(units=units, shortcut=block.shortcut and block.shortcut._replace(conv=conv)))
    return made


def cast_dual_path_blocks(blocks: Sequence[DualPathBlock], dtype: torch.dtype) -> list[DualPathBlock]:
    """The blocks with convolutions as `cast_convolution` gives them."""
    units = [unit for block in blocks for unit in (block.projection, *block.units)]
    convs = _cast_convs([None if unit is None else unit.conv for unit in units], dtype)
    cast = iter([None if unit is None else unit._replace(conv=conv) for unit, conv in zip(units, convs)])
    return [block._replace(projection=next(cast), units=tuple(next(cast) for _ in block.units)) for block in blocks]


def cast_conv_graph(graph: ConvGraph, dtype: torch.dtype) -> ConvGraph:
    """The graph with convolutions as `cast_convolution` gives them."""
    convs = [None if isinstance(conv, Resampling) else conv for conv in graph.convs]
    cast = _cast_convs(convs, dtype)
    return graph._replace(convs=tuple(conv or resampling for conv, resampling in zip(cast, graph.convs)))


def _cast_convs(convs: Sequence[Optional[Conv]], dtype: torch.dtype) -> list[Optional[Conv]]:
    tensors = [t for conv in convs if conv is not None for t in (conv.weight, conv.bias) if _changes(t, dtype)]
    cast = iter(CastFunction.apply(dtype, *tensors) if tensors else ())

    def read(tensor: Optional[Tensor]) -> Optional[Tensor]:
        return next(cast) if _changes(tensor, dtype) else tensor

    return [
        None if conv is None else conv._replace(weight=read(conv.weight), bias=read(conv.bias)) for conv in convs
    ]


def _changes(tensor: Optional[Tensor], dtype: torch.dtype) -> bool:
    return tensor is not None and tensor.dtype not in (dtype, torch.float64)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """The engines have their dtypes already; an inner convolution is to take them as they are."""
    if not has_autocast(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
