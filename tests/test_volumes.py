"""Convolutions of single volumes on a CPU: as torch computes them, by oneDNN where torch does not take it."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from small_nets import images, policy  # noqa: F401
from test_dense_block import built
from tolerance import assert_within_rule, module_run, torch_runs, true_run
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import resdense_ext as rd
from resdense_ext.ops import cpu, volumes
from resdense_ext.reference import Conv

pytestmark = [
    built,
    pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"),
]

GEOMETRIES = {
    "ordinary": dict(padding=(1, 1, 1)),
    "strided": dict(padding=(1, 0, 2), stride=(2, 1, 3)),
    "dilated": dict(padding=(2, 2, 2), dilation=(2, 2, 2)),
    "with a bias": dict(padding=(1, 1, 1), bias=images(5, dtype=torch.float32)),
}


@pytest.fixture(params=GEOMETRIES)
def conv(request):
    return Conv(images(5, 4, 3, 3, 3, dtype=torch.float32), **{"dilation": (1, 1, 1), **GEOMETRIES[request.param]})


def map_of(channels_last, *shape):
    x = images(*shape, dtype=torch.float32)
    return x.to(memory_format=torch.channels_last_3d) if channels_last else x


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("need_weight", [False, True])
def test_numbers(conv, channels_last, need_weight):
    x = map_of(channels_last, 1, 4, 6, 7, 8)
    assert volumes.are_for_onednn(x, conv)

    def run(convolution, inputs, params):
        x, weight, bias = inputs["x"], params["weight"], params.get("bias")
        named = conv._replace(weight=weight, bias=bias)
        y = F.conv3d(x, weight, bias, named.steps, conv.padding, conv.dilation)
        grad = images(*y.shape, seed=2, dtype=x.dtype)
        found = convolution(x, named, grad)
        return {name: t for name, t in zip(("output", "grad x", "grad weight", "grad bias"), found) if t is not None}

    def torchs(x, conv, grad):
        mask = [True, need_weight, need_weight and conv.bias is not None]
        numbers = conv.steps, conv.padding, conv.dilation, False, [0] * 3, 1
        sizes = None if conv.bias is None else [5]
        y = F.conv3d(x, conv.weight, conv.bias, conv.steps, conv.padding, conv.dilation)
        return y, *torch.ops.aten.convolution_backward(grad, x, conv.weight, sizes, *numbers, mask)

    def ours(x, conv, grad):
        return volumes.convolution(x, conv), *volumes.convolution_backward(grad, x, conv, True, need_weight)

    inputs = {"x": x}
    params = {"weight": conv.weight, **({} if conv.bias is None else {"bias": conv.bias})}
    stock = partial(run, torchs)
    truth, runs = true_run(stock, inputs, params), torch_runs(stock, inputs, params)
    assert_within_rule(run(ours, inputs, params), truth, runs, torch.float32)


def test_where_torch_takes_onednn_itself_it_is_left_to_it(conv, monkeypatch):
    x = map_of(False, 1, 4, 6, 7, 8)
    assert volumes.are_for_onednn(x, conv)
    for other in (torch.cat([x, x]), x.double(), x.bfloat16(), map_of(False, 1, 4, 72, 72, 8), x[0]):
        assert not volumes.are_for_onednn(other, conv)
    monkeypatch.setattr(torch._C, "_get_mkldnn_enabled", lambda: False)
    assert not volumes.are_for_onednn(x, conv)


@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(conv, channels_last):
    x = map_of(True, 1, 4, 6, 7, 8)
    if channels_last:
        conv = conv._replace(weight=conv.weight.to(memory_format=torch.channels_last_3d))
    y = F.conv3d(x, conv.weight, conv.bias, conv.steps, conv.padding, conv.dilation)
    for need_weight in (False, True):
        arguments = y, x, conv.weight, conv.steps, conv.padding, conv.dilation, True, need_weight
        utilities = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.resdense.volume_backward.default, arguments, test_utils=utilities)


class Called(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def network():
    torch.manual_seed(0)
    layers = [nn.Conv3d(4, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(inplace=True)]
    layers += [nn.Conv3d(8, 8, 3, 2, padding=1), nn.BatchNorm3d(8), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Conv3d(8, 3, 3, padding=1))


def test_what_is_converted_takes_it(policy):
    """In the first step and by its programs, which take what they have recorded."""
    stock, x = network(), images(1, 4, 12, 10, 8, dtype=torch.float32)
    model, run, state = rd.convert(copy.deepcopy(stock), policy), module_run(stock), stock.state_dict()
    with Called() as called:
        model(x).sum().backward()
    assert called.names.count("resdense::volume_backward") == 6
    assert called.names.count("aten::mkldnn_convolution") == (3 if policy == "fast" else 5)
    truth, runs = true_run(run, {"x": x}, state), torch_runs(run, {"x": x}, state)
    for _ in range(4):
        assert_within_rule(module_run(model)({"x": x.clone()}, copy.deepcopy(state)), truth, runs, torch.float32)


def test_samples_of_a_batch_that_are_convolved_one_by_one(policy, monkeypatch):
    """As large ones are, so that the activations of all of them are not in memory at once."""
    monkeypatch.setattr(cpu, "_CACHED", 1)
    stock, x = network(), images(3, 4, 12, 10, 9, dtype=torch.float32)
    model, run, state = rd.convert(copy.deepcopy(stock), policy), module_run(stock), stock.state_dict()
    with Called() as called:
        model(x).sum().backward()
    assert called.names.count("resdense::volume_backward") >= 6
    truth, runs = true_run(run, {"x": x}, state), torch_runs(run, {"x": x}, state)
    assert_within_rule(module_run(model)({"x": x.clone()}, copy.deepcopy(state)), truth, runs, torch.float32)
