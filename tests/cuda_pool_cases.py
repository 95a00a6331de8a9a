"""Checks of the CUDA pools, run like those of cuda_cases.py."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cuda_cases import (
    ACTIVATIONS, ELU, RELU6, SILU, activate, assert_nan_around, assert_rounded, assert_sums, columns, make, masked, masked_size,
    vectors, wide,
)  # fmt: skip
from torch import Tensor


class Pool(NamedTuple):
    """``padding`` zeros around the map; one value a dimension."""

    kernel_size: list[int]
    stride: list[int]
    padding: list[int]


def pools(rank: int) -> tuple[Pool, ...]:
    """Windows apart, overlapping, of every position, with gaps between, and different along every dimension."""
    same = [(2, 2, 0), (3, 2, 1), (3, 1, 1), (1, 3, 0)]
    every = [Pool([k] * rank, [s] * rank, [p] * rank) for k, s, p in same]
    return *every, Pool([3, 2, 4][-rank:], [2, 1, 3][-rank:], [1, 1, 0][-rank:])


SHAPES = (
    (2, 3, 5, 7),
    (3, 8, 4, 4),
    (2, 40, 7, 9),  # channels of whole vectors
    (5, 12, 14, 15),  # 16-bit channels are no whole vectors
    (7, 8, 33),
    (2, 5, 4, 3, 6),
    (1, 264, 4, 4),  # more channels than one block takes
    (2, 8, 41, 40),  # several chunks
)
LAYOUTS = ("contiguous", "channels_last", "slice", "channels_last_slice", "offset")


def cases() -> Iterator[tuple[tuple[int, ...], torch.dtype, str, Pool]]:
    """Every shape in every layout and two dtypes, with the windows in turn; one shape with all windows; and what has kernels of
    its own: whole vectors of channels, with windows that fill the map."""
    turn = itertools.count()
    for shape, dtype, layout in itertools.product(SHAPES, (torch.float32, torch.bfloat16), LAYOUTS):
        yield shape, dtype, layout, pools(len(shape) - 2)[next(turn) % 5]
    for pool, layout in itertools.product(pools(2), ("contiguous", "channels_last_slice")):
        yield (2, 16, 9, 6), torch.float64, layout, pool
        yield (2, 16, 9, 6), torch.float16, layout, pool
        yield (2, 16, 9, 6), torch.bfloat16, layout, pool
    for pool, dtype in itertools.product(pools(2)[:2], (torch.float32, torch.float64, torch.bfloat16, torch.float16)):
        yield (2, 16, 10, 6), dtype, "channels_last_slice", pool


def average(y: Tensor, pool: Pool) -> Tensor:
    return (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[y.dim() - 3](y, *pool)


def maximum(y: Tensor, pool: Pool) -> tuple[Tensor, Tensor]:
    function = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[y.dim() - 3]
    return function(y, *pool, return_indices=True)


def taps_of(places: Tensor, inputs: torch.Size, pool: Pool) -> Tensor:
    """torch's numbers of places in a sample as those in the window."""
    rank, taps, rest = len(inputs), torch.zeros_like(places), places
    coordinates = []
    for size in reversed(inputs):
        coordinates.insert(0, rest % size)
        rest = rest // size
    for i, coordinate in enumerate(coordinates):
        begins = torch.arange(places.shape[2 + i], device=places.device) * pool.stride[i] - pool.padding[i]
        begins = begins.view(-1, *[1] * (rank - 1 - i))
        taps = taps * pool.kernel_size[i] + coordinate - begins
    return taps


def pooled_shape(x: Tensor, pool: Pool) -> tuple[int, ...]:
    return tuple(average(torch.zeros(1, 1, *x.shape[2:]), pool).shape[2:])


def whole_numbers(shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: str, seed: int = 0) -> Tensor:
    """Few values, exact in every dtype: many maxima are equal."""
    x = make(shape, dtype, layout, device, seed)
    return x.copy_(x.mul(2).round().clamp(-3, 3))


