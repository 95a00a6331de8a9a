"""The engine of convolutions of concatenations, against the reference: every backend, both memory formats, mixed readers."""

import random
from functools import partial

import pytest
import torch
from small_nets import assert_same, policy  # noqa: F401
from test_dense_block import BACKENDS, built
from tolerance import assert_within_noise, assert_within_rule, rounding_noise, torch_runs, true_run
from torch.autograd import gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

import resdense_ext as rd
from resdense_ext import reference
from resdense_ext.ops import conv_graph_function, conv_graph_plan, instances
from resdense_ext.ops.conv_graph_function import conv_graph
from resdense_ext.reference import Activation, BatchNorm, Conv, ConvGraph, Piece

RELU, LINEAR = Activation(), Activation("identity")

# Maps 0 and 1 are sources of 3 and 2 channels. The norms are of maps 2, 3, 0 (not trained), 2, and 4 (frozen).
READS = (
    (Piece(0), Piece(1)),
    (Piece(2, 0, RELU), Piece(0)),
    (Piece(3, 1), Piece(1, None, RELU), Piece(2, 0, RELU), Piece(0, 2, RELU)),
    (Piece(2, 3, RELU),),
    (Piece(4, 4, RELU), Piece(4), Piece(2)),
)
OUTPUTS = ((Piece(6),), (Piece(4, 4, RELU), Piece(0), Piece(2, 0, RELU)), (Piece(3, 1, RELU),), (Piece(5),))
WIDTHS = (3, 2, 4, 3, 2, 4, 3)
NORMED = (2, 3, 0, 2, 4)
KERNELS = ((3, 1), (1, 1), (3, 1), (1, 2), (3, 2))
"""Of the five convolutions, with their strides."""


