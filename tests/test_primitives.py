"""Every backend's primitives against the reference in float64, and the operators' registration."""

import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from tolerance import assert_within_rule, torch_runs, true_run
from torch._subclasses.fake_tensor import FakeTensorMode

import resdense_ext as rd
from resdense_ext import reference
from resdense_ext.ops import _library
from resdense_ext.ops import backend as backends
from resdense_ext.ops._library import CPU_LIBRARY
from resdense_ext.ops.activation import activation_backward, activation_numbered, number_of
from resdense_ext.ops.operands import Affine, Fold, Pending, Stats
from resdense_ext.ops.triton import architecture_refusal, interpreting
from resdense_ext.reference import Activation, BatchNorm, Conv

built = pytest.mark.skipif(CPU_LIBRARY is not None, reason=f"the CPU library is {CPU_LIBRARY}")
multiplies_bfloat16 = pytest.mark.skipif(
    CPU_LIBRARY is not None or rd.build_info()["cpu_capability"] != "AVX512_BF16",
    reason="only the CPU kernels for AVX512_BF16 multiply bfloat16, and here others run",
)
# The same tests serve Triton's kernels in its interpreter: see test_triton.py.
BACKENDS = ["triton"] if interpreting() else ["reference", pytest.param("cpu", marks=built)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Samples, channels, spatial sizes: ordinary, odd, of one position, of one channel, past a tile and past a vector.
SHAPES = [(2, 8, (6, 5)), (1, 1, (7, 1)), (3, 17, (1, 1)), (2, 129, (3,)), (1, 70, (5, 4, 3)), (2, 33, (37, 29))]
ACTIVATIONS = [Activation("relu"), Activation("leaky_relu", 0.2), Activation("identity")]

stats_dtype = reference.accumulation_dtype


def last_format(x):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats.get(x.dim(), torch.contiguous_format))


def buffer_slice(values, channels_last, before=3, after=2, sentinel=77.0):
    """``values`` as a slice of the channels of a larger buffer, and a check that the rest of it is untouched."""
    shape = (values.shape[0], values.shape[1] + before + after, *values.shape[2:])
    buffer = torch.full(shape, sentinel, dtype=values.dtype)
    buffer = last_format(buffer) if channels_last else buffer
    inside = buffer[:, before : before + values.shape[1]]
    inside.copy_(values)

    def untouched():
        outside = torch.cat([buffer[:, :before], buffer[:, before + values.shape[1] :]], 1)
        assert (outside == sentinel).all(), "written outside of the slice"

    return inside, untouched


def vectors(channels, dtype, count):
    return [torch.randn(channels, dtype=stats_dtype(dtype)) for _ in range(count)]


def close(ours, run, inputs, dtype):
    """The rule of tolerance.py; ``run`` is the plain formula on a dict of tensors."""
    as_run = lambda tensors, _: {f"{i}": t for i, t in enumerate(run(tensors))}  # noqa: E731
    truth = true_run(as_run, inputs, {})
    runs = torch_runs(as_run, inputs, {})
    assert_within_rule({f"{i}": t for i, t in enumerate(ours)}, truth, runs, dtype)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return backends.get(request.param)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestElementwise:
    def map(self, shape, dtype):
        return torch.randn(shape[0], shape[1], *shape[2]).to(dtype)

    def test_channel_stats(self, backend, shape, dtype, channels_last):
        x = self.map(shape, dtype)
        source, _ = buffer_slice(x, channels_last)
        close(backend.channel_stats(source), lambda t: reference.channel_stats(t["x"]), {"x": x}, torch.float32)

    @pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
    def test_bn_act(self, backend, shape, dtype, channels_last, activation):
        x = self.map(shape, dtype)
        scale, shift = vectors(x.shape[1], dtype, 2)
        source, _ = buffer_slice(x, channels_last)
        out = backend.bn_act(source, Affine(scale, shift, activation))
        assert out.shape == x.shape and out.dtype == dtype
        inputs = {"x": x, "scale": scale, "shift": shift}
        close([out], lambda t: [reference.apply_pending(t["x"], t["scale"], t["shift"], activation)], inputs, dtype)

    def test_pending_grad(self, backend, shape, dtype, channels_last):
        dy, z = self.map(shape, dtype), self.map(shape, dtype)
        coefficients = dict(zip(("alpha", "beta", "delta"), vectors(dy.shape[1], dtype, 3)))
        target, untouched = buffer_slice(dy, channels_last)
        source, _ = buffer_slice(z, channels_last)
        pending, version = Pending(target, source, **coefficients), target._version
        new = backend.pending_grad(pending)
        assert target._version == version and torch.equal(target, dy)
        backend.pending_grad_(pending)
        assert target._version > version
        untouched()
        for found in (new, target):
            close([found], lambda t: [reference.pending_grad(**t)], {"dy": dy, "z": z, **coefficients}, dtype)

    @pytest.mark.parametrize("accumulate", [False, True])
    @pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
    def test_bn_act_backward(self, backend, shape, dtype, channels_last, activation, accumulate):
        x, grad, d = (self.map(shape, dtype) for _ in range(3))
        scale, shift, center = vectors(x.shape[1], dtype, 3)
        source, _ = buffer_slice(x, channels_last)
        g, g_untouched = buffer_slice(grad, channels_last)
        out, untouched = buffer_slice(d, channels_last)
        affine = Affine(scale, shift, activation)
        if accumulate:
            sums = backend.bn_act_backward_accumulate(out, g, source, affine, center)
            assert torch.equal(g, grad)
        else:
            sums = backend.bn_act_backward(g, source, affine, center)
            out = g
        untouched(), g_untouched()

        def formula(t):
            wide = stats_dtype(t["x"].dtype)
            per = lambda name: reference.per_channel(t[name], t["x"])  # noqa: E731
            y = per("scale") * t["x"].to(wide) + per("shift")
            dy = t["grad"].to(wide) * reference.activation_slope(y, activation)
            result = t["d"].to(wide) + per("scale") * dy if accumulate else dy
            reduced = [0, *range(2, dy.dim())]
            return result.to(t["x"].dtype), dy.sum(reduced), (dy * (t["x"].to(wide) - per("center"))).sum(reduced)

        inputs = {"x": x, "grad": grad, "d": d, "scale": scale, "shift": shift, "center": center}
        close([out, *sums], formula, inputs, dtype)


