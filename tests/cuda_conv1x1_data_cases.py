"""Checks of the CUDA data gradient of a 1x1 convolution behind norm and activation, run as those of cuda_cases.py."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from cuda_cases import SILU, assert_nan_around, make
from cuda_conv_cases import ACTIVATIONS, SLOPES, configure
from tolerance import Run, assert_within_rule, torch_runs, true_run
from torch import Tensor

from resdense_ext import reference
from resdense_ext.reference import Activation, per_channel


Tensors = dict[str, Tensor]


class Case(NamedTuple):
    """``multiprocessors`` is how large the shim's device is: of few tiles the channels are shared out, too."""

    shape: tuple[int, ...]
    outputs: int
    accumulate: bool
    multiprocessors: int


CASES = (
    Case((1, 8, 1, 1), 8, False, 64),
    Case((2, 40, 5, 3), 24, True, 64),  # a block for every 32 channels, the last of which are cut off
    Case((3, 72, 7, 7), 72, False, 4),
    Case((5, 264, 7), 136, True, 1),  # two blocks side by side, one with a warp too many
    Case((37, 64), 128, True, 2),
    Case((2, 8, 33, 32), 16, True, 1),  # more tiles than a lane adds up
    Case((1, 16, 3, 5, 9), 192, False, 2),
    Case((2, 104, 9, 8), 64, True, 3),
    Case((1, 328, 4, 5), 8, False, 1),
)
# What takes the shim too long.
GPU_CASES = (
    Case((16, 256, 28, 28), 128, True, 0),
    Case((3, 1024, 7, 7), 128, True, 0),
    Case((5, 992, 14, 14), 192, False, 0),
    Case((2, 64, 112, 111), 64, True, 0),
    Case((4, 544, 27, 29), 136, True, 0),
    Case((9, 2200, 8, 8), 48, False, 0),
)


def tensors(case: Case, dtype: torch.dtype, device: str) -> Tensors:
    """Slices of buffers that are NaN elsewhere, of different row strides."""
    (n, channels, *spatial), outputs = case.shape, case.outputs
    generator = torch.Generator().manual_seed(1)
    scale, shift, center = torch.randn(3, channels + 1, generator=generator).to(device)[:, 1:]  # not aligned
    weight = (torch.randn(outputs, channels, generator=generator) / math.sqrt(outputs)).to(device, dtype)
    x = make(case.shape, dtype, "channels_last_slice", device)
    grad = make((n, outputs, *spatial), dtype, "channels_last_slice", device, seed=2)
    out = torch.full((n, *spatial, channels + 8), math.nan, dtype=dtype, device=device).movedim(-1, 1)[:, :channels]
    out.copy_(make(case.shape, dtype, "contiguous", device, seed=3))
    return {"grad": grad, "x": x, "out": out, "scale": scale, "shift": shift, "center": center, "weight": weight}


def gradient(ops, inputs: Tensors, slope: float, accumulate: bool) -> Tensors:
    return gradient_by(ops.bn_act_conv1x1_data_backward, inputs, slope, accumulate)


def gradient_by(operator, inputs: Tensors, slope: float, accumulate: bool, count: float = math.inf) -> Tensors:
    """What is written over ``inputs["out"]``, and the sums: the gradients of the norm, if its rstd is 1 as where none is given."""
    one = torch.ones_like(inputs["scale"])
    given = {"rstd": one, "beta": one.clone(), "delta": one.clone(), **inputs}
    read, vectors, into = ("grad", "x"), ("scale", "shift", "center", "rstd"), ("weight", "out", "beta", "delta")
    read, vectors, into = ((given[name] for name in names) for names in (read, vectors, into))
    dgamma, dbeta, dweight = operator(*read, *vectors, count, slope, *into, accumulate, inputs.get("parts"))
    found = {"out": inputs["out"], "sum_dy": dbeta, "sum_dy_xc": dgamma}
    return found if dweight is None else {**found, "dweight": dweight}


def expected(maps: Tensors, params: Tensors, activation: Activation, accumulate: bool) -> Tensors:
    product = torch.einsum("nk...,kc->nc...", maps["grad"], params["weight"])
    return masked(product, maps, params, activation, accumulate)


