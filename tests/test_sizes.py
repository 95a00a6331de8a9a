"""Forwards that ask for sizes, as decoders of segmentation networks do: traced for the shapes that they are given."""

import copy
import math
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from small_nets import (
    assert_same,
    images,
    library,
    policy,  # noqa: F401
    randomise,
    steps,
    torchvision_models,
    without_garbage_collector,
)
from torch import nn

import resdense_ext as rd
from resdense_ext.convert import strangers
from resdense_ext.convert.strangers import Stranger

pytestmark = pytest.mark.filterwarnings("error::UserWarning")


class Twice(nn.Sequential):
    def __init__(self, inputs, outputs):
        units = [(nn.Conv2d(n, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)) for n in (inputs, outputs)]
        super().__init__(*(layer for unit in units for layer in unit))


class Level(nn.Module):
    """On the way up: what comes from below is brought to the sizes of what comes from the side, in one of the ways that there are."""

    def __init__(self, below, beside, outputs, way):
        super().__init__()
        self.up, self.way = nn.ConvTranspose2d(below, beside, 2, 2), way
        self.convs = Twice(2 * beside, outputs)

    def forward(self, below, beside):
        return self.convs(torch.cat([beside, getattr(self, self.way)(below, beside)], 1))

    def pads(self, below, beside):
        x = self.up(below)
        rows, columns = beside.size()[2] - x.size()[2], beside.size()[3] - x.size()[3]
        return F.pad(x, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])

    def decides(self, below, beside):
        x, sides = self.up(below), [0] * 4
        for i in range(len(beside.shape) - 2):
            if beside.shape[-1 - i] != x.shape[-1 - i]:
                sides[2 * i + 1] = 1
        return F.pad(x, sides, "replicate")

    def resizes(self, below, beside):
        return F.interpolate(self.up(below), beside.shape[-2:])


class UNet(nn.Module):
    def __init__(self, way, width=4):
        super().__init__()
        self.down = nn.ModuleList([Twice(3, width), Twice(width, 2 * width), Twice(2 * width, 4 * width)])
        self.pool, self.out = nn.MaxPool2d(2), nn.Conv2d(width, 2, 1)
        self.levels = nn.ModuleList([Level(4 * width, 2 * width, 2 * width, way), Level(2 * width, width, width, way)])

    def forward(self, x):
        first = self.down[0](x)
        second = self.down[1](self.pool(first))
        third = self.down[2](self.pool(second))
        return self.out(self.levels[1](self.levels[0](third, second), first))


WAYS = "pads", "decides", "resizes"
EVEN, ODD = (2, 3, 16, 12), (2, 3, 15, 13)


def network(way, kind=UNet):
    torch.manual_seed(0)
    return randomise(kind(way)).double()


@pytest.fixture(params=WAYS)
def way(request):
    return request.param


def layers_of(model, x):
    return [row.layers for row in rd.report(model, x).rows if row.layers]


class TestAUNet:
    def test_agrees_at_whatever_size(self, way, policy):
        """In turns: each has a program of its own."""
        stock, inputs = network(way), [images(*shape) for shape in (EVEN, ODD, (1, 3, 8, 20))]
        model = rd.convert(copy.deepcopy(stock), policy)
        assert isinstance(model, Stranger)
        for x in inputs * 2:
            assert_same(steps(model, x, 3), steps(stock, x, 3))
            model(x).sum().backward(), stock(x).sum().backward()
            for net in (model, stock):
                net.zero_grad()
        for x in inputs:
            assert_same({"output": model.eval()(x)}, {"output": stock.eval()(x)})
        assert_same(dict(model.named_buffers()), dict(stock.named_buffers()))

    def test_is_one_graph(self, way):
        """Of the sizes that go together: every convolution's map is kept once, and nothing that was pooled, padded or resized."""
        stock, x = network(way), images(*EVEN).requires_grad_()
        model = rd.convert(stock)
        assert layers_of(model, x) == [13] and not rd.report(model, x).left
        positions = [2 * 16 * 12, 2 * 8 * 6, 2 * 4 * 3]
        maps = (3 + 4 * 4 + 4) * positions[0] + (4 * 8 + 8) * positions[1] + 2 * 16 * positions[2]
        vectors = 2 * (4 * 4 + 4 * 8 + 2 * 16)
        assert rd.memory.saved_bytes(lambda: model(x)) == 8 * (maps + vectors)

    def test_an_example_says_what_the_sizes_are(self, way):
        """And outputs, gradients and buffers are compared at these."""
        stock, x = network(way), images(*ODD)
        model = rd.convert(copy.deepcopy(stock), example_input=x)
        assert isinstance(model, Stranger)
        assert_same(steps(model, x, 2), steps(stock, x, 2))

    def test_copies(self, way):
        stock, x = network(way), images(*EVEN)
        model = rd.convert(copy.deepcopy(stock))
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert layers_of(again, x) == [13]
            assert_same(steps(again, x), steps(stock, x))

    @pytest.mark.parametrize("autocast", [False, True])
    def test_in_channels_last(self, way, autocast, policy):
        stock = network(way).float().to(memory_format=torch.channels_last)
        model = rd.convert(copy.deepcopy(stock), policy)
        x = images(*ODD).float().contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ours, theirs = model(x), stock(x)
        assert ours.dtype == theirs.dtype and ours.stride() == theirs.stride()

    def test_the_model_that_is_given_up_is_gone(self, way):
        with without_garbage_collector():
            model, x = rd.convert(network(way)), images(*EVEN)
            model(x)
            alive = weakref.ref(model)
            del model
            assert alive() is None