def conv_cases():
    pointwise = Conv(torch.empty(0), None, (0, 0), (1, 1), 1)
    yield "1x1", pointwise, (12, 20, 1, 1), False
    yield "1x1 bias", pointwise, (12, 20, 1, 1), True
    yield "1x1 wide", pointwise, (130, 67, 1, 1), False
    yield "1x1 whole vectors", pointwise, (48, 32, 1, 1), False
    yield "3x3", pointwise._replace(padding=(1, 1)), (8, 20, 3, 3), False
    yield "3x3 whole vectors, bias", pointwise._replace(padding=(1, 1)), (16, 32, 3, 3), True
    yield "3x3 dilated, grouped, bias", Conv(torch.empty(0), None, (2, 2), (2, 2), 4), (8, 5, 3, 3), True
    yield "5x3", pointwise._replace(padding=(2, 1)), (6, 20, 5, 3), False
    yield "strided", pointwise._replace(padding=(1, 0), stride=(2, 3)), (6, 20, 3, 3), False


CASES = {name: (conv, shape, bias) for name, conv, shape, bias in conv_cases()}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
class TestConvolution:
    activation = Activation("relu")

    def inputs(self, case, dtype, sizes=(3, 11, 9)):
        conv, shape, bias = CASES[case]
        channels = shape[1] * conv.groups
        spread = (shape[1] * shape[2] * shape[3]) ** -0.5
        tensors = {
            "x": torch.randn(sizes[0], channels, *sizes[1:]).to(dtype),
            "weight": (torch.randn(shape) * spread).to(dtype),
            **dict(zip(("scale", "shift", "center"), vectors(channels, dtype, 3))),
        }
        if bias:
            tensors["bias"] = torch.randn(shape[0]).to(dtype)
        return conv, tensors

    @pytest.mark.parametrize("masked", [False, True])
    def test_forward(self, backend, case, dtype, channels_last, masked):
        conv, tensors = self.inputs(case, dtype)
        activation = self.activation
        outputs, *sizes = tensors["weight"].shape[0], *conv._replace(weight=tensors["weight"]).outputs((11, 9))
        mask = torch.rand(3, outputs, *sizes) > 0.5 if masked else None
        source, _ = buffer_slice(tensors["x"], channels_last)
        out, untouched = buffer_slice(torch.full((3, outputs, *sizes), float("nan"), dtype=dtype), channels_last)
        ours = conv._replace(weight=tensors["weight"], bias=tensors.get("bias"))
        affine = Affine(tensors["scale"], tensors["shift"], activation)
        stats = Stats(*(torch.empty(outputs, dtype=stats_dtype(dtype)) for _ in range(2)))
        reader = BatchNorm(torch.randn(outputs), torch.randn(outputs))
        fold = backend.bn_act_conv(source, affine, ours, out, mask, 2.0, stats, reader)
        untouched()

        def formula(t):
            a = reference.apply_pending(t["x"], t["scale"], t["shift"], activation)
            z = reference.convolution(a, conv._replace(weight=t["weight"], bias=t.get("bias")))
            return [z if mask is None else z * (mask * 2.0)]

        close([out], formula, tensors, dtype)
        # The statistics are those of what was written, rounded as it is.
        close(stats, lambda t: reference.channel_stats(t["x"]), {"x": out.contiguous()}, torch.float32)
        # And the norm that reads them is folded as `fold` does it.
        assert fold.affine.activation == activation and fold.count == 3 * math.prod(sizes)
        expected = backends.get("reference").fold(reader, stats, fold.count, activation)
        torch.testing.assert_close([*fold.affine[:2], *fold[1:3]], [*expected.affine[:2], *expected[1:3]], rtol=1e-6, atol=1e-6)
        frozen = BatchNorm(running_mean=torch.randn(outputs), running_var=torch.rand(outputs), batch_stats=False)
        fold = backend.bn_act_conv(source, affine, ours, out, mask, 2.0, None, frozen)
        assert fold.count is None and torch.equal(fold.mean, frozen.running_mean.to(stats_dtype(dtype)))
        assert backend.bn_act_conv(source, affine, ours, out, mask, 2.0, None) is None

    @pytest.mark.parametrize("pending", [False, True])
    @pytest.mark.parametrize("accumulate", [False, True])
    def test_backward(self, backend, case, dtype, channels_last, accumulate, pending):
        conv, tensors = self.inputs(case, dtype)
        activation = self.activation
        outputs, *sizes = tensors["weight"].shape[0], *conv._replace(weight=tensors["weight"]).outputs((11, 9))
        for name in ("dy", "z"):
            tensors[name] = torch.randn(3, outputs, *sizes).to(dtype)
        tensors["d"] = torch.randn_like(tensors["x"])
        tensors.update(zip(("alpha", "beta", "delta"), vectors(outputs, dtype, 3)))
        # The layout of the convolution's own input decides; a bottleneck is a map of its own, a wide input is a slice.
        source, _ = buffer_slice(tensors["x"], channels_last)
        if not accumulate:
            source = last_format(tensors["x"].clone()) if channels_last else tensors["x"].clone()
        dy, dy_untouched = buffer_slice(tensors["dy"], channels_last)
        z, _ = buffer_slice(tensors["z"], channels_last)
        d, untouched = buffer_slice(tensors["d"], channels_last)
        grad = Pending(dy, z, tensors["alpha"], tensors["beta"], tensors["delta"]) if pending else dy
        ours = conv._replace(weight=tensors["weight"], bias=tensors.get("bias"))
        tensors["rstd"] = torch.rand_like(tensors["scale"])
        fold = Fold(Affine(tensors["scale"], tensors["shift"], activation), tensors["center"], tensors["rstd"], 297)
        before = torch.zeros_like(tensors["scale"])
        into = Pending(d, source, None, before.clone(), before.clone()) if accumulate else None
        grads = backend.bn_act_conv_backward(source, fold, ours, grad, into, True)
        untouched(), dy_untouched()
        assert grads.input.z is source and (accumulate or grads.input.alpha is tensors["scale"])

        def formula(t):
            wide = stats_dtype(t["x"].dtype)
            per = lambda name: reference.per_channel(t[name], t["x"])  # noqa: E731
            y = per("scale") * t["x"].to(wide) + per("shift")
            a = reference.activate(y, activation).to(t["x"].dtype)
            dz = reference.pending_grad(t["dy"], t["z"], t["alpha"], t["beta"], t["delta"]) if pending else t["dy"]
            parameters = [a, t["weight"]] + ([t["bias"]] if "bias" in t else [])
            parameters = [p.detach().requires_grad_() for p in parameters]
            conv_t = conv._replace(weight=parameters[1], bias=parameters[2] if "bias" in t else None)
            da, *rest = torch.autograd.grad(reference.convolution(parameters[0], conv_t), parameters, dz)
            dy = da.to(wide) * reference.activation_slope(y, activation)
            out = (t["d"].to(wide) + per("scale") * dy if accumulate else dy).to(t["x"].dtype)
            reduced = [0, *range(2, dy.dim())]
            dbeta = dy.sum(reduced)
            dgamma = t["rstd"] * (dy * (t["x"].to(wide) - per("center"))).sum(reduced)
            beta = -t["scale"] * t["rstd"] * dgamma / 297
            return out, *rest, dbeta, dgamma, beta, -t["scale"] * dbeta / 297 - beta * t["center"]

        result = [grads.input.dy, grads.weight, grads.bias, grads.norm_bias, grads.norm_weight, *grads.input[3:]]
        close([t for t in result if t is not None], formula, tensors, dtype)
        without = backend.bn_act_conv_backward(source, fold, ours, tensors["dy"].clone(), into, False)
        assert without.weight is None and without.bias is None
        frozen = backend.bn_act_conv_backward(source, fold._replace(count=None), ours, tensors["dy"].clone(), None, False)
        assert not frozen.input.beta.any() and not frozen.input.delta.any()


