"""How the kernels see a map ``[N, C, *spatial]``, or a slice of the channels of one: three sizes and three strides."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Map"]


class Map(NamedTuple):
    """A tensor as ``N`` samples of ``C`` channels at ``S`` positions; ``sn``, ``sc``, ``ss`` are their strides in elements.

    ``last`` says that the channels are adjacent (channels-last); else the positions of a channel are walked side by side.
    """

    data: Tensor
    N: int
    C: int
    S: int
    sn: int
    sc: int
    ss: int

    @staticmethod
    def of(x: Tensor, name: str = "x") -> Map:
        """Raises ValueError where the spatial positions of a channel cannot be walked with one stride."""
        if x.dim() < 2:
            raise ValueError(f"{name}: expected shape (N, C, ...), got {tuple(x.shape)}")
        positions, stride = 1, 0
        for size, step in zip(reversed(x.shape[2:]), reversed(x.stride()[2:])):
            if size != 1:
                stride = step if positions == 1 else stride
                if step != stride * positions:
                    raise ValueError(
                        f"{name}: expected spatial positions with one stride, got shape {tuple(x.shape)} and strides {x.stride()}"
                    )
            positions *= size
        return Map(x, x.shape[0], x.shape[1], positions, x.stride(0), x.stride(1), stride)

    @property
    def last(self) -> bool:
        return self.sc == 1 and not (self.ss == 1 and self.S > 1 and self.C > 1)

    @property
    def count(self) -> int:
        """The number of positions, over all samples."""
        return self.N * self.S