def taps_like(out: Tensor, layout: str) -> Tensor:
    """Bytes of the shape and layout of a map, a part of a buffer of 255."""
    template = make(tuple(out.shape), torch.float32, layout, str(out.device))
    if template._base is None:
        return torch.full_like(template, 255, dtype=torch.uint8)
    base = torch.full_like(template._base, 255, dtype=torch.uint8)
    return base.as_strided(template.shape, template.stride(), template.storage_offset())


def check_avg_pool(ops, device: str) -> None:
    activations = itertools.cycle(ACTIVATIONS)
    for shape, dtype, layout, pool in cases():
        x = make(shape, dtype, layout, device)
        coefficients = vectors(2, shape[1], dtype, device)
        scale, shift = columns(coefficients, len(shape))
        terms = [scale * x.double(), shift.expand(shape)]
        for other in {layout, "channels_last_slice"}:
            activation = next(activations)
            out = make((*shape[:2], *pooled_shape(x, pool)), dtype, other, device, seed=1)
            ops.bn_act_avg_pool(x, *coefficients, activation, *pool, out)
            note = (shape, dtype, layout, other, activation, pool)
            magnitude = average(sum(t.abs() for t in terms), pool)
            assert_rounded(out, average(activate(sum(terms), activation), pool), magnitude, note)
            assert_nan_around(out, note)


def check_max_pool(ops, device: str) -> None:
    activations = itertools.cycle((0.0, 0.25, RELU6, ELU, SILU, 0.0, 1.0))
    for shape, dtype, layout, pool in cases():
        # Scale, shift and slope are powers of 2, so that rounding makes no two values equal or different.
        x = whole_numbers(shape, dtype, layout, device)
        scale = torch.tensor([1.0, -0.5, 2.0], device=device, dtype=wide(dtype)).repeat(shape[1])[: shape[1]]
        shift = torch.tensor([0.5, 0.0], device=device, dtype=wide(dtype)).repeat(shape[1])[: shape[1]]
        for other in {layout, "channels_last_slice"}:
            activation = next(activations)
            out = make((*shape[:2], *pooled_shape(x, pool)), dtype, other, device, seed=1)
            taps = taps_like(out, other)
            ops.bn_act_max_pool(x, scale, shift, activation, *pool, out, taps)
            note = (shape, dtype, layout, other, activation, pool)
            if activation in (ELU, SILU):  # whose values are rounded: as `bn_act` writes them
                y = torch.empty_like(x)
                ops.bn_act(x, scale, shift, activation, y)
            else:
                y = activate(columns(scale[None], len(shape))[0] * x.double() + columns(shift[None], len(shape))[0], activation)
            largest, places = maximum(y.double(), pool)
            assert torch.equal(out.double(), largest), note
            assert torch.equal(taps.long(), taps_of(places, x.shape[2:], pool)), note
            assert_nan_around(out, note)
            assert taps._base is None or int((taps._base == 255).sum()) == taps._base.numel() - taps.numel(), note


def check_max_pool_compares_what_is_written(ops, device: str) -> None:
    """Two values that bfloat16 cannot tell apart: the first is the maximum, although the second is larger."""
    x = torch.tensor([1.0, 1.0078125], dtype=torch.bfloat16, device=device).view(1, 1, 2).repeat(1, 2, 1)
    scale, shift = torch.ones(2, device=device) / 512, torch.ones(2, device=device)
    out = x.new_empty((1, 2, 1))
    taps = torch.empty((1, 2, 1), dtype=torch.uint8, device=device)
    ops.bn_act_max_pool(x, scale, shift, 0.0, [2], [2], [0], out, taps)
    assert bool(out.eq(1).all()) and bool(taps.eq(0).all())