def masked(product: Tensor, maps: Tensors, params: Tensors, activation: Activation, accumulate: bool) -> Tensors:
    """What is written, and the sums, in the dtype of the maps, the vectors' where ``bn_act_backward`` has it."""
    x = maps["x"]
    scale, shift, center = (per_channel(params[name], x) for name in ("scale", "shift", "center"))
    wide, positions = x.to(scale.dtype), [d for d in range(x.dim()) if d != 1]
    product = product.to(scale.dtype)
    slopes = reference.activation_slope(scale * wide + shift, activation)
    dy = torch.where(slopes == 0, 0, product * slopes)
    out = (maps["out"] + scale * dy if accumulate else dy).to(x.dtype)
    return {"out": out, "sum_dy": dy.sum(positions), "sum_dy_xc": (dy * (wide - center)).sum(positions)}


def split(inputs: Tensors) -> tuple[Tensors, Tensors]:
    """Copies on the CPU, the maps apart."""
    copies = {name: t.cpu().clone() for name, t in inputs.items()}
    return {name: copies.pop(name) for name in ("grad", "x", "out")}, copies


def assert_gradient(ours: Tensors, run: Run, maps: Tensors, params: Tensors) -> None:
    """What was written and the sums are those of ``run``."""
    ours = {name: t.cpu() for name, t in ours.items()}
    assert ours["sum_dy"].dtype == ours["sum_dy_xc"].dtype == torch.float32
    truth, runs = true_run(run, maps, params), torch_runs(run, maps, params)
    assert_within_rule(ours, truth, runs, maps["x"].dtype)

    # The sums are of products that nothing has rounded to 16 bits.
    wide = {name: t.float() for name, t in maps.items()}
    runs = torch_runs(run, wide, {name: t.float() for name, t in params.items()})
    for results in (ours, truth, *runs):
        del results["out"]
    assert_within_rule(ours, truth, runs, torch.float32)


def assert_corrects(ops, operator, inputs: Tensors, accumulate: bool) -> None:
    """The norm's gradients and its correction are what `bn_correction` makes of the sums, and are written nowhere else."""
    sums = gradient_by(operator, inputs, 0.0, accumulate)
    channels = len(inputs["scale"])
    rstd, *start = torch.randn(3, channels, generator=torch.Generator().manual_seed(4)).abs().to(inputs["x"].device)
    for count in (70.0, math.inf):  # that of a norm whose statistics are not of the batch
        around = torch.full((2, channels + 2), math.nan, device=rstd.device)
        beta, delta = around[:, 1:-1]
        expected = [torch.full_like(rstd, math.nan) for _ in start]
        if accumulate:
            for to, other, value in zip((beta, delta), expected, start):
                to.copy_(value), other.copy_(value)
        ours = gradient_by(operator, {**inputs, "rstd": rstd, "beta": beta, "delta": delta}, 0.0, accumulate, count)
        vectors = (sums["sum_dy"], sums["sum_dy_xc"], inputs["scale"], inputs["center"], rstd, count)
        dgamma = ops.bn_correction(*vectors, *expected, accumulate)
        assert torch.equal(ours["sum_dy"], sums["sum_dy"]) and torch.equal(ours["sum_dy_xc"], dgamma)
        assert torch.equal(beta, expected[0]) and torch.equal(delta, expected[1])
        assert bool(around[:, [0, -1]].isnan().all())


def assert_adds_up(operator, inputs: Tensors, accumulate: bool) -> None:
    """What a weight gradient has left, rounded once, beside all else."""
    expected = gradient_by(operator, {**inputs, "out": inputs["out"].clone()}, 0.0, accumulate)
    weight, x = inputs["weight"].movedim(1, -1), inputs["x"]
    for splits in (0, 1, 9, 40):
        # Whole numbers, more than x's dtype has digits for.
        parts = torch.randint(-1000, 1000, (splits, *weight.shape), generator=torch.Generator().manual_seed(6)).float().to(x.device)
        ours = gradient_by(operator, {**inputs, "out": inputs["out"].clone(), "parts": parts}, 0.0, accumulate)
        dweight = ours.pop("dweight")
        assert torch.equal(dweight, parts.sum(0).to(x.dtype)) and dweight.dtype == x.dtype and dweight.is_contiguous()
        assert all(torch.equal(t, expected[name]) for name, t in ours.items())


def assert_parts_errors(operator, inputs: Tensors) -> None:
    sizes = (2, *inputs["weight"].movedim(1, -1).shape)
    parts = torch.zeros(sizes, device=inputs["x"].device)
    for message, wrong in (
        (r"parts: expected what this convolution's weight gradient has left, got shape", parts[0]),
        (r"parts: expected what this convolution's weight gradient has left, got shape", parts[..., :8]),
        (r"parts: expected what this convolution's weight gradient has left, got .* strides", torch.cat([parts, parts])[::2]),
        (r"parts: expected dtype float32, got float64", parts.double()),
    ):
        with pytest.raises(RuntimeError, match=message):
            gradient_by(operator, {**inputs, "parts": wrong}, 0.0, False)


