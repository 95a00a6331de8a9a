"""What is recorded of an engine and replayed: the same bits, in no more memory, and only where it is the same."""

from __future__ import annotations

import copy
import random
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import test_conv_graph
import torch
from small_nets import images
from test_dense_block import random_block
from test_dual_path import INPUTS, stage_of
from test_residual_block import BLOCKS, Block, input_of
from torch.utils._python_dispatch import TorchDispatchMode

import resdense_ext as rd
from resdense_ext import functional, models, nn
from resdense_ext.ops import conv_graph_function
from resdense_ext.ops import operator as operators
from resdense_ext.ops import program as programs
from resdense_ext.ops import replay
from resdense_ext.ops._library import LIBRARY
from resdense_ext.ops.compiled import CompiledBackend
from resdense_ext.ops.cuda import CudaBackend
from resdense_ext.ops.program import Recorder, Unrecordable
from resdense_ext.ops.reference_backend import ReferenceBackend
from resdense_ext.reference import Activation, ConvGraph, Piece

pytest.importorskip("resdense_ext._C", reason="the CPU library is not built")

STEPS = 4  # one that is only remembered, one that is recorded, and two that are replayed
POLICIES = ["fast", "min"]


@pytest.fixture(params=["cpu", "cuda"])
def backend(request, monkeypatch):
    """Either of those that replay: the CPU's, and the CUDA backend with the CPU's tensors posing for a GPU's."""
    monkeypatch.setattr(CudaBackend, "refusal", CompiledBackend.refusal)
    for name in ("deviations", "moments_terms"):  # Triton's kernels take no tensors from the CPU
        monkeypatch.setattr(CudaBackend, name, getattr(ReferenceBackend, name))
    monkeypatch.setattr(CudaBackend, "fuses", lambda self, x: True)
    with rd.use_backend(request.param):
        yield request.param


@pytest.fixture
def plain(monkeypatch):
    """Runs engines without programs."""

    def run(call):
        with monkeypatch.context() as patch:
            for module in (operators, conv_graph_function):
                patch.setattr(module, "may_replay", lambda names: False)
            return call()

    return run


def remembered() -> dict[str, list[bool]]:
    """Of every operator, whether there is a program for each of its calls."""
    found: dict[str, list[bool]] = {}
    for ((of, *_), *_), memory in replay._memories.items():
        name = of if isinstance(of, str) else of._schema.name.removeprefix("resdense::")
        found.setdefault(name, []).append(memory.program is not None)
    return found


def results(module, x, count=STEPS, dtype=None):
    """Outputs, all gradients and all buffers of every one of some steps, in which the parameters change."""
    module, x, found = copy.deepcopy(module), x.clone().requires_grad_(), []
    for _ in range(count):
        x.grad = None
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = module(x)
        for out in y if isinstance(y, tuple) else (y,):
            out.float().square().sum().backward(retain_graph=True)
        found += [*(y if isinstance(y, tuple) else (y,)), x.grad, *(p.grad for p in module.parameters())]
        found += [b.clone() for b in module.buffers()]
        with torch.no_grad():
            for p in module.parameters():
                p -= 1e-3 * p.grad
    return found


def assert_same_bits(ours, expected):
    for a, b in zip(ours, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype and a.stride() == b.stride()
            assert torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) and torch.equal(a.isnan(), b.isnan())


def dense(policy):
    net = models.DenseNet(8, (2, 3), 16, num_classes=5, policy=policy)
    return net, images(2, 3, 64, 64).float(), {"dense_stage", "dense_stage_backward", "bn_act_pool", "bn_act_pool_backward"}


def lonely_block(policy):
    return random_block(channels=8, growth=8, policy=policy), images(3, 8, 7, 6).float(), {"dense_block", "dense_block_backward"}


def residual(kind):
    def make(policy):
        block = Block(**BLOCKS[kind], policy=policy)
        return block, input_of(block, channels_last=True).float(), {"residual_block", "residual_block_backward"}

    return make


def dual_path(policy):
    stage = stage_of(2, policy, dtype=torch.float32)
    return stage, images(2, INPUTS, 8, 8).float(), {"dual_path_stage", "dual_path_stage_backward"}