def check_global_pool(ops, device: str) -> None:
    activations = itertools.cycle(ACTIVATIONS)
    for shape, dtype, layout, _ in cases():
        x = make(shape, dtype, layout, device)
        coefficients, activation = vectors(2, shape[1], dtype, device), next(activations)
        scale, shift = columns(coefficients, len(shape))
        terms = [scale * x.double(), shift.expand(shape)]
        out = ops.bn_act_global_pool(x, *coefficients, activation)
        spatial = list(range(2, len(shape)))
        magnitude = sum(t.abs() for t in terms).mean(spatial, keepdim=True)
        truth = activate(sum(terms), activation).mean(spatial, keepdim=True)
        assert_rounded(out, truth, magnitude, (shape, dtype, layout, activation))


def pooled_gradient(kind: str, y: Tensor, pool: Pool, grad: Tensor) -> Tensor:
    """Of the activated map, by autograd; in float64."""
    # torch's own average pool on CUDA has wrong gradients where a channels-last map has overlapping windows (2.11).
    y = y.detach().contiguous().requires_grad_()
    spatial = list(range(2, y.dim()))
    pooled = {
        "avg": lambda: average(y, pool),
        "max": lambda: maximum(y, pool)[0],
        "global": lambda: y.mean(spatial, keepdim=True),
    }[kind]()
    return torch.autograd.grad(pooled, y, grad)[0]


def check_pool_backward(ops, device: str) -> None:
    activations, accumulates = itertools.cycle(ACTIVATIONS), itertools.cycle((True, False))
    for shape, dtype, layout, pool in cases():
        rank = len(shape)
        coefficients = vectors(3, shape[1], dtype, device)
        x = make(shape, dtype, layout, device)
        scale, shift, center = columns(coefficients, rank)
        y = scale * x.double() + shift
        for kind in ("avg", "max", "global"):
            # The gradients in the map's layout or another, the result in the map's.
            accumulate, activation = next(accumulates), next(activations)
            other = (layout, "channels_last_slice")[accumulate]
            note = (shape, dtype, layout, other, pool, kind, accumulate, activation)
            activated = activate(y, activation)
            outputs = [1] * (rank - 2) if kind == "global" else pooled_shape(x, pool)
            grad = make((*shape[:2], *outputs), dtype, other, device, seed=1)
            out = make(shape, dtype, layout, device, seed=3)
            before, windows, saved = out.double().clone(), [] if kind == "global" else pool, []
            if kind == "max":
                saved = [taps_like(grad, other)]
                saved[0].copy_(taps_of(maximum(activated, pool)[1], x.shape[2:], pool))
            backward = getattr(ops, f"bn_act_{kind}_pool_backward")
            sums = backward(grad, *saved, x, *coefficients, activation, *windows, out, accumulate)

            passed, largest = (pooled_gradient(kind, activated, pool, g) for g in (grad.double(), grad.double().abs()))
            dy = masked(passed, y, activation)
            size = masked_size(largest, (scale * x.double()).abs() + shift.abs(), activation, masked(largest, y, activation))
            if accumulate:
                assert_rounded(out, before + scale * dy, before.abs() + (scale * size).abs(), note)
            else:
                assert_rounded(out, dy, size, note)
            assert_nan_around(out, note)
            xc = x.double() - center
            sizes = size * (x.double().abs() + center.abs())
            assert_sums(sums, (dy, dy * xc), (size, sizes), dtype, note)