@built
def test_parts_are_no_smaller_than_twice_the_weights(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    x, cpu = last_format(torch.empty(8, 512, 32, 32)), backends.get("cpu")
    parts = [len(cpu.chunks(of, conv)) for of in (x, x.bfloat16()) for conv in (None, Conv(torch.empty(512, 512, 3, 3)))]
    assert parts == [8, 1, 8, 1] and len(cpu.chunks(x, Conv(torch.empty(256, 512, 3, 3)))) == 2


@built
class TestWinograd:
    """The operators themselves, wherever the CPU backend would rather use the framework's convolution."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    # Samples, channels of the input and of the output, height and width: one position, one line, rows in parts, samples together,
    # and in 16 bits tiles of 4 cut off anyhow.
    @pytest.mark.parametrize(
        "shape", [(2, 5, 3, 1, 1), (3, 1, 1, 2, 1), (1, 20, 8, 1, 31), (1, 32, 16, 5, 260), (5, 128, 32, 7, 7), (2, 24, 40, 10, 12)], ids=str
    )
    @pytest.mark.parametrize("slope", [0.0, 0.2])
    def test_sizes(self, shape, dtype, slope):
        N, C, K, *sizes = shape
        tensors = {name: torch.randn(N, width, *sizes).to(dtype) for name, width in (("x", C), ("dy", K), ("z", K), ("d", C))}
        tensors["weight"] = (torch.randn(K, C, 3, 3) / (3 * C**0.5)).to(dtype)
        tensors.update(zip(("scale", "shift", "center"), vectors(C, dtype, 3)))
        tensors.update(zip(("alpha", "beta", "delta"), vectors(K, dtype, 3)))
        x, dy, z = (buffer_slice(tensors[name], True)[0] for name in ("x", "dy", "z"))
        (out, out_untouched), (d, untouched) = buffer_slice(torch.full_like(dy, float("nan")), True), buffer_slice(tensors["d"], True)
        prologue, pending = (x, tensors["scale"], tensors["shift"]), (dy, z, *(tensors[v] for v in ("alpha", "beta", "delta")))
        stats = mean, m2 = torch.empty(2, K).unbind()
        torch.ops.resdense.bn_act_winograd(*prologue, slope, tensors["weight"], None, out, *stats)
        dweight, *sums = torch.ops.resdense.bn_act_winograd_backward(
            *prologue, tensors["center"], slope, tensors["weight"], *pending, d, True, True
        )
        out_untouched(), untouched()

        def formula(t):
            wide, activation = stats_dtype(t["x"].dtype), Activation("leaky_relu", slope)
            per = lambda name: reference.per_channel(t[name], t["x"])  # noqa: E731
            y = per("scale") * t["x"].to(wide) + per("shift")
            a = reference.activate(y, activation).to(t["x"].dtype)
            dz = reference.pending_grad(t["dy"], t["z"], t["alpha"], t["beta"], t["delta"])
            parts = [p.detach().requires_grad_() for p in (a, t["weight"])]
            conv = reference.convolution(parts[0], Conv(parts[1], padding=(1, 1)))
            da, dw = torch.autograd.grad(conv, parts, dz)
            g = da.to(wide) * reference.activation_slope(y, activation)
            reduced = [0, 2, 3]
            sum_xc = (g * (t["x"].to(wide) - per("center"))).sum(reduced)
            return conv.detach(), (t["d"].to(wide) + per("scale") * g).to(t["x"].dtype), dw, g.sum(reduced), sum_xc

        close([out, d, dweight.permute(0, 3, 1, 2), *sums], formula, tensors, dtype)
        close((mean, m2), lambda t: reference.channel_stats(t["x"]), {"x": out.contiguous()}, torch.float32)

    def test_results_repeat_bitwise(self):
        x, dy, z = (last_format(torch.randn(3, width, 9, 14)) for width in (24, 8, 8))
        vectors = torch.rand(3, 24).unbind()
        results = []
        for _ in range(3):
            out, d = torch.empty_like(dy), torch.empty_like(x)
            weight = torch.ones(8, 24, 3, 3)
            stats = torch.empty(2, 8).unbind()
            torch.ops.resdense.bn_act_winograd(x, *vectors[:2], 0.0, weight, None, out, *stats)
            pending = (dy, z, *torch.ones(3, 8).unbind())
            grads = torch.ops.resdense.bn_act_winograd_backward(x, *vectors, 0.0, weight, *pending, d, False, True)
            results.append([out, d, *stats, *grads])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other))

    @pytest.mark.parametrize("samples", [0, 2])
    def test_an_empty_map(self, samples):
        x, dy = (torch.empty(samples, width, 0 if samples else 4, 4).to(memory_format=torch.channels_last) for width in (6, 3))
        ones, weight = torch.ones(6), torch.randn(3, 6, 3, 3)
        mean, m2 = torch.ones(2, 3).unbind()
        torch.ops.resdense.bn_act_winograd(x, ones, ones, 0.0, weight, None, dy.clone(), mean, m2)
        assert mean.isnan().all()
        pending = (dy, dy, *torch.ones(3, 3).unbind())
        grads = torch.ops.resdense.bn_act_winograd_backward(x, ones, ones, ones, 0.0, weight, *pending, x.clone(), True, True)
        assert all(not grad.any() for grad in grads) and grads[0].shape == (3, 3, 3, 6)

    @pytest.mark.parametrize(
        "change, message",
        [
            (dict(x=torch.empty(2, 6, 5, 4)), "x: expected a channels_last map, got strides"),
            (dict(out=torch.empty(2, 3, 5, 4)), "out: expected a channels_last map, got strides"),
            (dict(out=last_format(torch.empty(2, 3, 5, 3))), "out: expected 2 samples of 5x4, as x, got"),
            (dict(x=torch.empty(2, 6, 5)), "x: expected shape .N, C, H, W., got"),
            (dict(weight=torch.empty(3, 6, 1, 1)), "weight: expected shape .3, 6, 3, 3., got .3, 6, 1, 1."),
            (dict(weight=torch.empty(3, 6, 3, 3).half()), "weight: expected dtype float32, got float16"),
            (dict(shift=torch.empty(5)), "shift: expected shape .6,., one value a channel"),
            (dict(bias=torch.empty(2)), "bias: expected shape .3,."),
            (dict(mean=torch.empty(2)), "mean: expected shape .3,., one value a channel of out, got .2."),
            (dict(m2=None), "m2: expected to be given where mean is, and only there"),
        ],
    )
    def test_bad_arguments_are_named(self, change, message):
        arguments = dict(
            x=last_format(torch.randn(2, 6, 5, 4)), scale=torch.ones(6), shift=torch.ones(6), activation=0.0,
            weight=torch.randn(3, 6, 3, 3), bias=None, out=last_format(torch.empty(2, 3, 5, 4)), mean=torch.empty(3), m2=torch.empty(3),
        )  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            torch.ops.resdense.bn_act_winograd(**{**arguments, **change})

    def test_float64_is_refused(self):
        x = last_format(torch.randn(2, 6, 5, 4).double())
        ones = torch.ones(6).double()
        with pytest.raises(RuntimeError, match="x: expected dtype float32, bfloat16 or float16, got float64"):
            torch.ops.resdense.bn_act_winograd(x, ones, ones, 0.0, torch.randn(6, 6, 3, 3).double(), None, x.clone(), None, None)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_convolution_behind_a_group_norm(backend, dtype, kernel, accumulate):
    """Forward and, its gradient finished, backward; no channel's correction is its own."""
    torch.manual_seed(0)
    norm, conv = BatchNorm(eps=1e-3, groups=3), Conv(torch.randn(8, 12, kernel, kernel) / (3 * kernel), padding=(kernel // 2,) * 2)
    tensors = {"x": 1 + torch.randn(1, 12, 7, 6), "weight": conv.weight, "dy": torch.randn(1, 8, 7, 6), "d": torch.randn(1, 12, 7, 6)}
    tensors = {name: t.to(dtype) for name, t in tensors.items()} | {"gamma": torch.randn(12), "beta": torch.randn(12)}
    x, conv = last_format(tensors["x"]), conv._replace(weight=tensors["weight"])
    fold = backend.fold(norm._replace(weight=tensors["gamma"], bias=tensors["beta"]), Stats(*backend.channel_stats(x)), 42, Activation())
    y = last_format(x.new_empty(1, 8, 7, 6))
    backend.bn_act_conv(x, fold.affine, conv, y, None, 1.0, None)
    into = Pending.of(last_format(tensors["d"].clone()), x) if accumulate else None
    found = backend.bn_act_conv_backward(x, fold, conv, last_format(tensors["dy"]), into, True, finish=not accumulate)
    dx = backend.pending_grad_(found.input) if isinstance(found.input, Pending) else found.input

    def formula(t):
        leaves = [t[name].detach().requires_grad_() for name in ("x", "weight", "gamma", "beta")]
        unit = reference.Unit(norm._replace(weight=leaves[2], bias=leaves[3]), conv._replace(weight=leaves[1]))
        y = reference.bn_act_conv(leaves[0], unit)
        dx, *rest = torch.autograd.grad(y, leaves, t["dy"])
        return y, dx + t["d"] if accumulate else dx, *rest

    close([y, dx, found.weight, found.norm_weight, found.norm_bias], formula, tensors, dtype)


@pytest.mark.parametrize("channels_last", [False, True])
def test_statistics_survive_a_mean_of_a_thousand_deviations(backend, channels_last):
    x = torch.randn(4, 9, 40, 37) + 1000 * torch.arange(9.0).view(1, 9, 1, 1)
    source, _ = buffer_slice(x, channels_last)
    stats = backend.channel_stats(source)
    close(stats, lambda t: reference.channel_stats(t["x"]), {"x": x}, torch.float32)


@pytest.mark.parametrize("channels_last", [False, True])
def test_not_a_number_and_infinity(backend, channels_last):
    x = torch.tensor([float("nan"), float("-inf"), float("inf"), -1.0, 1.0]).view(1, 5, 1, 1).repeat(2, 1, 3, 3)
    source, _ = buffer_slice(x, channels_last)
    out = backend.bn_act(source, Affine(torch.ones(5), torch.zeros(5), Activation("relu")))[0, :, 0, 0]
    assert out[0].isnan() and out[1:].tolist() == [0.0, float("inf"), 0.0, 1.0]


@pytest.mark.parametrize("threads", [1, 2])
def test_results_repeat_bitwise(backend, threads):
    torch.set_num_threads(threads)
    x, w = torch.randn(4, 40, 23, 19), torch.randn(24, 40, 1, 1)
    dy, z = torch.randn(4, 24, 23, 19), torch.randn(4, 24, 23, 19)
    ones, zeros = torch.ones(40), torch.zeros(40)
    results = []
    for _ in range(3):
        out = torch.zeros_like(x)
        pending = Pending(dy.clone(), z, torch.ones(24), torch.zeros(24), torch.zeros(24))
        affine = Affine(ones, zeros, Activation())
        into = Pending(out, x, ones, torch.zeros(40), torch.zeros(40))
        grads = backend.bn_act_conv_backward(x, Fold(affine, zeros, ones, 1), Conv(w), pending, into, True)
        results.append([out, grads.weight, grads.norm_weight, grads.norm_bias, into.beta, into.delta])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


class TestOperators:
    """torch.library.opcheck: schema, fake kernel, no undeclared mutation or aliasing."""

    pytestmark = [built]

    def arguments(self, name):
        x, z, w = torch.randn(2, 6, 5, 4), torch.randn(2, 3, 5, 4), torch.randn(3, 6)
        a, b, c = torch.randn(6), torch.randn(6), torch.randn(6)
        p, q, r = torch.randn(3), torch.randn(3), torch.randn(3)
        windows, small = ([3, 2], [2, 2], [1, 0]), torch.randn(2, 6, 3, 2)
        taps = torch.full_like(small, 2, dtype=torch.uint8)
        geometry = ([1, 1], [1, 1], [1, 1], 1)
        return {
            "channel_stats": (x,),
            "channel_stats_into": (x, a.clone(), b.clone()),
            "bn_fold": (a, b.square(), 40, 1e-5, c, None),
            "bn_folds": ([a, p], [b.square(), q.square()], [40.0, 9.0], [1e-5, 1e-3], [c, r], [a, q]),
            "bn_correction": (*torch.randn(5, 6).unbind(), 40, a, b, True),
            "bn_act": (x, a, b, 0.0, torch.empty_like(x)),
            "bn_act_sums": (x.clone(), x, a, b, c, 0.1),
            "bn_act_backward": (x.clone(), x, a, b, c, 0.1),
            "bn_act_backward_accumulate": (x.clone(), x.clone(), x, a, b, c, 0.0),
            "pending_grad": (z.clone(), z, p, q, r, p, 0.1),
            "finished_grad": (z, z.clone(), p, q, r),
            "copy_map": (x, torch.empty(2, 5, 4, 6, dtype=torch.bfloat16).movedim(-1, 1)),
            "bn_act_conv1x1": (x, a, b, 0.0, w, p, z.clone(), q.clone(), r.clone(), 1e-5, p.clone(), None),
            "bn_act_conv1x1_backward": (x, a, b, c, 0.0, w, z.clone(), z, p, q, r, x.clone(), True, True),
            "conv1x1_moments": (x, a, b, 0.1, c, z),
            "conv1x1_moments_terms": (a.double(), torch.randn(6, 6), p.double(), w, w, p, q, 40.0, True),
            "conv1x1_moments_backward": (x, a, b, c, 0.1, z, w, torch.randn(6, 6), a, b, x.clone(), True),
            "bn_act_winograd": (last_format(x), a, b, 0.0, torch.randn(3, 6, 3, 3), p, last_format(z.clone()), q.clone(), r.clone()),
            "bn_act_winograd_backward": (
                *(last_format(x), a, b, c, 0.0, torch.randn(3, 6, 3, 3), last_format(z.clone()), last_format(z)),
                *(p, q, r, last_format(x.clone()), True, True),
            ),
            "bn_act_avg_pool": (x, a, b, 0.1, *windows, small),
            "bn_act_avg_pool_backward": (small, x, a, b, c, 0.1, *windows, x.clone(), True),
            "bn_act_max_pool": (x, a, b, 0.1, *windows, small, taps),
            "bn_act_max_pool_backward": (small, taps, x, a, b, c, 0.1, *windows, x.clone(), False),
            "bn_act_global_pool": (x, a, b, 0.1),
            "bn_act_global_pool_backward": (torch.randn(2, 6, 1, 1), x, a, b, c, 0.1, x.clone(), True),
            "bn_act_conv3x3": (
                *(x, a, b, 0.0, torch.randn(3, 6, 3, 3), z.clone(), q.clone(), r.clone()),
                *(1e-5, None, torch.randn(9), a.clone(), b.exp(), torch.zeros(1, dtype=torch.int32)),
            ),
            "bn_act_conv": (
                *(x, a, b, 0.0, torch.randn(3, 6, 3, 3), p, *geometry, True, 2**20),
                *(z.clone(), q.clone(), r.clone(), 1e-5, None, p.clone()),
            ),
            "bn_act_conv_backward": (
                *(x, a, b, c, c.clone(), 40, 0.0, torch.randn(3, 6, 3, 3), *geometry, True, 2**20),
                *(z, z.clone(), p, q, r, None, None, None, True, True, True),
            ),
            "bn_act_conv1x1_weight_backward": (z, x, a, b, 0.0, z.clone(), p, q, r),
            "bn_act_conv1x1_data_backward": (
                *(z, x, a, b, c, a.clone(), 40, 0.1, w),
                *(x.clone(), b.clone(), c.clone(), True, torch.randn(2, 3, 6)),
            ),
            "bn_act_conv3x3_weight_backward": (z, x, a, b, 0.0),
            "bn_act_conv3x3_data_backward": (
                *(z, x, a, b, c, a.clone(), 40, 0.1, torch.randn(3, 6, 3, 3)),
                *(x.clone(), b.clone(), c.clone(), False),
            ),
            "add_act": (x, x.clone(), 0.0),
            "add_act_backward": (x, x.clone(), 0.0),
            "bn_add_act": (x, a, b, x.clone(), c, a.clone(), 0.0),
            "bn_add_act_backward": (x, x.clone(), x.clone(), a, x.clone(), b, 0.1),
        }[name]

    @pytest.mark.parametrize(
        "name",
        [
            "channel_stats",
            "channel_stats_into",
            "bn_fold",
            "bn_folds",
            "bn_correction",
            "bn_act",
            "bn_act_sums",
            "bn_act_backward",
            "bn_act_backward_accumulate",
            "pending_grad",
            "finished_grad",
            "copy_map",
            "bn_act_conv1x1",
            "bn_act_conv1x1_backward",
            "conv1x1_moments",
            "conv1x1_moments_terms",
            "conv1x1_moments_backward",
            "bn_act_winograd",
            "bn_act_winograd_backward",
            "bn_act_avg_pool",
            "bn_act_avg_pool_backward",
            "bn_act_max_pool",
            "bn_act_max_pool_backward",
            "bn_act_global_pool",
            "bn_act_global_pool_backward",
            "bn_act_conv3x3",
            "bn_act_conv",
            "bn_act_conv_backward",
            "bn_act_conv1x1_weight_backward",
            "bn_act_conv1x1_data_backward",
            "bn_act_conv3x3_weight_backward",
            "bn_act_conv3x3_data_backward",
            "add_act",
            "add_act_backward",
            "bn_add_act",
            "bn_add_act_backward",
        ],
    )
    def test_opcheck(self, name):
        utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(getattr(torch.ops.resdense, name).default, self.arguments(name), test_utils=utilities)

    def test_a_mutated_slice_bumps_the_version(self):
        backend = backends.get("cpu")
        x = torch.randn(2, 6, 5, 4)
        base = torch.zeros(2, 9, 5, 4)
        affine = Affine(torch.ones(6), torch.zeros(6), Activation())
        version = base._version
        backend.bn_act_conv(x, affine, Conv(torch.randn(3, 6, 1, 1)), base[:, 2:5], None, 1.0, None)
        assert base._version > version

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (dict(scale=torch.ones(5)), r"scale: expected shape \(6,\).*got \(5\)"),
            (dict(scale=torch.ones(6).double()), "scale: expected dtype float32, got float64"),
            (dict(out=torch.empty(2, 6, 5, 5)), r"out: expected shape \(2, 6, 5, 4\).*got \(2, 6, 5, 5\)"),
            (dict(out=torch.empty(2, 6, 5, 4).bfloat16()), "out: expected dtype float32, got bfloat16"),
            (dict(out=torch.empty(2, 6, 1, 1).expand(2, 6, 5, 4)), "out: expected a tensor whose elements do not overlap"),
            (dict(x=torch.empty(2, 6, 5, 4, dtype=torch.int32)), "expected dtype"),
        ],
    )
    def test_bad_arguments_are_named(self, change, message):
        arguments = dict(
            x=torch.randn(2, 6, 5, 4), scale=torch.ones(6), shift=torch.ones(6), activation=0.0,
            out=torch.empty(2, 6, 5, 4),
        )  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            torch.ops.resdense.bn_act(**{**arguments, **change})


# A long sum in float64 is no truth for one in float64: those are of few positions.
OF_MOMENTS = [(shape, torch.float32) for shape in (*SHAPES, (2, 48, (9, 15)), (0, 3, (2, 2)))]
OF_MOMENTS += [(shape, torch.float64) for shape in SHAPES[:5]]


@built
@pytest.mark.parametrize("activation", ACTIVATIONS[:2], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("shape", "dtype"), OF_MOMENTS, ids=str)
class TestMoments:
    """What is known of a 1x1 convolution without its output: `resdense_ext.ops.conv1x1_bn_add_act`."""

    beside_grad = (2, 1), (0, 0)
    """What else is in the buffer: in either layout."""

    def maps(self, shape, dtype, channels_last, outputs=32):
        n, channels, sizes = shape
        x, g = (torch.randn(n, c, *sizes).to(dtype) for c in (channels, outputs))
        return x, g, buffer_slice(x, channels_last)[0], buffer_slice(g, channels_last, *self.beside_grad[channels_last])[0]

    def test_moments(self, shape, dtype, channels_last, activation):
        x, g, source, grad = self.maps(shape, dtype, channels_last)
        scale, shift = vectors(x.shape[1], dtype, 2)
        a = reference.apply_pending(x, scale, shift, activation).transpose(0, 1).flatten(1)
        near = (a.mean(1) + 0.3 * a.std(1).nan_to_num()).to(stats_dtype(dtype))

        def plain(t):
            a = reference.apply_pending(t["x"], t["scale"], t["shift"], activation).transpose(0, 1).flatten(1)
            g = t["g"].transpose(0, 1).flatten(1)
            b = a - a.mean(1, keepdim=True)
            return a.mean(1), b @ b.T, g.sum(1), g @ b.T

        rest, products, sums, of_grad = backends.get("cpu").moments(source, Affine(scale, shift, activation), near, grad)
        assert rest.dtype == sums.dtype == torch.float64
        if not shape[0]:
            assert rest.isnan().all() and not sums.any()
            return
        assert products.dtype == of_grad.dtype == near.dtype and torch.equal(products, products.T)
        inputs = {"x": x, "g": g, "scale": scale, "shift": shift}
        close([(near + rest).to(dtype), products, sums.to(dtype), of_grad], plain, inputs, dtype)

    @pytest.mark.parametrize("accumulate", [False, True])
    def test_moments_backward(self, shape, dtype, channels_last, activation, accumulate):
        x, g, source, grad = self.maps(shape, dtype, channels_last)
        channels = x.shape[1]
        d = torch.randn_like(x)
        out, untouched = buffer_slice(d, channels_last)
        names = ("scale", "shift", "center", "near", "offset")
        params = dict(zip(names, vectors(channels, dtype, 5)))
        params.update(weight=torch.randn(32, channels).to(dtype), products=torch.randn(channels, channels).to(dtype))

        def plain(t):
            after = reference.apply_pending(t["x"], t["scale"], t["shift"], Activation("identity"))
            per = lambda name: reference.per_channel(t[name], t["x"])  # noqa: E731
            b = (reference.activate(after, activation) - per("near")).to(t["x"])
            da = torch.einsum("nk...,kc->nc...", t["g"], t["weight"]) + torch.einsum("nk...,kc->nc...", b, t["products"])
            dy = (da + per("offset")) * reference.activation_slope(after, activation)
            sums = [v.sum([i for i in range(v.dim()) if i != 1]) for v in (dy, dy * (t["x"] - per("center")))]
            return [(t["d"] + per("scale") * dy if accumulate else dy).to(t["x"]), *sums]

        fold = Fold(Affine(params["scale"], params["shift"], activation), params["center"], None, 1)
        matrices = params["weight"], params["products"], params["near"], params["offset"]
        version = out._version
        sums = backends.get("cpu").moments_backward(source, fold, grad, *matrices, out, accumulate)
        untouched()
        assert out._version > version
        close([out, *sums], plain, {"x": x, "g": g, "d": d, **params}, dtype)


OF_PAIRS = [(2, 48, (9, 15)), (1, 16, (7, 1)), (3, 160, (1, 1)), (2, 32, (5, 4, 3)), (5, 64, (37, 29))]


@multiplies_bfloat16
@pytest.mark.parametrize("activation", ACTIVATIONS[:2], ids=str)
@pytest.mark.parametrize("beside_grad", [(0, 0), (2, 2), (1, 1), (2, 1)], ids=str)
@pytest.mark.parametrize("shape", OF_PAIRS, ids=str)
class TestMomentsOfPairs:
    """The same of bfloat16, by pairs of channels that lie as such or do not."""

    def cases(self, beside_grad):
        cases = TestMoments()
        cases.beside_grad = (None, beside_grad)
        return cases

    def test_moments(self, shape, beside_grad, activation):
        self.cases(beside_grad).test_moments(shape, torch.bfloat16, True, activation)

    @pytest.mark.parametrize("accumulate", [False, True])
    def test_moments_backward(self, shape, beside_grad, activation, accumulate):
        self.cases(beside_grad).test_moments_backward(shape, torch.bfloat16, True, activation, accumulate)


@built
@pytest.mark.parametrize(
    ("channels", "outputs", "layout"), [(8, 32, last_format), (16, 31, last_format), (16, 32, torch.Tensor.contiguous)]
)
def test_moments_of_what_is_no_pairs(channels, outputs, layout):
    x, g = (layout(torch.randn(2, c, 3, 3).bfloat16()) for c in (channels, outputs))
    backend, vector = backends.get("cpu"), torch.zeros(channels)
    assert not backend.fuses_moments(x, Conv(torch.zeros(outputs, channels, 1, 1).bfloat16()), Activation())
    with pytest.raises(RuntimeError, match=f"x: expected .* bfloat16, got {channels} channels of bfloat16 and {outputs} outputs"):
        backend.moments(x, Affine(vector, vector, Activation()), vector, g)


@built
@pytest.mark.parametrize("need_weight", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), [(3, 5), (64, 16), (48, 144), (20, 130), (256, 64)])
def test_moments_terms(outputs, inputs, dtype, need_weight):
    """What follows from `moments`: the backward of `resdense_ext.ops.conv1x1_bn_add_act`, in its words."""
    M, wide = 500, stats_dtype(dtype)
    b, weight, G = (torch.randn(*size, dtype=wide) for size in ((M, inputs), (outputs, inputs), (outputs, inputs)))
    weight = weight.to(dtype)
    scale, rstd = vectors(outputs, dtype, 2)
    rest, dbeta = torch.randn(inputs, dtype=torch.float64), torch.randn(outputs, dtype=torch.float64)

    def plain(t):
        R, s, r = t["b"].T @ t["b"], t["scale"][:, None], t["rstd"][:, None]
        W = t["weight"].to(R)
        dgamma = r * (W * t["G"]).sum(1, keepdim=True)
        Q = s * r * dgamma / M
        scaled, products = (matrix.to(t["weight"]) for matrix in (s * W, -W.T @ (Q * W)))
        offset = -(dbeta.to(R) / M) @ scaled.to(R) - rest.to(R) @ products.to(R)
        dW = [(s * t["G"] - Q * (W @ R)).to(t["weight"])] if need_weight else []
        return [dgamma.flatten(), *dW, scaled, products, offset]

    fold = Fold(Affine(scale, torch.zeros_like(scale), Activation("identity")), torch.zeros_like(scale), rstd, M)
    dgamma, dW, *terms = backends.get("cpu").terms_of_moments(rest, b.T @ b, dbeta, G, weight, fold, need_weight)
    assert torch.equal(terms[1], terms[1].T)
    assert need_weight or not dW.numel()
    found = [dgamma, *([dW] if need_weight else []), *terms]
    assert [t.dtype for t in terms] == [dtype, dtype, wide]
    close(found, plain, {"b": b, "weight": weight, "G": G, "scale": scale, "rstd": rstd}, dtype)


