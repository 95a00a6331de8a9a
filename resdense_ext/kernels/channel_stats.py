"""Mean and sum of squared deviations of every channel, in one pass: a tile's own, merged exactly with those before it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resdense_ext.kernels.launch import launch, programs, tickets
from resdense_ext.kernels.maps import Map
from resdense_ext.kernels.stats import merge_programs
from resdense_ext.kernels.tiles import last_arrival, load_tile, row_offsets, sum_rows
from resdense_ext.kernels.walk import tile_at, tiling_of, wide
from resdense_ext.reference import accumulation_dtype

__all__ = ["channel_stats"]


@triton.jit
def channel_stats_fwd_kernel(
    x_ptr, xn, xs, xc, mean_ptr, m2_ptr, part_ptr, part_count_ptr, ticket_ptr, M, S, C, tiles,
    LAST: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    program, programs, block = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    mean = tl.zeros((BLOCK_C,), WIDE)
    m2 = tl.zeros((BLOCK_C,), WIDE)
    count = tl.cast(0.0, WIDE)
    for tile in range(program, tiles, programs):
        sample, place, channels, row_mask, mask = tile_at(tile, block, M, S, C, BLOCK_M, BLOCK_C)
        x = load_tile(x_ptr, row_offsets(sample, place, xn, xs), channels * xc, row_mask, mask, LAST).to(WIDE)
        rows = tl.sum(row_mask.to(WIDE))
        tile_mean = sum_rows(x) / rows
        d = tl.where(row_mask[:, None], x - tile_mean[None, :], 0.0)
        delta, total = tile_mean - mean, count + rows
        m2 += sum_rows(d * d) + delta * delta * (count * rows / total)
        mean += delta * (rows / total)
        count = total

    columns = block * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = columns < C
    m2_part_ptr = part_ptr + programs * C
    tl.store(part_count_ptr + program, count)
    tl.store(part_ptr + program * C + columns, mean, mask=mask)
    tl.store(m2_part_ptr + program * C + columns, m2, mask=mask)
    if last_arrival(ticket_ptr + block, programs):
        positions = tl.cast(M, tl.int64).to(WIDE)
        mean, m2 = merge_programs(part_ptr, m2_part_ptr, part_count_ptr, programs, positions, C, columns, mask)
        tl.store(mean_ptr + columns, mean, mask=mask)
        tl.store(m2_ptr + columns, m2, mask=mask)


def channel_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """``[C]`` each, float64 for float64, else float32. The mean of an empty map is NaN."""
    m = Map.of(x)
    dtype = accumulation_dtype(x.dtype)
    mean, m2 = (torch.empty(m.C, dtype=dtype, device=x.device) for _ in range(2))
    if x.numel() == 0:
        return mean.fill_(float("nan")), m2.zero_()
    tiling = tiling_of(m)
    shared = programs(x, tiling.rows, tiling.columns, 4)
    launch(
        channel_stats_fwd_kernel, (shared, tiling.columns), x, x, m.sn, m.ss, m.sc, mean, m2,
        torch.empty((2, shared, m.C), dtype=dtype, device=x.device), torch.empty(shared, dtype=dtype, device=x.device),
        tickets(x, tiling.columns), m.count, m.S, m.C, tiling.rows,
        LAST=m.last, WIDE=wide(x.dtype), **tiling.constants(),
    )  # fmt: skip
    return mean, m2
