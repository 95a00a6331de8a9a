"""Where the taps of a convolution of stride 1 that keeps the spatial size lie, in one to three dimensions."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from resdense_ext.reference import Conv

__all__ = ["Geometry", "shifted"]


class Geometry(NamedTuple):
    """Sizes, kernel and dilation as three dimensions, those in front filled up with ones."""

    sizes: tuple[int, int, int]
    kernel: tuple[int, int, int]
    dilation: tuple[int, int, int]

    @staticmethod
    def of(x: Tensor, conv: Conv) -> Geometry:
        fill = (1,) * (5 - x.dim())
        return Geometry((*fill, *x.shape[2:]), (*fill, *conv.weight.shape[2:]), (*fill, *conv.dilation))

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1] * self.kernel[2]

    def tap_stride(self, weight: Tensor) -> int:
        """From one tap of the weight to the next: both memory formats have a single such stride."""
        sized = [step for size, step in zip(weight.shape[2:], weight.stride()[2:]) if size > 1]
        return sized[-1] if sized else 0


@triton.jit
def shifted(
    place, tap, D, H, W, dilation_d, dilation_h, dilation_w, SIGN: tl.constexpr,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
):  # fmt: skip
    """How far a tap lies from each place, in positions, and whether it lies inside; SIGN -1 for the transposed convolution."""
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
