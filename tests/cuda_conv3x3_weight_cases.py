"""Checks of the weight gradient of a 3x3 convolution whose input is activated on the way, run as those of cuda_cases.py."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from cuda_cases import SILU, make
from cuda_conv1x1_weight_cases import (
    IDENTITY,
    LEAKY,
    RELU,
    SLOPES,
    Case,
    assert_finishes,
    assert_pending_errors,
    has_kernels,
    sum_of_parts,
    whole_numbers,
)
from cuda_conv_cases import configure
from tolerance import assert_within_rule, torch_runs, true_run
from torch import Tensor

from resdense_ext import reference
from resdense_ext.reference import Activation

CASES = (
    Case((1, 8, 1, 1), 8, 1),
    Case((2, 24, 5, 3), 24, 4, LEAKY),  # one tile across samples
    Case((5, 40, 7, 7), 32, 2),  # a tile that is cut lower for two splits
    Case((3, 72, 9, 30), 16, 2, IDENTITY),  # two chunks of channels, several tiles a block
    Case((4, 64, 5, 53), 32, 5),  # tiles side by side, the last ones overhanging, and a split with fewer of them
    Case((1, 128, 5, 14), 32, 1, LEAKY),
    Case((1, 256, 3, 9), 8, 2),  # more chunks than multiprocessors
    Case((9, 104, 4, 2), 16, 6),
    Case((40, 16, 1, 8), 24, 1),  # samples of one row
    Case((1, 16, 23, 1), 32, 1),
)
# What takes the shim too long.
GPU_CASES = (
    Case((64, 128, 56, 56), 32, 0),
    Case((256, 128, 28, 28), 32, 0),
    Case((256, 128, 14, 14), 32, 0),
    Case((256, 128, 7, 7), 32, 0, LEAKY),
    Case((33, 96, 28, 28), 24, 0),
    Case((100, 64, 32, 32), 16, 0),
    Case((9, 256, 33, 65), 32, 0, IDENTITY),
    Case((1, 136, 130, 257), 8, 0),
    Case((7, 192, 4, 4), 32, 0),
)


def tensors(case: Case, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Maps are slices of buffers that are NaN elsewhere, x of every other sample."""
    n, channels, *spatial = case.shape
    scale, shift = torch.randn(2, channels + 1, generator=torch.Generator().manual_seed(1)).to(device)
    scale, shift = scale[:-1], shift[1:]  # not aligned
    grad = make((n, case.outputs, *spatial), dtype, "channels_last_slice", device, seed=1)
    x = make((2 * n, channels, *spatial), dtype, "channels_last_slice", device)
    x[1::2] = math.nan
    return {"grad": grad, "x": x[::2], "scale": scale, "shift": shift}


def gradient(ops, inputs: dict[str, Tensor], activation: Activation) -> Tensor:
    return sum_of_parts(ops.bn_act_conv3x3_weight_backward(*inputs.values(), SLOPES[activation.name]), inputs["grad"])


def product(grad: Tensor, activated: Tensor) -> Tensor:
    """Tap by tap, in the dtype of the operands."""
    height, width = grad.shape[2:]
    padded = F.pad(activated, (1, 1, 1, 1))
    grad = grad.transpose(0, 1).flatten(1)
    steps = [(dy, dx) for dy in range(3) for dx in range(3)]
    taps = [padded[:, :, dy : dy + height, dx : dx + width].transpose(0, 1).flatten(1) for dy, dx in steps]
    return torch.stack([grad @ tap.T for tap in taps], 1).unflatten(1, (3, 3))


def truth(inputs: dict[str, Tensor], activation: Activation) -> Tensor:
    grad, *given = (t.double() for t in inputs.values())
    return product(grad, reference.apply_pending(*given, activation))


def check_bn_act_conv3x3_weight_backward(ops, device: str) -> None:
    for i, case in enumerate(CASES + (GPU_CASES if device == "cuda" else ())):
        configure(ops, case.multiprocessors)
        dtype = (torch.bfloat16, torch.float16)[i % 2]
        inputs = whole_numbers(tensors(case, dtype, device))
        dweight = gradient(ops, inputs, case.activation)
        assert torch.equal(dweight, truth(inputs, case.activation).to(dtype)), case


