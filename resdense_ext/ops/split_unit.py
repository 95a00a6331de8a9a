"""A unit between maps that lie side by side in several tensors, which nobody concatenates.

A batch norm works channel by channel, so it splits by channel; a convolution is a sum over the channels that it reads, so that::

    out_i = sum_j W_ij act(scale_j * x_j + shift_j)

with the rows of W that write ``out_i`` and of these the columns that read ``x_j``. The first product is written, the others are
added to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from resdense_ext.ops.convolve import convolve, convolve_backward, convolved
from resdense_ext.ops.layout import empty_map
from resdense_ext.ops.operands import Pending, Stats
from resdense_ext.ops.reference_backend import ReferenceBackend
from resdense_ext.reference import Activation, BatchNorm, Conv, Unit

__all__ = ["Source", "SplitUnit", "split_conv", "split_norm"]


class Source(NamedTuple):
    """A map that units read, and its statistics; where no norm normalises by them, these are not read."""

    x: Tensor
    stats: Stats


class SplitUnit:
    """A unit that reads these maps side by side. Of several sources or targets the convolution has one group."""

    def __init__(self, backend: ReferenceBackend, unit: Unit, sources: Sequence[Source], activation: Activation) -> None:
        self.backend, self.conv, self.sources = backend, unit.conv, sources
        widths = [x.shape[1] for x, _ in sources]
        self.folds = [
            backend.fold(norm, stats, x.numel() // x.shape[1], activation)
            for norm, (x, stats) in zip(split_norm(unit.norm, widths), sources)
        ]

    def empty_output(self) -> Tensor:
        """Room for what the convolution makes of the sources."""
        x, weight = self.sources[0].x, self.conv.weight
        return empty_map(x, weight.shape[0], weight.dtype, self.conv.outputs(x.shape[2:]))

    def write(self, outs: Sequence[Tensor], stats: Sequence[Optional[Stats]]) -> None:
        """Into these maps, side by side; their statistics are taken where there is room for them."""
        for out, taken, parts in zip(outs, stats, self._parts([out.shape[1] for out in outs])):
            (x, _), fold, alone = self.sources[0], self.folds[0], len(parts) == 1
            convolve(self.backend, x, fold, parts[0], out, taken if alone else None)
            for (x, _), fold, part in zip(self.sources[1:], self.folds[1:], parts[1:]):
                out.add_(convolved(self.backend, x, fold, part, None)[0])
            if taken is not None and not alone:
                for to, found in zip(taken, self.backend.channel_stats(out)):
                    to.copy_(found)

    def backward(
        self, grads: Sequence[Pending], intos: Sequence[Optional[Pending]], need_weight: bool
    ) -> tuple[list[Pending], tuple[Optional[Tensor], ...]]:
        """From the gradients of what was written: the sources', as `ReferenceBackend.bn_act_conv_backward` gives them, and the
        norm's and the convolution's weight and bias."""
        rows, columns = self._parts([grad.dy.shape[1] for grad in grads]), []
        for j, ((x, _), fold, into) in enumerate(zip(self.sources, self.folds, intos)):
            if into is None and len(grads) > 1:
                into = Pending.of(torch.zeros_like(x), x)
            columns.append(
                [
                    convolve_backward(self.backend, x, fold, parts[j], grad, into, need_weight)
                    for parts, grad in zip(rows, grads)
                ]
            )
        norm_weight, norm_bias = (
            _joined([_sum([getattr(found, at) for found in column]) for column in columns], 0) for at in ("norm_weight", "norm_bias")
        )
        weight = bias = None
        if need_weight:
            weight = _joined([_joined([found.weight for found in row], 1) for row in zip(*columns)], 0)
            bias = None if self.conv.bias is None else _joined([found.bias for found in columns[0]], 0)
        return [column[-1].input for column in columns], (norm_weight, norm_bias, weight, bias)

    def _parts(self, outputs: Sequence[int]) -> list[list[Conv]]:
        """The convolutions from every source to every target, a list a target."""
        conv, inputs = self.conv, [x.shape[1] for x, _ in self.sources]
        if len(inputs) == len(outputs) == 1:
            return [[conv]]
        biases = [None] * len(outputs) if conv.bias is None else conv.bias.split_with_sizes(list(outputs))
        rows = conv.weight.split_with_sizes(list(outputs))
        return [split_conv(conv._replace(weight=weight, bias=bias), inputs) for weight, bias in zip(rows, biases)]


def split_conv(conv: Conv, widths: Sequence[int]) -> list[Conv]:
    """The convolutions, of one group, whose sum is that of maps of these widths side by side; the first one has the bias."""
    parts = conv.weight.split_with_sizes(list(widths), 1)
    return [conv._replace(weight=_dense(part), bias=None if j else conv.bias) for j, part in enumerate(parts)]


def split_norm(norm: BatchNorm, widths: Sequence[int]) -> list[BatchNorm]:
    """The norms of maps of these widths, which ``norm`` reads side by side; the first one counts the batches.

    Raises:
        ValueError: a group of channels lies in two of them.
    """
    channels = sum(widths) // norm.groups if norm.groups else 1
    if any(width % channels for width in widths):
        raise ValueError(f"norm.groups: expected none of {channels} channels across maps of {list(widths)}, got {norm.groups}")
    vectors = [[None] * len(widths) if v is None else v.split_with_sizes(list(widths)) for v in norm[:4]]
    groups = [width // channels if norm.groups else 0 for width in widths]
    norms = [
        norm._replace(weight=w, bias=b, running_mean=m, running_var=v, groups=g) for w, b, m, v, g in zip(*vectors, groups)
    ]
    return [norms[0], *(other._replace(num_batches_tracked=None) for other in norms[1:])]


def _dense(weight: Tensor) -> Tensor:
    """The CPU's kernels in 16 bits want the rows of a weight without gaps; all others take any strides."""
    return weight.contiguous() if weight.dtype.itemsize == 2 else weight


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    """Without the zero that `sum` begins with, which is one more operator."""
    return sum(tensors[1:], tensors[0])


def _joined(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)
