"""Where the taps of a convolution lie, in one to three dimensions.

A convolution that keeps every position in its place shifts its maps. Any other has windows, as a pool has, and no dilation; its
data gradient goes by residue classes: all positions with the same remainders by the stride are reached by the same taps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from resdense_ext.kernels.launch import ceil_div, remembered
from resdense_ext.kernels.windows import coordinates, input_of
from resdense_ext.reference import Conv

__all__ = ["Geometry", "class_place", "class_tap", "class_taps", "shifted"]

Sizes = tuple[int, int, int]


@dataclass(frozen=True)
class Geometry:
    """Three dimensions: those that a map lacks come first, with size and kernel 1. Stride and padding are None where every
    position stays in its place."""

    sizes: Sizes
    outputs: Sizes
    kernel: Sizes
    dilation: Sizes
    stride: Optional[Sizes]
    padding: Optional[Sizes]

    @staticmethod
    def of(x: Tensor, conv: Conv) -> Geometry:
        return _geometry_of(x.shape[2:], conv.weight.shape, tuple(conv.padding), tuple(conv.dilation), tuple(conv.stride))

    @cached_property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @cached_property
    def kind(self) -> str:
        """``taps`` of `resdense_ext.kernels.configs.Key`."""
        return "strided" if self.stride else "1" if self.taps == 1 else "many"

    @cached_property
    def classes(self) -> int:
        """Residue classes of the input's positions; 1 where these stay in their places."""
        return math.prod(self.stride or ())

    @cached_property
    def class_size(self) -> int:
        """The positions of the largest residue class, that of remainder 0, in a sample."""
        return math.prod(map(ceil_div, self.sizes, self.stride or (1, 1, 1)))

    def constants(self) -> dict[str, Optional[Sizes]]:
        """What a launch takes."""
        return {"KERNEL": self.kernel, "STRIDE": self.stride, "PADDING": self.padding}


@remembered
def _geometry_of(
    sizes: Sizes, weight: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...], stride: tuple[int, ...]
) -> Geometry:
    conv = Conv(torch.empty(weight, device="meta"), None, padding, dilation, stride=stride)
    fill, none = (1,) * (3 - len(sizes)), (0,) * (3 - len(sizes))
    steps, zeros = (None, None) if conv.keeps_size else ((*fill, *conv.steps), (*none, *padding))
    return Geometry((*fill, *sizes), (*fill, *conv.outputs(sizes)), (*fill, *weight[2:]), (*fill, *dilation), steps, zeros)


@triton.jit
def shifted(
    place, tap, D, H, W, OH, OW, dilation_d, dilation_h, dilation_w, SIGN: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """How far a tap lies from each place, in positions, and whether it lies inside.

    SIGN is -1 for the transposed convolution, where positions stay in their places; else places are those of outputs, and taps
    those of inputs.
    """
    KD: tl.constexpr = KERNEL[0]
    KH: tl.constexpr = KERNEL[1]
    KW: tl.constexpr = KERNEL[2]
    if STRIDE is not None:
        at, inside = input_of(place, tap, D, H, W, OH, OW, KERNEL, STRIDE, PADDING)
        return at - place, inside
    if KD * KH * KW == 1:
        return tl.zeros_like(place), place >= 0
    td, th, tw = tap // (KH * KW), tap // KW % KH, tap % KW
    od = SIGN * (td * dilation_d - (KD - 1) * dilation_d // 2)
    oh = SIGN * (th * dilation_h - (KH - 1) * dilation_h // 2)
    ow = SIGN * (tw * dilation_w - (KW - 1) * dilation_w // 2)
    w, line = place % W, place // W
    h, d = line % H, line // H
    inside = (w + ow >= 0) & (w + ow < W) & (h + oh >= 0) & (h + oh < H) & (d + od >= 0) & (d + od < D)
    return tl.zeros_like(place) + (od * H + oh) * W + ow, inside


@triton.jit
def _remainders(residue, STRIDE: tl.constexpr):
    return residue // (STRIDE[1] * STRIDE[2]), residue // STRIDE[2] % STRIDE[1], residue % STRIDE[2]


@triton.jit
def class_place(residue, number, D, H, W, STRIDE: tl.constexpr):
    """The places in the map of positions by their number in a residue class, row-major; and whether they lie inside."""
    d, h, w = coordinates(number, tl.cdiv(H, STRIDE[1]), tl.cdiv(W, STRIDE[2]))
    rd, rh, rw = _remainders(residue, STRIDE)
    d, h, w = d * STRIDE[0] + rd, h * STRIDE[1] + rh, w * STRIDE[2] + rw
    return (d * H + h) * W + w, (d < D) & (h < H) & (w < W)


@triton.jit
def _taps(remainder, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr):
    """The first tap that reaches positions with this remainder, and how many do, a stride apart."""
    first = (remainder + PADDING) % STRIDE
    return first, (KERNEL - first + STRIDE - 1) // STRIDE


@triton.jit
def class_taps(residue, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr):
    """How many taps reach the positions of a residue class."""
    rd, rh, rw = _remainders(residue, STRIDE)
    _, down = _taps(rd, KERNEL[0], STRIDE[0], PADDING[0])
    _, along = _taps(rh, KERNEL[1], STRIDE[1], PADDING[1])
    _, across = _taps(rw, KERNEL[2], STRIDE[2], PADDING[2])
    return down * along * across


@triton.jit
def class_tap(
    place, residue, number, H, W, OD, OH, OW, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr
):  # fmt: skip
    """The tap of this ``number`` among those that reach a residue class; the outputs' places, and whether these lie inside."""
    rd, rh, rw = _remainders(residue, STRIDE)
    td, _ = _taps(rd, KERNEL[0], STRIDE[0], PADDING[0])
    th, along = _taps(rh, KERNEL[1], STRIDE[1], PADDING[1])
    tw, across = _taps(rw, KERNEL[2], STRIDE[2], PADDING[2])
    td += number // (along * across) * STRIDE[0]
    th += number // across % along * STRIDE[1]
    tw += number % across * STRIDE[2]
    d, h, w = coordinates(place, H, W)
    d, h, w = d + PADDING[0] - td, h + PADDING[1] - th, w + PADDING[2] - tw
    od, oh, ow = d // STRIDE[0], h // STRIDE[1], w // STRIDE[2]  # without a remainder, where not behind the map's end
    inside = (d >= 0) & (od < OD) & (h >= 0) & (oh < OH) & (w >= 0) & (ow < OW)
    return (td * KERNEL[1] + th) * KERNEL[2] + tw, (od * OH + oh) * OW + ow, inside
