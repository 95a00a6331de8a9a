"""Checks of the weight gradient of a 1x1 convolution whose input is activated on the way, run as those of cuda_cases.py."""

from __future__ import annotations

import math
from typing import NamedTuple, Optional

import pytest
import torch
from cuda_cases import SILU, make
from cuda_conv_cases import configure
from tolerance import assert_within_rule, torch_runs, true_run
from torch import Tensor

from resdense_ext import reference
from resdense_ext.reference import Activation

RELU, LEAKY, IDENTITY = Activation("relu"), Activation("leaky_relu", 0.5), Activation("identity")
SLOPES = {"relu": 0.0, "leaky_relu": 0.5, "identity": 1.0}


class Case(NamedTuple):
    """``multiprocessors`` is how large the shim's device is: the more, the fewer positions a block takes."""

    shape: tuple[int, ...]
    outputs: int
    multiprocessors: int
    activation: Activation = RELU


CASES = (
    Case((1, 8, 1, 1), 8, 1),
    Case((290, 16), 8, 1),  # more chunks a split than have a place in shared memory
    Case((3, 72, 7, 7), 48, 1, LEAKY),  # two panels of channels, two splits
    Case((1, 328, 8, 5), 16, 1),  # two tiles of three panels each
    Case((165, 24), 128, 1),
    Case((4, 80, 3, 11), 72, 2, IDENTITY),  # a split of a single chunk
    Case((2, 304, 4, 4), 128, 1),  # tiles of two panels and of three
    Case((33, 216), 104, 1),  # four panels
    Case((34, 264), 192, 1),  # tiles of two panels and of three, the most that there are
    Case((37, 8, 1, 1), 136, 1, LEAKY),
)
# What takes the shim too long.
GPU_CASES = (
    Case((64, 64, 56, 56), 128, 0),
    Case((64, 224, 56, 56), 128, 0),
    Case((16, 1000, 14, 14), 128, 0),
    Case((33, 992, 7, 7), 128, 0, LEAKY),
    Case((32, 336, 28, 28), 192, 0),
    Case((100, 2200, 7, 7), 192, 0, IDENTITY),
    Case((128, 216, 32, 32), 48, 0),
    Case((3, 456, 33, 35), 64, 0),
    Case((5, 8, 3, 300, 100), 88, 0),
)


