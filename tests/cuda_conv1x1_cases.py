"""Checks of the CUDA 1x1 convolution whose input is activated in registers, run as those of cuda_cases.py."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from cuda_cases import SILU, make
from cuda_conv_cases import ACTIVATIONS, SLOPES, assert_convolved, configure, written
from torch import Tensor

from resdense_ext import reference
from resdense_ext.reference import Activation


class Case(NamedTuple):
    """``multiprocessors`` is how large the shim's device is: small tiles are for what large ones would not fill."""

    shape: tuple[int, ...]
    outputs: int
    multiprocessors: int


SMALL_TILES, LARGE_TILES = 64, 1
CASES = (
    Case((1, 8, 1, 1), 8, SMALL_TILES),
    Case((2, 64, 4, 8), 64, SMALL_TILES),  # one tile, one chunk, no output too many
    Case((5, 136, 13), 72, SMALL_TILES),  # tiles across samples, a chunk cut off
    Case((3, 328, 3, 2, 1), 192, SMALL_TILES),  # more chunks than have a place
    Case((190, 40), 160, 2),  # small tiles, several of one block
    Case((3, 24, 9, 10), 64, LARGE_TILES),  # tiles of one block, each of one chunk
    Case((2, 200, 9, 15), 104, LARGE_TILES),  # several chunks, across tiles
    Case((9, 72, 5, 5), 136, LARGE_TILES),
)
# What takes the shim too long.
GPU_CASES = (
    Case((12, 64, 56, 56), 128, 0),
    Case((32, 1000, 7, 7), 128, 0),
    Case((24, 480, 28, 28), 192, 0),
    Case((33, 264, 31, 29), 48, 0),
    Case((64, 640, 14, 14), 128, 0),
    Case((3, 2208, 7, 7), 192, 0),
)