class End(torch.nn.Module):
    """A residual block's last convolution by itself."""

    def __init__(self, policy):
        super().__init__()
        self.conv, self.norm, self.policy = torch.nn.Conv2d(6, 24, 1, bias=False), torch.nn.BatchNorm2d(24), policy

    def forward(self, x):
        norm = functional.BatchNorm(*self.norm.parameters(), *list(self.norm.buffers())[:2], num_batches_tracked=self.norm.num_batches_tracked)
        return functional.conv1x1_bn_add_act(x, functional.Conv(self.conv.weight), norm, x.repeat(1, 4, 1, 1), policy=self.policy)


def end(policy):
    return End(policy), images(2, 6, 8, 8).float(), {"conv1x1_bn_add_act", "conv1x1_bn_add_act_backward"}


class Graph(torch.nn.Module):
    """Convolutions of several maps each, with strides; of its norms some are frozen."""

    def __init__(self):
        super().__init__()
        for name, value in test_conv_graph.state()[1].items():
            running = name.startswith(("mean", "var"))
            add = self.register_buffer if running else self.register_parameter
            add(name, value.float() if running else torch.nn.Parameter(value.float()))

    def forward(self, x):
        tensors = dict(self.state_dict(keep_vars=True))
        if torch.is_autocast_enabled("cpu"):
            tensors |= {name: t.bfloat16() for name, t in tensors.items() if name.startswith(("weight", "bias"))}
        return conv_graph_function.conv_graph(x.split([3, 2], 1), test_conv_graph.graph_of(tensors))


def graph(policy):
    return Graph(), images(2, 5, 6, 4).float(), {"conv_graph", "conv_graph_backward"}


