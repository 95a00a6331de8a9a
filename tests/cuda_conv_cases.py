"""Checks of the CUDA convolution whose halo is activated in shared memory, run as those of cuda_cases.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Optional

import pytest
import torch
from cuda_cases import SILU, make
from tolerance import assert_within_rule, torch_runs, true_run
from torch import Tensor

from resdense_ext import reference
from resdense_ext.reference import Activation, Conv

ACTIVATIONS = (Activation("relu"), Activation("leaky_relu", 0.2), Activation("identity"))
SLOPES = {"relu": 0.0, "leaky_relu": 0.2, "identity": 1.0}


class Case(NamedTuple):
    """``multiprocessors`` and ``shared_memory``, in KiB a multiprocessor, are how large the shim's device is: small tiles are for
    those that large ones would not fill."""

    shape: tuple[int, int, int, int]
    outputs: int
    multiprocessors: int
    shared_memory: int = 100


SMALL_TILES, LARGE_TILES = 64, 1
CASES = (
    Case((1, 16, 1, 1), 8, SMALL_TILES),
    Case((2, 32, 5, 3), 16, SMALL_TILES),
    Case((3, 48, 7, 7), 32, SMALL_TILES),  # half a chunk of channels, tiles across samples
    Case((1, 8, 1, 19), 40, SMALL_TILES),
    Case((2, 24, 11, 9), 48, 4),  # several tiles
    Case((1, 104, 6, 5), 64, SMALL_TILES),  # weights a chunk ahead of the products, a chunk cut off
    Case((5, 96, 9, 9), 16, 3),  # three teams, some without a tile, and weights of three chunks that stay
    Case((2, 40, 9, 21), 32, LARGE_TILES),  # overhanging tiles, two for a team
    Case((1, 128, 3, 37), 16, LARGE_TILES),  # tiles side by side
    Case((20, 16, 4, 3), 48, LARGE_TILES),
    Case((1, 96, 16, 35), 32, LARGE_TILES),  # weights a chunk ahead of the products of large tiles
    Case((2, 16, 16, 31), 16, 2, 164),  # three teams, one without a tile
    Case((1, 24, 29, 33), 24, LARGE_TILES, 164),  # two tiles for some teams
    Case((1, 72, 15, 20), 64, LARGE_TILES, 128),
)
# What takes the shim too long.
GPU_CASES = (
    Case((12, 128, 56, 56), 32, 0),
    Case((32, 128, 7, 7), 32, 0),
    Case((24, 192, 28, 28), 48, 0),
    Case((9, 256, 33, 65), 64, 0),
    Case((1, 64, 130, 257), 16, 0),
)


def configure(ops, multiprocessors: int, order: int = 2, shared_memory: int = 100) -> None:
    if hasattr(ops, "configure"):
        ops.configure(order, multiprocessors, shared_memory)


def tensors(case: Case, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """The input is a slice of a buffer that is NaN elsewhere."""
    channels = case.shape[1]
    generator = torch.Generator().manual_seed(1)
    scale, shift = torch.randn(2, channels, generator=generator).to(device)
    weight = torch.randn(case.outputs, channels, 3, 3, generator=generator) / math.sqrt(9 * channels)
    x = make(case.shape, dtype, "channels_last_slice", device)
    return {"x": x, "scale": scale, "shift": shift, "weight": weight.to(device, dtype)}


def convolved(ops, inputs: dict[str, Tensor], activation: Activation, stats: bool = True) -> tuple[Tensor, ...]:
    operands = (inputs["x"], inputs["scale"], inputs["shift"], SLOPES[activation.name], inputs["weight"])
    return written(inputs["x"], len(inputs["weight"]), lambda *to: ops.bn_act_conv3x3(*operands, *to), stats)


def written(
    x: Tensor, outputs: int, write: Callable[[Tensor, Optional[Tensor], Optional[Tensor]], None], stats: bool
) -> tuple[Optional[Tensor], ...]:
    """What ``write(out, mean, m2)`` writes: the output, a slice of a buffer in which nothing else is written, and its statistics."""
    out = make((x.shape[0], outputs, *x.shape[2:]), x.dtype, "channels_last_slice", x.device.type).fill_(math.nan)
    found = tuple(x.new_full((outputs,), math.nan, dtype=torch.float32) for _ in range(2)) if stats else (None, None)
    write(out, *found)
    nans = int(out._base.isnan().sum()) - int(out.isnan().sum())
    assert nans == out._base.numel() - out.numel(), "written outside of the slice"
    return out, *found


def assert_convolved(
    convolution: Callable[[Tensor, Tensor], Tensor],
    inputs: dict[str, Tensor],
    activation: Activation,
    out: Tensor,
    mean: Tensor,
    m2: Tensor,
) -> None:
    """``out`` is the convolution of the activation and the weight, and the statistics are its."""

    def run(maps, params):
        activated = reference.apply_pending(maps["x"], params["scale"], params["shift"], activation)
        return {"out": convolution(activated, params["weight"])}

    params = {name: t.cpu() for name, t in inputs.items()}
    maps = {"x": params.pop("x")}
    out = out.cpu()
    assert_within_rule({"out": out}, true_run(run, maps, params), torch_runs(run, maps, params), out.dtype)

    def stats(maps, params):
        return dict(zip(("mean", "m2"), reference.channel_stats(maps["out"])))

    # Of what was written, rounded as it is.
    rounded = {"out": out.float()}
    ours = {"mean": mean.cpu(), "m2": m2.cpu()}
    assert_within_rule(ours, true_run(stats, rounded, {}), torch_runs(stats, rounded, {}), torch.float32)


def assert_right(inputs: dict[str, Tensor], activation: Activation, *found: Tensor) -> None:
    convolution = lambda a, weight: reference.convolution(a, Conv(weight, padding=(1, 1)))  # noqa: E731
    assert_convolved(convolution, inputs, activation, *found)


def check_bn_act_conv3x3(ops, device: str) -> None:
    for i, case in enumerate(CASES + (GPU_CASES if device == "cuda" else ())):
        configure(ops, case.multiprocessors, shared_memory=case.shared_memory)
        dtype = (torch.bfloat16, torch.float16)[i % 2]
        activation = ACTIVATIONS[i % 3]
        inputs = tensors(case, dtype, device)
        if i % 2:
            inputs["weight"] = inputs["weight"].contiguous(memory_format=torch.channels_last)
        assert_right(inputs, activation, *convolved(ops, inputs, activation))


def check_bn_act_conv3x3_without_stats(ops, device: str) -> None:
    configure(ops, SMALL_TILES)
    inputs = tensors(CASES[1], torch.bfloat16, device)
    out, *_ = convolved(ops, inputs, ACTIVATIONS[0])
    other, *_ = convolved(ops, inputs, ACTIVATIONS[0], stats=False)
    assert torch.equal(out, other)


def check_bn_act_conv3x3_folds(ops, device: str) -> None:
    """The norm that reads what is written, and maybe channels before it, as `bn_fold` does: in a launch or by the last block."""
    generator = torch.Generator().manual_seed(3)
    for case, before, order in ((CASES[0], 0, 0), (CASES[2], 40, 1), (CASES[4], 8, 2), (CASES[6], 300, 3)):
        configure(ops, case.multiprocessors, order, case.shared_memory)
        inputs = tensors(case, torch.bfloat16, device)
        out, *stats = convolved(ops, inputs, ACTIVATIONS[0])
        weight, bias = torch.randn(2, before + case.outputs, generator=generator).to(device)
        of_before = torch.rand(2, before, generator=generator).to(device) if before else (None, None)
        whole = [torch.cat([a, b]) for a, b in zip(of_before, stats)] if before else stats
        ticket = torch.zeros(1, dtype=torch.int32, device=device)
        for reader in ((weight, bias), (None, bias), (weight, None)):
            expected = ops.bn_fold(*whole, out.numel() // case.outputs, 1e-3, *reader)
            for drawn in (None, ticket):
                folded = []

                def write(*to, reader=reader, drawn=drawn, inputs=inputs, folded=folded, of_before=of_before):
                    operands = inputs["x"], inputs["scale"], inputs["shift"], SLOPES[ACTIVATIONS[0].name], inputs["weight"]
                    folded += ops.bn_act_conv3x3(*operands, *to, 1e-3, *reader, *of_before, drawn)

                again = written(inputs["x"], case.outputs, write, True)
                found = (*again, *folded, ticket)
                assert all(torch.equal(a, b) for a, b in zip(found, (out, *stats, *expected, torch.zeros_like(ticket)), strict=True))


def check_bn_act_conv3x3_repeats(ops, device: str) -> None:
    """Bitwise, whatever order the threads run in."""
    for case in (CASES[2], CASES[6], CASES[8], CASES[12]):
        inputs = tensors(case, torch.bfloat16, device)
        results = []
        for order in (0, 1, 2, 3):
            configure(ops, case.multiprocessors, order, case.shared_memory)
            results.append(convolved(ops, inputs, ACTIVATIONS[0]))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def check_bn_act_conv3x3_far_mean(ops, device: str) -> None:
    """A mean of many deviations: the centre tap copies a map of values around 1000, its smallest steps apart."""
    configure(ops, 4)
    inputs = tensors(Case((3, 8, 11, 10), 8, 4), torch.float16, device)
    steps = torch.arange(3 * 8 * 11 * 10, device=device).view(3, 8, 11, 10) % 7
    inputs["x"].copy_(1000 + 0.5 * (steps % 3 == 0) + 0.5 * (steps > 4))
    inputs["scale"].fill_(1)
    inputs["shift"].zero_()
    inputs["weight"].zero_()[:, :, 1, 1] = torch.eye(8, dtype=torch.float16, device=device)
    out, mean, m2 = convolved(ops, inputs, ACTIVATIONS[0])
    assert torch.equal(out, inputs["x"])
    values = out.double().transpose(0, 1).flatten(1)
    deviation = values.std(1)
    assert bool((values.mean(1) > 1000 * deviation).all())
    assert_right(inputs, ACTIVATIONS[0], out, mean, m2)


def check_bn_act_conv3x3_special_values(ops, device: str) -> None:
    """NaN and infinity reach the positions around them and no others, as in torch."""
    configure(ops, SMALL_TILES)
    for dtype in (torch.bfloat16, torch.float16):
        inputs = tensors(Case((2, 16, 9, 9), 8, SMALL_TILES), dtype, device)
        inputs["scale"].fill_(1)
        inputs["weight"].abs_()
        x = inputs["x"]
        x[0, 3, 0, 0], x[0, 5, 4, 4], x[0, 7, 7, 8], x[1, 0, 8, 4] = math.nan, math.inf, -math.inf, math.inf
        for activation in (Activation("relu"), Activation("identity")):
            out, *_ = convolved(ops, inputs, activation)
            activated = reference.apply_pending(x, inputs["scale"], inputs["shift"], activation)
            stock = reference.convolution(activated.double(), Conv(inputs["weight"].double(), padding=(1, 1)))
            for kind in (torch.isnan, torch.isposinf, torch.isneginf):
                assert torch.equal(kind(out), kind(stock)), (dtype, activation, kind)
            assert bool(stock.isnan().any()) and bool(stock.isinf().any()) and bool(stock.isfinite().any())


def check_bn_act_conv3x3_empty(ops, device: str) -> None:
    for shape in ((0, 16, 4, 4), (2, 16, 0, 4)):
        inputs = tensors(Case(shape, 8, SMALL_TILES), torch.bfloat16, device)
        out = torch.empty(shape[0], 8, *shape[2:], dtype=torch.bfloat16, device=device)
        mean, m2 = torch.ones(2, 8, device=device)
        ops.bn_act_conv3x3(inputs["x"], inputs["scale"], inputs["shift"], 0.0, inputs["weight"], out, mean, m2)
        assert bool(mean.isnan().all()) and not m2.any()


def check_bn_act_conv3x3_errors(ops, device: str) -> None:
    def last(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)

    right = {"x": last(2, 16, 5, 6), "weight": last(8, 16, 3, 3), "out": last(2, 8, 5, 6)}
    vector = torch.zeros(16, device=device)
    prefix = {"eps": 1e-5, "before_mean": vector, "before_m2": vector}
    for message, change in (
        (r"x: expected dtype bfloat16 or float16, got float32", {"x": right["x"].float()}),
        (r"x: expected shape \(N, C, H, W\), got \(2, 16, 5\)", {"x": right["x"][..., 0]}),
        (r"x: expected a multiple of 8 channels, at most 256, got 12", {"x": last(2, 12, 5, 6)}),
        (r"x: expected a multiple of 8 channels, at most 256, got 264", {"x": last(2, 264, 5, 6)}),
        (r"x: expected channels_last, .* aligned to 16 bytes, got strides \(480, 30, 6, 1\)", {"x": right["x"].contiguous()}),
        (r"x: expected channels_last, .* got strides \(600, 1, 120, 20\)$", {"x": last(2, 20, 5, 6)[:, :16]}),
        (r"x: expected channels_last, .* at an address that is not aligned", {"x": last(2, 24, 5, 6)[:, 4:20]}),
        (r"x: expected spatial positions with one stride", {"x": last(2, 16, 5, 7)[..., :6]}),
        (r"out: expected dtype bfloat16, got float16", {"out": right["out"].half()}),
        (r"out: expected the samples and positions of x, .* got shape \(2, 8, 6, 5\)", {"out": last(2, 8, 6, 5)}),
        (r"out: expected a multiple of 8 channels, at most 64, got 72", {"out": last(2, 72, 5, 6)}),
        (r"out: expected channels_last", {"out": right["out"].contiguous()}),
        (r"out: expected a tensor whose elements do not overlap", {"out": right["out"][:1].expand(2, -1, -1, -1)}),
        (r"weight: expected shape \(8, 16, 3, 3\), got \(8, 16, 1, 1\)", {"weight": last(8, 16, 1, 1)}),
        (r"weight: expected dtype bfloat16, got float32", {"weight": right["weight"].float()}),
        (r"scale: expected shape \(16,\), one value a channel of x, got \(8\)", {"scale": vector[:8]}),
        (r"shift: expected dtype float32, got float64", {"shift": vector.double()}),
        (r"mean: expected shape \(8,\), one value a channel of out, got \(16\)", {"mean": vector}),
        (r"m2: expected to be given where mean is, and only there", {"m2": None}),
        (r"activation: expected the slope of what is negative, got", {"activation": SILU}),
        (r"eps: expected only with the statistics of what the norm reads", {"mean": None, "m2": None, "eps": 1e-5}),
        (r"reader_weight: expected shape \(8,\), one value a channel of out, got \(16\)", {"eps": 1e-5, "reader_weight": vector}),
        (r"reader_bias: expected shape \(24,\), one value .* got \(16\)", {**prefix, "reader_bias": vector}),
        (r"before_mean: expected dtype float32, got float64", {**prefix, "before_mean": vector.double()}),
        (r"before_m2: expected shape \(16,\), one value a channel of out, got \(8\)", {**prefix, "before_m2": vector[:8]}),
        (r"before_m2: expected to be given where before_mean is, and only there", {**prefix, "before_m2": None}),
        (r"ticket: expected one number, got shape \(16\)", {"ticket": vector.int()}),
        (r"ticket: expected dtype int32, got float32", {"ticket": vector[:1]}),
    ):
        given = {**right, "activation": 0.0, "scale": vector, "shift": vector, "mean": vector[:8], "m2": vector[8:], **change}
        before = given["out"].clone()
        operands = [given.pop(name) for name in ("x", "scale", "shift", "activation", "weight")]
        with pytest.raises(RuntimeError, match=message):
            ops.bn_act_conv3x3(*operands, **given)
        assert torch.equal(given["out"], before)


CHECKS = (
    check_bn_act_conv3x3,
    check_bn_act_conv3x3_without_stats,
    check_bn_act_conv3x3_folds,
    check_bn_act_conv3x3_repeats,
    check_bn_act_conv3x3_far_mean,
    check_bn_act_conv3x3_special_values,
    check_bn_act_conv3x3_empty,
    check_bn_act_conv3x3_errors,
)
