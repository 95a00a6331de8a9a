"""How the kernels see a map ``[N, C, *spatial]``, or a slice of the channels of one: three sizes and three strides."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from resdense_ext.kernels.launch import remembered

__all__ = ["Map"]


@dataclass(frozen=True)
class Map:
    """A tensor as ``N`` samples of ``C`` channels at ``S`` positions; ``sn``, ``sc``, ``ss`` are their strides in elements.

    ``last`` says that the channels are adjacent (channels-last); else the positions of a channel are walked side by side.
    """

    N: int
    C: int
    S: int
    sn: int
    sc: int
    ss: int

    @staticmethod
    def of(x: Tensor, name: str = "x") -> Map:
        """Raises ValueError where the spatial positions of a channel cannot be walked with one stride."""
        return _map_of(x.shape, x.stride(), name)

    @cached_property
    def last(self) -> bool:
        return self.sc == 1 and not (self.ss == 1 and self.S > 1 and self.C > 1)

    @cached_property
    def count(self) -> int:
        """The number of positions, over all samples."""
        return self.N * self.S


@remembered
def _map_of(shape: tuple[int, ...], strides: tuple[int, ...], name: str) -> Map:
    if len(shape) < 2:
        raise ValueError(f"{name}: expected shape (N, C, ...), got {tuple(shape)}")
    positions, stride = 1, 0
    for size, step in zip(reversed(shape[2:]), reversed(strides[2:])):
        if size != 1:
            stride = step if positions == 1 else stride
            if step != stride * positions:
                raise ValueError(
                    f"{name}: expected spatial positions with one stride, got shape {tuple(shape)} and strides {strides}"
                )
        positions *= size
    return Map(shape[0], shape[1], positions, strides[0], strides[1], stride)
