"""Checks of the CUDA operators, on whatever computes them: a GPU, or the execution-model shim on the CPU.

Every function takes ``ops`` (`torch.ops.resdense`, or the shim's namespace) and the device of its tensors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator

import pytest
import torch
from tolerance import assert_within_rule, torch_runs, true_run
from torch import Tensor

from resdense_ext import reference
from resdense_ext.ops.activation import activation_numbered, number_of
from resdense_ext.ops.operands import Affine
from resdense_ext.ops.reference_backend import ReferenceBackend
from resdense_ext.reference import Activation

SHAPES = (
    (2, 3, 5, 7),
    (1, 1, 1, 1),
    (3, 8, 4, 4),  # vectors in both layouts
    (2, 40, 7, 7),  # odd planes, channels of whole vectors
    (5, 12, 14, 14),  # 16-bit planes are no whole vectors
    (129, 24),
    (7, 1, 33),
    (2, 5, 3, 2, 4),
    (1, 264, 2),  # more channels than one block takes
    (2, 8, 41, 40),  # several chunks a plane
)
CURVES = RELU6, ELU, SILU = [number_of(Activation(name)) for name in ("relu6", "elu", "silu")]
ACTIVATIONS = (0.0, 0.1, RELU6, ELU, SILU, 0.0, 1.0)
"""As the operators know them; so many that cases by twos and threes take all of them."""
LAYOUTS = ("contiguous", "channels_last", "slice", "channels_last_slice", "every_other_sample", "offset", "expanded")


def make(shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: str, seed: int = 0) -> Tensor:
    """Normal values in a layout; slices lie in buffers of NaN, so that reading beside them shows."""
    n, c, *spatial = shape
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)
    if layout == "contiguous":
        return values
    if layout == "expanded":
        # One value for all positions of a sample, as the gradient of an average has it.
        return values.flatten(2)[:, :, 0].contiguous().view(n, c, *[1] * len(spatial)).expand(shape) if spatial else values
    if layout == "every_other_sample":
        whole = torch.full((2 * n, c, *spatial), math.nan, dtype=dtype, device=device)
        part = whole[::2]
    elif layout == "offset":
        whole = torch.full((n * c * math.prod(spatial) + 1,), math.nan, dtype=dtype, device=device)
        part = whole[1:].view(shape)
    else:
        extra = 0 if layout == "channels_last" else 24
        if layout == "slice":
            whole = torch.full((n, c + extra, *spatial), math.nan, dtype=dtype, device=device)
        else:
            whole = torch.full((n, *spatial, c + extra), math.nan, dtype=dtype, device=device).movedim(-1, 1)
        part = whole[:, 16 if extra else 0 :][:, :c]
    part.copy_(values)
    return part


def cases() -> Iterator[tuple[tuple[int, ...], torch.dtype, str]]:
    yield from itertools.product(SHAPES, (torch.float32, torch.bfloat16), LAYOUTS)
    yield from itertools.product(SHAPES, (torch.float16, torch.float64), ("contiguous", "channels_last_slice"))


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def activate(y: Tensor, activation: float) -> Tensor:
    return reference.activate(y, activation_numbered(activation))


def masked(grad: Tensor, y: Tensor, activation: float) -> Tensor:
    """The gradient behind the activation, in float64."""
    return grad.double() * reference.activation_slope(y.double(), activation_numbered(activation))


def marked(grad: Tensor, mark: Tensor, activation: float) -> Tensor:
    """The same, from the activation's output, or where that does not determine it, from its input."""
    return grad.double() * reference.marked_slope(mark.double(), activation_numbered(activation))


def masked_size(grad: Tensor, y_size: Tensor, activation: float, dy: Tensor) -> Tensor:
    """What the rounding of ``dy`` goes by: of a curve the derivative is as uncertain as the point it is taken at."""
    return grad.double().abs() * (1 + y_size) if activation in CURVES else dy.abs()


def layout_of(t: Tensor) -> list[int]:
    return [stride for size, stride in zip(t.shape, t.stride()) if size > 1]