def test_many_sizes(monkeypatch):
    """After so many the program for all takes those that are new, as long as the model lives; it is right as well."""
    monkeypatch.setattr(strangers, "_PROGRAMS", 4)
    stock = network("pads")
    model = rd.convert(copy.deepcopy(stock))
    for size in range(8, 20):
        x = images(2, 3, size, 8)
        assert_same(steps_in_place(model, x), steps_in_place(stock, x))
    assert len(strangers._programs[model]) <= 4 + 1
    assert layers_of(model, images(2, 3, 8, 8)) == [13] and layers_of(model, images(2, 3, 16, 8)) != [13]


def steps_in_place(model, x):
    """Output, gradients and buffers of a step of the model itself."""
    model.zero_grad()
    output = model(x)
    output.square().sum().backward()
    grads = {f"grad {name}": p.grad.clone() for name, p in model.named_parameters()}
    return {"output": output.detach(), **grads} | {f"buffer {name}": b.clone() for name, b in model.named_buffers()}


class TestWhatChanges:
    """What sizes were worked out from is compared, too."""

    def both(self, change, x=EVEN):
        stock = network("pads")
        model = rd.convert(copy.deepcopy(stock))
        for _ in range(2):
            assert_same(steps_in_place(model, images(*x)), steps_in_place(stock, images(*x)))
            change(model), change(stock)

    def test_a_layers_numbers(self):
        def change(net):
            net.down[1][0].padding, net.down[1][3].padding = (2, 2), (0, 0)
            net.pool.stride, net.pool.kernel_size = 2, 2

        self.both(change)

    def test_the_sizes_of_a_weight(self):
        def change(net):
            with torch.no_grad():
                net.down[0][0].weight = nn.Parameter(torch.ones(4, 3, 5, 5).double() / 75)
                net.down[0][0].padding = (2, 2)

        self.both(change)

    def test_what_is_inside_of_a_converted_module(self):
        """The trace does not look into it, but knows its sizes."""

        class Around(nn.Module):
            def __init__(self, way):
                super().__init__()
                self.block = torchvision_models().resnet.BasicBlock(3, 3)
                self.net = UNet(way)

            def forward(self, x):
                return self.net(self.block(x))

        stock = network("decides", Around)
        model = rd.convert(copy.deepcopy(stock))
        assert layers_of(model, images(*EVEN)) == [2, 13]
        assert_same(steps(model, images(*EVEN), 2), steps(stock, images(*EVEN), 2))

    def test_hooks(self):
        """They see what they saw, and no more often."""
        seen = []
        stock, x = network("pads"), images(*EVEN)
        model = rd.convert(copy.deepcopy(stock))
        model(x)
        for net in (model, stock):
            net.down[0][0].register_forward_hook(lambda module, args, output: seen.append(output.shape))
        with pytest.warns(UserWarning, match="carries hooks"):
            model(x)
        stock(x)
        assert len(seen) == 2 and seen[0] == seen[1]


def test_nothing_of_the_model_changes(way):
    """Not its buffers, nor the random numbers to come, though its layers tell their sizes."""
    net = network(way)
    net.down[0].append(nn.Dropout(0.5))
    before, random_state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    rd.convert(net)
    assert_same(net.state_dict(), before, tolerance=0)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_guess_that_is_wrong_is_not_heard_of(capfd, caplog):
    """A network for one size: nothing is logged, and it is converted."""

    class Sized(UNet):
        def __init__(self, way):
            super().__init__(way)
            self.linear = nn.Linear(2 * 16 * 12, 5)

        def forward(self, x):
            return self.linear(super().forward(x).flatten(1))

    stock, x = network("pads", Sized), images(*EVEN)
    model = rd.convert(copy.deepcopy(stock))
    assert layers_of(model, x) == [13]
    assert_same(steps(model, x, 2), steps(stock, x, 2))
    assert not caplog.records and capfd.readouterr().err == ""


