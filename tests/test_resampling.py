"""Pools and resizes among the convolutions of a graph, against the reference and against the modules as they are."""

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
    peak_of_training,
    policy,  # noqa: F401
    seeded,
    steps,
)
from test_dense_block import BACKENDS
from test_transposed import CONVS, NORMS, converted
from tolerance import assert_within_noise, rounding_noise
from torch import nn

import resdense_ext as rd
from resdense_ext import checks, reference
from resdense_ext.convert.strangers import Stranger
from resdense_ext.ops.conv_graph_function import conv_graph
from resdense_ext.ops.conv_graph_plan import offer_of
from resdense_ext.reference import Activation, BatchNorm, Conv, ConvGraph, Piece, Pool, Resize

SIZES = {1: (16,), 2: (8, 12), 3: (8, 8, 6)}
SMOOTH = {1: "linear", 2: "bilinear", 3: "trilinear"}
MAXIMA = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
AVERAGES = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}

pytestmark = pytest.mark.filterwarnings("error::UserWarning")


class Net(nn.Module):
    """Down by maxima, smoothed by averages, up to what it began with, and to sizes of its own."""

    def __init__(self, rank=2, norm="batch", widths=(4, 8, 12, 8, 8)):
        super().__init__()
        conv, norm = CONVS[rank], partial(NORMS[norm], rank)
        source, skip, deep, smooth, last = widths
        self.rank, self.sizes = rank, tuple(size + 3 for size in SIZES[rank])
        self.convs = nn.ModuleList([
            conv(source, skip, 3, padding=1),
            conv(skip, deep, 3, padding=1, bias=False),
            conv(deep, smooth, 3, padding=1),
            conv(skip + smooth, last, 3, padding=1),
            conv(last, 4, 3, padding=1),
        ])  # fmt: skip
        self.norms = nn.ModuleList([norm(skip), norm(deep), norm(smooth), norm(last)])
        self.act = nn.LeakyReLU(0.1, inplace=True)
        self.pool, self.up = MAXIMA[rank](2), nn.Upsample(scale_factor=2)

    def forward(self, x):
        skip = self.act(self.norms[0](self.convs[0](x)))
        y = self.act(self.norms[1](self.convs[1](self.pool(skip))))
        y = self.act(self.norms[2](self.convs[2](AVERAGES[self.rank](y, 3, stride=1, padding=1))))
        y = self.act(self.norms[3](self.convs[3](torch.cat([self.up(y), skip], 1))))
        return self.convs[4](F.interpolate(y, size=self.sizes, mode=SMOOTH[self.rank], align_corners=False))


@pytest.fixture(params=NORMS)
def norm(request):
    return request.param


network = partial(seeded, Net)