def tensors(case: Case, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Maps are slices of buffers that are NaN elsewhere."""
    n, channels, *spatial = case.shape
    scale, shift = torch.randn(2, channels, generator=torch.Generator().manual_seed(1)).to(device)
    grad = make((n, case.outputs, *spatial), dtype, "channels_last_slice", device, seed=1)
    return {"grad": grad, "x": make(case.shape, dtype, "channels_last_slice", device), "scale": scale, "shift": shift}


def whole_numbers(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same layouts; nothing but the result is rounded, neither products nor sums in any order."""
    for name, t in inputs.items():
        t.copy_((2 * t).round().clamp(-3, 3) / (2 if name == "scale" else 1))
    return inputs


def gradient(ops, inputs: dict[str, Tensor], activation: Activation) -> Tensor:
    return sum_of_parts(ops.bn_act_conv1x1_weight_backward(*inputs.values(), SLOPES[activation.name]), inputs["grad"])


def sum_of_parts(found: tuple[Tensor, Optional[Tensor]], grad: Tensor) -> Tensor:
    """Of what the splits have left, of a gradient that was finished already."""
    parts, finished = found
    assert parts.dtype == torch.float32 and parts.is_contiguous() and finished is None
    return parts.sum(0).to(grad.dtype)


def assert_finishes(ops, operator, inputs: dict[str, Tensor], alone: bool) -> None:
    """Of a pending gradient it leaves what it does of one that a pass has finished before, bitwise, and that gradient: to overwrite in
    its place where a block reads it ``alone``."""
    grad = inputs["grad"]
    before, z = grad.clone(), make(tuple(grad.shape), grad.dtype, "channels_last_slice", grad.device, seed=3)
    around = torch.randn(3, grad.shape[1] + 1, generator=torch.Generator().manual_seed(5)).to(grad.device)
    vectors = around[:, 1:]  # not aligned
    in_a_pass = ops.finished_grad(grad, z, *vectors)
    expected, _ = operator(*{**inputs, "grad": in_a_pass}.values(), 0.0)
    parts, finished = operator(*inputs.values(), 0.0, z, *vectors)
    assert torch.equal(finished, in_a_pass) and torch.equal(parts, expected) and torch.equal(grad, before)
    assert not torch.equal(finished, before) or grad.numel() == 0
    parts, finished = operator(*inputs.values(), 0.0, z, *vectors, True)
    assert (finished is None) == alone and torch.equal(parts, expected)
    assert torch.equal(grad if alone else finished, in_a_pass) and (alone or torch.equal(grad, before))


def has_kernels(ops, device: str) -> bool:
    """Rather than the reference: on a GPU and on the shim."""
    return device == "cuda" or hasattr(ops, "configure")


def assert_pending_errors(operator, right: dict[str, Tensor]) -> None:
    grad = right["grad"]
    vector = torch.zeros(grad.shape[1], device=grad.device)
    pending = {"z": torch.zeros_like(grad), "alpha": vector, "beta": vector, "delta": vector}
    all_or_none = "alpha, beta, delta: expected all of them with z, and none without it"
    for message, change in (
        (all_or_none, {"z": None}),
        (all_or_none, {"beta": None}),
        (r"z: expected shape \(2, 8, 5, 6\) \(that of grad\), got \(1, 8, 5, 6\)", {"z": pending["z"][:1]}),
        (r"z: expected dtype bfloat16, got float16", {"z": pending["z"].half()}),
        (r"z: expected channels_last", {"z": pending["z"].contiguous()}),
        (r"alpha: expected shape \(8,\), one value a channel of grad, got \(4\)", {"alpha": vector[:4]}),
        (r"delta: expected dtype float32, got float64", {"delta": vector.double()}),
    ):
        with pytest.raises(RuntimeError, match=message):
            operator(*right.values(), 0.0, *{**pending, **change}.values())


def product(grad: Tensor, activated: Tensor) -> Tensor:
    grad, activated = (t.transpose(0, 1).flatten(1) for t in (grad, activated))
    return grad @ activated.T


def truth(inputs: dict[str, Tensor], activation: Activation) -> Tensor:
    grad, *given = (t.double() for t in inputs.values())
    return product(grad, reference.apply_pending(*given, activation))


def check_bn_act_conv1x1_weight_backward(ops, device: str) -> None:
    for i, case in enumerate(CASES + (GPU_CASES if device == "cuda" else ())):
        configure(ops, case.multiprocessors)
        dtype = (torch.bfloat16, torch.float16)[i % 2]
        inputs = whole_numbers(tensors(case, dtype, device))
        dweight = gradient(ops, inputs, case.activation)
        assert torch.equal(dweight, truth(inputs, case.activation).to(dtype)), case


def check_bn_act_conv1x1_weight_backward_finishes(ops, device: str) -> None:
    for i, case in enumerate(CASES + (GPU_CASES if device == "cuda" else ())):
        configure(ops, case.multiprocessors, i % 4)
        inputs = tensors(case, (torch.bfloat16, torch.float16)[i % 2], device)
        alone = case.shape[1] <= (256 if case.outputs <= 128 else 192)
        assert_finishes(ops, ops.bn_act_conv1x1_weight_backward, inputs, alone and has_kernels(ops, device))


def check_bn_act_conv1x1_weight_backward_tolerance(ops, device: str) -> None:
    configure(ops, 1)
    for case, dtype in ((CASES[2], torch.float16), (CASES[4], torch.bfloat16)):
        inputs = tensors(case, dtype, device)

        def run(maps, params, activation=case.activation):
            return {"dweight": product(maps["grad"], reference.apply_pending(maps["x"], **params, activation=activation))}

        params = {name: t.cpu() for name, t in inputs.items()}
        maps = {name: params.pop(name) for name in ("grad", "x")}
        ours = {"dweight": gradient(ops, inputs, case.activation).cpu()}
        assert_within_rule(ours, true_run(run, maps, params), torch_runs(run, maps, params), dtype)


def check_bn_act_conv1x1_weight_backward_rounds(ops, device: str) -> None:
    """What is multiplied is the activated value in the dtype of the map, as in the forward pass."""
    configure(ops, 1)
    for dtype in (torch.bfloat16, torch.float16):
        inputs = tensors(Case((1, 64, 1, 1), 8, 1), dtype, device)
        inputs["grad"].fill_(1)
        inputs["scale"].copy_(inputs["scale"].bfloat16())  # exact products
        inputs["shift"].zero_()
        for activation in (RELU, LEAKY):
            activated = reference.apply_pending(inputs["x"], inputs["scale"], inputs["shift"], activation)
            assert torch.equal(gradient(ops, inputs, activation), activated.view(1, 64).expand(8, -1))


def check_bn_act_conv1x1_weight_backward_special_values(ops, device: str) -> None:
    """NaN and infinity reach their inputs and outputs and no others, as in torch; nor do the positions past the end."""
    configure(ops, 1)
    for dtype in (torch.bfloat16, torch.float16):
        inputs = whole_numbers(tensors(Case((37, 24), 16, 1), dtype, device))
        grad, x, scale, shift = inputs.values()
        grad.abs_().add_(1)
        scale[:16].fill_(1)
        x[0, 3], x[36, 5], x[20, 7] = math.nan, math.inf, -math.inf
        grad[33, 2], grad[4, 6] = math.nan, math.inf
        x[:, 16:].abs_().add_(1)
        shift[16:].zero_()
        scale[16], scale[17], shift[18], shift[19] = math.inf, -math.inf, math.inf, -math.inf
        for activation in (RELU, LEAKY, IDENTITY):
            ours, stock = gradient(ops, inputs, activation), truth(inputs, activation)
            for kind in (torch.isnan, torch.isposinf, torch.isneginf):
                assert torch.equal(kind(ours), kind(stock)), (dtype, activation, kind)
            assert bool(stock[0].isfinite().any()) and bool(stock[0, 16].isposinf())


def check_bn_act_conv1x1_weight_backward_repeats(ops, device: str) -> None:
    """Bitwise, whatever order the threads run in."""
    inputs = tensors(Case((290, 16), 8, 1), torch.bfloat16, device)
    results = []
    for order in (0, 1, 2, 3):
        configure(ops, 1, order)
        results.append(gradient(ops, inputs, RELU))
    assert all(torch.equal(results[0], other) for other in results[1:])


def check_bn_act_conv1x1_weight_backward_empty(ops, device: str) -> None:
    for shape in ((0, 16, 4, 4), (2, 16, 0, 4)):
        inputs = tensors(Case(shape, 8, 1), torch.bfloat16, device)
        assert torch.equal(gradient(ops, inputs, RELU), torch.zeros(8, 16, dtype=torch.bfloat16, device=device))
        assert_finishes(ops, ops.bn_act_conv1x1_weight_backward, inputs, True)


def check_bn_act_conv1x1_weight_backward_errors(ops, device: str) -> None:
    def last(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)

    vector = torch.zeros(16, device=device)
    right = {"grad": last(2, 8, 5, 6), "x": last(2, 16, 5, 6), "scale": vector, "shift": vector}
    for message, change in (
        (r"x: expected dtype bfloat16 or float16, got float32", {"x": right["x"].float()}),
        (r"x: expected a multiple of 8 channels, at most 65536, got 12", {"x": last(2, 12, 5, 6)}),
        (r"x: expected channels_last, .* aligned to 16 bytes, got strides \(480, 30, 6, 1\)$", {"x": right["x"].contiguous()}),
        (r"x: expected channels_last, .* got strides \(600, 1, 120, 20\)$", {"x": last(2, 20, 5, 6)[:, :16]}),
        (r"x: expected channels_last, .* at an address that is not aligned", {"x": last(2, 24, 5, 6)[:, 4:20]}),
        (r"x: expected one stride .* across samples, .* strides \(960, 1, 96, 16\)$", {"x": last(4, 16, 5, 6)[::2]}),
        (r"grad: expected dtype bfloat16, got float16", {"grad": right["grad"].half()}),
        (r"grad: expected the samples and positions of x, .* got shape \(2, 8, 6, 5\)", {"grad": last(2, 8, 6, 5)}),
        (r"grad: expected the samples and positions of x, .* got shape \(2, 8, 5\)", {"grad": right["grad"][..., 0]}),
        (r"grad: expected a multiple of 8 channels, at most 192, got 200", {"grad": last(2, 200, 5, 6)}),
        (r"grad: expected channels_last", {"grad": right["grad"].contiguous()}),
        (r"scale: expected shape \(16,\), one value a channel of x, got \(8\)", {"scale": vector[:8]}),
        (r"shift: expected dtype float32, got float64", {"shift": vector.double()}),
    ):
        with pytest.raises(RuntimeError, match=message):
            gradient(ops, {**right, **change}, RELU)
    with pytest.raises(RuntimeError, match="activation: expected the slope of what is negative, got"):
        ops.bn_act_conv1x1_weight_backward(*right.values(), SILU)
    assert_pending_errors(ops.bn_act_conv1x1_weight_backward, right)


CHECKS = (
    check_bn_act_conv1x1_weight_backward,
    check_bn_act_conv1x1_weight_backward_finishes,
    check_bn_act_conv1x1_weight_backward_tolerance,
    check_bn_act_conv1x1_weight_backward_rounds,
    check_bn_act_conv1x1_weight_backward_special_values,
    check_bn_act_conv1x1_weight_backward_repeats,
    check_bn_act_conv1x1_weight_backward_empty,
    check_bn_act_conv1x1_weight_backward_errors,
)
