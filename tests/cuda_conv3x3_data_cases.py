"""Checks of the CUDA data gradient of a 3x3 convolution behind norm and activation, run as those of cuda_cases.py."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from cuda_cases import SILU, assert_nan_around, make
from cuda_conv1x1_data_cases import (
    Tensors,
    assert_adds_up,
    assert_corrects,
    assert_gradient,
    assert_parts_errors,
    gradient_by,
    masked,
    split,
)
from cuda_conv_cases import ACTIVATIONS, SLOPES, configure
from torch import Tensor

from resdense_ext.reference import Activation


class Case(NamedTuple):
    """``multiprocessors`` is how large the shim's device is: of few tiles the channels are shared out, too."""

    shape: tuple[int, int, int, int]
    outputs: int
    accumulate: bool
    multiprocessors: int


CASES = (
    Case((1, 8, 1, 1), 8, False, 64),
    Case((2, 40, 5, 3), 24, True, 64),  # a block for every 32 channels, the last of which are cut off
    Case((5, 72, 7, 7), 32, False, 1),  # tiles across samples, the last of which overhangs
    Case((2, 136, 7, 5), 16, True, 1),  # two blocks side by side, one with a warp too many
    Case((2, 64, 9, 37), 8, True, 1),  # tiles side by side, of which two warps have the positions in turn
    Case((60, 8, 4, 3), 32, False, 1),  # four warps have the positions in turn
    Case((1, 8, 3300, 1), 8, True, 1),  # more tiles than a lane adds up
    Case((1, 96, 3, 33), 24, False, 2),
    Case((1, 256, 4, 5), 32, True, 1),
)
# What takes the shim too long.
GPU_CASES = (
    Case((16, 128, 56, 56), 32, False, 0),
    Case((33, 128, 7, 7), 32, False, 0),
    Case((40, 128, 14, 14), 32, True, 0),
    Case((24, 192, 28, 28), 24, True, 0),
    Case((9, 256, 33, 65), 16, False, 0),
    Case((1, 64, 130, 257), 32, True, 0),
)


def tensors(case: Case, dtype: torch.dtype, device: str) -> Tensors:
    """Slices of buffers that are NaN elsewhere, of different strides; but for x they leave out every other sample."""
    (n, channels, height, width), outputs = case.shape, case.outputs
    generator = torch.Generator().manual_seed(1)
    scale, shift, center = torch.randn(3, channels + 1, generator=generator).to(device)[:, 1:]  # not aligned
    weight = (torch.randn(outputs, channels, 3, 3, generator=generator) / math.sqrt(9 * outputs)).to(device, dtype)

    def every_other(channels: int, extra: int, seed: int) -> Tensor:
        whole = torch.full((2 * n, height, width, channels + extra), math.nan, dtype=dtype, device=device)
        part = whole.movedim(-1, 1)[1::2, :channels]
        return part.copy_(make((n, channels, height, width), dtype, "contiguous", device, seed))

    x = make(case.shape, dtype, "channels_last_slice", device)
    grad, out = every_other(outputs, 16, 2), every_other(channels, 8, 3)
    return {"grad": grad, "x": x, "out": out, "scale": scale, "shift": shift, "center": center, "weight": weight}


def gradient(ops, inputs: Tensors, slope: float, accumulate: bool) -> Tensors:
    return gradient_by(ops.bn_act_conv3x3_data_backward, inputs, slope, accumulate)


def expected(maps: Tensors, params: Tensors, activation: Activation, accumulate: bool) -> Tensors:
    product = torch.nn.functional.conv_transpose2d(maps["grad"], params["weight"], padding=1)
    return masked(product, maps, params, activation, accumulate)