class TestInANetwork:
    @pytest.mark.parametrize("rank", [1, 2, 3])
    def test_in_float64(self, rank, norm, policy):
        stock, x = network(rank=rank, norm=norm), images(3, 4, *SIZES[rank])
        model = converted(stock, policy)
        assert isinstance(model, Stranger)
        assert_trains_and_evaluates_alike(model, stock, x)

    @pytest.mark.parametrize("channels_last", [False, True])
    @pytest.mark.parametrize("autocast", [None, torch.bfloat16])
    def test_in_working_precision(self, autocast, channels_last, norm, policy):
        """torch's instance norm makes its input contiguous."""
        stock, x, strides = network(torch.float32, norm=norm), images(3, 4, 8, 12), norm != "instance"
        assert_in_working_precision(stock, partial(rd.convert, policy=policy), x, autocast, channels_last, strides)

    @pytest.mark.parametrize("frozen", ["convs.3", "norms.1", "convs.2 norms.2", "convs.0 convs.1 norms.0 norms.1"])
    def test_what_is_frozen(self, frozen, norm, policy):
        stock, x = network(norm=norm), images(2, 4, 8, 12)
        for name in frozen.split():
            stock.get_submodule(name).requires_grad_(False)
        assert_same(steps(converted(stock, policy), x, 3), steps(stock, x, 3))

    def test_what_is_pooled_of_a_frozen_front_is_kept(self, norm, policy):
        """And none of the maps in front of it, which would take more. (The last convolution can read what it writes, and its map
        could be the source.)"""
        torch.manual_seed(2)
        front = [nn.Conv2d(4, 8, 3, padding=1), NORMS[norm](2, 8), nn.ReLU(), nn.MaxPool2d(2)]
        stock = nn.Sequential(*front, nn.Conv2d(8, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)).double()
        for layer in front:
            layer.requires_grad_(False)
        model, x = converted(stock, policy), images(2, 4, 8, 12)
        assert_same(steps(model, x, 3, of_input=False), steps(stock, x, 3, of_input=False))
        pooled, behind, statistics = 2 * 8 * 24, 2 * 4 * 24, 2 * 8 * (1 if norm == "batch" else 2)
        assert rd.memory.saved_bytes(lambda: model(x)) == 8 * (pooled + behind + statistics)

    def test_keeps_what_convolutions_made(self, norm):
        """And nothing of what was pooled or resized, which in stock is what the convolutions behind it keep."""
        stock, x = network(norm=norm), images(2, 4, 8, 12).requires_grad_()
        maps = 2 * (4 * 96 + 8 * 96 + 12 * 24 + 8 * 24 + 8 * 96)
        vectors = 2 * (8 + 12 + 8 + 8) * (1 if norm == "batch" else 2)
        assert rd.memory.saved_bytes(lambda: converted(stock)(x)) == 8 * (maps + vectors)
        least, most = (rd.memory.saved_bytes(lambda: net(x)) for net in (converted(stock, "min"), stock))
        assert least < 8 * maps < 0.31 * most

    def test_a_budget_offers_what_it_costs(self, norm):
        assert_budget_offers_what_it_costs(network(norm=norm), images(2, 4, 8, 12))

    @pytest.mark.unpoisoned  # what is counted are the tensors of a step
    def test_peak(self, policy):
        """Lower than stock's, though what was pooled and resized is made again."""
        stock, x = network(torch.float32), torch.randn(4, 4, 48, 48)
        assert peak_of_training(converted(stock, policy), x) < 0.8 * peak_of_training(stock, x)

    def test_second_derivative(self, norm):
        stock, x = network(norm=norm, widths=(4, 4, 4, 4, 4)), images(2, 4, 8, 12).requires_grad_()
        assert_second_derivatives(converted(stock), x, ("convs.1.weight", "convs.3.weight", "norms.1.bias"))

    @pytest.mark.parametrize("activation", [nn.Mish, nn.PReLU], ids=lambda kind: kind.__name__)
    def test_behind_an_activation_apart(self, activation, policy):
        """One that our kernels do not have, in front of every pool and resize."""
        stock, x = network(), images(2, 4, 8, 12)
        stock.act = activation().double()
        assert_same(steps(converted(stock, policy), x, 3), steps(stock, x, 3))


RELU = Activation()
RESAMPLINGS = {
    "maxima": (Pool("maximum", (2, 2), (2, 2), (0, 0)), (8, 6)),
    "maxima of windows that overlap": (Pool("maximum", (3, 3), (2, 2), (1, 1)), (7, 6)),
    "averages": (Pool("average", (3, 2), (1, 2), (1, 0)), (7, 6)),
    **{f"{mode}": (Resize(mode, (11, 9)), (5, 4)) for mode in ("nearest", "nearest-exact")},
    **{f"{mode} by factors": (Resize(mode, (), (2.0, 1.6)), (5, 4)) for mode in ("nearest", "nearest-exact")},
    **{f"{mode}": (Resize(mode, (11, 3), (), False), (5, 4)) for mode in ("bilinear", "bicubic")},
    **{f"{mode} by factors": (Resize(mode, (), (2.0, 0.7), False), (5, 4)) for mode in ("bilinear", "bicubic")},
    **{f"{mode}, corners aligned": (Resize(mode, (11, 9), (), True), (5, 4)) for mode in ("bilinear", "bicubic")},
}