def assert_rounded(ours: Tensor, truth: Tensor, magnitude: Tensor, note: object) -> None:
    """``truth`` in float64 up to the rounding of the dtype, and of a few operations on terms of this magnitude."""
    assert ours.shape == truth.shape
    step = torch.finfo(ours.dtype).eps
    work = torch.finfo(wide(ours.dtype)).eps
    bound = step * truth.abs() + 4 * work * magnitude + torch.finfo(ours.dtype).tiny
    error = (ours.double() - truth).abs()
    assert bool((error <= bound).all()), f"{note}: error {error.max().item():.3g}"


def assert_sums(sums: Iterable[Tensor], terms: Iterable[Tensor], magnitudes: Iterable[Tensor], dtype: torch.dtype, note: object) -> None:
    """The sums over a channel's positions of ``terms`` in float64, up to the rounding of a few operations on terms of these
    magnitudes. (Of sums in float64 the true ones are taken without any rounding: one of repeated values drifts.)"""
    for ours, *true in zip(sums, terms, magnitudes, strict=True):
        assert ours.dtype == wide(dtype) and ours.shape == true[0].shape[1:2], note
        rows = [t.movedim(1, 0).flatten(1) for t in true]
        if ours.dtype == torch.float64:
            total, magnitude = (ours.new_tensor([math.fsum(row) for row in t.tolist()]) for t in rows)
        else:
            total, magnitude = (t.sum(1) for t in rows)
        bound = 4 * torch.finfo(ours.dtype).eps * magnitude
        assert bool(((ours.double() - total).abs() <= bound).all()), note


def written_cases() -> Iterator[tuple[tuple[int, ...], torch.dtype, str]]:
    """Without the layout that nothing can be written in."""
    return (case for case in cases() if case[2] != "expanded")


