"""The backward of a 1x1 convolution and its norm by 16-bit matrix products: against float64 by the rule, far means included."""

import copy

import pytest
import torch
from test_conv1x1_bn_add_act import Ours, Stock, fold_of, pointwise
from test_dense_block import BACKENDS, state
from test_primitives import multiplies_bfloat16
from test_residual_block import BLOCKS, Block, input_of, stock_of
from tolerance import assert_within_rule, module_run, torch_runs, true_run

import resdense_ext as rd
from resdense_ext import reference
from resdense_ext.ops import backend as backends
from resdense_ext.ops import conv1x1_bn_add_act as engine
from resdense_ext.ops import moments
from resdense_ext.ops.cpu import CpuBackend
from resdense_ext.ops.operands import Affine, Fold, Pending
from resdense_ext.ops.reference_backend import ReferenceBackend
from resdense_ext.reference import Activation, Conv

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
POLICIES = ("fast", "min")


@pytest.fixture(params=[name for name in BACKENDS if name in ("reference", "triton")])
def backend(request, monkeypatch):
    """Plain PyTorch goes this way only here."""
    monkeypatch.setattr(ReferenceBackend, "multiplies_moments", lambda self, x, conv: moments.suits(x, conv))
    with rd.use_backend(request.param):
        yield request.param


@pytest.fixture
def taken(monkeypatch):
    """The channels of the convolutions that went this way."""
    taken, backward = [], moments.backward
    monkeypatch.setattr(moments, "backward", lambda x, *rest: taken.append(x.shape[1]) or backward(x, *rest))
    return taken


def assert_gram(a, b):
    """``a^T b`` in float32: no further from float64 than one rounding of the sum of the terms' sizes."""
    found = moments.gram(a, b)
    assert found.dtype == torch.float32
    of_magnitudes = a.double().abs().T @ b.double().abs()
    assert (found - a.double().T @ b.double()).norm() <= torch.finfo(torch.float32).eps * of_magnitudes.norm()


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def assert_rule(stock, ours, x, params, dtype):
    run, inputs = module_run(stock), {"x": x}
    found = module_run(ours)({"x": inputs["x"].clone()}, copy.deepcopy(params))
    assert_within_rule(found, true_run(run, inputs, params), torch_runs(run, inputs, params), dtype)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("formatted", [channels_last, torch.Tensor.contiguous], ids=["last", "first"])
def test_a_norm_before_and_behind(backend, taken, monkeypatch, dtype, bias, formatted):
    monkeypatch.setattr(engine, "kept_for_backward", lambda *sizes: "nothing")
    stock, ours = Stock(bias=bias), Ours(bias=bias)
    ours.load_state_dict(stock.state_dict())
    stock, ours = stock.to(dtype), ours.to(dtype)
    assert_rule(stock, ours, formatted(torch.randn(4, 16, 9, 7)).to(dtype), dict(stock.state_dict()), dtype)
    assert taken == [16]


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("far", [0, 30])
@pytest.mark.parametrize("formatted", [channels_last, torch.Tensor.contiguous], ids=["last", "first"])
@pytest.mark.parametrize(
    ("name", "wanted"),
    [("bottleneck", [4]), ("bottleneck down", [4, 8]), ("stride first", [4, 4]), ("pooled", [4])],
)
def test_blocks(backend, taken, dtype, policy, far, formatted, name, wanted):
    """``far`` is the mean of the input in deviations, which a projection sees."""
    block = Block(**BLOCKS[name], policy=policy)
    params = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state(block).items()}
    assert_rule(stock_of(block), block, formatted(input_of(block, (9, 7)) + far).to(dtype), params, dtype)
    assert taken == wanted


@multiplies_bfloat16
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("far", [0, 30])
@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (dict(widths=(96, 16, 48, 96), kernels=(1, 3, 1)), [48]),
        (dict(widths=(32, 16, 16, 96), kernels=(1, 3, 1), stride=2, projection="normed"), [16, 32]),
        (dict(widths=(16, 32, 70), kernels=(1, 1), stride=2, projection="normed", bias=True), [32, 16]),
        (dict(widths=(16, 8, 16, 38), kernels=(3, 3, 1), rank=3, projection="normed"), [16, 16]),
    ],
    ids=["bottleneck", "bottleneck down", "stride first", "3d"],
)
def test_blocks_by_kernels_of_pairs(monkeypatch, options, wanted, policy, far):
    """On processors that multiply bfloat16."""
    taken, backward = [], CpuBackend.moments_backward
    monkeypatch.setattr(CpuBackend, "moments_backward", lambda self, x, *rest: taken.append(x.shape[1]) or backward(self, x, *rest))
    block = Block(**options, policy=policy)
    x = input_of(block, (9, 7, 3)[: block.convs[0].weight.dim() - 2], True, 4) + far
    params = {name: t.bfloat16() if t.is_floating_point() else t for name, t in state(block).items()}
    with rd.use_backend("cpu"):
        assert_rule(stock_of(block), block, x.bfloat16(), params, torch.bfloat16)
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


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("activation", [None, *(Activation(a, 0.2) for a in ("relu", "relu6", "leaky_relu", "elu", "silu"))])
@pytest.mark.parametrize("channels", [1, 6, 14, 130])
def test_deviations(backend, dtype, activation, channels):
    """To half a unit in the last place, at means of up to thousands; of a slice of channels; ones and zeros behind them."""
    whole = channels_last(torch.randn(3, 2 * channels, 5, 7) + 100 * torch.arange(2 * channels).view(-1, 1, 1)).to(dtype)
    x, center = whole[:, :channels], torch.arange(channels) * 100.0 + 0.3
    affine = None if activation is None else Affine(torch.rand(channels) + 0.5, torch.randn(channels), activation)
    b = backends.get(backend).deviations(x, affine, center)
    rows, near = moments._matrix(x).double(), center.double()
    if affine is not None:
        rows, near = (reference.activate(affine.scale * t + affine.shift, activation) for t in (rows, near))
    half, least = torch.finfo(dtype).eps / 2, torch.finfo(dtype).smallest_normal
    # Each of the operations in float32 rounds once.
    before = 4 * torch.finfo(torch.float32).eps * (rows.abs() + near.abs())
    assert ((b[:, :channels] - (rows - near)).abs() <= half * (rows - near).abs().clamp(min=least) + before).all()
    assert b.shape[1] % 8 == 0 and b.dtype == dtype
    assert (b[:, channels : channels + 2] == 1).all() and (b[:, channels + 2 :] == 0).all()


