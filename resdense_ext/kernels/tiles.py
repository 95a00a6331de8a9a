"""What the kernels share on the device: activations, tiles of maps, and the ticket by which a launch finishes its own sums.

Offsets are 64-bit; positions within a sample are 32-bit. A tile is ``[positions, channels]`` in either memory format.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "activate",
    "activation_slope",
    "add_in_memory",
    "last_arrival",
    "load_tile",
    "marked",
    "masked",
    "positions_from",
    "product",
    "rounded",
    "row_offsets",
    "store_tile",
    "sum_rows",
]

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _expm1(y):
    """``exp(y) - 1``, near 0 by its series, of which the difference would lose the digits."""
    series = tl.full(y.shape, 1.0, y.dtype)
    for n in tl.static_range(13, 1, -1):
        series = series * y * (1.0 / n) + 1
    return tl.where(tl.abs(y) < 0.25, y * series, tl.exp(y) - 1)


@triton.jit
def activate(y, slope, ACT: tl.constexpr):
    """The activation by its name in `resdense_ext.reference`; NaN stays NaN, and the ReLU of -inf is 0."""
    if ACT == "relu":
        y = tl.where(y <= 0, 0.0, y)
    elif ACT == "relu6":
        y = tl.where(y <= 0, 0.0, tl.where(y >= 6, 6.0, y))
    elif ACT == "leaky_relu":
        y = tl.where(y > 0, y, y * slope)
    elif ACT == "elu":
        y = tl.where(y > 0, y, _expm1(y))
    elif ACT == "silu":
        y = y * tl.sigmoid(y)
    return y


@triton.jit
def activation_slope(y, slope, ACT: tl.constexpr):
    """The activation's derivative at its input."""
    if ACT == "relu":
        y = tl.where(y <= 0, tl.zeros_like(y), 1.0)
    elif ACT == "relu6":
        y = tl.where((y <= 0) | (y >= 6), tl.zeros_like(y), 1.0)
    elif ACT == "leaky_relu":
        y = tl.where(y > 0, tl.full(y.shape, 1.0, y.dtype), tl.full(y.shape, slope, y.dtype))
    elif ACT == "elu":
        y = tl.where(y > 0, 1.0, tl.exp(y))
    elif ACT == "silu":
        gate = tl.sigmoid(y)
        y = gate * (1 + y * (1 - gate))
    else:
        y = tl.full(y.shape, 1.0, y.dtype)
    return y


@triton.jit
def masked(grad, y, slope, ACT: tl.constexpr):
    """``grad`` times the activation's derivative at ``y``; behind a ReLU that stops it even an infinite gradient is 0."""
    if ACT == "relu":
        grad = tl.where(y <= 0, 0.0, grad)
    elif ACT == "relu6":
        grad = tl.where((y <= 0) | (y >= 6), 0.0, grad)
    else:
        grad = grad * activation_slope(y, slope, ACT)
    return grad


@triton.jit
def marked(grad, mark, slope, ACT: tl.constexpr):
    """`masked`, as the activation's output tells it; where that does not determine the derivative, the mark is the input."""
    if ACT == "elu":
        grad = tl.where(mark <= 0, grad * (mark + 1), grad)
    else:
        grad = masked(grad, mark, slope, ACT)
    return grad


@triton.jit
def positions_from(first, S, BLOCK: tl.constexpr):
    """The sample (64-bit) and the place in it (32-bit) of BLOCK positions, the first of which is the 64-bit ``first``."""
    sample = first // S
    place = (first - sample * S).to(tl.int32) + tl.arange(0, BLOCK)
    ahead = place // S
    return sample + ahead, place - ahead * S


@triton.jit
def row_offsets(sample, place, sn, ss):
    return sample.to(tl.int64) * sn + place.to(tl.int64) * ss


@triton.jit
def load_tile(ptr, rows, columns, row_mask, column_mask, LAST: tl.constexpr):
    """Reads ``[rows, columns]``, 0 where masked; threads lie side by side along what is adjacent in memory."""
    if LAST:
        tile = tl.load(ptr + rows[:, None] + columns[None, :], mask=row_mask[:, None] & column_mask[None, :], other=0.0)
    else:
        tile = tl.load(ptr + columns[:, None] + rows[None, :], mask=column_mask[:, None] & row_mask[None, :], other=0.0)
        tile = tl.trans(tile)
    return tile


@triton.jit
def store_tile(ptr, rows, columns, tile, row_mask, column_mask, LAST: tl.constexpr):
    if LAST:
        tl.store(ptr + rows[:, None] + columns[None, :], tile, mask=row_mask[:, None] & column_mask[None, :])
    else:
        tl.store(ptr + columns[:, None] + rows[None, :], tl.trans(tile), mask=column_mask[:, None] & row_mask[None, :])


@triton.jit
def _nearest_tf32(value):
    """Rounds as the vendor's convolutions do. The matrix units alone cut the lower bits off, toward 0, and a sum of many
    positive products, a batch variance for one, is too small by as much."""
    return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [value], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` on the matrix units."""
    if _INTERPRETED:
        # The interpreter would multiply the bit patterns of bfloat16; in float32 its products are exact.
        a, b = a.to(tl.float32), b.to(tl.float32)
    elif PRECISION == "tf32" and a.dtype == tl.float32:
        a, b = _nearest_tf32(a), _nearest_tf32(b)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """``value`` in another dtype, rounded to the nearest."""
    if _INTERPRETED and DTYPE == tl.bfloat16:
        # The interpreter would cut the lower bits off, and of a subnormal number, which a 0 must not become, do worse.
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).to(tl.float32, bitcast=True)
        value = tl.where(value == value, nearest, value)
    return value.to(DTYPE)


@triton.jit
def sum_rows(tile):
    """The sum over a tile's positions, as a tree."""
    if _INTERPRETED:
        # The interpreter would add row after row in one long chain of roundings.
        while tile.shape[0] > 8:
            tile = tl.sum(tl.reshape(tile, (8, tile.shape[0] // 8, tile.shape[1])), 0)
    return tl.sum(tile, 0)


@triton.jit
def add_in_memory(ptr, columns, mask, value, fresh):
    """``ptr[columns] += value``, or ``= value`` where fresh: a program's own sums, that would fill its registers otherwise."""
    before = tl.load(ptr + columns, mask=mask & (not fresh), other=0.0)
    tl.store(ptr + columns, before + value, mask=mask)


@triton.jit
def last_arrival(ticket_ptr, programs):
    """Whether all other programs have drawn their ticket, and so have stored what they had to.

    The last one leaves the ticket at 0 for the next launch. What it then reads of the others must come from the
    second-level cache (``cache_modifier=".cg"``).
    """
    tl.debug_barrier()  # all threads of this program have stored before one of them draws
    last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(ticket_ptr, 0)
    return last