@built
@pytest.mark.parametrize("capability", ["avx512", "avx2", "default"])
def test_narrower_instruction_sets(capability):
    """The kernels for processors with less, on this one."""
    code = "import sys, resdense_ext; print(resdense_ext.build_info()['cpu_capability'])"
    environment = {**os.environ, "RESDENSE_CPU_CAPABILITY": capability}
    run = partial(subprocess.run, cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True)
    chosen = run([sys.executable, "-c", code]).stdout.strip()
    if chosen == rd.build_info()["cpu_capability"]:
        pytest.skip(f"this processor has {chosen}, which every other test runs on")
    assert chosen == capability.upper()
    wanted = "cpu and (TestElementwise or 1x1 or winograd or TestCurved) or TestMoments or moments_terms and not narrower"
    answer = run([sys.executable, "-m", "pytest", "-q", __file__, "-k", wanted])
    assert answer.returncode == 0, answer.stdout[-4000:]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [Activation(name) for name in ("relu6", "elu", "silu")], ids=str)
class TestCurvedActivations:
    """Those whose number is no slope."""

    def test_elementwise(self, backend, activation, dtype, channels_last):
        cases, x = TestElementwise(), torch.zeros(1, 1, 1, dtype=dtype)
        assert backend.name == "reference" or backends.choose(x, dtype) is backend
        assert activation_numbered(number_of(activation)) == activation
        for shape in (SHAPES[1], SHAPES[5]):
            cases.test_bn_act(backend, shape, dtype, channels_last, activation)
            for accumulate in (False, True):
                cases.test_bn_act_backward(backend, shape, dtype, channels_last, activation, accumulate)

    @pytest.mark.parametrize("case", ["1x1", "3x3"])
    def test_convolution(self, backend, activation, dtype, channels_last, case):
        cases = TestConvolution()
        cases.activation = activation
        cases.test_forward(backend, case, dtype, channels_last, False)
        for accumulate in (False, True):
            cases.test_backward(backend, case, dtype, channels_last, accumulate, True)

    def test_far_from_zero(self, backend, activation, dtype, channels_last):
        """Where exponentials end, and what is no number."""
        scale, shift = (torch.full((1,), v, dtype=stats_dtype(dtype)) for v in (1.0, 0.0))
        x = torch.linspace(-120, 120, 2001).to(dtype).view(1, 1, -1, 1)
        affine = Affine(scale, shift, activation)
        close([backend.bn_act(x, affine)], lambda t: [reference.activate(t["x"], activation)], {"x": x}, dtype)
        dy = torch.ones_like(x)
        backend.bn_act_backward(dy, x, affine, shift)
        close([dy], lambda t: [reference.activation_slope(t["x"], activation)], {"x": x}, dtype)
        ends = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0], dtype=dtype).view(1, 1, -1)
        assert torch.equal(backend.bn_act(ends, affine).nan_to_num(7, 8, 9), reference.activate(ends, activation).nan_to_num(7, 8, 9))


