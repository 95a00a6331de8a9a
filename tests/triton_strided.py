"""Convolutions that move positions on Triton's kernels themselves, in float32 too; run in the interpreter by test_triton.py."""

from __future__ import annotations

import pytest
import torch
from test_primitives import buffer_slice, close, vectors

from resdense_ext import reference
from resdense_ext.kernels.bn_act_conv import bn_act_conv
from resdense_ext.kernels.bn_act_conv_backward import bn_act_conv_data_backward, bn_act_conv_weight_backward
from resdense_ext.kernels.configs import Config
from resdense_ext.reference import Activation, Conv

# Sizes, kernel, stride and padding: positions that no window covers, in the middle and at the end; fewer outputs than residue
# classes; padding past the half of a kernel; stride 1.
WINDOWS = [
    ((11,), (5,), (2,), (3,)),
    ((8, 7), (3, 3), (2, 2), (1, 1)),
    ((9, 8), (2, 1), (3, 2), (0, 0)),
    ((1, 2), (3, 3), (2, 2), (1, 1)),
    ((6, 5), (3, 3), (1, 1), (0, 0)),
    ((4, 5, 6), (3, 2, 3), (2, 1, 3), (1, 0, 1)),
]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("windows", WINDOWS, ids=str)
def test_windows(windows, channels_last):
    sizes, kernel, stride, padding = windows
    C, K, relu, config = 5, 7, Activation(), Config(64, 16, 16, 4, 2, 1)
    conv = Conv(torch.randn(K, C, *kernel), None, padding, (1,) * len(sizes), 1, stride)
    outputs = conv.outputs(sizes)
    tensors = {"x": torch.randn(2, C, *sizes), "weight": conv.weight, "dy": torch.randn(2, K, *outputs)}
    tensors.update(zip(("scale", "shift", "center", "rstd"), vectors(C, torch.float32, 4)))
    scale, shift, center, rstd = (tensors[name] for name in ("scale", "shift", "center", "rstd"))
    x, dy = (buffer_slice(tensors[name], channels_last)[0] for name in ("x", "dy"))
    (out, out_untouched), (dx, dx_untouched) = (
        buffer_slice(torch.full_like(t, float("nan")), channels_last) for t in (dy, x)
    )
    bn_act_conv(x, scale, shift, relu, conv, out, None, 1.0, None, None, config)
    vectors_of_x = (scale, shift, center, rstd)
    dgamma, dbeta, _, _ = bn_act_conv_data_backward(dy, None, conv, x, vectors_of_x, None, relu, dx, None, config)
    dweight = bn_act_conv_weight_backward(dy, None, conv, x, scale, shift, relu, config)
    out_untouched(), dx_untouched()

    def formula(t):
        per = lambda name: reference.per_channel(t[name], t["x"])  # noqa: E731
        y = per("scale") * t["x"] + per("shift")
        inputs = [p.detach().requires_grad_() for p in (reference.activate(y, relu), t["weight"])]
        z = reference.convolution(inputs[0], conv._replace(weight=inputs[1]))
        da, dweight = torch.autograd.grad(z, inputs, t["dy"])
        dy = da * reference.activation_slope(y, relu)
        reduced = [0, *range(2, dy.dim())]
        return z.detach(), dy, dweight, dy.sum(reduced), t["rstd"] * (dy * (t["x"] - per("center"))).sum(reduced)

    close([out, dx, dweight, dbeta, dgamma], formula, tensors, torch.float32)