def tensors(case: Case, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """The input is a slice of a buffer that is NaN elsewhere."""
    channels = case.shape[1]
    generator = torch.Generator().manual_seed(1)
    scale, shift = torch.randn(2, channels, generator=generator).to(device)
    weight = torch.randn(case.outputs, channels, generator=generator) / math.sqrt(channels)
    x = make(case.shape, dtype, "channels_last_slice", device)
    return {"x": x, "scale": scale, "shift": shift, "weight": weight.to(device, dtype)}


def convolved(ops, inputs: dict[str, Tensor], activation: Activation, stats: bool = True) -> tuple[Tensor, ...]:
    operands = (inputs["x"], inputs["scale"], inputs["shift"], SLOPES[activation.name], inputs["weight"], None)
    return written(inputs["x"], len(inputs["weight"]), lambda *to: ops.bn_act_conv1x1(*operands, *to), stats)


def product(activated: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("nc...,kc->nk...", activated, weight)


def assert_right(inputs: dict[str, Tensor], activation: Activation, *found: Tensor) -> None:
    assert_convolved(product, inputs, activation, *found)


def check_bn_act_conv1x1(ops, device: str) -> None:
    for i, case in enumerate(CASES + (GPU_CASES if device == "cuda" else ())):
        configure(ops, case.multiprocessors)
        dtype = (torch.bfloat16, torch.float16)[i % 2]
        activation = ACTIVATIONS[i % 3]
        inputs = tensors(case, dtype, device)
        assert_right(inputs, activation, *convolved(ops, inputs, activation))


def check_bn_act_conv1x1_without_stats(ops, device: str) -> None:
    configure(ops, SMALL_TILES)
    inputs = tensors(CASES[1], torch.bfloat16, device)
    out, *_ = convolved(ops, inputs, ACTIVATIONS[0])
    other, *_ = convolved(ops, inputs, ACTIVATIONS[0], stats=False)
    assert torch.equal(out, other)


def check_bn_act_conv1x1_folds(ops, device: str) -> None:
    """The norm that reads what is written, as `bn_fold` does."""
    for case in (CASES[0], CASES[2], CASES[6]):
        configure(ops, case.multiprocessors)
        inputs = tensors(case, torch.bfloat16, device)
        weight, bias = torch.randn(2, case.outputs + 1, generator=torch.Generator().manual_seed(3)).to(device)[:, 1:]
        for reader in ((weight, bias), (None, bias), (weight, None)):
            folded = []

            def write(*to, reader=reader, inputs=inputs, folded=folded):
                vectors = inputs["scale"], inputs["shift"]
                folded += ops.bn_act_conv1x1(inputs["x"], *vectors, 0.0, inputs["weight"], None, *to, 1e-3, *reader)

            out, *stats = written(inputs["x"], case.outputs, write, True)
            expected = ops.bn_fold(*stats, out.numel() // case.outputs, 1e-3, *reader)
            assert all(torch.equal(a, b) for a, b in zip(folded, expected, strict=True)), (case, reader)


def check_bn_act_conv1x1_repeats(ops, device: str) -> None:
    """Bitwise, whatever order the threads run in."""
    for case in (CASES[2], CASES[6]):
        inputs = tensors(case, torch.bfloat16, device)
        results = []
        for order in (0, 1, 2) if case.multiprocessors == SMALL_TILES else (1, 3):
            configure(ops, case.multiprocessors, order)
            results.append(convolved(ops, inputs, ACTIVATIONS[0]))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def check_bn_act_conv1x1_strides(ops, device: str) -> None:
    """Weights in any order, and vectors at any address."""
    configure(ops, SMALL_TILES)
    inputs = tensors(CASES[2], torch.bfloat16, device)
    expected = convolved(ops, inputs, ACTIVATIONS[1])
    for name in ("scale", "shift"):
        inputs[name] = torch.cat((inputs[name][:1], inputs[name]))[1:]
    weight = inputs["weight"]
    for other in (weight.t().contiguous().t(), torch.cat((weight.flatten()[:1], weight.flatten()))[1:].view_as(weight)):
        found = convolved(ops, {**inputs, "weight": other}, ACTIVATIONS[1])
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


def check_bn_act_conv1x1_far_mean(ops, device: str) -> None:
    """A mean of many deviations: a copy of a map of values around 1000, its smallest steps apart."""
    for multiprocessors in (SMALL_TILES, LARGE_TILES):
        configure(ops, multiprocessors)
        inputs = tensors(Case((3, 8, 11, 10), 8, multiprocessors), torch.float16, device)
        steps = torch.arange(3 * 8 * 11 * 10, device=device).view(3, 8, 11, 10) % 7
        inputs["x"].copy_(1000 + 0.5 * (steps % 3 == 0) + 0.5 * (steps > 4))
        inputs["scale"].fill_(1)
        inputs["shift"].zero_()
        inputs["weight"].copy_(torch.eye(8))
        out, mean, m2 = convolved(ops, inputs, ACTIVATIONS[0])
        assert torch.equal(out, inputs["x"])
        values = out.double().transpose(0, 1).flatten(1)
        assert bool((values.mean(1) > 1000 * values.std(1)).all())
        assert_right(inputs, ACTIVATIONS[0], out, mean, m2)


def check_bn_act_conv1x1_special_values(ops, device: str) -> None:
    """NaN and infinity reach their own position and no other, as in torch."""
    configure(ops, SMALL_TILES)
    for dtype in (torch.bfloat16, torch.float16):
        inputs = tensors(Case((2, 16, 7, 9), 8, SMALL_TILES), dtype, device)
        inputs["scale"].fill_(1)
        inputs["weight"].abs_()
        x = inputs["x"]
        x[0, 3, 0, 0], x[0, 5, 4, 4], x[0, 7, 6, 8], x[1, 0, 5, 4] = math.nan, math.inf, -math.inf, math.inf
        x[1, :, 6, 8] = -math.inf
        for activation in (Activation("relu"), Activation("leaky_relu", 0.2), Activation("identity")):
            out, *_ = convolved(ops, inputs, activation)
            activated = reference.apply_pending(x, inputs["scale"], inputs["shift"], activation)
            stock = product(activated.double(), inputs["weight"].double())
            for kind in (torch.isnan, torch.isposinf, torch.isneginf):
                assert torch.equal(kind(out), kind(stock)), (dtype, activation, kind)
            assert bool(stock.isnan().any()) and bool(stock.isinf().any()) and bool(stock.isfinite().any())


def check_bn_act_conv1x1_empty(ops, device: str) -> None:
    for shape in ((0, 16, 4, 4), (2, 16, 0)):
        inputs = tensors(Case(shape, 8, SMALL_TILES), torch.bfloat16, device)
        out = torch.empty(shape[0], 8, *shape[2:], dtype=torch.bfloat16, device=device)
        vectors = inputs["scale"], inputs["shift"]
        mean, m2 = torch.ones(2, 8, device=device)
        folded = ops.bn_act_conv1x1(inputs["x"], *vectors, 0.0, inputs["weight"], None, out, mean, m2, 1e-5)
        assert bool(mean.isnan().all()) and not m2.any()
        assert all(bool(v.isnan().all()) for v in folded)


def check_bn_act_conv1x1_errors(ops, device: str) -> None:
    def last(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)

    right = {"x": last(2, 16, 5, 6), "weight": last(8, 16, 1, 1).flatten(1), "bias": None, "out": last(2, 8, 5, 6)}
    vector = torch.zeros(16, device=device)
    for message, change in (
        (r"x: expected dtype bfloat16 or float16, got float32", {"x": right["x"].float()}),
        (r"x: expected a multiple of 8 channels, at most 65536, got 12", {"x": last(2, 12, 5, 6)}),
        (r"x: expected channels_last, .* 16 bytes, got strides \(480, 30, 6, 1\)", {"x": right["x"].contiguous()}),
        (r"x: expected channels_last, .* got strides \(600, 1, 120, 20\)$", {"x": last(2, 20, 5, 6)[:, :16]}),
        (r"x: expected channels_last, .* at an address that is not aligned", {"x": last(2, 24, 5, 6)[:, 4:20]}),
        (r"x: expected one stride .* across samples, .* \(960, 1, 96, 16\)", {"x": last(4, 16, 5, 6)[::2]}),
        (r"x: expected spatial positions with one stride", {"x": last(2, 16, 5, 7)[..., :6]}),
        (r"out: expected dtype bfloat16, got float16", {"out": right["out"].half()}),
        (r"out: expected the samples and positions of x, .* got shape \(2, 8, 6, 6\)", {"out": last(2, 8, 6, 6)}),
        (r"out: expected a multiple of 8 channels, at most 192, got 200", {"out": last(2, 200, 5, 6)}),
        (r"out: expected channels_last", {"out": right["out"].contiguous()}),
        (r"out: expected one stride from position to position across samples", {"out": last(4, 8, 5, 6)[::2]}),
        (r"out: expected a tensor whose elements do not overlap", {"out": right["out"][:1].expand(2, -1, -1, -1)}),
        (r"weight: expected shape \(8, 16\), got \(8, 16, 1, 1\)", {"weight": last(8, 16, 1, 1)}),
        (r"weight: expected dtype bfloat16, got float32", {"weight": right["weight"].float()}),
        (r"bias: expected none, .* got shape \(8\)", {"bias": vector[:8]}),
        (r"scale: expected shape \(16,\), one value a channel of x, got \(8\)", {"scale": vector[:8]}),
        (r"shift: expected dtype float32, got float64", {"shift": vector.double()}),
        (r"mean: expected shape \(8,\), one value a channel of out, got \(16\)", {"mean": vector}),
        (r"m2: expected to be given where mean is, and only there", {"m2": None}),
        (r"eps: expected only with the statistics of what the norm reads", {"mean": None, "m2": None}),
        (r"reader_weight: expected shape \(8,\), one value a channel of out, got \(16\)", {"reader_weight": vector}),
        (r"reader_bias: expected dtype float32, got float64", {"reader_bias": vector[:8].double()}),
        (r"activation: expected the slope of what is negative, got", {"activation": SILU}),
    ):
        given = {**right, "activation": 0.0, "scale": vector, "shift": vector, "mean": vector[:8], "m2": vector[8:], **change}
        before = given["out"].clone()
        with pytest.raises(RuntimeError, match=message):
            vectors = given["scale"], given["shift"]
            stats, reader = (given["mean"], given["m2"]), (1e-5, given.get("reader_weight"), given.get("reader_bias"))
            ops.bn_act_conv1x1(given["x"], *vectors, given["activation"], given["weight"], given["bias"], given["out"], *stats, *reader)
        assert torch.equal(given["out"], before)


CHECKS = (
    check_bn_act_conv1x1,
    check_bn_act_conv1x1_without_stats,
    check_bn_act_conv1x1_folds,
    check_bn_act_conv1x1_repeats,
    check_bn_act_conv1x1_strides,
    check_bn_act_conv1x1_far_mean,
    check_bn_act_conv1x1_special_values,
    check_bn_act_conv1x1_empty,
    check_bn_act_conv1x1_errors,
)