def vectors(count: int, channels: int, dtype: torch.dtype, device: str) -> Tensor:
    """Per-channel coefficients, ``[count, channels]``."""
    values = torch.randn(count, channels, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return values.to(device, wide(dtype))


def columns(coefficients: Tensor, rank: int) -> Tensor:
    """In float64, each shaped so that it broadcasts over a map."""
    return coefficients.double().view(*coefficients.shape[:1], 1, -1, *[1] * (rank - 2))


def assert_nan_around(t: Tensor, note: object) -> None:
    """Of the buffer that a map is a part of nothing else was written."""
    if t._base is not None:
        assert int(t._base.isnan().sum()) == t._base.numel() - t.numel(), note


def check_channel_stats(ops, device: str) -> None:
    for case in cases():
        x = make(*case, device)
        mean, m2 = ops.channel_stats(x)
        assert mean.shape == m2.shape == (x.shape[1],) and mean.dtype == m2.dtype == wide(x.dtype)
        rows = x.double().movedim(1, 0).flatten(1)
        eps = torch.finfo(mean.dtype).eps
        bound = 4 * eps * rows.abs().mean(1)
        assert bool(((mean.double() - rows.mean(1)).abs() <= bound).all()), case
        truth = (rows - rows.mean(1, keepdim=True)).square().sum(1)
        # What a rounding of the values themselves would change: 2 eps of the products of deviation and value.
        energy = rows.square().sum(1)
        bound = eps * (8 * truth + 4 * (truth * energy).sqrt() + 16 * eps * energy)
        assert bool(((m2.double() - truth).abs() <= bound).all()), case


def check_repeats(ops, device: str) -> None:
    """What is reduced repeats bitwise, whatever order the threads run in."""
    results = []
    for order in (0, 1, 2, 3):
        if device == "cpu":
            ops.configure(order, 4)
        results.append([])
        for shape, dtype, layout in itertools.islice(written_cases(), 0, None, 7):
            x, grad = make(shape, dtype, layout, device), make(shape, dtype, layout, device, seed=1)
            coefficients = vectors(3, shape[1], dtype, device)
            results[-1] += ops.channel_stats(x)
            results[-1] += ops.bn_act_backward_accumulate(x.clone(), grad, x, *coefficients, 0.1)
            results[-1] += ops.bn_act_backward(grad, x, *coefficients, 0.1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def check_channel_stats_far_mean(ops, device: str) -> None:
    """A mean of 1000 deviations, and a first value that is far from all others."""
    for layout in ("contiguous", "channels_last"):
        x = make((4, 8, 20, 20), torch.float32, layout, device) + 1000
        x[0, :, 0, 0] = 0
        _assert_stats(ops, x)
        x[0, :, 0, 0] = 1000
        _assert_stats(ops, x)


def _assert_stats(ops, x: Tensor) -> None:
    def run(inputs, params):
        return dict(zip(("mean", "m2"), reference.channel_stats(inputs["x"])))

    inputs = {"x": x.cpu()}
    ours = dict(zip(("mean", "m2"), (t.cpu() for t in ops.channel_stats(x))))
    assert_within_rule(ours, true_run(run, inputs, {}), torch_runs(run, inputs, {}), torch.float32)


def check_add_act(ops, device: str) -> None:
    activations = itertools.cycle(ACTIVATIONS)
    for shape, dtype, layout in cases():
        x = make(shape, dtype, layout, device)
        for other in {layout, "channels_last"}:
            y = make(shape, dtype, other, device, seed=1)
            activation = next(activations)
            note = (shape, dtype, layout, other, activation)
            out = ops.add_act(x, y, activation)
            assert other != layout or layout_of(out) == layout_of(x + y), note
            assert_rounded(out, activate(x.double() + y.double(), activation), x.double().abs() + y.double().abs(), note)

            mark = ops.add_act(x, y, 1.0) if activation == SILU else out
            dx, truth = ops.add_act_backward(y, mark, activation), marked(y, mark, activation)
            assert_rounded(dx, truth, masked_size(y, mark.double().abs(), activation, y.double()), note)


def check_bn_add_act(ops, device: str) -> None:
    projections, activations = itertools.cycle((False, True, True)), itertools.cycle(ACTIVATIONS)
    for shape, dtype, layout in cases():
        z = make(shape, dtype, layout, device)
        coefficients = vectors(4, shape[1], dtype, device)
        scale, shift, scale_d, shift_d = columns(coefficients, len(shape))
        for other in {layout, "channels_last"}:
            identity = make(shape, dtype, other, device, seed=1)
            projected, activation = next(projections), next(activations)
            more = coefficients[2:] if projected else (None, None)
            out = ops.bn_add_act(z, *coefficients[:2], identity, *more, activation)
            terms = [scale * z.double(), shift.expand(shape)]
            if projected:
                terms += [scale_d * identity.double(), shift_d.expand(shape)]
            else:
                terms += [identity.double()]
            note = (shape, dtype, layout, other, projected, activation)
            assert_rounded(out, activate(sum(terms), activation), sum(t.abs() for t in terms), note)


def check_pending_grad(ops, device: str) -> None:
    for shape, dtype, layout in written_cases():
        for other in {layout, "channels_last"}:
            dy, z = make(shape, dtype, layout, device), make(shape, dtype, other, device, seed=1)
            coefficients = vectors(3, shape[1], dtype, device)
            alpha, beta, delta = columns(coefficients, len(shape))
            terms = [alpha * dy.double(), beta * z.double(), delta.expand(shape)]
            ops.pending_grad(dy, z, *coefficients)
            note = (shape, dtype, layout, other)
            assert_rounded(dy, sum(terms), sum(t.abs() for t in terms), note)
            assert_nan_around(dy, note)


def check_finished_grad(ops, device: str) -> None:
    """A new map, as in place; and with the mask in the same pass, whose sums `bn_act_sums` has taken."""
    activations = itertools.cycle(ACTIVATIONS)
    for shape, dtype, layout in written_cases():
        dy, z, activation = make(shape, dtype, layout, device), make(shape, dtype, layout, device, seed=1), next(activations)
        coefficients = vectors(4, shape[1], dtype, device)
        (alpha, beta, delta, shift), note = columns(coefficients, len(shape)), (shape, dtype, layout, activation)
        in_place = make(shape, dtype, layout, device)
        ops.pending_grad(in_place, z, *coefficients[:3])
        assert torch.equal(ops.finished_grad(dy, z, *coefficients[:3]), in_place), note

        sums = ops.bn_act_sums(dy, z, coefficients[0], coefficients[3], coefficients[1], activation)
        g = masked(dy, alpha * z.double() + shift, activation)
        size = masked_size(dy, (alpha * z.double()).abs() + shift.abs(), activation, g)
        distance = z.double().abs() + beta.abs()
        assert_sums(sums, (g, g * (z.double() - beta)), (size, size * distance), dtype, note)
        terms = [alpha * g, beta * z.double(), delta.expand(shape)]
        ops.pending_grad(dy, z, *coefficients[:3], coefficients[3], activation)
        assert_rounded(dy, sum(terms), alpha.abs() * size + sum(t.abs() for t in terms[1:]), note)
        assert_nan_around(dy, note)


def check_bn_act(ops, device: str) -> None:
    activations = itertools.cycle(ACTIVATIONS)
    for shape, dtype, layout in cases():
        x = make(shape, dtype, layout, device)
        coefficients = vectors(2, shape[1], dtype, device)
        scale, shift = columns(coefficients, len(shape))
        terms = [scale * x.double(), shift.expand(shape)]
        for other in {"contiguous" if layout == "expanded" else layout, "channels_last_slice"}:
            activation = next(activations)
            out = make(shape, dtype, other, device, seed=1)
            ops.bn_act(x, *coefficients, activation, out)
            note = (shape, dtype, layout, other, activation)
            assert_rounded(out, activate(sum(terms), activation), sum(t.abs() for t in terms), note)
            assert_nan_around(out, note)


def check_bn_act_backward(ops, device: str) -> None:
    activations = itertools.cycle(ACTIVATIONS)
    for shape, dtype, layout in written_cases():
        coefficients = vectors(3, shape[1], dtype, device)
        scale, shift, center = columns(coefficients, len(shape))
        # What is written is in the one layout, what is only read in another.
        for other in {layout, "channels_last", "expanded"}:
            x, activation = make(shape, dtype, other, device), next(activations)
            grad, read = (make(shape, dtype, of, device, seed=1) for of in (layout, other))
            out = make(shape, dtype, layout, device, seed=3)
            note = (shape, dtype, layout, other, activation)

            for accumulate, g in ((True, read), (False, grad)):
                dy = masked(g, scale * x.double() + shift, activation)
                dy_size = masked_size(g, (scale * x.double()).abs() + shift.abs(), activation, dy)
                xc = x.double() - center
                sizes = dy_size * (x.double().abs() + center.abs())
                if accumulate:
                    before = out.double().clone()
                    sums = ops.bn_act_backward_accumulate(out, g, x, *coefficients, activation)
                    assert torch.equal(g, make(shape, dtype, other, device, seed=1)), note
                    assert_rounded(out, before + scale * dy, before.abs() + scale.abs() * dy_size, note)
                    assert_nan_around(out, note)
                else:
                    sums = ops.bn_act_backward(g, x, *coefficients, activation)
                    assert_rounded(g, dy, dy_size, note)
                    assert_nan_around(g, note)
                assert_sums(sums, (dy, dy * xc), (dy_size, sizes), dtype, note)


def check_bn_act_backward_long(ops, device: str) -> None:
    """Sums over many positions: in the rule's tolerance, which knows that errors of either sign cancel."""

    def run(inputs, params):
        x, grad = inputs["x"], inputs["grad"]
        scale, shift, center = (v.to(x.dtype).view(1, -1, 1, 1) for v in params["coefficients"])
        dy = grad * (scale * x + shift > 0)
        return {"sum_dy": dy.sum((0, 2, 3)), "sum_dy_xc": (dy * (x - center)).sum((0, 2, 3))}

    if device == "cpu":
        ops.configure(2, 1)  # so few blocks that only the bound on a thread's chain keeps it short
    for layout in ("contiguous", "channels_last"):
        shape = (3, 2, 250, 251)
        coefficients = vectors(3, shape[1], torch.float32, device)
        x, grad = make(shape, torch.float32, layout, device), make(shape, torch.float32, layout, device, seed=1)
        inputs, params = {"x": x.cpu(), "grad": grad.cpu()}, {"coefficients": coefficients.cpu()}
        sums = ops.bn_act_backward(grad, x, *coefficients, 0.0)
        ours = dict(zip(("sum_dy", "sum_dy_xc"), (t.cpu() for t in sums)))
        assert_within_rule(ours, true_run(run, inputs, params), torch_runs(run, inputs, params), torch.float32)


def check_bn_fold(ops, device: str) -> None:
    for channels, dtype, affine in itertools.product((1, 7, 129), (torch.float32, torch.float64), (True, False)):
        mean, m2, weight, bias = vectors(4, channels, dtype, device)
        m2 = m2.square() * 50
        ours = ops.bn_fold(mean, m2, 50.0, 1e-5, *((weight, bias) if affine else (None, None)))
        rstd = (m2.double() / 50 + 1e-5).rsqrt()
        scale = weight.double() * rstd if affine else rstd
        shift = bias.double() if affine else torch.zeros_like(rstd)
        truths = (scale, shift - mean.double() * scale, rstd)
        sizes = (scale.abs(), shift.abs() + (mean.double() * scale).abs(), rstd)
        for value, truth, size in zip(ours, truths, sizes):
            assert value.dtype == dtype
            assert_rounded(value, truth, size, (channels, dtype, affine))
    none = torch.empty(0, device=device)
    assert all(t.shape == (0,) for t in ops.bn_fold(none, none, 1.0, 1e-5, None, None))


def check_bn_folds(ops, device: str) -> None:
    """As `bn_fold` of each, bitwise: of more norms than one launch takes, and of one."""
    for sizes, dtype in (([5, 0, 300, 1, 8] * 15, torch.float32), ([130], torch.float64)):
        norms = [[(i + 1) * v.abs() for v in vectors(4, size, dtype, device)] for i, size in enumerate(sizes)]
        mean, m2, weight, bias = map(list, zip(*norms))
        counts, eps = [10.0 + i for i in range(len(sizes))], [1e-5 * (1 + i) for i in range(len(sizes))]
        folds = ops.bn_folds(mean, m2, counts, eps, weight, bias)
        assert folds.shape == (3, sum(-(-size // 4) * 4 for size in sizes))
        start = 0
        for i, size in enumerate(sizes):
            expected = ops.bn_fold(mean[i], m2[i], counts[i], eps[i], weight[i], bias[i])
            assert torch.equal(folds[:, start : start + size], torch.stack(expected)), (i, size)
            start += -(-size // 4) * 4


def check_bn_correction(ops, device: str) -> None:
    for channels, dtype, accumulate in itertools.product((1, 7, 129), (torch.float32, torch.float64), (True, False)):
        sum_dy, sum_dy_xc, scale, mean, rstd, *into = vectors(7, channels, dtype, device)
        truths = [t.double() if accumulate else torch.zeros_like(t).double() for t in into]
        sizes = [t.abs() for t in truths]
        beta, delta = (t.clone() if accumulate else torch.full_like(t, math.nan) for t in into)
        dgamma = ops.bn_correction(sum_dy, sum_dy_xc, scale, mean, rstd, 50.0, beta, delta, accumulate)
        truth = rstd.double() * sum_dy_xc.double()
        assert_rounded(dgamma, truth, truth.abs(), (channels, dtype))
        slope = -scale.double() / 50 * rstd.double() * truth
        terms = [(slope,), (-scale.double() / 50 * sum_dy.double(), -slope * mean.double())]
        for ours, start, size, more in zip((beta, delta), truths, sizes, terms):
            assert_rounded(ours, start + sum(more), size + sum(t.abs() for t in more), (channels, dtype, accumulate))
    none = torch.empty(0, device=device)
    assert ops.bn_correction(*[none] * 5, 1.0, none, none, False).shape == (0,)


def check_copy_map(ops, device: str) -> None:
    dtypes = itertools.cycle((torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32))
    for shape, dtype, layout in cases():
        x = make(shape, dtype, layout, device)
        for other in ("slice", "channels_last_slice", "offset"):
            out = make(shape, next(dtypes), other, device, seed=1)
            expected = x.to(out.dtype)
            ops.copy_map(x, out)
            note = (shape, dtype, layout, out.dtype, other)
            assert torch.equal(out, expected), note
            assert_nan_around(out, note)


def check_special_values(ops, device: str) -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0], device=device).view(1, 1, 6)
    zero, one = torch.zeros_like(x), torch.ones(1, device=device)
    for activation, passed in ((0.0, [1, 1, 0, 0, 0, 1]), (RELU6, [1, 0, 0, 0, 0, 1])):
        activated, expected = torch.empty_like(x), activate(x, activation)
        ops.bn_act(x, one, 0 * one, activation, activated)
        for out in (ops.add_act(x, zero, activation), ops.bn_add_act(x, one, 0 * one, zero, None, None, activation), activated):
            torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
        # Behind what stops it even an infinite gradient is 0.
        dx = ops.add_act_backward(zero + math.inf, expected, activation)
        expected = torch.tensor(passed, device=device) > 0
        expected = torch.where(expected, math.inf, 0)
        assert torch.equal(dx.flatten(), expected)
        dy, out = zero + math.inf, zero.clone()
        ops.bn_act_backward_accumulate(out, dy, x, one, 0 * one, 0 * one, activation)
        ops.bn_act_backward(dy, x, one, 0 * one, 0 * one, activation)
        assert torch.equal(dy.flatten(), expected) and torch.equal(out.flatten(), expected)
    dx = ops.add_act_backward(zero + 1, torch.nn.functional.leaky_relu(x, 0.1), 0.1)
    torch.testing.assert_close(dx.flatten(), torch.tensor([0.1, 1, 0.1, 0.1, 0.1, 1], device=device))
    # Into the sums goes what the reference lets in.
    for value in (math.nan, math.inf, -math.inf):
        x, grad = (torch.tensor([[v]], device=device) for v in ([value, 2.0], [3.0, 4.0]))
        expected = ReferenceBackend().bn_act_backward(grad.clone(), x, Affine(one, 0 * one, Activation("relu")), one)
        sums = ops.bn_act_backward(grad, x, one, 0 * one, one, 0.0)
        torch.testing.assert_close(torch.stack(sums), torch.stack(expected), rtol=0, atol=0, equal_nan=True)


def check_curves_far_from_zero(ops, device: str) -> None:
    """Where exponentials are as small and as large as they get, and beyond."""
    for dtype, activation in itertools.product((torch.float32, torch.float64, torch.bfloat16, torch.float16), CURVES):
        x = torch.linspace(-87, 87, 2001, device=device).to(dtype).view(1, 1, -1)
        one, zero, grad = torch.ones(1, dtype=wide(dtype), device=device), torch.zeros_like(x), torch.ones_like(x)
        far, note = 1 + x.double().abs(), (dtype, activation)

        def forward(x: Tensor) -> tuple[Tensor, ...]:
            out, nothing = torch.empty_like(x), torch.zeros_like(x)
            ops.bn_act(x, one, 0 * one, activation, out)
            return out, ops.add_act(x, nothing, activation), ops.bn_add_act(x, one, 0 * one, nothing, None, None, activation)

        for values in (x, torch.tensor([[[200.0, -200.0]]], dtype=dtype, device=device)):
            truth = activate(values.double(), activation)
            for out in forward(values):
                assert_rounded(out, truth, truth.abs() * (1 + values.double().abs()), note)
        ends = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0], dtype=dtype, device=device).view(1, 1, -1)
        for out in forward(ends):
            torch.testing.assert_close(out, activate(ends, activation), rtol=0, atol=0, equal_nan=True)

        mark = x if activation == SILU else forward(x)[0]
        assert_rounded(ops.add_act_backward(grad, mark, activation), marked(grad, mark, activation), far, note)
        dy, out, truth = grad.clone(), zero.clone(), masked(grad, x, activation)
        size = (truth.abs() + torch.sigmoid(x.double())) * far
        ops.bn_act_backward_accumulate(out, dy, x, one, 0 * one, 0 * one, activation)
        ops.bn_act_backward(dy, x, one, 0 * one, 0 * one, activation)
        assert_rounded(out, truth, size, note)
        assert_rounded(dy, truth, size, note)


def check_empty(ops, device: str) -> None:
    for shape in ((0, 3, 4, 4), (2, 0, 4), (2, 3, 0)):
        x = torch.empty(shape, device=device)
        channels = torch.empty(shape[1], device=device)
        assert ops.add_act(x, x, 0.0).shape == shape
        assert ops.add_act_backward(x, x, 0.0).shape == shape
        assert ops.bn_add_act(x, channels, channels, x, None, None, 0.0).shape == shape
        ops.bn_act(x, channels, channels, 0.0, x)
        ops.copy_map(x, x.bfloat16())
        sums = ops.bn_act_backward(x, x, channels, channels, channels, 0.0)
        sums += ops.bn_act_backward_accumulate(x, x, x, channels, channels, channels, 0.0)
        assert all(torch.equal(t, torch.zeros_like(channels)) for t in sums)
        mean, m2 = ops.channel_stats(x)
        assert bool(mean.isnan().all()) and torch.equal(m2, torch.zeros_like(channels))


def check_errors(ops, device: str) -> None:
    x = torch.zeros(2, 3, 4, 4, device=device)
    vector = torch.zeros(3, device=device)
    for message, call in (
        (r"x: expected shape \(N, C, ...\), got \(3\)", lambda: ops.channel_stats(vector)),
        (r"x: expected dtype float32, bfloat16, float16 or float64, got int32", lambda: ops.channel_stats(x.int())),
        (r"x: expected spatial positions with one stride", lambda: ops.channel_stats(x[..., :3])),
        (r"x: expected adjacent channels .* or adjacent positions", lambda: ops.channel_stats(x[:, :, 0, ::2])),
        (r"y: expected dtype float32, got float64", lambda: ops.add_act(x, x.double(), 0.0)),
        (r"y: expected shape \(2, 3, 4, 4\) \(that of x\), got \(1, 3, 4, 4\)", lambda: ops.add_act(x, x[:1], 0.0)),
        (r"activation: expected no negative slope, .* got -0.1", lambda: ops.add_act_backward(x, x, -0.1)),
        (r"scale: expected shape \(3,\), one value a channel of z, got \(2\)",
         lambda: ops.bn_add_act(x, vector[:2], vector, x, None, None, 0.0)),
        (r"shift: expected dtype float32, got float64", lambda: ops.bn_add_act(x, vector, vector.double(), x, None, None, 0.0)),
        (r"m2: expected shape \(3,\), one value a channel of mean, got \(2\)",
         lambda: ops.bn_fold(vector, vector[:2], 1.0, 1e-5, None, None)),
        (r"weight: expected dtype float32, got float64",
         lambda: ops.bn_fold(vector, vector, 1.0, 1e-5, vector.double(), None)),
        (r"eps: expected 1 values, as many as mean has, got 2",
         lambda: ops.bn_folds([vector], [vector], [1.0], [1.0, 1.0], [vector], [vector])),
        (r"bias: expected shape \(3,\), one value a channel of mean, got \(2\)",
         lambda: ops.bn_folds([vector], [vector], [1.0], [1.0], [vector], [vector[:2]])),
        (r"beta: expected a contiguous vector, got stride 2",
         lambda: ops.bn_correction(*[vector] * 5, 1.0, torch.zeros(6, device=device)[::2], vector, False)),
        (r"out: expected dtype float32, got bfloat16", lambda: ops.bn_act(x, vector, vector, 0.0, x.bfloat16())),
        (r"grad: expected a tensor whose elements do not overlap",
         lambda: ops.bn_act_backward(x[:1].expand(2, 3, 4, 4), x, vector, vector, vector, 0.0)),
        (r"center: expected shape \(3,\), one value a channel of x, got \(2\)",
         lambda: ops.bn_act_backward(x, x, vector, vector, vector[:2], 0.0)),
        (r"out: expected shape \(2, 3, 4, 4\) \(that of x\), got \(2, 3, 4, 3\)",
         lambda: ops.bn_act_backward_accumulate(x[..., :3].clone(), x, x, vector, vector, vector, 0.0)),
        (r"out: expected shape \(2, 3, 4, 4\) \(that of x\), got \(1, 3, 4, 4\)", lambda: ops.copy_map(x, x[:1])),
        (r"out: expected dtype float32, bfloat16, float16 or float64, got int32", lambda: ops.copy_map(x, x.int())),
        (r"identity_shift: expected a tensor", lambda: ops.bn_add_act(x, vector, vector, x, vector, None, 0.0)),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


CHECKS = (
    check_channel_stats,
    check_channel_stats_far_mean,
    check_add_act,
    check_bn_add_act,
    check_pending_grad,
    check_finished_grad,
    check_bn_act,
    check_bn_act_backward,
    check_bn_act_backward_long,
    check_bn_fold,
    check_bn_folds,
    check_bn_correction,
    check_copy_map,
    check_repeats,
    check_special_values,
    check_curves_far_from_zero,
    check_empty,
    check_errors,
)
