"""Activations that none of our kernels has, between convolutions that run on the engine, against the modules as they are."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from small_nets import (
    assert_budget_offers_what_it_costs,
    assert_in_working_precision,
    assert_same,
    assert_second_derivatives,
    assert_trains_and_evaluates_alike,
    images,
    library,
    peak_of_training,
    policy,  # noqa: F401
    steps,
    torchvision_models,
)
from tolerance import assert_within_noise, module_run, rounding_noise
from torch import nn

import resdense_ext as rd

ACTIVATIONS = {
    "hardswish": partial(nn.Hardswish, inplace=True),
    "mish": nn.Mish,
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "prelu": partial(nn.PReLU, init=0.1),
    "prelu_of_channels": partial(nn.PReLU, 8, init=-0.3),
}
NORMS = {"batch": nn.BatchNorm2d, "instance": partial(nn.InstanceNorm2d, affine=True), "groups": partial(nn.GroupNorm, 4)}

pytestmark = pytest.mark.filterwarnings("error::UserWarning")


class Net(nn.Module):
    """Three convolutions, the last of which reads two maps side by side; the last norm and activation make the output."""

    def __init__(self, activation, norm=nn.BatchNorm2d):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(12, 8, 3, 2, 1, bias=False)])
        self.norms = nn.ModuleList([norm(8) for _ in range(3)])
        self.acts = nn.ModuleList([activation() for _ in range(3)])

    def forward(self, x):
        y = x
        for i, (conv, norm, act) in enumerate(zip(self.convs, self.norms, self.acts)):
            y = act(norm(conv(torch.cat([y, x], 1) if i == 2 else y)))
        return y


@pytest.fixture(params=ACTIVATIONS)
def activation(request):
    return ACTIVATIONS[request.param]


def network(activation, norm=nn.BatchNorm2d, dtype=torch.float64):
    torch.manual_seed(0)
    net = Net(activation, norm).to(dtype)
    for of in net.norms:
        nn.init.normal_(of.weight, 1.0, 0.3), nn.init.normal_(of.bias, 0.0, 0.3)
    return net


def converted(stock, *options, **more):
    return rd.convert(copy.deepcopy(stock), *options, **more)


@pytest.mark.parametrize("norm", NORMS)
def test_in_float64(activation, norm, policy):
    stock, x = network(activation, NORMS[norm]), images(3, 4, 9, 7)
    assert_trains_and_evaluates_alike(converted(stock, policy), stock, x)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_in_working_precision(activation, autocast, channels_last, policy):
    stock, x = network(activation, dtype=torch.float32), images(3, 4, 9, 7)
    assert_in_working_precision(stock, partial(rd.convert, policy=policy), x, autocast, channels_last)


def test_keeps_every_map_once(activation):
    stock, x = network(activation), images(2, 4, 9, 7).requires_grad_()
    maps = 2 * (4 * 63 + 8 * 63 + 8 * 63 + 8 * 20)
    assert rd.memory.saved_bytes(lambda: converted(stock)(x)) == 8 * (maps + 3 * 2 * 8)
    assert rd.memory.saved_bytes(lambda: converted(stock, "min")(x)) < 8 * maps


def test_a_budget_offers_what_it_costs(activation):
    assert_budget_offers_what_it_costs(network(activation), images(2, 4, 9, 7))


@pytest.mark.unpoisoned  # what is counted are the tensors of a step
def test_peak(activation, policy):
    """No higher than stock's, though activations are made again."""
    stock, x = network(activation, dtype=torch.float32), torch.randn(4, 4, 48, 48)
    assert peak_of_training(converted(stock, policy), x) < peak_of_training(stock, x)