def check_bn_act_conv3x3_data_backward(ops, device: str) -> None:
    for i, case in enumerate(CASES + (GPU_CASES if device == "cuda" else ())):
        configure(ops, case.multiprocessors)
        dtype, activation = (torch.bfloat16, torch.float16)[i // 2 % 2], ACTIVATIONS[i % 3]
        inputs = tensors(case, dtype, device)
        if i % 3:  # channels-last, or not aligned
            apart = torch.empty(inputs["weight"].numel() + 1, dtype=dtype, device=device)[1:].view(case.outputs, 3, 3, -1)
            weight = inputs["weight"].contiguous(memory_format=torch.channels_last)
            inputs["weight"] = weight if i % 3 == 1 else apart.movedim(-1, 1).copy_(weight)
        maps, params = split(inputs)

        def run(maps, params, activation=activation, accumulate=case.accumulate):
            return expected(maps, params, activation, accumulate)

        ours = gradient(ops, inputs, SLOPES[activation.name], case.accumulate)
        assert_nan_around(inputs["out"], case)
        assert_gradient(ours, run, maps, params)


def check_bn_act_conv3x3_data_backward_corrects(ops, device: str) -> None:
    for case in (CASES[0], CASES[1], CASES[2], CASES[5]):  # of one chunk, of few, and of many
        configure(ops, case.multiprocessors)
        inputs = tensors(case, torch.bfloat16, device)
        assert_corrects(ops, ops.bn_act_conv3x3_data_backward, inputs, case.accumulate)


def check_bn_act_conv3x3_data_backward_adds_up(ops, device: str) -> None:
    for order in (0, 3):
        configure(ops, CASES[1].multiprocessors, order)
        assert_adds_up(ops.bn_act_conv3x3_data_backward, tensors(CASES[1], torch.float16, device), CASES[1].accumulate)


def check_bn_act_conv3x3_data_backward_repeats(ops, device: str) -> None:
    """Bitwise, whatever order the threads run in."""
    for case in (CASES[1], CASES[3], CASES[5]):
        results = []
        for order in (0, 1, 2, 3):
            configure(ops, case.multiprocessors, order)
            results.append(gradient(ops, tensors(case, torch.bfloat16, device), 0.0, case.accumulate))
        for other in results[1:]:
            assert all(torch.equal(other[name], t) for name, t in results[0].items())


def check_bn_act_conv3x3_data_backward_special_values(ops, device: str) -> None:
    """NaN and infinity reach the positions around them and no others, as in torch."""
    for accumulate, activation in ((True, ACTIVATIONS[0]), (False, ACTIVATIONS[2])):
        configure(ops, 64)
        inputs = tensors(Case((2, 16, 9, 9), 24, accumulate, 64), torch.float16, device)
        inputs["scale"].fill_(1)
        for name in ("grad", "weight"):
            inputs[name].abs_()
        x, grad = inputs["x"], inputs["grad"]
        x[0, 3, 0, 0], x[0, 5, 1, 4], x[1, 7, 2, 6] = math.nan, math.inf, -math.inf
        grad[0, 2, 0, 1], grad[0, 3, 8, 8], grad[1, 4, 4, 0] = math.nan, math.inf, -math.inf
        inputs["center"][11] = math.inf
        truth = expected(*({k: t.double() for k, t in part.items()} for part in split(inputs)), activation, accumulate)
        ours = gradient(ops, inputs, SLOPES[activation.name], accumulate)
        for name, stock in truth.items():
            for kind in (torch.isnan, torch.isposinf, torch.isneginf):
                assert torch.equal(kind(ours[name]).cpu(), kind(stock)), (activation, name, kind)
        assert bool(truth["out"].isnan().any() and truth["out"].isfinite().any())
        assert bool(truth["out"].isposinf().any() and truth["out"].isneginf().any())


def check_bn_act_conv3x3_data_backward_empty(ops, device: str) -> None:
    for shape in ((0, 16, 4, 4), (2, 16, 0, 4)):
        inputs = tensors(Case(shape, 8, True, 1), torch.bfloat16, device)
        results = gradient(ops, inputs, 0.0, True)
        assert all(torch.equal(results[name], torch.zeros(16, device=device)) for name in ("sum_dy", "sum_dy_xc"))
        for accumulate in (True, False):
            assert_corrects(ops, ops.bn_act_conv3x3_data_backward, inputs, accumulate)
            assert_adds_up(ops.bn_act_conv3x3_data_backward, inputs, accumulate)


def check_bn_act_conv3x3_data_backward_errors(ops, device: str) -> None:
    def last(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)

    weight, vector = last(8, 16, 3, 3), torch.zeros(16, device=device)
    right = {"grad": last(2, 8, 5, 6), "x": last(2, 16, 5, 6), "out": last(2, 16, 5, 6), "weight": weight}
    rows = r"expected channels_last, the channels of every position aligned to 16 bytes, got strides"
    for message, change in (
        (r"x: expected dtype bfloat16 or float16, got float32", {"x": right["x"].float()}),
        (r"x: expected shape \(N, C, H, W\), got \(2, 16, 5\)", {"x": right["x"][..., 0]}),
        (r"x: expected a multiple of 8 channels, at most 256, got 12", {"x": last(2, 12, 5, 6)}),
        (r"x: expected a multiple of 8 channels, at most 256, got 264", {"x": last(2, 264, 5, 6)}),
        (r"x: expected spatial positions with one stride", {"x": last(2, 16, 5, 7)[..., :6]}),
        (rf"x: {rows} \(480, 30, 6, 1\)$", {"x": right["x"].contiguous()}),
        (rf"x: {rows} \(600, 1, 120, 20\)$", {"x": last(2, 20, 5, 6)[:, :16]}),
        (rf"x: {rows} .* at an address that is not aligned", {"x": last(2, 24, 5, 6)[:, 4:20]}),
        (r"grad: expected dtype bfloat16, got float16", {"grad": right["grad"].half()}),
        (r"grad: expected the samples and positions of x, .* got shape \(2, 8, 6, 5\)", {"grad": last(2, 8, 6, 5)}),
        (r"grad: expected a multiple of 8 channels, at most 32, got 40", {"grad": last(2, 40, 5, 6)}),
        (r"grad: expected a multiple of 8 channels, at most 32, got 4", {"grad": last(2, 4, 5, 6)}),
        (rf"grad: {rows}", {"grad": right["grad"].contiguous()}),
        (r"out: expected shape \(2, 16, 5, 6\) \(that of x\), got \(2, 24, 5, 6\)", {"out": last(2, 24, 5, 6)}),
        (rf"out: {rows}", {"out": right["out"].contiguous()}),
        (r"out: expected a tensor whose elements do not overlap", {"out": right["out"][:1].expand(2, -1, -1, -1)}),
        (r"weight: expected shape \(8, 16, 3, 3\), got \(16, 8, 3, 3\)", {"weight": last(16, 8, 3, 3)}),
        (r"weight: expected shape \(8, 16, 3, 3\), got \(8, 16, 1, 1\)", {"weight": weight[..., :1, :1]}),
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
    assert_parts_errors(ops.bn_act_conv3x3_data_backward, {**right, "scale": vector, "shift": vector, "center": vector})


CHECKS = (
    check_bn_act_conv3x3_data_backward,
    check_bn_act_conv3x3_data_backward_corrects,
    check_bn_act_conv3x3_data_backward_adds_up,
    check_bn_act_conv3x3_data_backward_repeats,
    check_bn_act_conv3x3_data_backward_special_values,
    check_bn_act_conv3x3_data_backward_empty,
    check_bn_act_conv3x3_data_backward_errors,
)
