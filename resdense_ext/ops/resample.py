"""Pools and resizes of what norms and activations make of a map, which backward may make again."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from resdense_ext import reference
from resdense_ext.ops._library import LIBRARY
from resdense_ext.ops.layout import memory_format_of
from resdense_ext.ops.operands import ConvGrads, Fold, Pending
from resdense_ext.ops.reference_backend import ReferenceBackend
from resdense_ext.reference import Pool, Resampling, Resize

__all__ = ["is_repeatable", "resample", "resample_backward"]

_BACKWARDS = {
    "nearest": "upsample_nearest",
    "nearest-exact": "_upsample_nearest_exact",
    **{mode: f"upsample_{mode}" for mode in ("linear", "bilinear", "bicubic", "trilinear")},
}
"""The framework's operators, whose names end with the rank."""


def is_repeatable(by: object) -> bool:
    """Whether the framework's backward on a GPU adds up in one order."""
    return not isinstance(by, Resize) or by.mode.startswith("nearest")


def resample(backend: ReferenceBackend, x: Tensor, fold: Optional[Fold], by: Resampling) -> tuple[Tensor, Optional[Tensor]]:
    """``by(act(norm(x)))``, a new dense tensor in the layout of ``x``; of maxima also their places, as `ReferenceBackend.bn_act_pool`
    gives them."""
    if isinstance(by, Pool):
        return backend.bn_act_pool(x, (fold or backend.linear(x)).affine, by)
    a = x if fold is None else backend.bn_act(x, fold.affine)
    return torch.ops.resdense.resize(a, by.mode, by.size, by.scale, bool(by.align_corners)), None


def resample_backward(
    backend: ReferenceBackend,
    x: Tensor,
    fold: Optional[Fold],
    by: Resampling,
    grad: Tensor,
    taps: Optional[Tensor],
    into: Optional[Pending],
) -> ConvGrads:
    """See `ReferenceBackend.bn_act_conv_backward`, from the gradient of what `resample` returned, and the places where they are known."""
    if isinstance(by, Pool):
        if by.kind == "maximum" and taps is None:
            _, taps = resample(backend, x, fold, by)
        return backend.bn_act_pool_backward(grad, taps, x, fold or backend.linear(x), by, into)
    da = torch.ops.resdense.resize_backward(grad, x, by.mode, by.scale, bool(by.align_corners))
    return backend.norm_act_backward(da, x, fold, into)


def _resize(x: Tensor, mode: str, size: list[int], scale: list[float], align_corners: bool) -> Tensor:
    by = Resize(mode, tuple(size), tuple(scale), None if mode.startswith("nearest") else align_corners)
    return reference.resampled(x, by).contiguous(memory_format=memory_format_of(x))


def _resize_backward(grad: Tensor, x: Tensor, mode: str, scale: list[float], align_corners: bool) -> Tensor:
    rank = x.dim() - 2
    backward = getattr(torch.ops.aten, f"{_BACKWARDS[mode]}{rank}d_backward")
    corners = [] if mode.startswith("nearest") else [align_corners]
    dx = backward(grad, grad.shape[2:], x.shape, *corners, *(scale or (None,) * rank))
    return dx.contiguous(memory_format=memory_format_of(x))


# Operators, so that a program holds them: it cannot call the framework's, whose sizes may be symbols.
LIBRARY.define("resize(Tensor x, str mode, int[] size, float[] scale, bool align_corners) -> Tensor")
LIBRARY.define("resize_backward(Tensor grad, Tensor x, str mode, float[] scale, bool align_corners) -> Tensor")
LIBRARY.impl("resize", _resize, "CompositeExplicitAutograd")
LIBRARY.impl("resize_backward", _resize_backward, "CompositeExplicitAutograd")