def check_pool_repeats(ops, device: str) -> None:
    """What is gathered repeats bitwise, whatever order the threads run in."""
    results = []
    for order in (0, 1, 2, 3):
        if device == "cpu":
            ops.configure(order, 4)
        results.append([])
        for shape, dtype, layout, pool in itertools.islice(cases(), 0, None, 9):
            x = make(shape, dtype, layout, device)
            coefficients = vectors(3, shape[1], dtype, device)
            grad = make((*shape[:2], *pooled_shape(x, pool)), dtype, layout, device, seed=1)
            out, dx, taps = torch.zeros_like(grad), torch.zeros_like(x), taps_like(grad, layout)
            ops.bn_act_max_pool(x, *coefficients[:2], 0.1, *pool, out, taps)
            results[-1] += [out, taps, ops.bn_act_global_pool(x, *coefficients[:2], 0.1)]
            results[-1] += ops.bn_act_max_pool_backward(grad, taps, x, *coefficients, 0.1, *pool, dx, True)
            results[-1] += ops.bn_act_avg_pool_backward(grad, x, *coefficients, 0.1, *pool, dx, True)
            results[-1].append(dx)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def check_pool_special_values(ops, device: str) -> None:
    """Not a number, infinities and zeros of either sign are pooled as torch pools them, and pass gradients as there."""
    values = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0], device=device)
    drawn = torch.randint(7, (4, 8, 9, 10), generator=torch.Generator().manual_seed(0)).to(device)
    one, pool = torch.ones(8, device=device), Pool([3, 3], [2, 2], [1, 1])
    mixed, lowest = values[drawn], torch.full((4, 8, 9, 10), -math.inf, device=device)
    for x in (mixed, mixed.contiguous(memory_format=torch.channels_last), lowest):
        for activation in (0.0, RELU6, 1.0):
            y = activate(x, activation)
            largest, places = maximum(y, pool)
            out = torch.empty_like(largest)
            taps = torch.empty_like(largest, dtype=torch.uint8)
            ops.bn_act_max_pool(x, one, 0 * one, activation, *pool, out, taps)
            torch.testing.assert_close(out, largest, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(taps.long(), taps_of(places, x.shape[2:], pool))
            ops.bn_act_avg_pool(x, one, 0 * one, activation, *pool, out)
            torch.testing.assert_close(out, average(y, pool), equal_nan=True)
            mean = ops.bn_act_global_pool(x, one, 0 * one, activation)
            torch.testing.assert_close(mean, y.mean((2, 3), keepdim=True), equal_nan=True)
            # Behind what stops it even an infinite gradient is 0.
            dx = torch.empty_like(x)
            ops.bn_act_max_pool_backward(out.fill_(math.inf), taps, x, one, 0 * one, 0 * one, activation, *pool, dx, False)
            expected = pooled_gradient("max", y, pool, out)
            expected[masked(torch.ones_like(x), x, activation) == 0] = 0
            assert torch.equal(dx, expected)


def check_pool_empty(ops, device: str) -> None:
    for shape in ((0, 3, 4, 4), (2, 0, 4)):
        x, rank = torch.empty(shape, device=device), len(shape) - 2
        channels, pool = torch.empty(shape[1], device=device), pools(rank)[0]
        out = torch.empty(*shape[:2], *[2] * rank, device=device)
        taps = out.to(torch.uint8)
        ops.bn_act_avg_pool(x, channels, channels, 0.0, *pool, out)
        ops.bn_act_max_pool(x, channels, channels, 0.0, *pool, out, taps)
        mean = ops.bn_act_global_pool(x, channels, channels, 0.0)
        assert mean.shape == (*shape[:2], *[1] * rank)
        sums = ops.bn_act_avg_pool_backward(out, x, channels, channels, channels, 0.0, *pool, x, False)
        sums += ops.bn_act_max_pool_backward(out, taps, x, channels, channels, channels, 0.0, *pool, x, True)
        sums += ops.bn_act_global_pool_backward(mean, x, channels, channels, channels, 0.0, x, False)
        assert all(torch.equal(t, torch.zeros_like(channels)) for t in sums)


def check_pool_errors(ops, device: str) -> None:
    x, vector = torch.zeros(2, 3, 4, 6, device=device), torch.zeros(3, device=device)
    pool, out = Pool([2, 2], [2, 2], [0, 0]), torch.full((2, 3, 2, 3), math.nan, device=device)
    taps, small = torch.zeros_like(out, dtype=torch.uint8), torch.zeros(2, 3, 2, 2, device=device)
    few = small.byte()

    def avg(x=x, scale=vector, shift=vector, out=out, **changed):
        ops.bn_act_avg_pool(x, scale, shift, 0.0, *pool._replace(**changed), out)

    def largest(out=out, taps=taps, **changed):
        ops.bn_act_max_pool(x, vector, vector, 0.0, *pool._replace(**changed), out, taps)

    def backward(grad=out, taps=taps, center=vector, dx=x, **changed):
        ops.bn_act_max_pool_backward(grad, taps, x, vector, vector, center, 0.0, *pool._replace(**changed), dx.clone(), True)

    for message, call in (
        (r"x: expected shape \(N, C, ...\) with 1 to 3 spatial dimensions, got \(2, 3\)", lambda: avg(x=x[..., 0, 0])),
        (r"x: expected spatial sizes of 1 or more, got \(2, 3, 4, 0\)", lambda: avg(x=x[..., :0])),
        (r"x: expected adjacent channels .* or adjacent positions", lambda: avg(x=x[..., ::2])),
        (r"kernel_size: expected 2 values, one a spatial dimension of x, got \(2\)", lambda: avg(kernel_size=[2])),
        (r"kernel_size: expected values from 1 to .*, got \(2, 0\)", lambda: avg(kernel_size=[2, 0])),
        (r"stride: expected values from 1 to .*, got \(0, 2\)", lambda: avg(stride=[0, 2])),
        (r"padding: expected values from 0 to .*, got \(-1, 0\)", lambda: avg(padding=[-1, 0])),
        (r"padding: expected at most half of kernel_size \(2, 2\), got \(0, 2\)", lambda: avg(padding=[0, 2])),
        (r"kernel_size: expected windows within the padded x of shape \(2, 3, 4, 6\), got \(2, 7\) with padding \(0, 0\)",
         lambda: avg(kernel_size=[2, 7])),
        (r"kernel_size: expected at most 255 places a window, whose numbers are kept in a byte, got 256",
         lambda: largest(kernel_size=[16, 16], padding=[8, 8])),
        (r"scale: expected shape \(3,\), one value a channel of x, got \(2\)", lambda: avg(scale=vector[:2])),
        (r"shift: expected dtype float32, got float64", lambda: avg(shift=vector.double())),
        (r"out: expected dtype float32, got bfloat16", lambda: avg(out=out.bfloat16())),
        (r"out: expected shape \(2, 3, 2, 3\) \(that of the pooled x\), got \(2, 3, 2, 2\)", lambda: avg(out=small)),
        (r"out: expected a tensor whose elements do not overlap", lambda: avg(out=out[:1].expand(2, 3, 2, 3))),
        (r"taps: expected dtype uint8, got float32", lambda: largest(taps=out)),
        (r"taps: expected shape \(2, 3, 2, 3\) \(that of the pooled x\), got \(2, 3, 2, 2\)", lambda: largest(taps=few)),
        (r"taps: expected a tensor whose elements do not overlap", lambda: largest(taps=taps[:1].expand(2, 3, 2, 3))),
        (r"grad: expected shape \(2, 3, 2, 3\) \(that of the pooled x\), got \(2, 3, 4, 6\)", lambda: backward(grad=x)),
        (r"taps: expected dtype uint8, got Long", lambda: backward(taps=taps.long())),
        (r"center: expected shape \(3,\), one value a channel of x, got \(2\)", lambda: backward(center=vector[:2])),
        (r"out: expected shape \(2, 3, 4, 6\) \(that of x\), got \(1, 3, 4, 6\)", lambda: backward(dx=x[:1])),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            call()
    assert bool(out.isnan().all()) and not taps.any()


CHECKS = (
    check_avg_pool,
    check_max_pool,
    check_max_pool_compares_what_is_written,
    check_global_pool,
    check_pool_backward,
    check_pool_repeats,
    check_pool_special_values,
    check_pool_empty,
    check_pool_errors,
)
