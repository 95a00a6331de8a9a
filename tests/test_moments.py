"""The backward of a 1x1 convolution and its norm by 16-bit matrix products: against float64 by the rule, far means included."""

import copy

import pytest
import torch
from test_conv1x1_bn_add_act import Ours, Stock, fold_of, pointwise
from test_dense_block import BACKENDS, state
from test_residual_block import BLOCKS, Block, input_of, stock_of
from tolerance import assert_within_rule, module_run, torch_runs, true_run

import resdense_ext as rd
from resdense_ext.ops import backend as backends
from resdense_ext.ops import conv1x1_bn_add_act as engine
from resdense_ext.ops import moments
from resdense_ext.reference import Activation, Conv

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
POLICIES = ("fast", "min")


@pytest.fixture(params=[name for name in BACKENDS if name in ("reference", "triton")])
def backend(request, monkeypatch):
    """Plain PyTorch goes this way only here."""
    monkeypatch.setattr(backends.ReferenceBackend, "multiplies_moments", lambda self, x, conv: moments.suits(x, conv))
    with rd.use_backend(request.param):
        yield request.param


@pytest.fixture
def taken(monkeypatch):
    """The channels of the convolutions that went this way."""
    taken, backward = [], moments.backward
    monkeypatch.setattr(moments, "backward", lambda x, *rest: taken.append(x.shape[1]) or backward(x, *rest))
    return taken


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def assert_rule(stock, ours, x, params, dtype):
    run, inputs = module_run(stock), {"x": channels_last(x)}
    found = module_run(ours)({"x": inputs["x"].clone()}, copy.deepcopy(params))
    assert_within_rule(found, true_run(run, inputs, params), torch_runs(run, inputs, params), dtype)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_a_norm_before_and_behind(backend, taken, monkeypatch, dtype, bias):
    monkeypatch.setattr(engine, "kept_for_backward", lambda *sizes: "nothing")
    stock, ours = Stock(bias=bias), Ours(bias=bias)
    ours.load_state_dict(stock.state_dict())
    stock, ours = stock.to(dtype), ours.to(dtype)
    assert_rule(stock, ours, torch.randn(4, 16, 9, 7).to(dtype), dict(stock.state_dict()), dtype)
    assert taken == [16]


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("far", [0, 30])
@pytest.mark.parametrize(
    ("name", "wanted"),
    [("bottleneck", [4]), ("bottleneck down", [4, 8]), ("stride first", [4, 6]), ("pooled", [6])],
)
def test_blocks(backend, taken, dtype, policy, far, name, wanted):
    """``far`` is the mean of the input in deviations, which a projection sees."""
    block = Block(**BLOCKS[name], policy=policy)
    params = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state(block).items()}
    assert_rule(stock_of(block), block, (input_of(block, (9, 7)) + far).to(dtype), params, dtype)
    assert taken == wanted


@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_a_gradient_with_a_mean_and_of_any_size(backend, scale, shift):
    """float16, whose range is short; the mean of the gradient is what the norm behind the convolution takes away."""
    dtype = torch.float16
    x, weight = channels_last(torch.randn(8, 24, 20, 20)).to(dtype), (torch.randn(40, 24, 1, 1) / 5).to(dtype)
    g = channels_last((torch.randn(8, 40, 20, 20) + shift) * scale).to(dtype)

    def stock(x, weight, g):
        x, weight = (t.detach().requires_grad_() for t in (x, weight))
        y = torch.nn.functional.batch_norm(torch.nn.functional.conv2d(x, weight), None, None, training=True)
        return dict(zip(("grad x", "grad weight"), torch.autograd.grad(y, (x, weight), g)))

    source = pointwise(x, weight)
    z = source.convolved(slice(None))
    fold = fold_of(z, None, None)
    branch = engine.Branch(source, fold._replace(affine=fold.affine._replace(activation=Activation("identity"))))
    found = engine.backward(branch, None, g).conv
    truth, runs = stock(x.double(), weight.double(), g.double()), [stock(x, weight, g)]
    assert_within_rule({"grad x": found.input.dy, "grad weight": found.weight}, truth, runs, dtype)
    # All positions together: what is left of the mean.
    errors = [(t.double().sum((0, 2, 3)) - truth["grad x"].sum((0, 2, 3))).norm() for t in (found.input.dy, runs[0]["grad x"])]
    assert errors[0] <= 2 * errors[1], errors


@pytest.mark.parametrize("shape", [(1, 3, 5), (1024, 7, 3), (3 * 2048, 130, 9)], ids=str)
def test_products_in_parts(shape):
    count, a, b = shape
    left, right = torch.randn(count, a).bfloat16(), torch.randn(count, b).bfloat16()
    torch.testing.assert_close(moments.gram(left, right), left.float().T @ right.float(), rtol=1e-5, atol=1e-4)


def test_parts_fill_a_card_and_divide_the_positions():
    stages = [(256 * side**2, outputs, inputs + 8) for side, outputs, inputs in ((56, 256, 64), (28, 512, 128), (7, 2048, 512))]
    assert [moments._parts(*sizes) for sizes in stages] == [128, 32, 2]
    assert moments._parts(7 * 1021, 256, 64) == 7 and moments._parts(10007, 8, 8) == 1


def test_what_suits():
    conv = Conv(torch.zeros(8, 4, 1, 1, dtype=torch.bfloat16))
    x = torch.zeros(2, 4, 3, 3, dtype=torch.bfloat16)
    assert moments.suits(channels_last(x), conv) and moments.suits(x[..., :1, :1].contiguous(), conv)
    assert not moments.suits(x, conv) and not moments.suits(channels_last(x).float(), conv)
    assert not moments.suits(channels_last(torch.cat([x, x], 1)), conv._replace(groups=2))
