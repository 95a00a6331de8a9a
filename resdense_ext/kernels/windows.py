"""The windows of a pool or a convolution, in one to three dimensions: which inputs an output has, and which outputs an input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Windows", "check_spatial", "coordinates", "input_of", "output_of"]

Sizes = tuple[int, int, int]


class Windows(NamedTuple):
    """Three dimensions: those that a map lacks come first, with size and window 1. Padding is at most half a window, so every
    window has an input."""

    inputs: Sizes
    outputs: Sizes
    kernel: Sizes
    stride: Sizes
    padding: Sizes

    @staticmethod
    def of(x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Windows:
        """Raises ValueError, naming the argument, where these are no windows of ``x``."""
        check_spatial(x)
        sizes, kernel_size, stride, padding = (tuple(of) for of in (x.shape[2:], kernel_size, stride, padding))
        for name, values, least in (("kernel_size", kernel_size, 1), ("stride", stride, 1), ("padding", padding, 0)):
            if len(values) != len(sizes):
                raise ValueError(f"{name}: expected {len(sizes)} values, one a spatial dimension of x, got {values}")
            if min(values) < least:
                raise ValueError(f"{name}: expected values of {least} or more, got {values}")
        if any(p > k // 2 for p, k in zip(padding, kernel_size)):
            raise ValueError(f"padding: expected at most half of kernel_size {kernel_size}, got {padding}")
        spare = [size + 2 * p - k for size, p, k in zip(sizes, padding, kernel_size)]
        if min(spare) < 0:
            raise ValueError(
                f"kernel_size: expected windows within the padded x of shape {tuple(x.shape)}, got {kernel_size} with padding {padding}"
            )
        outputs = tuple(left // step + 1 for left, step in zip(spare, stride))
        fill = (1,) * (3 - len(sizes))
        none = (0,) * len(fill)
        return Windows((*fill, *sizes), (*fill, *outputs), (*fill, *kernel_size), (*fill, *stride), (*none, *padding))

    @property
    def taps(self) -> int:
        """Places of a window."""
        return math.prod(self.kernel)

    @property
    def covering(self) -> int:
        """The most windows that cover a place."""
        return math.prod(-(-k // step) for k, step in zip(self.kernel, self.stride))

    def constants(self) -> dict[str, Sizes]:
        return {"KERNEL": self.kernel, "STRIDE": self.stride, "PADDING": self.padding}

    def pooled(self, x: Tensor) -> tuple[int, ...]:
        """The shape of the pooled ``x``."""
        return *x.shape[:2], *self.outputs[5 - x.dim() :]


def check_spatial(x: Tensor) -> None:
    if not 3 <= x.dim() <= 5:
        raise ValueError(f"x: expected shape (N, C, ...) with 1 to 3 spatial dimensions, got {tuple(x.shape)}")
    if 0 in x.shape[2:]:
        raise ValueError(f"x: expected spatial sizes of 1 or more, got {tuple(x.shape)}")


@triton.jit
def coordinates(place, H, W):
    """The coordinates of a place in a sample."""
    line = place // W
    return line // H, line % H, place % W


@triton.jit
def _input(output, tap, size, STRIDE: tl.constexpr, PADDING: tl.constexpr):
    at = output * STRIDE - PADDING + tap
    return at, (at >= 0) & (at < size)


@triton.jit
def input_of(
    output, tap, D, H, W, OH, OW, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr
):  # fmt: skip
    """The places of the inputs at a tap, row-major, of the windows of outputs; and whether they lie in the map."""
    od, oh, ow = coordinates(output, OH, OW)
    d, d_inside = _input(od, tap // (KERNEL[1] * KERNEL[2]), D, STRIDE[0], PADDING[0])
    h, h_inside = _input(oh, tap // KERNEL[2] % KERNEL[1], H, STRIDE[1], PADDING[1])
    w, w_inside = _input(ow, tap % KERNEL[2], W, STRIDE[2], PADDING[2])
    return (d * H + h) * W + w, d_inside & h_inside & w_inside


@triton.jit
def _output(place, back, size, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr):
    """The output ``back`` before the last whose window covers a place, and the tap that leads there."""
    output = (place + PADDING) // STRIDE - back
    tap = place + PADDING - output * STRIDE
    return output, tap, (output >= 0) & (output < size) & (tap < KERNEL)


@triton.jit
def output_of(
    place, number, H, W, OD, OH, OW, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr
):  # fmt: skip
    """Of the windows that cover a place that of this ``number``: its output's place, the tap, and whether there is one."""
    ACROSS: tl.constexpr = (KERNEL[2] + STRIDE[2] - 1) // STRIDE[2]
    DOWN: tl.constexpr = (KERNEL[1] + STRIDE[1] - 1) // STRIDE[1]
    d, h, w = coordinates(place, H, W)
    od, td, d_inside = _output(d, number // (ACROSS * DOWN), OD, KERNEL[0], STRIDE[0], PADDING[0])
    oh, th, h_inside = _output(h, number // ACROSS % DOWN, OH, KERNEL[1], STRIDE[1], PADDING[1])
    ow, tw, w_inside = _output(w, number % ACROSS, OW, KERNEL[2], STRIDE[2], PADDING[2])
    return (od * OH + oh) * OW + ow, (td * KERNEL[1] + th) * KERNEL[2] + tw, d_inside & h_inside & w_inside
