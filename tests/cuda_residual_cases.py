"""Checks of the backward of the residual blocks' end, run like those of cuda_cases.py."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cuda_cases import (
    ACTIVATIONS, RELU6, assert_rounded, assert_sums, cases, columns, layout_of, make, marked, masked_size, vectors,
)  # fmt: skip
from torch import Tensor


def operands(case, device: str, other: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient, output, z and identity; some outputs are exactly 0, as a ReLU's are."""
    shape, dtype, layout = case
    grad, out, z, identity = (make(shape, dtype, of, device, seed) for seed, of in enumerate((other, layout, layout, other)))
    if layout != "expanded":
        out.copy_(torch.where(out > -0.5, out, torch.zeros_like(out)))
    return grad, out, z, identity


def check_bn_add_act_backward(ops, device: str) -> None:
    activations, projections = itertools.cycle(ACTIVATIONS), itertools.cycle((False, True, True, False))
    for case in cases():
        shape, dtype, layout = case
        coefficients = vectors(2, shape[1], dtype, device)
        centers = columns(coefficients, len(shape))
        for other in {layout, "channels_last", "expanded"}:
            grad, out, z, identity = operands(case, device, other)
            activation, projected = next(activations), next(projections)
            shortcut = (identity, coefficients[1]) if projected else (None, None)
            g, *sums = ops.bn_add_act_backward(grad, out, z, coefficients[0], *shortcut, activation)
            note = (*case, other, projected, activation)
            truth = marked(grad, out, activation)
            size = masked_size(grad, out.double().abs(), activation, truth)
            assert_rounded(g, truth, size, note)
            assert layout == "expanded" or layout_of(g) == layout_of(torch.empty_like(out)), note

            terms, sizes = [truth], [size]
            for x, center in zip((z, identity)[: 1 + projected], centers):
                terms.append(truth * (x.double() - center))
                sizes.append(size * (x.double().abs() + center.abs()))
            if not projected:
                assert sums.pop().shape == (0,), note
            assert_sums(sums, terms, sizes, dtype, note)


def check_bn_add_act_backward_repeats(ops, device: str) -> None:
    results = []
    for order in (0, 1, 2, 3):
        if device == "cpu":
            ops.configure(order, 4)
        results.append([])
        for case in itertools.islice(cases(), 0, None, 11):
            grad, out, z, identity = operands(case, device, case[2])
            a, b = vectors(2, z.shape[1], z.dtype, device)
            results[-1] += ops.bn_add_act_backward(grad, out, z, a, identity, b, 0.1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def check_bn_add_act_backward_special_values(ops, device: str) -> None:
    """Behind what stops it even an infinite gradient is 0."""
    out = torch.tensor([math.nan, 6.0, 0.0, -0.0, 1.0], device=device).view(1, 1, 5)
    grad, zero = torch.full_like(out, math.inf), torch.zeros(1, device=device)
    for activation, at_6 in ((0.0, math.inf), (RELU6, 0)):
        g, sum_g, _, _ = ops.bn_add_act_backward(grad, out, torch.ones_like(out), zero, None, None, activation)
        assert torch.equal(g.flatten(), torch.tensor([math.inf, at_6, 0, 0, math.inf], device=device))
        assert sum_g.item() == math.inf


def check_bn_add_act_backward_empty(ops, device: str) -> None:
    for shape in ((0, 3, 4, 4), (2, 0, 4), (2, 3, 0)):
        x, center = torch.empty(shape, device=device), torch.empty(shape[1], device=device)
        g, *sums = ops.bn_add_act_backward(x, x, x, center, x, center, 0.0)
        assert g.shape == shape and all(torch.equal(t, torch.zeros_like(center)) for t in sums)


def check_bn_add_act_backward_errors(ops, device: str) -> None:
    x, vector = torch.zeros(2, 3, 4, 4, device=device), torch.zeros(3, device=device)

    def backward(grad=x, out=x, z=x, center=vector, identity=x, identity_center=vector, activation=0.0):
        return ops.bn_add_act_backward(grad, out, z, center, identity, identity_center, activation)

    for message, changed in (
        (r"grad: expected shape \(2, 3, 4, 4\) \(that of out\), got \(1, 3, 4, 4\)", dict(grad=x[:1])),
        (r"z: expected dtype float32, got float64", dict(z=x.double())),
        (r"center: expected shape \(3,\), one value a channel of z, got \(2\)", dict(center=vector[:2])),
        (r"identity: expected shape \(2, 3, 4, 4\) \(that of out\), got \(2, 3, 4, 3\)", dict(identity=x[..., :3].clone())),
        (r"identity: expected a tensor, as the other of .* is one, got None", dict(identity=None)),
        (r"identity_center: expected a tensor, as the other of .* is one, got None", dict(identity_center=None)),
        (r"identity_center: expected dtype float32, got float64", dict(identity_center=vector.double())),
        (r"activation: expected no negative slope, as the sign is told from the output, got -0.1", dict(activation=-0.1)),
    ):
        with pytest.raises(RuntimeError, match=message):
            backward(**changed)


CHECKS = (
    check_bn_add_act_backward,
    check_bn_add_act_backward_repeats,
    check_bn_add_act_backward_special_values,
    check_bn_add_act_backward_empty,
    check_bn_add_act_backward_errors,
)