class Standardised(nn.Conv2d):
    """No layer that the engines know."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


@pytest.mark.parametrize(
    "put",
    [
        lambda net: net.levels[1].convs.__setitem__(0, Standardised(8, 4, 3, padding=1)),
        lambda net: net.down[2].__setitem__(4, nn.GroupNorm(4, 16)),
        lambda net: net.down[1].__setitem__(1, nn.InstanceNorm2d(8, track_running_stats=True)),
    ],
    ids=["a convolution of its own kind", "a group norm among batch norms", "a norm of another kind"],
)
def test_what_no_graph_takes_leaves_the_rest_to_smaller_ones(put, policy):
    stock, x = network("pads"), images(*EVEN)
    put(stock)
    stock.double()
    model = rd.convert(copy.deepcopy(stock), policy)
    report = rd.report(model, x)
    assert sum(row.layers for row in report.rows) >= 8 and report.saved_bytes < 0.85 * report.stock_saved_bytes
    assert_same(steps(model, x, 2), steps(stock, x, 2))


def test_layers_whose_sizes_come_with_the_first_input(policy):
    class Odd(UNet):
        def __init__(self, way):
            super().__init__(way)
            self.more = nn.Sequential(nn.LazyConv2d(2, 1), nn.Conv2d(2, 2, 1))

        def forward(self, x):
            return self.more(super().forward(x))

    torch.manual_seed(0)
    stock, x = Odd("pads").double(), images(*EVEN)
    model = rd.convert(copy.deepcopy(stock), policy)
    with pytest.warns(UserWarning, match="is LazyConv2d"):
        stock(x), model(x)
    model.load_state_dict(stock.state_dict())
    assert isinstance(model, Stranger)
    assert_same(steps_in_place(model, x), steps_in_place(stock, x))
    assert sum(row.layers for row in rd.report(model, x).rows) >= 10


class Decides(UNet):
    """On a value, not on a size."""

    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else -super().forward(x)


def test_decisions_on_values_are_left_alone():
    stock, x = network("pads", Decides), images(*EVEN)
    model = rd.convert(copy.deepcopy(stock))
    assert not isinstance(model, Stranger) and "depends on values" in rd.report(model, x).left[0]
    for sign in (x.abs(), -x.abs()):
        assert_same(steps(model, sign), steps(stock, sign))


class Asks(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.norm, self.relu, self.act = nn.BatchNorm2d(4), nn.ReLU(), nn.LeakyReLU(0.1)
        self.way = way

    def forward(self, x, other=None):
        y = self.act(self.norm(self.first(x)))
        return getattr(self, self.way)(y, y if other is None else other)

    def isinstance(self, y, other):
        if isinstance(y, torch.Tensor) and torch.jit.isinstance(other, torch.Tensor):
            return self.relu(self.second(torch.cat([y, other], 1)))
        return y

    def counts(self, y, other):
        assert len(y) == y.shape[0] and y.dim() == y.ndim == 4 and y.numel() == math.prod(y.size())
        return self.relu(self.second(torch.cat([y, other], 1)))


@pytest.mark.parametrize("asked", ["isinstance", "counts"])
def test_what_else_is_asked(asked, policy):
    """Again and again, which a function of Python's that is called often answers in another way."""
    for _ in range(12):
        stock, x = network(asked, Asks), images(2, 3, 6, 5)
        model = rd.convert(copy.deepcopy(stock), policy)
        assert layers_of(model, x) == [2] and not rd.report(model, x).left
    assert_same(steps(model, x, 2), steps(stock, x, 2))


def test_several_inputs():
    """Of which nothing can be guessed: their shapes come with the first call."""

    class Two(nn.Module):
        def __init__(self, way):
            super().__init__()
            self.net = Level(8, 4, 4, way)
            self.first, self.second = Twice(3, 8), Twice(3, 4)

        def forward(self, below, beside):
            return self.net(self.first(below), self.second(beside))

    stock, inputs = network("pads", Two), (images(2, 3, 8, 6), images(2, 3, 16, 12))
    model = rd.convert(copy.deepcopy(stock), example_input=inputs)
    assert layers_of(model, inputs) == [7]
    call = lambda net, x: net(x, inputs[1])  # noqa: E731
    assert_same(steps(model, inputs[0], 2, call), steps(stock, inputs[0], 2, call))


def monai(name, **options):
    return getattr(library("monai.networks.nets"), name)(3, 1, 2, **options)


@pytest.mark.parametrize(
    ("name", "layers", "most"), [("BasicUNet", 23, (0.5, 0.2)), ("BasicUNetPlusPlus", 44, (0.42, 0.16))]
)
@pytest.mark.parametrize("size", [32, 33])
def test_of_monai(name, layers, most, size, policy):
    """Their way up decides on sizes; where sides are odd, it pads."""
    torch.manual_seed(0)
    stock = monai(name, features=(4, 4, 8, 8, 8, 4), dropout=0.0).double()
    x = images(1, 1, size, 32, 32)
    model = rd.convert(copy.deepcopy(stock), policy)

    def call(net, x):
        y = net(x)
        return y[0] if isinstance(y, list) else y

    assert_same(steps(model, x, 1, call), steps(stock, x, 1, call))
    if size == 32:
        report = rd.report(model, x)
        assert [row.layers for row in report.rows if row.layers] == [layers] and not report.left
        assert report.saved_bytes < most[policy == "min"] * report.stock_saved_bytes

