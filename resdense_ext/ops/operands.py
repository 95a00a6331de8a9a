"""What primitives take and give beside maps: folded norms, statistics, pending gradients, and what a backward finds."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from resdense_ext.reference import Activation, BatchNorm, accumulation_dtype

__all__ = ["Affine", "ConvGrads", "Fold", "Groups", "Pending", "Prefix", "Stats", "in_dtype"]


class Affine(NamedTuple):
    """A folded batch norm and the activation behind it: ``act(scale * x + shift)``."""

    scale: Tensor
    shift: Tensor
    activation: Activation


class Stats(NamedTuple):
    """A map's mean and sum of squared deviations, ``[C]`` each; slices of a block's vectors, to be written by a primitive."""

    mean: Tensor
    m2: Tensor

    @staticmethod
    def room(z: Tensor, reader: Optional[BatchNorm], samples: int = 1) -> Stats:
        """For those of ``z``, or of every one of so many samples; none where its reader has its own."""
        size = samples * z.shape[1] if reader is not None and reader.batch_stats else 0
        return Stats(*(z.new_empty(size, dtype=accumulation_dtype(z.dtype)) for _ in range(2)))


class Prefix(NamedTuple):
    """The channels of a buffer that a norm reads, the last of which are about to be written: the statistics of those before, and of
    all; and one int32 of 0, from which a kernel's blocks may draw, to know the last of them, and which is 0 again behind it."""

    before: Stats
    whole: Stats
    ticket: Optional[Tensor]


class Groups(NamedTuple):
    """How many groups of channels share statistics, and the number of values in each."""

    number: int
    count: int


class Fold(NamedTuple):
    """A batch norm ready for use: the affine it amounts to, and what its backward needs.

    ``count`` is the number of positions whose statistics normalise; None where the running statistics do, or those of
    `Groups`, whose correction is no channel's own.
    """

    affine: Affine
    mean: Tensor
    rstd: Tensor
    count: Optional[int]
    groups: Optional[Groups] = None

    @staticmethod
    def linear(x: Tensor, samples: int = 1) -> Fold:
        """That of no norm and no activation, for a kernel that wants one, or of every one of so many samples."""
        dtype, size = accumulation_dtype(x.dtype), samples * x.shape[1]
        one, zero = x.new_ones(size, dtype=dtype), x.new_zeros(size, dtype=dtype)
        return Fold(Affine(one, zero, Activation("identity")), zero, one, None)

    def correction(self, dbeta: Tensor, dgamma: Tensor) -> tuple[Tensor, Tensor]:
        """``(beta, delta)`` of the gradient of the norm's input, ``scale * dy + beta * x + delta``."""
        shared = self.affine.scale / self.count
        beta = -shared * self.rstd * dgamma
        return beta, -(shared * dbeta + beta * self.mean)

    def correction_of_groups(self, dbeta: Tensor, dgamma: Tensor) -> tuple[Tensor, Tensor]:
        """`correction`, to which all channels of a group add."""
        number, count = self.groups
        own = (v.view(number, -1) for v in self._replace(count=count).correction(dbeta, dgamma))
        beta, delta = (v.sum(1).repeat_interleave(v.shape[1]) for v in own)
        return beta, delta


class Pending(NamedTuple):
    """A gradient that its reader still has to finish: ``alpha * dy + beta * z + delta``."""

    dy: Tensor
    z: Tensor
    alpha: Tensor
    beta: Tensor
    delta: Tensor

    @staticmethod
    def of(dy: Tensor, x: Tensor, samples: int = 1) -> Pending:
        """``dy`` itself, a gradient of ``x``, to which norms may add their corrections, or those of every one of so many samples."""
        dtype, size = accumulation_dtype(dy.dtype), samples * dy.shape[1]
        return Pending(dy, x, dy.new_ones(size, dtype=dtype), *dy.new_zeros((2, size), dtype=dtype))

    def part(self, samples: slice) -> Pending:
        """That of some samples."""
        return self._replace(dy=self.dy[samples], z=self.z[samples])


class ConvGrads(NamedTuple):
    """The gradients of a norm, an activation and a convolution or a pool: of the input, which is pending unless it was to be
    finished, and of the parameters."""

    input: Pending | Tensor
    weight: Optional[Tensor]
    bias: Optional[Tensor]
    norm_weight: Optional[Tensor]
    norm_bias: Optional[Tensor]


def in_dtype(dtype: torch.dtype, *vectors: Optional[Tensor]) -> list[Optional[Tensor]]:
    """A norm's vectors for a kernel. One of the right dtype, which almost all are, is not touched: a call costs as much as a fold."""
    return [v if v is None or v.dtype is dtype else v.detach().to(dtype) for v in vectors]
