"""Statistics from many programs: what each has left, merged in one order."""

from __future__ import annotations

import triton
import triton.language as tl

from resdense_ext.kernels.tiles import last_arrival, sum_rows

__all__ = ["finish_sums", "merge_programs", "sum_programs"]


@triton.jit
def sum_programs(part_ptr, programs, C, columns, mask, WIDE: tl.constexpr, ROWS: tl.constexpr = 32):
    """The sum of the rows ``[programs, C]`` that the programs have left."""
    total = tl.zeros(columns.shape, WIDE)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < programs)[:, None] & mask[None, :]
        at = part_ptr + row[:, None] * C + columns[None, :]
        total += sum_rows(tl.load(at, mask=inside, other=0.0, cache_modifier=".cg"))
    return total


@triton.jit
def finish_sums(sums, sums_ptr, part_ptr, ticket_ptr, block, C, WIDE: tl.constexpr, BLOCK_C: tl.constexpr):
    """Leaves a program's vectors of sums; the last program of a block of channels adds up those of all, ``[len(sums), C]``."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = block * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = columns < C
    for i in tl.static_range(len(sums)):
        tl.store(part_ptr + (i * programs + program) * C + columns, sums[i], mask=mask)
    if last_arrival(ticket_ptr + block, programs):
        for i in tl.static_range(len(sums)):
            total = sum_programs(part_ptr + i * programs * C, programs, C, columns, mask, WIDE)
            tl.store(sums_ptr + i * C + columns, total, mask=mask)


@triton.jit
def merge_programs(mean_ptr, m2_ptr, count_ptr, programs, count, C, columns, mask, ROWS: tl.constexpr = 32):
    """Mean and sum of squared deviations over all programs, of the rows ``[programs, C]`` of each (Chan et al., 1983)."""
    first = tl.load(mean_ptr + columns, mask=mask, other=0.0, cache_modifier=".cg")
    ahead = tl.zeros_like(first)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < programs)[:, None] & mask[None, :]
        n = tl.load(count_ptr + row, mask=row < programs, other=0.0, cache_modifier=".cg")
        mean = tl.load(mean_ptr + row[:, None] * C + columns[None, :], mask=inside, other=0.0, cache_modifier=".cg")
        ahead += sum_rows(tl.where(inside, n[:, None] * (mean - first[None, :]), 0.0))
    total = first + ahead / count
    m2 = tl.zeros_like(first)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < programs)[:, None] & mask[None, :]
        n = tl.load(count_ptr + row, mask=row < programs, other=0.0, cache_modifier=".cg")
        at = row[:, None] * C + columns[None, :]
        d = tl.load(mean_ptr + at, mask=inside, other=0.0, cache_modifier=".cg") - total[None, :]
        own = tl.load(m2_ptr + at, mask=inside, other=0.0, cache_modifier=".cg")
        m2 += sum_rows(tl.where(inside, own + n[:, None] * d * d, 0.0))
    return total, m2
