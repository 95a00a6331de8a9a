"""The CUDA backend's convolutions, by its operators or through the vendor's libraries, on the CPU, whose operators have the same names."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import test_primitives
import test_transposed
import torch
from test_dense_block import POLICIES, maps, random_block, state, stock_of
from test_instance_norm import NETS, Chain, Concatenation, group, network  # noqa: F401
from test_residual_block import BLOCKS, Block, input_of
from tolerance import assert_within_noise, assert_within_rule, module_run, rounding_noise, torch_runs, true_run
from torch.utils._python_dispatch import TorchDispatchMode

import resdense_ext as rd
from resdense_ext.ops import out_of_memory, vendor
from resdense_ext.ops.compiled import CompiledBackend
from resdense_ext.ops.cuda import CudaBackend
from resdense_ext.ops.operands import Affine
from resdense_ext.ops.reference_backend import ReferenceBackend
from resdense_ext.reference import Activation, Conv

pytest.importorskip("resdense_ext._C", reason="the CPU library is not built")


@pytest.fixture(autouse=True)
def posing(monkeypatch):
    """Tensors on the CPU pass for a GPU's."""
    monkeypatch.setattr(CudaBackend, "refusal", CompiledBackend.refusal)
    # Triton's kernels take none from the CPU.
    for name in ("deviations", "moments_terms"):
        monkeypatch.setattr(CudaBackend, name, getattr(ReferenceBackend, name))
    monkeypatch.setattr(CudaBackend, "fuses", lambda self, x: True)
    with rd.use_backend("cuda"):
        yield


@pytest.fixture(params=["kernels", "library", "sample by sample"])
def way(request, monkeypatch):
    """By the operators that activate as they go, where they serve, or by the framework's, on all samples or one at a time."""
    monkeypatch.setattr(CudaBackend, "fuses", lambda self, x: request.param == "kernels")
    if request.param == "sample by sample":
        monkeypatch.setattr(vendor, "SCRATCH", 1)


