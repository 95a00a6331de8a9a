"""Batch norm, ReLU and convolution of a dense layer on a buffer's slice: the 1x1 that reads it, the 3x3 of the bottleneck."""

import pytest
import torch
import torch.nn.functional as F
from _ops import LAYERS, cases, map_of, time

from resdense_ext import reference
from resdense_ext.ops import backend as backends
from resdense_ext.ops.operands import Affine, Fold, Pending
from resdense_ext.reference import Activation, Conv


def operands(block, dtype, channels_last, kernel):
    size, channels, whole = LAYERS[block]
    buffer = map_of(whole, size, dtype, channels_last)
    x, outputs = (buffer[:, :channels], 128) if kernel == 1 else (map_of(128, size, dtype, channels_last), 32)
    weight = torch.randn(outputs, x.shape[1], kernel, kernel, dtype=dtype) / x.shape[1] ** 0.5 / kernel
    scale, shift = torch.rand(x.shape[1]) + 0.5, torch.randn(x.shape[1])
    return x, Affine(scale, shift, Activation()), Conv(weight, padding=(kernel // 2,) * 2)


def stock_of(x, affine, conv):
    y = F.relu(x * reference.per_channel(affine.scale, x).to(x.dtype) + reference.per_channel(affine.shift, x).to(x.dtype))
    return reference.convolution(y, conv)


def truth_of(x, affine, conv):
    double = Affine(affine.scale.double(), affine.shift.double(), affine.activation)
    return reference.convolution(reference.apply_pending(x.double(), *double), conv._replace(weight=conv.weight.double()))


@pytest.mark.parametrize("kernel", [1, 3])
@cases
def test_forward(benchmark, block, dtype, channels_last, provider, kernel):
    x, affine, conv = operands(block, dtype, channels_last, kernel)
    out = map_of(conv.weight.shape[0], x.shape[2], dtype, channels_last)
    backend = backends.choose(x, dtype)

    def ours():
        backend.bn_act_conv(x, affine, conv, out, None, 1.0, None)
        return out

    dense = torch.empty_like(x).copy_(x)
    runs = {"floor": lambda: reference.convolution(dense, conv), "stock": lambda: stock_of(x, affine, conv), "ours": ours}
    group = f"bn_act_conv{kernel}x{kernel} {block} {dtype} channels_last={channels_last}"
    time(benchmark, group, provider, runs, lambda: truth_of(x, affine, conv))


@pytest.mark.parametrize("kernel", [1, 3])
@cases
def test_backward(benchmark, block, dtype, channels_last, provider, kernel):
    """Data and weight gradients; ours also masks, adds up the norm's gradients and accumulates."""
    x, affine, conv = operands(block, dtype, channels_last, kernel)
    dy = map_of(conv.weight.shape[0], x.shape[2], dtype, channels_last)
    channels = x.shape[1]
    fold = Fold(affine, torch.zeros(channels), affine.scale, dy.numel() // dy.shape[1])
    zeros, ones = torch.zeros(dy.shape[1]), torch.ones(dy.shape[1])
    into = Pending(torch.zeros_like(x), x, torch.ones(channels), torch.zeros(channels), torch.zeros(channels))
    backend = backends.choose(x, dtype)

    def ours():
        pending = Pending(dy, dy, ones, zeros, zeros)
        return backend.bn_act_conv_backward(x, fold, conv, pending, into if kernel == 1 else None, True).weight

    leaves = [x.detach().clone().requires_grad_(), conv.weight.clone().requires_grad_()]
    y = stock_of(leaves[0], affine, conv._replace(weight=leaves[1]))

    def stock():
        return torch.autograd.grad(y, leaves, dy, retain_graph=True)[1]

    def truth():
        weight = conv.weight.double().requires_grad_()
        return torch.autograd.grad(truth_of(x, affine, conv._replace(weight=weight)), weight, dy.double())[0]

    dense, around = torch.empty_like(x).copy_(x), [kernel // 2] * 2

    def floor():
        geometry = ([1, 1], around, [1, 1], False, [0, 0], 1, [True, True, False])
        return torch.ops.aten.convolution_backward(dy, dense, conv.weight, None, *geometry)

    group = f"bn_act_conv{kernel}x{kernel} backward {block} {dtype} channels_last={channels_last}"
    runs = {"floor": floor, "stock": stock, "ours": ours}
    # A gradient is worth what its weight's dtype is.
    time(benchmark, group, provider, runs, truth, {"stock": stock, "ours": lambda: ours().to(dtype)})