def check_bn_act_conv3x3_weight_backward_finishes(ops, device: str) -> None:
    for i, case in enumerate(CASES + (GPU_CASES if device == "cuda" else ())):
        configure(ops, case.multiprocessors, i % 4)
        inputs, alone = tensors(case, (torch.bfloat16, torch.float16)[i % 2], device), case.shape[1] <= 64
        assert_finishes(ops, ops.bn_act_conv3x3_weight_backward, inputs, alone and has_kernels(ops, device))


def check_bn_act_conv3x3_weight_backward_tolerance(ops, device: str) -> None:
    for case, dtype in ((CASES[2], torch.float16), (CASES[4], torch.bfloat16), (CASES[5], torch.bfloat16)):
        configure(ops, case.multiprocessors)
        inputs = tensors(case, dtype, device)

        def run(maps, params, activation=case.activation):
            return {"dweight": product(maps["grad"], reference.apply_pending(maps["x"], **params, activation=activation))}

        params = {name: t.cpu() for name, t in inputs.items()}
        maps = {name: params.pop(name) for name in ("grad", "x")}
        ours = {"dweight": gradient(ops, inputs, case.activation).cpu()}
        assert_within_rule(ours, true_run(run, maps, params), torch_runs(run, maps, params), dtype)


def check_bn_act_conv3x3_weight_backward_rounds(ops, device: str) -> None:
    """What is multiplied is the activated value in the dtype of the map, as in the forward pass; padding is 0 behind it."""
    configure(ops, 1)
    for dtype in (torch.bfloat16, torch.float16):
        inputs = tensors(Case((1, 64, 1, 1), 8, 1), dtype, device)
        inputs["grad"].fill_(1)
        inputs["scale"].copy_(inputs["scale"].bfloat16())  # exact products
        for shift in (0.0, 4.0):
            inputs["shift"].fill_(shift)
            for activation in (RELU, LEAKY):
                activated = reference.apply_pending(inputs["x"], inputs["scale"], inputs["shift"], activation)
                expected = torch.zeros(8, 3, 3, 64, dtype=dtype, device=device)
                expected[:, 1, 1] = activated.view(64)
                assert torch.equal(gradient(ops, inputs, activation), expected)


def check_bn_act_conv3x3_weight_backward_special_values(ops, device: str) -> None:
    """NaN and infinity reach all that they do in torch, and no other channels and outputs."""
    configure(ops, 1)
    for dtype in (torch.bfloat16, torch.float16):
        # A tile with positions past its end, and maps with borders inside.
        for case in (Case((2, 24, 3, 9), 16, 1), Case((2, 24, 5, 5), 24, 1)):
            inputs = whole_numbers(tensors(case, dtype, device))
            inputs["scale"][:8].fill_(1)
            for activation in (RELU, LEAKY):
                clean = truth(inputs, activation).to(dtype)
                dirty = {name: t.clone() for name, t in inputs.items()}
                # At borders and inside; before a ReLU minus infinity is nothing but negative.
                dirty["x"][0, 3, 0, :2], dirty["x"][1, 3, 1, 4], dirty["x"][1, 5, 1, 4] = math.nan, math.nan, math.inf
                dirty["x"][0, 7, 2, 2] = -math.inf
                dirty["grad"][0, 2, 2, 4], dirty["grad"][1, 6, 1, 2] = math.nan, math.inf
                ours, stock = gradient(ops, dirty, activation), truth(dirty, activation)
                channels = torch.tensor([c not in (3, 5, 7) for c in range(24)], device=device)
                outputs = torch.tensor([o not in (2, 6) for o in range(case.outputs)], device=device)
                assert torch.equal(ours[outputs][..., channels], clean[outputs][..., channels])
                assert not bool((ours.isfinite() & ~stock.isfinite()).any()), (dtype, case, activation)
                if activation == RELU:
                    assert bool(ours[outputs][..., 7].isfinite().all())
                assert bool(ours[..., 3].isnan().all()) and bool(ours[2].isnan().all())