class Added(torch.nn.Module):
    """A graph of which two outputs are added, so that they have one gradient."""

    def __init__(self, policy):
        super().__init__()
        self.convs = torch.nn.ModuleList(torch.nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.norm, self.policy = torch.nn.BatchNorm2d(4), policy

    def forward(self, x):
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else x.dtype
        convs = tuple(functional.Conv(conv.weight.to(dtype), conv.bias.to(dtype), (1, 1)) for conv in self.convs)
        reads = (Piece(0),), (Piece(1, 0, Activation()),), (Piece(0),)
        norm = functional.BatchNorm(self.norm.weight, self.norm.bias)
        graph = ConvGraph(convs, reads, (norm,), ((Piece(2),), (Piece(3),)))
        return torch.add(*conv_graph_function.conv_graph([x], graph, self.policy))


def added(policy):
    return Added(policy), images(2, 4, 6, 5).float(), {"conv_graph", "conv_graph_backward"}


SUBJECTS = {"dense": dense, "dense block": lonely_block, "dual path": dual_path, "end": end, "graph": graph, "added": added} | {
    kind: residual(kind) for kind in ("basic down", "bottleneck", "bottleneck down", "grouped", "pre bottleneck")
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_the_same_bits(subject, policy, dtype, backend, plain):
    """Step after step, outputs, gradients and running statistics; and every operator's calls are replayed."""
    module, x, expected = SUBJECTS[subject](policy)
    x = x.to(dtype)
    assert_same_bits(results(module, x, dtype=dtype), plain(lambda: results(module, x, dtype=dtype)))
    found = remembered()
    assert set(found) == expected and all(all(of) for of in found.values()), found


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_no_more_memory(subject, policy, backend, plain):
    """A result is gone when nobody reads it any more."""
    module, x, _ = SUBJECTS[subject](policy)
    x.requires_grad_()

    def step():
        module.zero_grad()
        y = module(x)
        sum(out.square().sum() for out in (y if isinstance(y, tuple) else (y,))).backward()

    expected = plain(lambda: rd.memory.peak_bytes(step, warmup=2))
    assert rd.memory.peak_bytes(step, warmup=2) <= expected
    assert all(all(of) for of in remembered().values())


def test_evaluation_and_inference(backend, plain):
    net, x, _ = dense("fast")
    net.eval()

    def run():
        with torch.no_grad():
            return [net(x) for _ in range(STEPS)]

    assert_same_bits(run(), plain(run))
    assert remembered() == {"bn_act_pool": [True], "dense_stage": [True, True]}


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
def test_a_program_is_the_same_in_every_mode(first, backend, plain):
    block, x, _ = lonely_block("min")

    def run():
        of, found = copy.deepcopy(block), []
        for mode in (first, torch.no_grad, torch.inference_mode):
            with mode():
                found += [of(x) for _ in range(STEPS)]
        return [y.clone() for y in found] + results(of, x)

    assert_same_bits(run(), plain(run))


def test_other_inputs_are_recorded_by_themselves(backend, plain):
    """Sizes, layouts, dtypes, what wants a gradient; and parameters that have changed theirs."""
    block = random_block(channels=8, growth=8)
    inputs = [images(3, 8, 7, 6).float(), images(3, 8, 6, 7).float(), images(2, 8, 7, 6).float()]
    inputs.append(inputs[0].contiguous(memory_format=torch.channels_last))

    def run():
        found = []
        for x in inputs * STEPS:
            found += results(block, x, count=1)
        block.double()
        found += results(block, inputs[0].double())
        block.float()
        *frozen, last = block.parameters()
        for p in frozen:
            p.requires_grad_(False)
        return found + [grad for _ in range(STEPS) for grad in torch.autograd.grad(block(inputs[0]).square().sum(), [last])]

    first = copy.deepcopy(block)
    ours = run()
    block = first
    assert_same_bits(ours, plain(run))


def test_parameters_in_another_layout(backend, plain):
    """Not in the key, but the program looks."""
    block, x, _ = residual("basic down")("fast")

    def run():
        of = copy.deepcopy(block)
        found = results(of, x)
        return found + results(of.to(memory_format=torch.channels_last), x) + results(of, x)

    assert_same_bits(run(), plain(run))


def chain_of(width):
    unit = torch.nn.Conv2d(16, width, 3, padding=1), torch.nn.BatchNorm2d(width), torch.nn.ReLU()
    return rd.convert(torch.nn.Sequential(*unit, torch.nn.Conv2d(width, 16, 1)))


@pytest.mark.parametrize("kind", [chain_of, lambda width: rd.nn.Bottleneck(16, 4, base_width=8 * width)], ids=["chain", "residual"])
def test_neighbours_that_differ_inside_alone(kind, backend, monkeypatch):
    """Each has a program of its own, and none is recorded again and again."""
    recorded, record = [], replay._recorded
    monkeypatch.setattr(replay, "_recorded", lambda *args: recorded.append(args) or record(*args))
    blocks, x, found = torch.nn.Sequential(*map(kind, (8, 16, 8, 24))), images(2, 16, 6, 5).float(), []
    for _ in range(STEPS):
        results(blocks, x, count=1)
        found.append(len(recorded))
    assert found == [2, 6, 6, 6]  # the two that are alike share theirs


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **kwargs or {})


def test_a_mode_sees_the_engine(backend):
    """What it would see of a program is another operator."""
    block, x, _ = lonely_block("fast")
    for _ in range(STEPS):
        block(x)
        with Names() as mode:
            block(x)
        assert "resdense::dense_block" in mode.names and "resdense::replay" not in mode.names


def test_a_backend_of_which_not_all_are_operators(plain):
    block, x, _ = lonely_block("fast")
    with rd.use_backend("reference"):
        results(block, x)
    assert remembered() == {}


def test_what_is_remembered_is_bounded(monkeypatch, backend):
    monkeypatch.setattr(replay, "_MOST", 3)
    block = random_block(channels=8, growth=8)
    for size in range(4, 12):
        results(block, images(2, 8, size, size).float(), count=2)
    assert len(replay._memories) == 3


def test_threads_share_what_is_remembered(monkeypatch):
    """Autograd walks backward with a thread a device, and detectors see more sizes than are remembered."""
    monkeypatch.setattr(replay, "_MOST", 2)
    monkeypatch.setattr(replay, "_recorded", lambda call, recorder: (call(), replay._PYTHONS))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def calls(seed: int) -> bool:
        keys = random.Random(seed).choices(range(4), k=20000)
        return all(replay.replayed(key, [], lambda: key) == key for key in keys)

    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(calls, range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert len(replay._memories) == 2


@pytest.fixture
def recorded():
    """A function of tensors as an operator, recorded on some: its program, or why there is none."""

    def record(function, *tensors):
        name = f"recorded_{len(made)}"
        arguments = ", ".join(f"Tensor? t{i}" for i in range(len(tensors)))
        LIBRARY.define(f"{name}({arguments}) -> Tensor[]")
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        made.append(name)
        operator = getattr(torch.ops.resdense, name).default
        with Recorder(tensors, operator, function) as recorder:
            found = operator(*tensors)
        return recorder.program(found)

    return record


made: list[str] = []


class TestRecorder:
    def test_all_kinds_of_arguments(self, recorded):
        def function(x, y):
            a = torch.empty((3, 4), dtype=torch.float64, device=x.device, memory_format=torch.contiguous_format).copy_(x[:3, :4])
            b = torch.cat([x, y.to(torch.float32)]).sum([0], keepdim=True)
            c, d = torch.aminmax(x, dim=0)
            e = x.new_zeros(2, 3, dtype=torch.int64).to(torch.bool).any()
            return [a, b, c, d, e, *x.split([1, 4]), *x.unbind(1), x.mean(0, dtype=torch.float64), torch.std(x, 0, correction=0)]

        x, y = images(5, 6).float(), images(2, 6)
        program = recorded(function, x, y)
        x, y = images(5, 6, seed=1).float(), images(2, 6, seed=1)
        assert_same_bits(program([x, y]), function(x, y))

    def test_numbers(self, recorded):
        """Beside tensors and as scalars, of either type: a result's dtype tells 2 from 2.0."""

        def function(x, n):
            found = [n.add(n, alpha=2), n.clamp(2), n.clamp(2.0), x * 2, x / 3, 3 - x, x.add(x, alpha=2), x.clamp(max=0.5)]
            return [*found, x.mul_(1.5) + x, torch.addmm(x, x, x, beta=0.5, alpha=2), x > 0, torch.where(x > 0, 0.0, x)]

        given = [images(4, 4).float(), torch.arange(5)]
        program = recorded(function, *[t.clone() for t in given])
        given = [images(4, 4, seed=1).float(), torch.arange(5) * 3]
        assert_same_bits(program([t.clone() for t in given]), function(*[t.clone() for t in given]))

    def test_other_numbers_need_no_other_operators(self, recorded):
        """A detector's images are of any size, and so are the counts by which sums are divided."""
        x, known = images(4, 4), []
        for number in (2, 3.0, 3, 0.5):
            assert torch.equal(recorded(lambda x: [x.add(x, alpha=number)], x)([x])[0], x.add(x, alpha=number))
            known.append({name for name in LIBRARY._op_defs if "recorded" not in name})
        assert known[1] == known[3] and {"resdense::aten_add_Tensor_int", "resdense::aten_add_Tensor_float"} <= known[1]

    def test_nothing_in_the_place_of_a_tensor(self, recorded):
        def function(x, nothing):
            return [torch.nn.functional.layer_norm(x, (6,), None, nothing), x.new_empty(0)]

        x = images(5, 6)
        program = recorded(function, x, None)
        assert_same_bits(program([x + 1, None]), function(x + 1, None))
        assert program([x, x]) == []

    def test_results_that_are_inputs_or_there_twice(self, recorded):
        def function(x, y):
            return [y, x.add_(y), x[1:], x[1:].relu_()]

        x, y = images(5, 6), images(5, 6, seed=1)
        program = recorded(function, x.clone(), y)
        ours, expected = [x.clone(), y], [x.clone(), y]
        found = program(ours)
        assert_same_bits(found, function(*expected))
        assert torch.equal(ours[0], expected[0]) and found[1].data_ptr() == ours[0].data_ptr()

    @pytest.mark.parametrize(
        "other",
        [images(5, 6).float(), images(5, 7), images(30, 6)[::6], images(6, 5).T, images(5, 6, 1), images(5, 6).to("meta")],
        ids=["dtype", "size", "stride", "transposed", "dimensions", "device"],
    )
    def test_inputs_that_lie_otherwise(self, recorded, other):
        program = recorded(lambda x: [x + 1, x[:, :2] * 2], images(5, 6))
        assert program([other]) == []
        assert len(program([images(5, 6)])) == 2
        assert program([images(5, 6), images(5, 6)]) == []

    def test_each_result_for_as_long_as_it_is_read(self, recorded):
        def function(x):
            for _ in range(10):
                x = x.exp()
            return [x]

        x = images(1 << 16)
        program = recorded(function, x)
        assert rd.memory.peak_bytes(lambda: program([x])) == 2 * x.nbytes

    def test_a_result_that_lies_otherwise_than_it_did(self, recorded):
        """Views are made by what was recorded of their tensor's layout."""
        transposes = [False]

        def fickle(x):
            return x.t().clone(memory_format=torch.contiguous_format).t() if transposes[0] else x.clone()

        LIBRARY.define("fickle(Tensor x) -> Tensor")
        LIBRARY.impl("fickle", fickle, "CPU")
        program = recorded(lambda x: [torch.ops.resdense.fickle(x)[:, 1:] + 1], images(5, 6))
        assert torch.equal(program([images(5, 6)])[0], images(5, 6)[:, 1:] + 1)
        transposes[0] = True
        with pytest.raises(RuntimeError, match="a call gives a tensor with other strides than it did"):
            program([images(5, 6)])

    def test_views_of_all_kinds(self, recorded):
        def function(x):
            parts = [x.narrow(1, 1, 2), x[::2], x.t(), x.view(-1), x.unsqueeze(0), x[0].expand(3, 6), *x.split(2), *x.unbind(1)]
            return [part * 2 for part in parts]

        program = recorded(function, images(5, 6))
        assert_same_bits(program([images(5, 6, seed=1)]), function(images(5, 6, seed=1)))

    def test_an_error_inside(self, recorded):
        """Of an operator that looks at values: its own words, where torch hands them on."""
        program = recorded(lambda x, at: [x.index_select(0, at)], images(5), torch.tensor([1]))
        told = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
        with pytest.raises(RuntimeError, match="aten::index_select: " + ("index out of range" if told else "failed")):
            program([images(5), torch.tensor([7])])

    @pytest.mark.parametrize(
        ("function", "reason"),
        [
            (lambda x: [x + OUTSIDE], "neither an input nor made"),
            (lambda x: [OUTSIDE], "neither an input nor made"),
            (lambda x: [x * x.sum().item()], "value"),
            (lambda x: [x + 1] if x.equal(x) else [x], "value"),
            (lambda x: [x.sum() * 2], "dtype"),
            (lambda x: [x.argmax(0) * 2.0], "dtype"),
            (lambda x: [torch.ops.aten.index(x, [x.argmax(0)])], "of type"),
            (lambda x: [programs.unrecordable("something else is done") or x + 1], "something else is done"),
        ],
        ids=["another tensor", "another result", "value", "answer", "no dimensions", "integers", "optional tensors", "said"],
    )
    def test_what_cannot_be(self, recorded, function, reason):
        with pytest.raises(Unrecordable, match=reason):
            recorded(function, images(5, 6))

    def test_an_input_that_is_there_twice(self, recorded):
        x = images(3)
        with pytest.raises(Unrecordable, match="twice"):
            recorded(lambda x, y: [x + y], x, x)


OUTSIDE = torch.ones(6)


@pytest.mark.parametrize("code", [torch.zeros(3), torch.zeros(3, 2).long(), torch.zeros(6).long()[::2]], ids=["dtype", "shape", "stride"])
def test_what_is_no_program(code):
    with pytest.raises(RuntimeError, match="code: expected a program's"):
        torch.ops.resdense.replay(code, "", [])


def test_what_cannot_be_recorded_runs_as_it_is(backend, plain, monkeypatch):
    """And is not tried again."""
    block, x, _ = lonely_block("fast")
    of = CudaBackend if backend == "cuda" else type(rd.ops.backend.get("cpu"))
    run, tried = of.bn_act_conv, []
    monkeypatch.setattr(of, "bn_act_conv", lambda *args: programs.unrecordable("not by an operator") or run(*args))
    record = replay._recorded
    monkeypatch.setattr(replay, "_recorded", lambda *args: tried.append(args) or record(*args))
    assert_same_bits(results(block, x), plain(lambda: results(block, x)))
    assert remembered() == {"dense_block": [False], "dense_block_backward": [True]} and len(tried) == 2


def test_a_whole_network_of_every_kind(plain):
    """Stems, transitions, heads and blocks of the library's modules together."""
    torch.manual_seed(0)
    nets = [models.ResNet(nn.Bottleneck, (2, 1), num_classes=5), models.PreActResNet(nn.PreActBlock, (1, 1), num_classes=5)]
    for net in nets:
        x = images(2, 3, 32, 32).float()
        assert_same_bits(results(net, x), plain(lambda net=net, x=x: results(net, x)))