def agrees(block, stock, x, dtype):
    """By the rule in 16 bits under autocast, in float32 and, by the network's own noise, in float64."""
    params, inputs, run = state(block), {"x": x}, module_run(stock, dtype if dtype == torch.bfloat16 else None)
    if dtype == torch.float64:
        params, inputs = ({name: t.double() if t.is_floating_point() else t for name, t in of.items()} for of in (params, inputs))
    ours = module_run(block, dtype if dtype == torch.bfloat16 else None)({"x": inputs["x"].clone()}, copy.deepcopy(params))
    if dtype == torch.float64:
        noise = rounding_noise(run, inputs, params)
        return assert_within_noise(ours, run({"x": inputs["x"].clone()}, copy.deepcopy(params)), noise)
    assert_within_rule(ours, true_run(module_run(stock), inputs, params), torch_runs(run, inputs, params), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_dense_blocks(channels_last, policy, dtype, way):
    block = random_block(channels=8, growth=8, policy=policy)
    agrees(block, stock_of(block), maps((3, 8, 7, 6), channels_last), dtype)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("channels", [8, 72])
def test_dense_blocks_on_maps_in_16_bits(channels, policy, way):
    """As they stand behind others of the network: only then is the buffer in 16 bits, too."""
    block = random_block(channels=channels, growth=8, policy=policy)
    agrees(block, stock_of(block), maps((3, channels, 7, 6), True).bfloat16(), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["bottleneck down", "grouped", "stride first", "pre bottleneck"])
def test_residual_blocks(kind, policy, dtype, way):
    block = Block(**BLOCKS[kind], policy=policy)
    stock = copy.deepcopy(block)
    stock.policy = None
    agrees(block, stock, input_of(block, channels_last=True), dtype)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", test_primitives.CASES)
def test_convolutions(case, channels_last, way):
    suite, dtype = test_primitives.TestConvolution(), torch.bfloat16
    for flag in (False, True):
        suite.test_forward(CudaBackend(), case, dtype, channels_last, flag)
        for pending in (False, True):
            suite.test_backward(CudaBackend(), case, dtype, channels_last, flag, pending)


@pytest.mark.parametrize("accumulate", [False, True])
def test_group_norms(accumulate, way):
    for dtype in (torch.float32, torch.bfloat16):
        for kernel in (1, 3):
            test_primitives.test_a_convolution_behind_a_group_norm(CudaBackend(), dtype, kernel, accumulate)


def test_a_pointwise_convolution_copies_nothing():
    """It is one product, which reads a slice of a buffer and writes one."""
    backend, conv = CudaBackend(), Conv(torch.randn(8, 16, 1, 1))
    buffer = torch.randn(3, 32, 5, 4).to(memory_format=torch.channels_last)
    out = torch.zeros(3, 24, 5, 4).to(memory_format=torch.channels_last)
    expected = torch.nn.functional.conv2d(buffer[:, 8:24], conv.weight)
    with torch.profiler.profile(profile_memory=True) as profile:
        backend.bn_act_conv(buffer[:, 8:24], None, conv, out[:, 8:16], None, 1.0, None)
    names = {e.name for e in profile.events()}
    assert "aten::mm" in names and not names & {"aten::copy_", "aten::clone", "aten::empty", "aten::convolution"}
    torch.testing.assert_close(out[:, 8:16], expected)
    assert not out[:, :8].any() and not out[:, 16:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ["relu6", "elu", "silu"])
def test_activations_that_are_no_slopes(activation, dtype):
    """The products' kernels do not know them: activated by a pass, forward and backward."""
    block = random_block(channels=8, growth=8, policy="min", activation=activation)
    x = maps((3, 8, 7, 6), True).to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    agrees(block, stock_of(block), x, dtype)
    with torch.profiler.profile() as profile, torch.autocast("cpu", torch.bfloat16, dtype == torch.bfloat16):
        block(x.requires_grad_()).sum().backward()
    called = {e.name for e in profile.events() if e.name.startswith("resdense::")}
    assert called >= {"resdense::bn_act", "resdense::bn_act_backward_accumulate"}
    assert not {name for name in called if name.startswith(("resdense::bn_act_conv1x1", "resdense::bn_act_conv3x3"))}


def test_samples_share_the_scratch(monkeypatch):
    monkeypatch.setattr(vendor, "SCRATCH", 2 * 4 * 6 * 5 * 4)
    x = torch.empty(5, 4, 6, 5)
    assert CudaBackend().chunks(x) == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert CudaBackend().chunks(x[:0]) == [slice(0, 0)]


def test_who_convolves(monkeypatch):
    """The operator with a halo where it serves, else the framework's convolution or product."""

    def last(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)

    def route(x, out, weight, affine=True, activation=Activation(), **geometry) -> str:
        affine = Affine(*torch.ones(2, x.shape[1]), activation) if affine else None
        with torch.profiler.profile() as profile:
            CudaBackend().bn_act_conv(x, affine, Conv(weight, **{"padding": (1, 1), **geometry}), out, None, 1.0, None)
        names = [e.name for e in profile.events()]
        return next(name for name in (*ours, "aten::convolution", "aten::mm") if name in names)

    ours = "resdense::bn_act_conv3x3", "resdense::bn_act_conv1x1"
    x, out, weight = last(2, 16, 5, 6), last(2, 8, 5, 6), last(8, 16, 3, 3)
    assert route(x, out, weight) == "resdense::bn_act_conv3x3"
    point = {"weight": last(8, 16, 1, 1), "padding": (0, 0)}
    assert route(x, out, **point) == "resdense::bn_act_conv1x1"
    assert route(last(2, 32, 5, 6)[:, 8:24], last(2, 24, 5, 6)[:, 16:], **point) == "resdense::bn_act_conv1x1"
    assert route(last(2, 32, 5, 6)[:, 8:24], last(2, 24, 5, 6)[:, 16:], weight) == "resdense::bn_act_conv3x3"
    for given in (
        {"x": last(2, 20, 5, 6)[:, :16]},
        {"x": last(4, 16, 5, 6)[::2]},
        {"x": last(2, 12, 5, 6), "weight": last(8, 12, 1, 1)},
        {"x": x.contiguous()},
        {"out": last(2, 200, 5, 6), "weight": last(200, 16, 1, 1)},
        {"x": x.float(), "weight": last(8, 16, 1, 1, dtype=torch.float32), "out": out.float()},
        {"bias": torch.zeros(8, dtype=torch.bfloat16)},
        {"stride": (2, 2), "out": last(2, 8, 3, 3)},
        {"affine": False},
        {"activation": Activation("silu")},
    ):
        assert route(**{"x": x, "out": out, **point, **given}) in ("aten::mm", "aten::convolution"), given
    for given in (
        {"x": last(2, 20, 5, 6)[:, :16]},
        {"x": last(2, 24, 5, 6)[:, 4:20]},
        {"x": last(2, 12, 5, 6), "weight": last(8, 12, 3, 3)},
        {"x": last(2, 264, 5, 6), "weight": last(8, 264, 3, 3)},
        {"x": x.contiguous()},
        {"x": last(2, 16, 5, 7)[..., :6].contiguous()},
        {"out": out.contiguous()},
        {"out": last(2, 72, 5, 6), "weight": last(72, 16, 3, 3)},
        {"x": x.half(), "weight": weight.half(), "out": out.float()},
        {"x": x.float(), "weight": weight.float(), "out": out.float()},
        {"weight": last(8, 8, 3, 3), "groups": 2},
        {"padding": (2, 2), "dilation": (2, 2)},
        {"stride": (2, 2), "out": last(2, 8, 3, 3)},
        {"bias": torch.zeros(8, dtype=torch.bfloat16)},
        {"affine": False},
        {"activation": Activation("silu")},
    ):
        assert route(**{"x": x, "out": out, "weight": weight, **given}) == "aten::convolution", given
    monkeypatch.setattr(CudaBackend, "fuses", lambda self, x: False)
    assert route(x, out, **point) == "aten::mm"
    assert route(x, out, weight) == "aten::convolution"


def test_memory_that_runs_out_in_an_operator(monkeypatch):
    monkeypatch.setattr(out_of_memory, "_shortages", [])

    def fails(short: bool):
        if short:
            out_of_memory._note(1, 3 * 2**30, 80 * 2**30, 2**29)
        raise RuntimeError("API call failed")

    with pytest.raises(RuntimeError, match="API call failed") as found:
        out_of_memory.told(fails, False)
    assert not isinstance(found.value, torch.OutOfMemoryError)
    with pytest.raises(torch.OutOfMemoryError, match="tried to allocate 3,072 MiB on cuda:1, which has 81,920 MiB, 512 MiB of them"):
        out_of_memory.told(fails, True)
    with pytest.raises(RuntimeError, match="API call failed"):  # the shortage before is not this one's
        out_of_memory.told(fails, False)
    assert out_of_memory.told(max, 1, 2) == 2


def _events_of(block, x) -> tuple[list, list]:
    """What the operators of its convolutions do, forward and backward: they themselves left out, and what is inside our kernels."""
    outer, events = ("resdense::bn_act_conv", "resdense::bn_act_conv_backward"), []

    def inside(event) -> bool:
        above = event.cpu_parent
        while above is not None and not above.name.startswith("resdense::"):
            above = above.cpu_parent
        return above is not None and above.name in outer

    y = None
    for run in (lambda: block(x), lambda: y.sum().backward()):
        with torch.profiler.profile(profile_memory=True) as profile, torch.autocast("cpu", torch.bfloat16):
            y = run()
        events.append([e for e in profile.events() if inside(e)])
    return events[0], events[1]


def test_what_a_dense_layer_takes():
    """Its kernels, and no memory of the size of its input."""
    layers, channels = 3, 128
    block = random_block(layers, channels=channels, growth=8, bn_size=4, policy="fast").to(memory_format=torch.channels_last)
    x = torch.randn(4, channels, 9, 9, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    forward, backward = _events_of(block, x)
    kernels = [[e.name.removeprefix("resdense::") for e in events if e.name.startswith("resdense::")] for events in (forward, backward)]
    assert kernels[0] == ["bn_act_conv1x1", "bn_act_conv3x3"] * layers
    gradients = [f"bn_act_conv{size}_{of}_backward" for size in ("3x3", "1x1") for of in ("weight", "data")]
    assert kernels[1] == gradients * layers
    vendors = "aten::mm", "aten::bmm", "aten::convolution", "aten::convolution_backward"
    assert not any(e.name in vendors for e in (*forward, *backward))
    assert max(e.self_cpu_memory_usage for e in (*forward, *backward)) <= x.numel() * 2 // 2


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", NETS, ids=lambda kind: kind.__name__)
def test_instance_and_group_norms(kind, channels_last, policy, group, way):
    stock = network(kind, group=group)
    agrees(rd.convert(copy.deepcopy(stock), policy), stock, maps((3, 4, 9, 7), channels_last).double(), torch.float64)


@pytest.mark.parametrize("norm", test_transposed.NORMS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_transposed_convolutions(channels_last, policy, norm, way):
    stock = test_transposed.network(norm=norm)
    agrees(rd.convert(copy.deepcopy(stock), policy), stock, maps((3, 4, 10, 8), channels_last).double(), torch.float64)


class Calls(TorchDispatchMode):
    """Counts what is called, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            self.names[str(func)] += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("kind", [Chain, Concatenation], ids=lambda kind: kind.__name__)
def test_more_samples_take_no_more_calls(kind, group):
    """Where the channels of one lie behind those of the one before. Each call is a launch or some."""
    calls = Calls(), Calls()
    for counted, samples in zip(calls, (2, 5)):
        net, x = rd.convert(network(kind, group=group)), maps((samples, 4, 9, 7), False).double()
        with counted:
            net(x).sum().backward()
    few, many = (counted.names for counted in calls)
    # Of a piece of a concatenation samples do not lie so, when it is written there.
    pieces = {"resdense.bn_act.default": 3} if kind is Concatenation else {}
    assert many - few == pieces and not few - many
