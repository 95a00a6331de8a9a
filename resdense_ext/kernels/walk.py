"""The walk over maps that every elementwise kernel takes: tiles of positions by channels, in either memory format."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from resdense_ext.kernels.launch import ceil_div, power_of_two, remembered
from resdense_ext.kernels.maps import Map
from resdense_ext.kernels.tiles import positions_from

__all__ = ["Tiling", "load_vector", "tile_at", "tiling_of", "wide"]


class Tiling(NamedTuple):
    """Sizes of a tile, and how many there are along positions and channels."""

    BLOCK_M: int
    BLOCK_C: int
    rows: int
    columns: int

    @remembered
    def constants(self) -> dict[str, int]:
        return {"BLOCK_M": self.BLOCK_M, "BLOCK_C": self.BLOCK_C, "num_warps": 8}


@remembered
def tiling_of(m: Map, elements: int = 4096) -> Tiling:
    """Tiles of so many elements, by default 16 a thread: long along what is adjacent in memory."""
    BLOCK_C = power_of_two(m.C, 1, 128) if m.last else power_of_two(m.C, 1, 4)
    BLOCK_M = power_of_two(m.count, 16, elements // BLOCK_C)
    return Tiling(BLOCK_M, BLOCK_C, ceil_div(m.count, BLOCK_M), ceil_div(m.C, BLOCK_C))


_WIDE = {torch.float64: tl.float64}


def wide(dtype: torch.dtype) -> tl.dtype:
    """What values of a dtype are computed in."""
    return _WIDE.get(dtype, tl.float32)


@triton.jit
def tile_at(row_tile, column_tile, M, S, C, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Samples, places, channels (64-bit) and the masks of a tile."""
    first = tl.cast(row_tile, tl.int64) * BLOCK_M
    sample, place = positions_from(first, S, BLOCK_M)
    channels = column_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    return sample, place, channels.to(tl.int64), first + tl.arange(0, BLOCK_M) < M, channels < C


@triton.jit
def load_vector(ptr, channels, mask, WIDE: tl.constexpr):
    """A per-channel vector as a row."""
    return tl.load(ptr + channels, mask=mask, other=0.0).to(WIDE)[None, :]
