"""Small networks, one training step of them as named tensors, and whether two such steps are the same."""

import copy
import gc
import importlib
import warnings
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from stock import import_torchvision
from tolerance import assert_within_rule, module_run, torch_runs, true_run
from torch import nn
from torch.autograd import gradgradcheck

import resdense_ext as rd
from resdense_ext import functional

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Narrow(nn.Conv2d):
    """Of which the constructor is its own, and what torch's class does not have."""

    expansion = 2

    def __init__(self, channels):
        super().__init__(channels, channels // self.expansion, 3, padding=1, bias=False)

    @staticmethod
    def downsampling_stride(stride):
        return stride


class SlowNorm(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels, momentum=0.01)

    def reset_parameters(self):
        super().reset_parameters()
        nn.init.zeros_(self.weight)


CONSTRUCTED = {nn.Conv2d: Narrow, nn.BatchNorm2d: SlowNorm}
"""Subclasses of layers that compute what these compute."""


class Joined(nn.Module):
    def forward(self, halves):
        return torch.cat(halves, 1)


def library(path):
    """A module of a library that is torchvision's or wants it; skips the test, or the test file, where it is not installed."""
    try:
        import_torchvision()
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name not in ("torchvision", path.partition(".")[0]):
            raise  # one that is there and does not load is a failure
        pytest.skip(f"{path}: {error} (`make test` installs it)", allow_module_level=True)


def torchvision_models():
    """torchvision's models, as `library`."""
    return library("torchvision.models")


def torchvision_densenet():
    """torchvision's DenseNet module, as `torchvision_models`."""
    return torchvision_models().densenet


def randomise(model, seed=0):
    """Norms as after some training, all different; in place."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, NORMS):
            nn.init.normal_(module.weight, 1.0, 0.3, generator)
            nn.init.normal_(module.bias, 0.0, 0.3, generator)
            nn.init.normal_(module.running_mean, 0.0, 0.3, generator)
            nn.init.uniform_(module.running_var, 0.5, 1.5, generator)
    return model


def small_densenet(dtype=torch.float64, **options):
    """torchvision's DenseNet with two blocks, of two and three layers."""
    options = dict(growth_rate=8, block_config=(2, 3), num_init_features=16, num_classes=5) | options
    torch.manual_seed(0)
    return randomise(torchvision_densenet().DenseNet(**options)).to(dtype)


def small_block(dtype=torch.float64, **options):
    """torchvision's dense block: three layers, 6 channels to 18."""
    options = dict(num_layers=3, num_input_features=6, bn_size=2, growth_rate=4, drop_rate=0.0) | options
    torch.manual_seed(0)
    return randomise(torchvision_densenet()._DenseBlock(**options)).to(dtype)


def images(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def steps(model, x, count=1, call=None, of_input=True):
    """`steps_of` a copy."""
    return steps_of(copy.deepcopy(model), x, count, call, of_input)


def steps_of(model, x, count=1, call=None, of_input=True):
    """Output, gradients and buffers of ``count`` forwards and backwards; gradients accumulate. Where none is ``of_input``, nothing in
    front of the first parameter that is trained has one."""
    x = x.clone().requires_grad_(of_input)
    for _ in range(count):
        output = model(x) if call is None else call(model, x)
        weights = images(*output.shape, seed=1).to(output)
        (output * weights).sum().backward()
    gradients = {f"grad {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    buffers = {f"buffer {name}": b for name, b in model.named_buffers()}
    of_x = {"grad x": x.grad} if of_input else {}
    return {"output": output.detach(), **of_x, **gradients, **buffers}


def ten_losses(net, x, target, rate):
    """Those of ten steps of SGD with momentum."""
    optimizer = torch.optim.SGD(net.parameters(), rate, momentum=0.9)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def seeded(kind, dtype=torch.float64, **options):
    """A network of this kind, whose ``norms`` are all different."""
    torch.manual_seed(0)
    net = kind(**options).to(dtype)
    for of in net.norms:
        nn.init.normal_(of.weight, 1.0, 0.3), nn.init.normal_(of.bias, 0.0, 0.3)
    return net


def assert_trains_and_evaluates_alike(model, stock, x):
    """Two steps of training, so that a parameter that has changed is read, and evaluation."""
    for training in (True, False):
        assert_same(steps(model.train(training), x, 2), steps(stock.train(training), x, 2))
        with torch.no_grad():
            assert_same({"output": model(x)}, {"output": stock(x)})


def assert_second_derivatives(model, x, names):
    """Of the input and the parameters of these names."""
    parameters = dict(model.named_parameters())

    def call(x, *values):
        return torch.func.functional_call(model, parameters | dict(zip(names, values)), (x,))

    gradgradcheck(call, (x, *map(parameters.__getitem__, names)), nondet_tol=0, fast_mode=True)


@contextmanager
def without_garbage_collector():
    """What is let go inside is gone at once, or stays."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def assert_in_working_precision(stock, convert, x, autocast=None, channels_last=False, strides=True):
    """By the rule, of float32 or under autocast, whose network gets convolutions in its dtype; the output's dtype, and if asked for
    its ``strides``, are stock's. ``convert`` gives another network from a copy of stock."""
    dtype = autocast or torch.float32
    x = x.to(dtype)
    for conv in stock.convs:
        conv.to(dtype)  # autocast would round away a change in its last place
    inputs, params, run = {"x": x}, stock.state_dict(), module_run(stock, autocast)
    truth, runs = true_run(run, inputs, params), torch_runs(run, inputs, params)
    model = convert(copy.deepcopy(stock))
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        ours, theirs = copy.deepcopy(model)(x), copy.deepcopy(stock)(x)
    assert ours.dtype == theirs.dtype and (ours.stride() == theirs.stride() or not strides)
    assert_within_rule(module_run(model, autocast)({"x": x.clone()}, copy.deepcopy(params)), truth, runs, dtype)


def assert_budget_offers_what_it_costs(stock, x):
    """From "min" to "fast": all that the plan has to give, and what lies between the two."""
    reports = [rd.report(rd.convert(copy.deepcopy(stock), policy), x) for policy in ("min", "fast")]
    least, most = (report.saved_bytes for report in reports)
    recomputed = []
    for budget in (least, (least + most) // 2, most):
        model = rd.convert(copy.deepcopy(stock), memory_budget=budget, example_input=x)
        report = rd.report(model, x)
        assert report.plan.predicted_bytes == report.saved_bytes <= budget
        recomputed.append(report.plan.recomputed_flops)
        if budget in (least, most):
            assert report.saved_bytes == budget
        assert_same(steps(model, x), steps(stock, x))
    every, some, none = recomputed
    assert every >= some >= none == 0 < every


def peak_of_training(net, x):
    """Of the second step."""

    def step():
        net.zero_grad(set_to_none=True)
        net(x).square().mean().backward()

    step()
    return rd.memory.peak_bytes(step)


def assert_same(ours, stock, tolerance=1e-12):
    """Every tensor, by its norm; a gradient that is nearly zero is the rounding of the others."""
    assert ours.keys() == stock.keys()
    largest = max((t.norm() for name, t in stock.items() if name.startswith("grad ")), default=0)
    for name, t in stock.items():
        scale = t.double().norm() + 0.01 * largest * name.startswith("grad ")
        assert (ours[name] - t).double().norm() <= tolerance * scale, name


POLICIES = ("fast", "min")


@pytest.fixture(params=POLICIES)
def policy(request):
    return request.param


@pytest.fixture
def silent():
    """No warning is given that users would see."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.fixture
def engine(monkeypatch):
    """The list of the functional calls that modules have made, by their policies; of residual blocks each by its own."""
    calls = []

    def counted(call, note):
        def run(*args, **options):
            note(options["policy"])
            return call(*args, **options)

        return run

    notes = {"checked_dense_block": calls.append, "dual_path_stage": calls.append, "checked_residual_stage": calls.extend}
    for name, note in notes.items():
        monkeypatch.setattr(functional, name, counted(getattr(functional, name), note))
    return calls