class TestSlopes:
    @pytest.mark.parametrize("frozen", [0, 1, 2])
    def test_a_frozen_one_has_no_gradient(self, frozen, policy):
        stock, x = network(ACTIVATIONS["prelu"]), images(2, 4, 9, 7)
        stock.acts[frozen].weight.requires_grad_(False)
        assert_same(steps(converted(stock, policy), x), steps(stock, x))

    def test_all_else_is_frozen(self, policy):
        """Of a fine-tuning that trains slopes alone."""
        stock, x = network(ACTIVATIONS["prelu_of_channels"]), images(2, 4, 9, 7)
        stock.requires_grad_(False).eval()
        for act in stock.acts:
            act.weight.requires_grad_()
        found = []
        for net in (converted(stock, policy), stock):
            net(x).square().sum().backward()
            found.append({f"grad {i}": act.weight.grad for i, act in enumerate(net.acts)})
        assert_same(*found)

    def test_one_that_serves_twice(self, policy):
        stock, x = network(ACTIVATIONS["prelu"]), images(2, 4, 9, 7)
        stock.acts[2] = stock.acts[0]
        assert_same(steps(converted(stock, policy), x, 2), steps(stock, x, 2))

    def test_in_front_of_everything(self, policy):
        """It reads what comes from elsewhere, without a norm."""
        torch.manual_seed(0)
        stock = nn.Sequential(nn.ConvTranspose2d(4, 4, 2, 2), nn.PReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double()
        model, x = converted(stock, policy), images(2, 4, 5, 4)
        assert_same(steps(model, x), steps(stock, x))

    def test_of_the_wrong_size_as_in_stock(self):
        stock = network(partial(nn.PReLU, 3))
        with pytest.raises(RuntimeError, match="Mismatch of parameter numbers"):
            stock(images(2, 4, 9, 7))
        with pytest.raises(RuntimeError, match="Mismatch of parameter numbers"):
            converted(stock)(images(2, 4, 9, 7))


@pytest.mark.parametrize("name", ["mish", "gelu", "prelu_of_channels"])
def test_second_derivative(name):
    stock, x = network(ACTIVATIONS[name]), images(2, 4, 5, 4).requires_grad_()
    model = converted(stock)
    names = [key for key, _ in model.named_parameters() if key.startswith(("convs.0", "acts.0"))]
    assert_second_derivatives(model, x, names)


def test_torch_compile(activation):
    stock, x = network(activation), images(2, 4, 9, 7)
    torch.compiler.reset()
    compiled = torch.compile(converted(stock), backend="aot_eager")
    state, run = stock.state_dict(), module_run(stock)
    y = compiled(x.clone().requires_grad_())
    assert_within_noise({"output": y.detach()}, {"output": stock(x)}, rounding_noise(run, {"x": x}, state))
    y.sum().backward()


@pytest.mark.parametrize("call", [F.gelu, partial(F.gelu, approximate="tanh"), F.mish, partial(F.hardswish, inplace=True)])
def test_functions(call, policy):
    class Own(Net):
        def forward(self, x):
            for conv, norm in zip(self.convs[:2], self.norms):
                x = call(norm(conv(x)))
            return x

    torch.manual_seed(0)
    stock, x = Own(nn.ReLU).double(), images(2, 4, 9, 7)
    model = converted(stock, policy)
    assert_same(steps(model, x, 2), steps(stock, x, 2))
    kept = [rd.memory.saved_bytes(lambda: net(x.clone().requires_grad_())) for net in (model, stock)]
    assert kept[0] < 0.65 * kept[1]


def test_residual_and_dense_blocks_of_them_stay_stock():
    """By name."""
    stock, x = torchvision_models().resnet18(num_classes=3).double(), images(2, 3, 32, 32)
    for block in stock.modules():
        if hasattr(block, "relu"):
            block.relu = nn.GELU()
    with pytest.warns(UserWarning, match="relu is GELU"):
        model = converted(stock)
        assert_same(steps(model, x), steps(stock, x))


@pytest.mark.parametrize("name, least", [("unet", 0.85), ("mobilenet", 0.65)])
def test_networks(name, least, policy):
    """MONAI's U-Net, whose activation is a PReLU, and torchvision's MobileNetV3."""
    torch.manual_seed(0)
    if name == "unet":
        stock, x = library("monai.networks.nets").UNet(3, 1, 2, (4, 8, 16), (2, 2), num_res_units=2), images(2, 1, 8, 16, 8)
    else:
        stock, x = torchvision_models().mobilenet_v3_small(num_classes=3, dropout=0.0), images(2, 3, 64, 64)
    stock = stock.double()
    model = converted(stock, policy)
    state, run = stock.state_dict(), module_run(stock)
    ours, expected = (module_run(net)({"x": x.clone()}, copy.deepcopy(state)) for net in (model, stock))
    assert_within_noise(ours, expected, rounding_noise(run, {"x": x}, state))
    kept = [rd.memory.saved_bytes(lambda: net(x.clone().requires_grad_())) for net in (model, stock)]
    assert kept[0] < least * kept[1]