def state(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = {"a": normal(2, 3, 5, 4), "b": normal(2, 2, 5, 4)}
    params = {}
    for i, ((kernel, _), pieces) in enumerate(zip(KERNELS, READS)):
        inner = sum(WIDTHS[piece.map] for piece in pieces)
        params[f"weight {i}"] = normal(WIDTHS[2 + i], inner, kernel, kernel) * inner**-0.5
        if i % 2:
            params[f"bias {i}"] = normal(WIDTHS[2 + i])
    for i, of in enumerate(NORMED):
        if i != 2:
            params[f"gamma {i}"], params[f"beta {i}"] = 1 + 0.3 * normal(WIDTHS[of]), normal(WIDTHS[of])
        params[f"mean {i}"], params[f"var {i}"] = normal(WIDTHS[of]), 1 + normal(WIDTHS[of]) ** 2
    return inputs, params


def graph_of(params, activation=RELU):
    convs = [
        Conv(params[f"weight {i}"], params.get(f"bias {i}"), (kernel // 2,) * 2, stride=(step,) * 2)
        for i, (kernel, step) in enumerate(KERNELS)
    ]
    norms = [
        BatchNorm(params.get(f"gamma {i}"), params.get(f"beta {i}"), params[f"mean {i}"], params[f"var {i}"], i != 4, 0.1)
        for i in range(len(NORMED))
    ]

    def put(piece):
        if piece.activation != RELU:
            return piece
        own = Activation("prelu", int(piece.norm == 3)) if activation.name == "prelu" else activation
        return piece._replace(activation=own)

    reads, outputs = (tuple(tuple(map(put, pieces)) for pieces in of) for of in (READS, OUTPUTS))
    slopes = tuple(params[f"slope {i}"] for i in range(2)) if activation.name == "prelu" else ()
    return ConvGraph(tuple(convs), reads, tuple(norms), outputs, slopes)


def with_slopes(inputs, params):
    """Two weights of PReLUs, one for all channels, one for those of map 2."""
    return inputs, {**params, "slope 0": torch.tensor([0.3]).double(), "slope 1": torch.tensor([0.1, -0.2, 0.4, 0.0]).double()}


def run_of(call, activation=RELU, used=range(len(OUTPUTS)), without=()):
    def run(inputs, params):
        wanted = {
            name: t.requires_grad_()
            for name, t in (inputs | params).items()
            if name.split()[0] not in ("mean", "var") and name not in without
        }
        outputs = call(list(inputs.values()), graph_of(params, activation))
        weights = torch.Generator().manual_seed(1)
        loss = sum((outputs[i] * torch.randn(outputs[i].shape, generator=weights).to(outputs[i].dtype)).sum() for i in used)
        loss.backward()
        grads = {f"grad {name}": t.grad for name, t in wanted.items() if t.grad is not None}
        return {f"output {i}": y.detach() for i, y in enumerate(outputs)} | grads

    return run


def layout(tensors, channels_last):
    maps = {k for k, t in tensors.items() if channels_last and t.dim() == 4}
    return {k: t.to(memory_format=torch.channels_last) if k in maps else t for k, t in tensors.items()}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
class TestNumbers:
    @pytest.mark.parametrize("used, without", [((0, 1, 2, 3), ()), ((2,), ("a",)), ((0, 3), ("a", "b", "gamma 0", "weight 0"))])
    def test_in_float64(self, backend, channels_last, used, without, policy):
        inputs, params = state()
        stock = run_of(reference.conv_graph, used=used, without=without)
        noise = rounding_noise(stock, inputs, params)
        with rd.use_backend(backend):
            inputs = layout(inputs, channels_last)
            call = partial(conv_graph, policy=policy)
            ours = run_of(call, used=used, without=without)({k: t.clone() for k, t in inputs.items()}, state()[1])
        assert_within_noise(ours, stock(*state()), noise)
        assert all(ours[f"output {i}"].is_contiguous(memory_format=layout_of(channels_last)) for i in range(len(OUTPUTS)))

    def test_weights_say_what_the_layout_is(self, backend, channels_last):
        """Of a network in channels-last whose images are contiguous."""
        inputs, params = state()
        params = layout(params, channels_last)
        stock = run_of(reference.conv_graph)
        with rd.use_backend(backend):
            ours = run_of(conv_graph)({k: t.clone() for k, t in inputs.items()}, params)
        assert_within_noise(ours, stock(*state()), rounding_noise(stock, *state()))
        assert all(ours[f"output {i}"].is_contiguous(memory_format=layout_of(channels_last)) for i in range(len(OUTPUTS)))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_in_working_precision(self, backend, channels_last, dtype, policy):
        # Norms are float32 in both, as they are beside a lower precision.
        inputs, params = state()
        inputs = {name: t.to(dtype) for name, t in inputs.items()}
        params = {name: t.to(dtype if name.split()[0] in ("weight", "bias") else torch.float32) for name, t in params.items()}
        stock = run_of(reference.conv_graph)
        runs, truth = torch_runs(stock, inputs, params), true_run(stock, inputs, params)
        with rd.use_backend(backend):
            call = partial(conv_graph, policy=policy)
            ours = run_of(call)(layout({k: t.clone() for k, t in inputs.items()}, channels_last), params)
        assert_within_rule(ours, truth, runs, dtype)


def layout_of(channels_last):
    return torch.channels_last if channels_last else torch.contiguous_format


@pytest.mark.parametrize("activation", [Activation("leaky_relu", 0.2), Activation("elu"), Activation("silu")], ids=lambda a: a.name)
def test_activations(activation, policy):
    stock, call = run_of(reference.conv_graph, activation), partial(conv_graph, policy=policy)
    assert_within_noise(run_of(call, activation)(*state()), stock(*state()), rounding_noise(stock, *state()))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["hardswish", "mish", "gelu", "gelu_tanh", "prelu"])
def test_activations_apart(name, backend, channels_last, policy):
    """Those that our kernels do not have."""
    activation, (inputs, params) = Activation(name), with_slopes(*state())
    stock, call = run_of(reference.conv_graph, activation), partial(conv_graph, policy=policy)
    expected, noise = stock(*with_slopes(*state())), rounding_noise(stock, *with_slopes(*state()))
    with rd.use_backend(backend):
        ours = run_of(call, activation)(layout(inputs, channels_last), params)
    assert_within_noise(ours, expected, noise)
    assert ("grad slope 1" in ours) == (name == "prelu")


def test_running_statistics_are_those_of_a_batch_norm_and_change_once():
    def stock(inputs, params):
        norm = torch.nn.BatchNorm2d(4).to(inputs["a"].dtype)
        norm.running_mean.copy_(params["mean 0"])
        norm.running_var.copy_(params["var 0"])
        norm(reference.convolution(torch.cat(list(inputs.values()), 1), graph_of(params).convs[0]))
        return {"mean 0": norm.running_mean, "var 0": norm.running_var}

    inputs, params = state()
    conv_graph(list(inputs.values()), graph_of(params))
    found = {name: params[name] for name in ("mean 0", "var 0")}
    assert_within_noise(found, stock(*state()), rounding_noise(stock, *state()))
    assert torch.equal(params["mean 4"], state()[1]["mean 4"]), "a frozen norm's are only read"


def test_keeps_its_maps_and_nothing_else():
    inputs, params = state()
    for t in (*inputs.values(), *params.values()):
        t.requires_grad_(False)
    inputs["a"].requires_grad_()
    positions = inputs["a"][:, :1].numel()
    kept = rd.memory.saved_bytes(lambda: conv_graph(list(inputs.values()), graph_of(params)))
    # Map 5 is strided, and like map 6 read by nobody; maps 2, 3 and 0 have statistics of the batch.
    maps, statistics = sum(WIDTHS[:5]) * positions, 2 * sum(WIDTHS[of] for of in (2, 3, 0))
    tensors = sum(t.numel() for name, t in params.items() if name.split()[0] not in ("mean", "var"))
    frozen = 2 * WIDTHS[4]
    assert kept == 8 * (maps + statistics + tensors + frozen)


def chain(widths, source=8, skipping=False, dtype=torch.float32):
    """Convolutions in a row; to be ``skipping``, they read the map two before, too."""

    def parameter(value):
        return torch.nn.Parameter(value.to(dtype))

    channels, reads, convs, norms = [source, *widths], [], [], []
    for i, width in enumerate(widths):
        pieces = [Piece(i, i - 1, RELU)] if i else [Piece(0)]
        if skipping and i > 1:
            pieces.append(Piece(i - 1, i - 2, RELU))
        inputs = sum(channels[piece.map] for piece in pieces)
        convs.append(Conv(parameter(torch.randn(width, inputs, 1, 1) * inputs**-0.5)))
        norms.append(BatchNorm(parameter(torch.ones(width)), parameter(torch.zeros(width)), None, None, True))
        reads.append(tuple(pieces))
    return ConvGraph(tuple(convs), tuple(reads), tuple(norms), ((Piece(len(widths), len(widths) - 1, RELU),),))


class TestMin:
    """What is kept, and that backward holds no more than a stretch beside it."""

    def kept(self, graph, x):
        """Values beside the source's and the statistics."""
        statistics = 2 * sum(conv.weight.shape[0] for conv in graph.convs)
        return rd.memory.saved_bytes(lambda: conv_graph([x], graph, "min")) // 4 - x.numel() - statistics

    def test_a_short_chain_keeps_its_source(self):
        x = torch.randn(2, 8, 6, 5, requires_grad=True)
        assert self.kept(chain([16, 16]), x) == 0

    def test_narrow_maps_between_wide_ones(self):
        """As of inverted residuals in a row: of nine wide maps none, of the narrow ones those between the stretches."""
        x = torch.randn(2, 8, 6, 5, requires_grad=True)
        assert self.kept(chain([48, 48, 8] * 4 + [48]), x) == 4 * 8 * 60

    def test_equal_maps(self):
        """Of n some root of n, and the longest stretch likewise."""
        x = torch.randn(2, 8, 6, 5, requires_grad=True)
        assert self.kept(chain([8] * 16), x) in [count * 8 * 60 for count in (3, 4, 5)]

    def test_what_is_read_across_a_cut_is_kept(self):
        """Two maps a cut."""
        x = torch.randn(2, 8, 6, 5, requires_grad=True)
        assert self.kept(chain([8] * 16, skipping=True), x) in [count * 2 * 8 * 60 for count in (1, 2, 3)]

    @pytest.mark.unpoisoned
    @pytest.mark.parametrize("replayed", [True, False])
    def test_peak(self, replayed, monkeypatch):
        """Of 12 wide maps, of which "fast" keeps every one, two or three at a time."""
        if not replayed:
            monkeypatch.setattr(conv_graph_function, "may_replay", lambda names: False)
        graph, x = chain([64, 64, 4] * 6, source=4), torch.randn(2, 4, 24, 24, requires_grad=True)
        wide, parameters = 64 * 2 * 24 * 24 * 4, [*(conv.weight for conv in graph.convs)]
        peaks = {}
        for policy in ("fast", "min"):
            step = lambda: torch.autograd.grad(conv_graph([x], graph, policy)[0].sum(), [x, *parameters])  # noqa: E731
            peaks[policy] = rd.memory.peak_bytes(step)
        assert peaks["fast"] > 12 * wide and peaks["min"] < 7 * wide


class TestBudget:
    """What lies between the policies: of every convolution the bytes of its map, or its FLOPs once more."""

    WIDTHS = ([16, 16], [48, 48, 8] * 4, [8] * 9)

    @pytest.fixture(params=WIDTHS, ids=str)
    def graph(self, request):
        return chain(request.param, dtype=torch.float64)

    @pytest.fixture
    def x(self):
        return torch.randn(2, 8, 6, 5, dtype=torch.float64, requires_grad=True)

    def step(self, x, graph, policy):
        """The bytes that are kept, the FLOPs of the backward, and the gradients."""
        saved = rd.memory.saved_bytes(lambda: conv_graph([x], graph, policy))
        with rd.use_backend("reference"):
            (y,) = conv_graph([x], graph, policy)
            with FlopCounterMode(display=False) as counter:
                grads = torch.autograd.grad(y, [x, *(conv.weight for conv in graph.convs)], torch.cos(y.detach()))
        return saved, counter.get_total_flops(), {f"grad {i}": grad for i, grad in enumerate(grads)}

    def test_costs_what_it_offers(self, graph, x):
        offer = conv_graph_plan.offer_of([x], graph, torch.float64)
        (most, none, expected), (least, all_again, _) = (self.step(x, graph, policy) for policy in ("fast", "min"))
        choices = [i for i, of_map in enumerate(offer.maps) if of_map is not None]
        assert choices and most - least == sum(offer.maps[i][0] for i in choices)
        assert all_again - none == sum(offer.maps[i][1] for i in choices)
        for seed in range(4):
            kept = random.Random(seed).sample(choices, len(choices) // 2)
            policy = tuple(i in kept for i in range(len(graph.convs)))
            saved, flops, grads = self.step(x, graph, policy)
            assert saved == least + sum(offer.maps[i][0] for i in kept)
            assert flops == all_again - sum(offer.maps[i][1] for i in kept)
            assert_same(grads, expected)

    def test_all_of_them_are_fast_and_none_are_min(self, graph, x):
        for keep, name in ((True, "fast"), (False, "min")):
            assert self.step(x, graph, (keep,) * len(graph.convs))[:2] == self.step(x, graph, name)[:2]

    @pytest.mark.unpoisoned
    @pytest.mark.parametrize("replayed", [True, False])
    def test_scratch(self, replayed, monkeypatch):
        """What "auto" leaves room for: what the backward of "min" has at once beside what is kept, but for parameters' gradients and one
        activated map."""
        if not replayed:
            monkeypatch.setattr(conv_graph_function, "may_replay", lambda names: False)
        graph, x = chain([64, 64, 4] * 6, source=4), torch.randn(2, 4, 48, 48, requires_grad=True)
        parameters = [x, *(conv.weight for conv in graph.convs)]
        step = lambda: torch.autograd.grad(conv_graph([x], graph, "min")[0].sum(), parameters)  # noqa: E731
        step()
        beside = rd.memory.peak_bytes(step) - rd.memory.saved_bytes(lambda: conv_graph([x], graph, "min"))
        passing, wide = sum(t.nbytes for t in parameters), 64 * 2 * 48 * 48 * 4
        scratch = conv_graph_plan.offer_of([x], graph, torch.float32).scratch
        assert scratch - wide <= beside <= scratch + passing + wide


def test_a_front_that_is_frozen(policy):
    """Of its source nothing is kept, which a second derivative would want."""
    graph, x = chain([8, 12, 6], dtype=torch.float64), torch.randn(2, 8, 6, 5).double()
    for t in (graph.convs[0].weight, graph.norms[0].weight, graph.norms[0].bias):
        t.requires_grad_(False)
    weights, found = [conv.weight for conv in graph.convs[1:]], []
    for call in (partial(conv_graph, policy=policy), reference.conv_graph):
        (y,) = call([x], graph)
        grads = torch.autograd.grad(y, weights, torch.cos(y.detach()), retain_graph=True)
        found.append({f"grad {i}": grad for i, grad in enumerate(grads)})
        if call is not reference.conv_graph:
            with pytest.raises(RuntimeError, match="conv_graph: expected no frozen convolutions in front"):
                torch.autograd.grad(y.sum(), weights, create_graph=True)
    assert_same(*found)


@built
def test_what_was_gathered_is_not_beside_its_maps_gradients(monkeypatch):
    """Nor is it in a run that no program shortens, which a first run is. (Plain PyTorch has more in memory before that.)"""
    monkeypatch.setattr(conv_graph_function, "may_replay", lambda names: False)
    sources = [torch.randn(2, 32, 48, 48, requires_grad=True) for _ in range(2)]
    conv = Conv(torch.randn(2, 64, 1, 1, requires_grad=True))
    norm = BatchNorm(torch.ones(2), torch.zeros(2), None, None, True)
    graph = ConvGraph((conv,), ((Piece(0), Piece(1)),), (norm,), ((Piece(2, 0, RELU),),))
    gathered = sum(x.nbytes for x in sources)

    def step():
        with rd.use_backend("cpu"):
            (out,) = conv_graph(sources, graph)
        torch.autograd.grad(out.sum(), [*sources, conv.weight])

    assert 2 * gathered < rd.memory.peak_bytes(step) < 2.5 * gathered


def test_second_derivatives(policy):
    inputs, params = state()
    names = [name for name in (inputs | params) if name.split()[0] in ("a", "weight", "gamma")]
    tensors = [(inputs | params)[name].requires_grad_() for name in names]

    def call(*values):
        given = dict(zip(names, values))
        graph = graph_of({**params, **given}, Activation("silu"))
        return conv_graph([given["a"], inputs["b"]], graph, policy)

    assert gradgradcheck(call, tensors, fast_mode=True)


def test_a_source_that_is_changed_afterwards_is_noticed():
    inputs, params = state()
    a = inputs["a"].requires_grad_() * 1
    outputs = conv_graph([a, inputs["b"]], graph_of(params))
    a.add_(1)
    with pytest.raises(RuntimeError, match="conv_graph: .* was changed in place"):
        outputs[0].sum().backward()


class Decoder(torch.nn.Module):
    """A level of a U-Net on its way up; its convolutions are the framework's."""

    def __init__(self, norm):
        super().__init__()
        self.conv1, self.norm1 = torch.nn.Conv2d(16, 8, 5, padding=2), norm(8)
        self.conv2, self.norm2 = torch.nn.Conv2d(8, 8, 5, padding=2), norm(8)
        self.act = torch.nn.LeakyReLU(inplace=True)

    def forward(self, up, skip):
        y = self.act(self.norm1(self.conv1(torch.cat([up, skip], 1))))
        return self.act(self.norm2(self.conv2(y)))


@pytest.mark.unpoisoned  # what is counted are the tensors of a step
@pytest.mark.parametrize("norm", ["batch", "instance", "instance, one by one"])
@pytest.mark.parametrize("name, maps", [("fast", 6), ("min", 5)])
@built
def test_peak(norm, name, maps, monkeypatch):
    """The most is when the gradients of both sources are there: these, that of the map which their convolution wrote, this map, the
    output, and what else is kept. Finished gradients take no memory of their own, and nothing is gathered or taken apart. Only for
    instance norms of several samples what a convolution reads is made in memory: beside what "min" has there that is one map more."""
    if norm == "instance":
        maps = 6
    elif norm != "batch":
        monkeypatch.setitem(instances._TOGETHER, "cpu", 1)
    norm = torch.nn.BatchNorm2d if norm == "batch" else partial(torch.nn.InstanceNorm2d, affine=True)
    sources, grad = [map_of(seed) for seed in (0, 1)], map_of(2)
    model = rd.convert(Decoder(norm), name)

    def step():
        for t in (*sources, *model.parameters()):
            t.grad = None
        model(*sources).backward(grad)

    assert rd.memory.peak_bytes(step) <= (maps + 0.3) * grad.nbytes


def map_of(seed):
    x = torch.randn(2, 8, 64, 64, generator=torch.Generator().manual_seed(seed))
    return x.to(memory_format=torch.channels_last).requires_grad_(seed < 2)


def test_a_source_that_is_handed_on_twice_is_added_up_in_memory_of_its_own():
    """The gradients that come are only read."""
    a, b = (torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    conv = Conv(torch.randn(3, 3, 3, 3, dtype=torch.float64, requires_grad=True), padding=(1, 1))
    graph = ConvGraph((conv,), ((Piece(0),),), (), ((Piece(1), Piece(2)), (Piece(1),), (Piece(1),)))
    outputs = conv_graph([a, b], graph)
    grads = [torch.randn_like(y) for y in outputs]
    before = [grad.clone() for grad in grads]
    torch.autograd.backward(outputs, grads)
    assert all(map(torch.equal, grads, before))
    assert torch.equal(b.grad, (grads[0][:, :3] + grads[1]) + grads[2])
