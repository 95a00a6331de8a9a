"""`bn_act_conv` and its modules, and those of a residual block's end: agreement with plain PyTorch, memory, and errors."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small_nets import randomise
from test_dense_block import BACKENDS, _format, agree_in_float64, backend, built, maps, same, state, stock_of  # noqa: F401
from test_residual_block import described_conv, described_norm
from tolerance import assert_within_rule, module_run, torch_runs, true_run
from torch import nn

import resdense_ext as rd
from resdense_ext import functional
from resdense_ext.functional import BatchNorm, Conv

UNITS = {
    "1x1": dict(kernel_size=1, bias=False),
    "3x3": dict(kernel_size=3, padding=1, bias=False),
    "bias": dict(kernel_size=3, padding="same"),
    "stride": dict(kernel_size=3, stride=2, padding=1),
    "sampled": dict(kernel_size=1, stride=2),
    "valid": dict(kernel_size=2),
    "dilated": dict(kernel_size=3, padding=2, dilation=2),
    "grouped": dict(kernel_size=3, padding=1, groups=3),
    "depthwise": dict(kernel_size=3, padding=1, groups=6, bias=False),
}
CLASSES = {1: rd.nn.BNActConv1d, 2: rd.nn.BNActConv2d, 3: rd.nn.BNActConv3d}


def unit_of(kind="3x3", rank=2, **options):
    torch.manual_seed(0)
    return randomise(CLASSES[rank](6, 12, **UNITS[kind], **options))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", UNITS)
def test_numbers(backend, kind, channels_last, training):
    agree_in_float64(unit_of(kind).train(training), maps((3, 6, 8, 7), channels_last))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("kind", ["1x1", "3x3"])
def test_channels_around_samples(backend, kind, rank):
    """No kernel walks such a map: a gradient that lay as it does would seem to overlap itself."""
    x = maps((6, 3, 7, 5, 6)[: rank + 2]).transpose(0, 1)
    agree_in_float64(unit_of(kind, rank), x)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("kind", UNITS)
def test_numbers_in_one_and_three_dimensions(backend, kind, rank):
    agree_in_float64(unit_of(kind, rank), maps((2, 6, 7, 5, 6)[: rank + 2]))


@pytest.mark.parametrize("activation", ["relu6", "leaky_relu", "elu", "silu", "identity"])
def test_activations(backend, activation):
    agree_in_float64(unit_of(activation=activation), maps((3, 6, 8, 7)))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", ["1x1", "3x3", "stride", "grouped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_working_precision(backend, kind, dtype, channels_last):
    unit = unit_of(kind)
    params = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state(unit).items()}
    inputs = {"x": maps((3, 6, 9, 7)).to(dtype)}
    run = module_run(stock_of(unit))
    ours = module_run(unit)({"x": inputs["x"].contiguous(memory_format=_format(channels_last))}, copy.deepcopy(params))
    assert_within_rule(ours, true_run(run, inputs, params), torch_runs(run, inputs, params), dtype)


def test_autocast():
    unit, inputs = unit_of(), {"x": maps((3, 6, 9, 7)).bfloat16()}
    run = module_run(stock_of(unit), torch.bfloat16)
    ours = module_run(unit, torch.bfloat16)({"x": inputs["x"].clone()}, state(unit))
    assert_within_rule(
        ours, true_run(module_run(stock_of(unit)), inputs, state(unit)), torch_runs(run, inputs, state(unit)), torch.bfloat16
    )
    assert ours["output"].dtype == torch.bfloat16


@pytest.mark.parametrize("weights_last", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_layout_is_stocks(backend, channels_last, weights_last):
    unit, x = unit_of().to(memory_format=_format(weights_last)), maps((3, 6, 8, 7), channels_last)
    assert unit(x).stride() == stock_of(unit)(x).stride()


@pytest.mark.parametrize("kind", ["1x1", "3x3", "stride"])
def test_what_is_kept(backend, kind):
    """The input and its statistics; stock keeps the activation, too."""
    unit = unit_of(kind)
    x = maps((4, 6, 16, 16)).requires_grad_()
    vectors = 2 * 6 * 4
    assert rd.memory.saved_bytes(lambda: unit(x)) == x.nbytes + vectors
    assert rd.memory.saved_bytes(lambda: stock_of(unit)(x)) >= 2 * x.nbytes


def test_strided_input_and_expanded_gradient(backend):
    unit, wide = unit_of("stride").double(), maps((3, 16, 14, 6)).double()
    for view in (wide[:, 1:7], wide[:, :6, ::2], wide[:, 1:7, 7:].transpose(2, 3), wide[:1, :6].expand(3, 6, 14, 6)):
        results = []
        for net in (unit, stock_of(unit)):
            x = view.detach().requires_grad_()
            y = net(x)
            results.append((y.detach(), *torch.autograd.grad(y, x, torch.ones((), dtype=y.dtype).expand(y.shape))))
        same(*results)


def test_gradients_of_gradients(backend):
    def run(x, gamma, beta, weight, bias):
        return functional.bn_act_conv(x, BatchNorm(gamma, beta), Conv(weight, bias, (1, 1), (1, 1), 1, (2, 2)), activation="silu")

    x, weight = torch.randn(2, 3, 4, 3).double(), torch.randn(2, 3, 3, 3).double()
    tensors = [t.requires_grad_() for t in (x, *(torch.rand(3).double() + 0.5 for _ in range(2)), weight, torch.randn(2).double())]
    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)


def test_compiled():
    unit, x = unit_of().double(), maps((3, 6, 8, 7)).double()
    compiled = torch.compile(copy.deepcopy(unit), fullgraph=True, backend="aot_eager")
    runs = [torch.autograd.grad(net(x).square().sum(), list(net.parameters())) for net in (compiled, unit)]
    same(*([*grads, *net.norm.buffers()] for grads, net in zip(runs, (compiled, unit))))


@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch(backend, training):
    unit, x = unit_of("stride").train(training), maps((0, 6, 8, 7)).requires_grad_()
    before = state(unit.norm)
    y = functional.bn_act_conv(x, described_norm(unit.norm), described_conv(unit.conv))
    assert y.shape == unit(x).shape == (0, 12, 4, 4) and torch.autograd.grad(y.sum(), x)[0].shape == x.shape
    assert all(torch.equal(before[name], t) for name, t in unit.norm.named_buffers() if "running" in name)


def test_hooks_run():
    unit, x, seen = unit_of(), maps((3, 6, 8, 7)), []
    unit.act.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="a BNActConv2d runs its stock path: act carries hooks"):
        unit(x)
    assert seen and "act carries hooks" in str(rd.report(nn.Sequential(unit), x))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=torch.zeros(3, 5, 8, 7)), ValueError, r"norm.weight: expected shape \(5,\), one value a channel, got \(6,\)"),
        (dict(x=torch.zeros(3, 6, 8, 7).double()), TypeError, "conv.weight: expected dtype torch.float64, got torch.float32"),
        (dict(x=torch.zeros(6, 8)), ValueError, "x: expected 3, 4 or 5 dimensions"),
        (dict(x=torch.zeros(1, 6, 1, 1)), ValueError, "x: expected more than 1 value per channel when training"),
        (dict(conv=Conv(torch.zeros(4, 3, 3, 3), None, (1, 1), (1, 1), 1)), ValueError, r"conv.weight: expected \[K, 6 / groups"),
        (dict(conv=Conv(torch.zeros(4, 6, 9, 9), None, (0, 0), (1, 1), 1)), ValueError, "conv: expected windows within the padded map"),
        (dict(activation="tanh"), ValueError, "activation: expected relu, .* got 'tanh'"),
    ],
)
def test_bad_input_changes_nothing(change, error, message):
    unit = unit_of()
    before = state(unit)
    arguments = dict(x=torch.zeros(3, 6, 8, 7), norm=described_norm(unit.norm), conv=described_conv(unit.conv)) | change
    with pytest.raises(error, match=message):
        functional.bn_act_conv(**arguments)
    assert all(torch.equal(before[name], t) for name, t in unit.state_dict().items())


def test_arguments_of_modules():
    with pytest.raises(ValueError, match="activation: expected one of relu, .* got 'tanh'"):
        rd.nn.BNActConv2d(6, 8, 3, activation="tanh")
    with pytest.raises(ValueError, match="policy: expected one of fast, min, or None for the stock path, got 'slow'"):
        rd.nn.AddAct(policy="slow")
    with pytest.raises(ValueError, match="spatial_dims: expected 1, 2 or 3, got 4"):
        rd.nn.BNAddAct(6, spatial_dims=4)
    with pytest.raises(TypeError, match="x: expected a Tensor, got NoneType"):
        unit_of()(None)
    with pytest.raises(TypeError, match="identity: expected a Tensor, got list"):
        rd.nn.AddAct()(torch.zeros(2, 3, 4), [])


class End(nn.Module):
    """An end of two parts of its input."""

    def __init__(self, end):
        super().__init__()
        self.end = end

    def forward(self, x):
        return self.end(*x.chunk(2, 1))


ENDS = {
    "add": lambda **options: rd.nn.AddAct(**options),
    "norm": lambda **options: rd.nn.BNAddAct(6, **options),
    "projection": lambda **options: rd.nn.BNAddAct(6, True, **options),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu"])
@pytest.mark.parametrize("end", ENDS)
def test_ends(backend, end, activation, channels_last, training):
    net = End(randomise(ENDS[end](activation=activation))).train(training)
    agree_in_float64(net, maps((3, 12, 5, 6), channels_last))


@built
@pytest.mark.parametrize("end", ENDS)
def test_ends_are_on_the_engine(end):
    """In one node, which keeps no more than stock."""
    x, net = maps((3, 12, 5, 6)).requires_grad_(), End(ENDS[end]())
    with rd.use_backend("cpu"):
        node = type(net(x).grad_fn).__name__
        assert rd.memory.saved_bytes(lambda: net(x)) <= rd.memory.saved_bytes(lambda: stock_of(net)(x))
    assert node == ("AddActFunctionBackward" if end == "add" else "BNAddActFunctionBackward")
    assert rd.report(net, x).rows[0].policy == "fast"


@pytest.mark.parametrize("shape", [(3, 1, 5, 6), (6, 5, 6)])
def test_maps_that_are_not_alike_are_left_to_pytorch(shape):
    x, other = maps((3, 6, 5, 6)), torch.randn(shape)
    assert torch.equal(rd.nn.AddAct()(x, other), F.relu(x + other))
    assert torch.equal(rd.nn.AddAct()(x, other.double()), F.relu(x + other.double()))


def test_a_norm_over_several_ranks_runs_stock(monkeypatch):
    unit, x = nn.SyncBatchNorm.convert_sync_batchnorm(unit_of()), maps((3, 6, 8, 7))
    stock = stock_of(unit)(x)  # of this process, as there is no other
    monkeypatch.setattr("resdense_ext.nn.leaves._group_of", lambda norm: "0")
    with pytest.warns(UserWarning, match="norm takes statistics over several ranks"):
        assert torch.equal(unit(x), stock)


def test_converted_and_reverted():
    net = nn.Sequential(unit_of(policy=None), End(rd.nn.BNAddAct(6, policy=None))).double()
    x = maps((3, 6, 8, 7)).double()
    expected = copy.deepcopy(net)(x)
    rd.convert(net)
    assert (net[0].policy, net[1].end.policy) == ("fast", "fast")
    same([copy.deepcopy(net)(x)], [expected])
    rd.revert(net)
    assert (net[0].policy, net[1].end.policy) == (None, None)
