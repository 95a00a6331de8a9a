"""Transposed convolutions in graphs of convolutions, as U-Nets have them on their way up, against the modules as they are."""

import copy
from functools import partial

import pytest
import torch
from small_nets import (
    assert_budget_offers_what_it_costs,
    assert_in_working_precision,
    assert_same,
    assert_second_derivatives,
    assert_trains_and_evaluates_alike,
    images,
    peak_of_training,
    policy,  # noqa: F401
    seeded,
    steps,
)
from torch import nn

import resdense_ext as rd
from resdense_ext import checks
from resdense_ext.ops.conv_graph_plan import offer_of
from resdense_ext.reference import Conv, ConvGraph, Piece, TransposedConv

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
NORMS = {
    "batch": lambda rank, channels: BATCH[rank](channels),
    "instance": lambda rank, channels: INSTANCE[rank](channels, affine=True),
    "groups": lambda rank, channels: nn.GroupNorm(4, channels),
}
SIZES = {1: (18,), 2: (10, 8), 3: (6, 8, 4)}

pytestmark = pytest.mark.filterwarnings("error::UserWarning")


class Net(nn.Module):
    """Down and up again: one transposed convolution reads an activated map, and one such a map and another side by side; the first
    has no norm behind it."""

    def __init__(self, rank=2, norm="batch"):
        super().__init__()
        conv, up, norm = CONVS[rank], TRANSPOSED[rank], partial(NORMS[norm], rank)
        self.convs = nn.ModuleList([
            conv(4, 8, 3, padding=1),
            conv(8, 12, 3, 2, 1),
            up(12, 8, 2, 2, groups=2),
            up(16, 8, 3, 2, 1, output_padding=1, bias=False),
            conv(8, 4, 3, dilation=2),
        ])  # fmt: skip
        self.norms = nn.ModuleList([norm(8), norm(12), norm(8)])
        self.act = nn.LeakyReLU(0.1, inplace=True)

    def forward(self, x):
        skip = self.act(self.norms[0](self.convs[0](x)))
        y = self.act(self.norms[1](self.convs[1](skip)))
        y = torch.cat([self.convs[2](y), skip], 1)
        return self.convs[4](self.act(self.norms[2](self.convs[3](y))))


@pytest.fixture(params=NORMS)
def norm(request):
    return request.param


network = partial(seeded, Net)


def converted(stock, *options, **more):
    return rd.convert(copy.deepcopy(stock), *options, **more)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_in_float64(rank, norm, policy):
    stock, x = network(rank=rank, norm=norm), images(3, 4, *SIZES[rank])
    assert_trains_and_evaluates_alike(converted(stock, policy), stock, x)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_in_working_precision(autocast, channels_last, norm, policy):
    """torch's instance norm makes its input contiguous."""
    stock, x, strides = network(torch.float32, norm=norm), images(3, 4, 10, 8), norm != "instance"
    assert_in_working_precision(stock, partial(rd.convert, policy=policy), x, autocast, channels_last, strides)


@pytest.mark.parametrize("frozen", ["convs.2", "convs.3", "norms.1", "convs.0 convs.1 norms.0 norms.1"])
def test_what_is_frozen(frozen, norm, policy):
    stock, x = network(norm=norm), images(2, 4, 10, 8)
    for name in frozen.split():
        stock.get_submodule(name).requires_grad_(False)
    assert_same(steps(converted(stock, policy), x, 3), steps(stock, x, 3))


def test_keeps_every_map_once(norm):
    stock, x = network(norm=norm), images(2, 4, 10, 8).requires_grad_()
    maps = 2 * (4 * 80 + 8 * 80 + 12 * 20 + 8 * 80 + 8 * 320)
    vectors = 2 * (8 + 12 + 8) * (1 if norm == "batch" else 2)
    assert rd.memory.saved_bytes(lambda: converted(stock)(x)) == 8 * (maps + vectors)
    least, most = (rd.memory.saved_bytes(lambda: net(x)) for net in (converted(stock, "min"), stock))
    assert least < 8 * maps < 0.6 * most


def test_a_budget_offers_what_it_costs(norm):
    assert_budget_offers_what_it_costs(network(norm=norm), images(2, 4, 10, 8))


@pytest.mark.unpoisoned  # what is counted are the tensors of a step
def test_peak(policy):
    """No higher than stock's, though activations are made again."""
    stock, x = network(torch.float32), torch.randn(4, 4, 48, 48)
    assert peak_of_training(converted(stock, policy), x) < peak_of_training(stock, x)


def test_second_derivative(norm):
    stock, x = network(norm=norm), images(2, 4, 10, 8).requires_grad_()
    assert_second_derivatives(converted(stock), x, ("convs.2.weight", "convs.3.weight", "norms.1.bias"))


def test_other_sizes_are_left_alone():
    """A size that the forward asks for is no number of the layer's."""

    class Sized(Net):
        def forward(self, x):
            y = self.act(self.norms[1](self.convs[1](self.act(self.norms[0](self.convs[0](x))))))
            return self.convs[2](y, output_size=(11, 9))

    torch.manual_seed(0)
    stock, x = Sized().double(), images(2, 4, 10, 8)
    assert_same(steps(converted(stock), x, 2), steps(stock, x, 2))


def test_the_cost_of_computing_again():
    """As many products as values of the weight, for each position of what it reads."""
    weight = torch.randn(8, 4, 2, 2, requires_grad=True)
    up = TransposedConv(weight, stride=(2, 2))
    assert up.channels == 4 and up.outputs((5, 3)) == (10, 6)
    conv = Conv(torch.randn(3, 4, 3, 3), padding=(1, 1))
    graph = ConvGraph((up, conv), ((Piece(0),), (Piece(1),)), (), ((Piece(2),),))
    x = torch.randn(2, 8, 5, 3, requires_grad=True)
    assert offer_of([x], graph, torch.float32).maps == [(4 * 2 * 4 * 60, 2 * 2 * 15 * weight.numel()), None]


@pytest.mark.parametrize(
    "conv, message",
    [
        (TransposedConv(torch.zeros(6, 4, 2, 2)), r"weight: expected \[8, K / groups, \*kernel\] a multiple of groups = 1, got"),
        (TransposedConv(torch.zeros(8, 4, 2, 2), torch.zeros(8)), r"bias: expected shape \(4,\), got \(8,\)"),
        (TransposedConv(torch.zeros(8, 4, 2)), "weight: expected 4 dimensions as x has, got 3"),
    ],
)
def test_errors(conv, message):
    graph = ConvGraph((conv,), ((Piece(0),),), (), ((Piece(1),),))
    with pytest.raises(ValueError, match=rf"^reads\[0\].conv.{message}"):
        checks.check_conv_graph([torch.zeros(2, 8, 5, 4)], graph)