def check_bn_act_conv1x1_data_backward_corrects(ops, device: str) -> None:
    for case in (CASES[0], CASES[1], CASES[3], CASES[5]):  # of one chunk, of few, and of many
        configure(ops, case.multiprocessors)
        inputs = tensors(case, torch.bfloat16, device)
        assert_corrects(ops, ops.bn_act_conv1x1_data_backward, inputs, case.accumulate)


def check_bn_act_conv1x1_data_backward(ops, device: str) -> None:
    for i, case in enumerate(CASES + (GPU_CASES if device == "cuda" else ())):
        configure(ops, case.multiprocessors)
        dtype, activation = (torch.bfloat16, torch.float16)[i // 2 % 2], ACTIVATIONS[i % 3]
        inputs = tensors(case, dtype, device)
        if i % 3:  # not contiguous, or not aligned
            apart = torch.empty(case.shape[1] * case.outputs + 1, dtype=dtype, device=device)[1:]
            columns, rows = apart.view(case.shape[1], -1).T, apart.view(case.outputs, -1)
            inputs["weight"] = (columns if i % 3 == 1 else rows).copy_(inputs["weight"])
        maps, params = split(inputs)

        def run(maps, params, activation=activation, accumulate=case.accumulate):
            return expected(maps, params, activation, accumulate)

        ours = gradient(ops, inputs, SLOPES[activation.name], case.accumulate)
        assert_nan_around(inputs["out"], case)
        assert_gradient(ours, run, maps, params)


def check_bn_act_conv1x1_data_backward_adds_up(ops, device: str) -> None:
    for order in (0, 3):
        configure(ops, CASES[1].multiprocessors, order)
        assert_adds_up(ops.bn_act_conv1x1_data_backward, tensors(CASES[1], torch.float16, device), CASES[1].accumulate)


def check_bn_act_conv1x1_data_backward_repeats(ops, device: str) -> None:
    """Bitwise, whatever order the threads run in."""
    for case in (CASES[1], CASES[3], CASES[4]):
        results = []
        for order in (0, 1, 2, 3):
            configure(ops, case.multiprocessors, order)
            results.append(gradient(ops, tensors(case, torch.bfloat16, device), 0.0, case.accumulate))
        for other in results[1:]:
            assert all(torch.equal(other[name], t) for name, t in results[0].items())


def check_bn_act_conv1x1_data_backward_special_values(ops, device: str) -> None:
    """NaN and infinity go where torch has them, and none comes from the positions that a tile has too many."""
    for accumulate, activation in ((True, ACTIVATIONS[0]), (False, ACTIVATIONS[2])):
        configure(ops, 64)
        inputs = tensors(Case((1, 16, 3, 7), 24, accumulate, 64), torch.float16, device)
        inputs["scale"].fill_(1)
        for name in ("grad", "weight"):
            inputs[name].abs_()
        x, grad = inputs["x"], inputs["grad"]
        x[0, 3, 0, 0], x[0, 5, 1, 4], x[0, 7, 2, 6] = math.nan, math.inf, -math.inf
        grad[0, 2, 0, 1], grad[0, 3, 1, 1], grad[0, 4, 2, 1] = math.nan, math.inf, -math.inf
        inputs["weight"][20, 9], inputs["center"][11] = math.inf, math.inf
        truth = expected(*({k: t.double() for k, t in part.items()} for part in split(inputs)), activation, accumulate)
        ours = gradient(ops, inputs, SLOPES[activation.name], accumulate)
        for name, stock in truth.items():
            for kind in (torch.isnan, torch.isposinf, torch.isneginf):
                assert torch.equal(kind(ours[name]).cpu(), kind(stock)), (activation, name, kind)
        assert bool(truth["out"].isnan().any() and truth["out"].isfinite().any())
        assert bool(truth["out"].isposinf().any() and truth["out"].isneginf().any())


def check_bn_act_conv1x1_data_backward_empty(ops, device: str) -> None:
    for shape in ((0, 16, 4, 4), (2, 16, 0, 4)):
        inputs = tensors(Case(shape, 8, True, 1), torch.bfloat16, device)
        results = gradient(ops, inputs, 0.0, True)
        assert all(torch.equal(results[name], torch.zeros(16, device=device)) for name in ("sum_dy", "sum_dy_xc"))
        for accumulate in (True, False):
            assert_corrects(ops, ops.bn_act_conv1x1_data_backward, inputs, accumulate)
            assert_adds_up(ops.bn_act_conv1x1_data_backward, inputs, accumulate)


def check_bn_act_conv1x1_data_backward_errors(ops, device: str) -> None:
    def last(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)

    weight, vector = torch.zeros(8, 16, dtype=torch.bfloat16, device=device), torch.zeros(16, device=device)
    right = {"grad": last(2, 8, 5, 6), "x": last(2, 16, 5, 6), "out": last(2, 16, 5, 6), "weight": weight}
    rows = r"expected channels_last, the channels of every position aligned to 16 bytes, got strides"
    for message, change in (
        (r"x: expected dtype bfloat16 or float16, got float32", {"x": right["x"].float()}),
        (r"x: expected a multiple of 8 channels, at most 65536, got 12", {"x": last(2, 12, 5, 6)}),
        (r"x: expected spatial positions with one stride", {"x": last(2, 16, 5, 7)[..., :6]}),
        (rf"x: {rows} \(480, 30, 6, 1\)$", {"x": right["x"].contiguous()}),
        (r"x: expected one stride .* across samples, .* strides \(960, 1, 96, 16\)$", {"x": last(4, 16, 5, 6)[::2]}),
        (rf"x: {rows} \(600, 1, 120, 20\)$", {"x": last(2, 20, 5, 6)[:, :16]}),
        (rf"x: {rows} .* at an address that is not aligned", {"x": last(2, 24, 5, 6)[:, 4:20]}),
        (r"grad: expected dtype bfloat16, got float16", {"grad": right["grad"].half()}),
        (r"grad: expected the samples and positions of x, .* got shape \(2, 8, 6, 5\)", {"grad": last(2, 8, 6, 5)}),
        (r"grad: expected the samples and positions of x, .* got shape \(60, 8\)", {"grad": weight.new_zeros(60, 8)}),
        (r"grad: expected a multiple of 8 channels, at most 192, got 200", {"grad": last(2, 200, 5, 6)}),
        (r"grad: expected a multiple of 8 channels, at most 192, got 4", {"grad": last(2, 4, 5, 6)}),
        (rf"grad: {rows}", {"grad": right["grad"].contiguous()}),
        (r"out: expected shape \(2, 16, 5, 6\) \(that of x\), got \(2, 24, 5, 6\)", {"out": last(2, 24, 5, 6)}),
        (rf"out: {rows}", {"out": right["out"].contiguous()}),
        (r"out: expected a tensor whose elements do not overlap", {"out": right["out"][:1].expand(2, -1, -1, -1)}),
        (r"weight: expected shape \(8, 16\), got \(16, 8\)", {"weight": weight.T}),
        (r"weight: expected shape \(8, 16\), got \(8, 16, 1, 1\)", {"weight": weight[..., None, None]}),
        (r"weight: expected dtype bfloat16, got float32", {"weight": weight.float()}),
        (r"scale: expected shape \(16,\), one value a channel of x, got \(8\)", {"scale": vector[:8]}),
        (r"shift: expected dtype float32, got float64", {"shift": vector.double()}),
        (r"center: expected a contiguous vector, got stride 2", {"center": vector.repeat(2)[::2]}),
        (r"rstd: expected shape \(16,\), one value a channel of x, got \(1\)", {"rstd": vector[:1]}),
        (r"beta: expected dtype float32, got float64", {"beta": vector.double()}),
        (r"delta: expected a contiguous vector, got stride 2", {"delta": vector.repeat(2)[::2]}),
        (r"activation: expected the slope of what is negative, got", {"activation": SILU}),
    ):
        given = {**right, "activation": 0.0, "scale": vector, "shift": vector, "center": vector, **change}
        before = given["out"].clone()
        with pytest.raises(RuntimeError, match=message):
            gradient(ops, given, given["activation"], False)
        assert torch.equal(given["out"], before)
    assert_parts_errors(ops.bn_act_conv1x1_data_backward, {**right, "scale": vector, "shift": vector, "center": vector})


CHECKS = (
    check_bn_act_conv1x1_data_backward,
    check_bn_act_conv1x1_data_backward_corrects,
    check_bn_act_conv1x1_data_backward_adds_up,
    check_bn_act_conv1x1_data_backward_repeats,
    check_bn_act_conv1x1_data_backward_special_values,
    check_bn_act_conv1x1_data_backward_empty,
    check_bn_act_conv1x1_data_backward_errors,
)
