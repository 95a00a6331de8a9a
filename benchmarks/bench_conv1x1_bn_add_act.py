"""A bottleneck's end from its last 1x1 convolution on, with its backward, by what is kept for it; resnet50's stages."""

import pytest
import torch
import torch.nn.functional as F
from _ops import map_of, time

from resdense_ext import functional, reference
from resdense_ext.functional import Activation, BatchNorm, Conv
from resdense_ext.ops import conv1x1_bn_add_act as engine

STAGES = {"stage1": (56, 64), "stage2": (28, 128), "stage3": (14, 256), "stage4": (7, 512)}
"""Height and width, and the channels that the convolution makes four times as many of."""


@pytest.mark.parametrize("stage", list(STAGES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("provider", ["floor", "stock", "z", "gram", "nothing"])
def test_conv1x1_bn_add_act(benchmark, monkeypatch, stage, dtype, channels_last, provider):
    """Ours by what it keeps; the floor is the bare convolution's three products."""
    monkeypatch.setattr(engine, "kept_for_backward", lambda *sizes: provider)
    size, channels = STAGES[stage]
    outputs = 4 * channels
    x, identity = (map_of(c, size, dtype, channels_last).requires_grad_() for c in (channels, outputs))
    weight = (torch.randn(outputs, channels, 1, 1, dtype=dtype) / channels**0.5).requires_grad_()
    norms = [BatchNorm(*(v.to(dtype).requires_grad_() for v in (torch.ones(c), torch.zeros(c)))) for c in (channels, outputs)]
    grad = map_of(outputs, size, dtype, channels_last)
    leaves = [x, identity, weight, *(v for norm in norms for v in norm[:2])]

    def stock():
        a = F.relu(F.batch_norm(x, None, None, *norms[0][:2], True))
        return F.relu(F.batch_norm(F.conv2d(a, weight), None, None, *norms[1][:2], True) + identity)

    def ours():
        return functional.conv1x1_bn_add_act(x, Conv(weight), norms[1], identity, input_norm=norms[0])

    def truth():
        double = lambda norm: norm._replace(weight=norm.weight.double(), bias=norm.bias.double())  # noqa: E731
        conv = Conv(weight.double())
        return reference.conv1x1_bn_add_act(
            x.double(), conv, double(norms[1]), identity.double(), None, Activation(), double(norms[0])
        ).detach()

    def floor():
        torch.autograd.grad(F.conv2d(x, weight), [x, weight], grad)

    forwards = {"stock": stock, **dict.fromkeys(("z", "gram", "nothing"), ours)}
    runs = {name: lambda f=f: torch.autograd.grad(f(), leaves, grad) for name, f in forwards.items()}
    group = f"conv1x1_bn_add_act {stage} {dtype} channels_last={channels_last}"
    time(benchmark, group, provider, {**runs, "floor": floor}, truth, forwards)