def state(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    params = {"first": normal(6, 3, 3, 3), "last": normal(4, 6, 1, 1)}
    for i in range(2):
        params[f"gamma {i}"], params[f"beta {i}"] = 1 + 0.3 * normal(6), normal(6)
    return {"x": normal(2, 3, *sizes)}, params


def graph_of(by, params):
    """What is resampled is read behind a norm and an activation, and with a norm and an activation of its own; it is an output, too."""
    convs = Conv(params["first"], None, (1, 1)), by, Conv(params["last"], None, (0, 0))
    norms = tuple(BatchNorm(params[f"gamma {i}"], params[f"beta {i}"]) for i in range(2))
    reads = (Piece(0),), (Piece(1, 0, RELU),), (Piece(2, 1, RELU),)
    return ConvGraph(convs, reads, norms, ((Piece(3),), (Piece(2),), (Piece(1, 0, RELU),)))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", RESAMPLINGS)
def test_numbers(name, backend, channels_last, policy):
    by, sizes = RESAMPLINGS[name]
    assert by.outputs(sizes) == tuple(reference.resampled(torch.zeros(1, 1, *sizes), by).shape[2:])

    def run_of(call):
        def run(inputs, params):
            wanted = {name: t.requires_grad_() for name, t in (inputs | params).items()}
            outputs = call(list(inputs.values()), graph_of(by, params))
            sum((y * images(*y.shape, seed=1).to(y.dtype)).sum() for y in outputs).backward()
            return {f"output {i}": y.detach() for i, y in enumerate(outputs)} | {f"grad {k}": t.grad for k, t in wanted.items()}

        return run

    stock = run_of(reference.conv_graph)
    expected, noise = stock(*state(sizes)), rounding_noise(stock, *state(sizes))
    format = torch.channels_last if channels_last else torch.contiguous_format
    for _ in range(3):  # the third is replayed
        inputs, params = state(sizes)
        with rd.use_backend(backend):
            ours = run_of(partial(conv_graph, policy=policy))({"x": inputs["x"].to(memory_format=format)}, params)
        assert_within_noise(ours, expected, noise)
        assert all(ours[f"output {i}"].is_contiguous(memory_format=format) for i in range(3))


def test_the_cost_of_computing_again():
    """That of the convolution in front of a pool, which has no product itself."""
    weight = torch.randn(8, 4, 3, 3, requires_grad=True)
    convs = Conv(weight, None, (1, 1)), Pool("maximum", (2, 2), (2, 2), (0, 0)), Conv(torch.randn(3, 8, 1, 1, requires_grad=True))
    graph = ConvGraph(convs, ((Piece(0),), (Piece(1),), (Piece(2),)), (), ((Piece(3),),))
    x = torch.randn(2, 4, 6, 4, requires_grad=True)
    saved = [rd.memory.saved_bytes(lambda: conv_graph([x], graph, policy)) for policy in ("fast", "min")]
    assert offer_of([x], graph, torch.float32).maps == [(saved[0] - saved[1], 2 * 2 * 24 * weight.numel()), None, None]


@pytest.mark.parametrize(
    ("by", "pieces", "message"),
    [
        (Pool("maximum", (2,), (2,), (0,)), 1, r"convs\[1\]: expected a pool without ceil_mode, or a resize, with 2 numbers of each"),
        (Pool("maximum", (2, 2), (2, 2), (0, 0), True), 1, r"convs\[1\]: expected a pool without ceil_mode"),
        (Pool("global"), 1, r"convs\[1\]: expected a pool without ceil_mode, or a resize, with 2 numbers of each kind"),
        (Pool("maximum", (9, 9), (1, 1), (0, 0)), 1, r"convs\[1\]: expected windows within the padded x"),
        (Resize("nearest", (), (2.0,)), 1, r"convs\[1\]: expected a pool without ceil_mode, or a resize, with 2 numbers"),
        (Resize("nearest", (), (2.0, 0.1)), 1, r"convs\[1\]: expected to leave a position of a map of shape \(2, 8, 5, 4\), got"),
        (Resize("nearest", (2, 2)), 2, r"reads\[1\]: expected one piece of a new map for a pool or a resize, got 2"),
        (Resize("nearest", (2, 2)), 0, r"reads\[1\]: expected one piece of a new map for a pool or a resize, got one that is a source's"),
    ],
)
def test_errors(by, pieces, message):
    conv = Conv(torch.zeros(8, 4, 3, 3), None, (1, 1))
    graph = ConvGraph((conv, by), ((Piece(0),), (Piece(1),) * pieces or (Piece(0),)), (), ((Piece(2),),))
    with pytest.raises(ValueError, match=rf"^{message}"):
        checks.check_conv_graph([torch.zeros(2, 4, 5, 4)], graph)


class TestWhatIsLeftAlone:
    """By itself: a forward runs as it is, whatever stands between its convolutions."""

    def same(self, stock, x, layers, policy="fast"):
        model = converted(stock, policy)
        assert sum(row.layers for row in rd.report(model, x).rows) == layers
        assert_same(steps(model, x, 2), steps(stock, x, 2))

    @pytest.mark.parametrize(
        "resample",
        [
            lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear", recompute_scale_factor=True),
            lambda x: F.interpolate(x, scale_factor=2.0, mode="area"),
            lambda x: F.interpolate(x, size=(9, 9), mode="bilinear", antialias=True),
            lambda x: F.max_pool2d(x, 3, stride=2, ceil_mode=True),
            lambda x: F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False),
            lambda x: F.adaptive_avg_pool2d(x, 1),
        ],
        ids=["recomputed factor", "area", "antialiased", "windows beyond the map", "padding that does not count", "global"],
    )
    def test_other_resamplings(self, resample):
        """Behind them another chain begins."""

        class Between(Net):
            def forward(self, x):
                y = self.act(self.norms[0](self.convs[0](x)))
                y = self.act(self.norms[1](self.convs[1](y)))
                y = resample(y)
                y = self.act(self.norms[2](self.convs[2](y)))
                return y.sum() + x

        torch.manual_seed(0)
        self.same(Between().double(), images(2, 4, 8, 12), 2)

    def test_a_resize_of_which_another_reads(self):
        """A pyramid of features: every level is added to a resize of the one above."""

        class Pyramid(Net):
            def forward(self, x):
                skip = self.act(self.norms[0](self.convs[0](x)))
                y = self.act(self.norms[2](self.convs[2](self.act(self.norms[1](self.convs[1](self.pool(skip)))))))
                return self.convs[4](self.up(y) + skip)

        torch.manual_seed(0)
        self.same(Pyramid().double(), images(2, 4, 8, 12), 3)

    def test_an_average_of_what_stock_does_not_keep(self):
        """A convolution without a norm, pooled: kept is the smaller of the two."""

        class Averaged(Net):
            def forward(self, x):
                y = self.act(self.norms[1](self.convs[1](F.avg_pool2d(self.convs[0](x), 2))))
                return self.convs[2](y)

        torch.manual_seed(0)
        stock, x = Averaged().double(), images(2, 4, 8, 12).requires_grad_()
        model = converted(stock)
        assert rd.memory.saved_bytes(lambda: model(x)) == 8 * (2 * (4 * 96 + 8 * 24 + 12 * 24) + 2 * 12)
        self.same(stock, x.detach(), 2)