@pytest.mark.parametrize("name", ["relu", "relu6", "leaky_relu", "elu", "silu", "identity"])
def test_slopes_of_activations(name):
    """At the input and, where that tells, at the output; torch's at the kinks, too."""
    activation = Activation(name, 0.2)
    y = torch.linspace(-9, 9, 37, dtype=torch.float64, requires_grad=True)
    out = reference.activate(y, activation)
    (expected,) = torch.autograd.grad(out.sum(), y)
    y, mark = y.detach(), out.detach() if reference.determined(activation) else y.detach()
    slopes = reference.activation_slope(y, activation), reference.marked_slope(mark, activation)
    for slope in (*slopes, activation_backward(torch.ones_like(y), mark, activation)):
        assert (slope - expected).abs().max() <= 4 * torch.finfo(torch.float64).eps


class TestBackendChoice:
    def test_a_wrong_name_is_refused(self):
        with pytest.raises(ValueError, match="name: expected one of reference, cpu, cuda, triton, got 'gpu'"):
            with backends.use_backend("gpu"):
                pass

    def test_the_environment_decides(self, monkeypatch):
        monkeypatch.setenv("RESDENSE_BACKEND", "reference")
        assert backends.choose(torch.zeros(1, 1, 1), torch.float32).name == "reference"
        monkeypatch.setenv("RESDENSE_BACKEND", "fpga")
        with pytest.raises(ValueError, match="RESDENSE_BACKEND: expected one of"):
            backends.choose(torch.zeros(1, 1, 1), torch.float32)

    def test_a_missing_backend_says_so(self, monkeypatch):
        monkeypatch.delitem(backends._backends, "triton")
        with backends.use_backend("triton"), pytest.raises(RuntimeError, match="'triton' was asked for"):
            backends.choose(torch.zeros(1, 1, 1), torch.float32)

    def test_old_gpus_are_refused(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        refusal = architecture_refusal(torch.device("cuda:1"))
        assert refusal == "cuda:1 is sm_75, and the kernels are for sm_80 and later"

    @built
    @pytest.mark.parametrize(
        ("x", "compute", "reason"),
        [
            (torch.zeros(1, 1, 1, device="meta"), torch.float32, "on meta"),
            (torch.zeros(1, 1, 1), torch.bfloat16, "compute in torch.bfloat16"),
        ],
    )
    def test_what_the_cpu_backend_refuses_goes_to_the_reference(self, x, compute, reason):
        assert reason in backends.get("cpu").refusal(x, compute)
        assert backends.choose(x, compute).name == "reference"

    @pytest.mark.parametrize(
        ("dtype", "compute", "reason"),
        [
            (torch.float32, torch.float32, None),
            (torch.float32, torch.bfloat16, None),
            (torch.float64, torch.float64, None),
            (torch.float32, torch.float64, "is torch.float32 and the convolutions compute in torch.float64"),
            (torch.complex64, torch.complex64, "the input is torch.complex64"),
        ],
    )
    def test_what_the_cuda_backend_refuses(self, monkeypatch, dtype, compute, reason):
        cuda = backends.get("cuda")
        with FakeTensorMode():
            x = torch.empty(1, 1, 1, dtype=dtype, device="cuda")
        monkeypatch.setattr(_library, "CUDA_LIBRARY", None)
        monkeypatch.setattr("resdense_ext.ops.cuda.architecture_refusal", lambda device: None)
        refusal = cuda.refusal(x, compute)
        assert refusal is None if reason is None else reason in refusal
        assert cuda.refusal(torch.zeros(1, 1, 1), compute) == "the input is on cpu"
        monkeypatch.setattr(_library, "CUDA_LIBRARY", "not built")
        assert cuda.refusal(x, compute) == "the CUDA library is not loaded: not built"