def check_bn_act_conv3x3_weight_backward_repeats(ops, device: str) -> None:
    """Bitwise, whatever order the threads run in."""
    for case in (CASES[2], CASES[3]):
        inputs = tensors(case, torch.bfloat16, device)
        results = []
        for order in (0, 1, 2, 3):
            configure(ops, case.multiprocessors, order)
            results.append(gradient(ops, inputs, RELU))
        assert all(torch.equal(results[0], other) for other in results[1:])


def check_bn_act_conv3x3_weight_backward_empty(ops, device: str) -> None:
    for shape in ((0, 16, 4, 4), (2, 16, 0, 4)):
        inputs = tensors(Case(shape, 8, 1), torch.bfloat16, device)
        assert torch.equal(gradient(ops, inputs, RELU), torch.zeros(8, 3, 3, 16, dtype=torch.bfloat16, device=device))
        assert_finishes(ops, ops.bn_act_conv3x3_weight_backward, inputs, True)


def check_bn_act_conv3x3_weight_backward_errors(ops, device: str) -> None:
    def last(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)

    vector = torch.zeros(16, device=device)
    right = {"grad": last(2, 8, 5, 6), "x": last(2, 16, 5, 6), "scale": vector, "shift": vector}
    for message, change in (
        (r"x: expected dtype bfloat16 or float16, got float32", {"x": right["x"].float()}),
        (r"x: expected shape \(N, C, H, W\), got \(2, 16, 5\)", {"x": right["x"][..., 0]}),
        (r"x: expected a multiple of 8 channels, at most 256, got 12", {"x": last(2, 12, 5, 6)}),
        (r"x: expected a multiple of 8 channels, at most 256, got 264", {"x": last(2, 264, 5, 6)}),
        (r"x: expected channels_last, .* aligned to 16 bytes, got strides \(480, 30, 6, 1\)$", {"x": right["x"].contiguous()}),
        (r"x: expected channels_last, .* got strides \(600, 1, 120, 20\)$", {"x": last(2, 20, 5, 6)[:, :16]}),
        (r"x: expected channels_last, .* at an address that is not aligned", {"x": last(2, 24, 5, 6)[:, 4:20]}),
        (r"x: expected spatial positions with one stride", {"x": last(2, 16, 5, 7)[..., :6]}),
        (r"grad: expected dtype bfloat16, got float16", {"grad": right["grad"].half()}),
        (r"grad: expected the samples and positions of x, .* got shape \(2, 8, 6, 5\)", {"grad": last(2, 8, 6, 5)}),
        (r"grad: expected the samples and positions of x, .* got shape \(2, 8, 5\)", {"grad": right["grad"][..., 0]}),
        (r"grad: expected a multiple of 8 channels, at most 32, got 40", {"grad": last(2, 40, 5, 6)}),
        (r"grad: expected a multiple of 8 channels, at most 32, got 4", {"grad": last(2, 4, 5, 6)}),
        (r"grad: expected channels_last", {"grad": right["grad"].contiguous()}),
        (r"scale: expected shape \(16,\), one value a channel of x, got \(8\)", {"scale": vector[:8]}),
        (r"shift: expected dtype float32, got float64", {"shift": vector.double()}),
    ):
        with pytest.raises(RuntimeError, match=message):
            gradient(ops, {**right, **change}, RELU)
    with pytest.raises(RuntimeError, match="activation: expected the slope of what is negative, got"):
        ops.bn_act_conv3x3_weight_backward(*right.values(), SILU)
    assert_pending_errors(ops.bn_act_conv3x3_weight_backward, right)


CHECKS = (
    check_bn_act_conv3x3_weight_backward,
    check_bn_act_conv3x3_weight_backward_finishes,
    check_bn_act_conv3x3_weight_backward_tolerance,
    check_bn_act_conv3x3_weight_backward_rounds,
    check_bn_act_conv3x3_weight_backward_special_values,
    check_bn_act_conv3x3_weight_backward_repeats,
    check_bn_act_conv3x3_weight_backward_empty,
    check_bn_act_conv3x3_weight_backward_errors,
)