def test_a_pool_of_a_module_serves_twice(policy):
    """One pool and one resize for all levels, as some U-Nets have them."""

    class Levels(Net):
        def forward(self, x):
            first = self.act(self.norms[0](self.convs[0](x)))
            y = self.pool(self.act(self.norms[1](self.convs[1](self.pool(first)))))
            y = self.up(self.up(self.act(self.norms[2](self.convs[2](y)))))
            return self.convs[4](self.act(self.norms[3](self.convs[3](torch.cat([y, first], 1)))))

    torch.manual_seed(0)
    stock, x = Levels().double(), images(2, 4, 8, 12)
    model = converted(copy.deepcopy(stock), policy)
    assert [row.layers for row in rd.report(model, x).rows if row.layers] == [5]
    assert_same(steps(model, x, 3), steps(stock, x, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_on_a_gpu(norm, autocast, deterministic, policy):
    """Where all has to repeat, the framework has no smooth resize's backward; stock has another for it."""
    stock, x = network(norm=norm).cuda(), images(2, 4, 8, 12).cuda()
    model = converted(stock, policy)
    torch.use_deterministic_algorithms(deterministic)
    try:
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):  # float64 stays as it is
            assert_same(steps(model, x, 4), steps(stock, x, 4))
    finally:
        torch.use_deterministic_algorithms(False)