@pytest.mark.parametrize("sizes", [(1, 1), (7, 5), (40, 24), (130, 70), (4100, 64)], ids=str)
@pytest.mark.parametrize("need_weight", [False, True])
def test_terms(backend, sizes, need_weight):
    """What is not rounded in float32, the rest by one rounding; the offset of the matrices as they are rounded."""
    (K, C), count, dtype = sizes, 4096, torch.bfloat16
    b, g = torch.randn(count, C) / 2 + 0.3, torch.randn(count, K) + 0.2
    b = torch.cat([b, torch.ones(count, 2), torch.zeros(count, -(C + 2) % 8)], 1)
    R, G, weight = b.T @ b, g.T @ b, torch.randn(K, C).to(dtype)
    vectors = [torch.rand(K) + 0.5 for _ in range(4)]
    fold = Fold(Affine(*vectors[:2], Activation("identity")), *vectors[2:], count)
    dgamma, dbeta, dW, V, T = backends.get(backend).moments_terms(R, G, weight, fold, 64.0, need_weight)
    wide = fold._replace(affine=fold.affine._replace(scale=vectors[0].double()), rstd=vectors[3].double())
    truth = ReferenceBackend().moments_terms(R.double(), G.double(), weight.double(), wide, 64.0, need_weight)
    single, half = torch.finfo(torch.float32).eps, torch.finfo(dtype).eps / 2
    assert torch.equal(dbeta, G[:, C]) and V.dtype == T.dtype == dtype
    assert (dgamma - truth[0]).norm() <= C * single * (weight.abs().float() * G[:, :C].abs()).sum(1).norm()
    assert (V - truth[3]).abs().le((half + single) * truth[3].abs()).all()
    # Of T, one rounding more: it is made of V.
    assert (T[:C] - truth[4][:C]).norm() <= 4 * half * truth[4][:C].norm()
    offset = -(64.0 * dbeta.double() @ V.double() + R[C, :C].double() @ T[:C].double()) / count
    assert (T[C].double() + T[C + 1] - offset).norm() <= 2 * half**2 * offset.norm() + K * single * offset.norm()
    assert not T[C + 2 :].any()
    assert (dW is None) == (not need_weight)
    if need_weight:
        assert dW.dtype == dtype and (dW - truth[2]).norm() <= 2 * half * truth[2].norm()


@pytest.mark.parametrize("channels", [1, 300])
def test_correction(backend, channels):
    """That of a norm, in one launch where there are kernels."""
    x, (scale, mean, rstd, sum_dy, sum_dy_xc, beta, delta) = torch.randn(2, channels, 3), torch.randn(7, channels).unbind()
    fold = Fold(Affine(scale, mean, Activation()), mean, rstd, 6)
    results = []
    for chosen in (backends.get(backend), ReferenceBackend()):
        into = Pending(x, x, scale, beta.clone(), delta.clone())
        version = into.beta._version
        results.append((*chosen._correct(fold, sum_dy, sum_dy_xc, None), *chosen._correct(fold, sum_dy, sum_dy_xc, into)))
        assert into.beta._version > version and results[-1][-2] is into.beta
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("shape", [(1, 3, 5), (1024, 7, 3), (3 * 2048, 130, 9)], ids=str)
def test_products_in_parts(shape):
    count, a, b = shape
    assert_gram(torch.randn(count, a).bfloat16(), torch.randn(count, b).bfloat16())


def test_parts_fill_a_card_and_divide_the_positions():
    stages = [(256 * side**2, outputs, inputs + 8) for side, outputs, inputs in ((56, 256, 64), (28, 512, 128), (7, 2048, 512))]
    assert [moments._parts(*sizes) for sizes in stages] == [128, 32, 2]
    assert moments._parts(7 * 1021, 256, 64) == 7 and moments._parts(10007, 8, 8) == 1


def test_what_suits():
    conv = Conv(torch.zeros(8, 4, 1, 1, dtype=torch.bfloat16))
    x = torch.zeros(2, 4, 3, 3, dtype=torch.bfloat16)
    assert moments.suits(x, conv)
    assert not moments.suits(x.float(), conv) and not moments.suits(x.half(), conv)
    assert not moments.suits(torch.cat([x, x], 1), conv._replace(groups=2))
