"""`add_act` and `bn_add_act`: against plain PyTorch, their errors, and what they leave alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small_nets import assert_same
from torch import nn

from resdense_ext import functional, reference
from resdense_ext.functional import BatchNorm
from resdense_ext.ops import backend as backends
from resdense_ext.ops import add_act, bn_add_act
from resdense_ext.ops.activation import number_of
from resdense_ext.ops.layout import is_map
from resdense_ext.ops.triton import interpreting

ACTIVATIONS = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": lambda y: F.leaky_relu(y, 0.2),
    "elu": F.elu,
    "silu": F.silu,
    "identity": lambda y: y,
}


def maps(count, dtype=torch.float64, channels_last=False):
    formatted = torch.channels_last if channels_last else torch.contiguous_format
    return [torch.randn(3, 5, 7, 6, dtype=dtype).contiguous(memory_format=formatted).requires_grad_() for _ in range(count)]


def norm_of(module, momentum=0.1):
    return BatchNorm(
        module.weight, module.bias, module.running_mean, module.running_var, module.training, momentum, module.eps,
        module.num_batches_tracked,
    )  # fmt: skip


def batch_norm():
    module = nn.BatchNorm2d(5).double()
    nn.init.normal_(module.weight, 1, 0.3), nn.init.normal_(module.bias)
    return module


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_add_act(activation, channels_last):
    x, identity = maps(2, channels_last=channels_last)
    options = dict(activation=activation, negative_slope=0.2)
    y = functional.add_act(x, identity, **options)
    expected = ACTIVATIONS[activation](x + identity)
    if activation == "elu" and interpreting():  # whose exponentials are Triton's
        assert_same({"output": y}, {"output": expected})
    else:
        assert torch.equal(y, expected)
    assert y.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert torch.autograd.gradcheck(lambda a, b: functional.add_act(a, b, **options), (x, identity), fast_mode=True)


def test_the_kernels_stand_in_refuses_what_they_refuse():
    pytest.importorskip("resdense_ext._C", reason="the CPU library is not built")
    x = torch.randn(2, 3, 4)
    with pytest.raises(RuntimeError, match="activation: expected no negative slope, .* got -0.1"):
        torch.ops.resdense.add_act_backward(x, x, -0.1)


@pytest.mark.parametrize("layout", ["dense", "every other position", "expanded"])
def test_add_act_hands_its_kernels_maps_that_they_walk(monkeypatch, layout):
    """The framework's kernels, which stand in on the CPU, take any layout; those of CUDA do not."""

    class Kernels:
        def __getattr__(self, name):
            def run(*operands):
                assert all(is_map(t) for t in operands if isinstance(t, torch.Tensor))
                return getattr(torch.ops.resdense, name)(*operands)

            return run

    monkeypatch.setattr(add_act, "kernels_of", lambda x: Kernels())
    whole = torch.randn(3, 5, 14, 6, dtype=torch.float64)
    views = {"dense": whole, "every other position": whole[:, :, ::2, ::2], "expanded": whole.new_ones(()).expand(whole.shape)}
    x, identity = (views[layout].detach().requires_grad_() for _ in range(2))
    y = functional.add_act(x, identity)
    assert torch.equal(y, F.relu(x + identity))
    for grad in (torch.randn_like(y), torch.ones_like(y[0, 0, 0, 0]).expand(y.shape), torch.randn_like(y.mT).mT):
        for ours in torch.autograd.grad(y, (x, identity), grad, retain_graph=True):
            assert torch.equal(ours, grad * (y > 0))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bn_add_act(activation, projection, training):
    norms = [batch_norm().train(training) for _ in range(2)]
    z, identity = maps(2)
    stock = copy.deepcopy(norms)
    expected = ACTIVATIONS[activation](stock[0](z) + (stock[1](identity) if projection else identity))
    shortcut = norm_of(norms[1]) if projection else None
    y = functional.bn_add_act(z, norm_of(norms[0]), identity, shortcut, activation=activation, negative_slope=0.2)
    assert torch.allclose(y, expected, rtol=1e-13, atol=1e-13)
    for ours, other in zip(norms[: 1 + projection], stock):
        for name, buffer in other.named_buffers():
            assert torch.allclose(ours.get_buffer(name), buffer, rtol=1e-14), name


@pytest.mark.parametrize("projection", [False, True])
def test_bn_add_act_gradients(projection):
    z, identity = maps(2)
    vectors = [(torch.randn(5).double() + 1).requires_grad_() for _ in range(4)]

    def run(z, identity, a, b, c, d):
        shortcut = BatchNorm(c, d) if projection else None
        return functional.bn_add_act(z, BatchNorm(a, b), identity, shortcut, activation="silu")

    assert torch.autograd.gradcheck(run, (z, identity, *vectors), fast_mode=True)


@pytest.fixture
def fused(monkeypatch):
    """The fused path: in Triton's interpreter as it is; else that of the CUDA operators, which the CPU serves by references."""
    if interpreting():
        return
    pytest.importorskip("resdense_ext._C", reason="the CPU library is not built")
    monkeypatch.setattr(bn_add_act, "fused_number", lambda x, activation: number_of(activation))
    monkeypatch.setattr(bn_add_act, "kernels_of", lambda x: backends.get("cpu").ends)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu", "elu", "identity"])
def test_fused_bn_add_act(fused, activation, projection, training, affine):
    norms = [batch_norm().train(training) for _ in range(2)]
    if not affine:
        for norm in norms:
            norm.weight = norm.bias = None
    stock = copy.deepcopy(norms)
    z, identity = maps(2)
    grad = torch.randn_like(z)

    def results(y, modules):
        used = modules[: 1 + projection]
        wanted = [z, identity, *(p for module in used for p in module.parameters())]
        return {"output": y} | {f"grad {i}": g for i, g in enumerate(torch.autograd.grad(y, wanted, grad))}

    shortcut = norm_of(norms[1]) if projection else None
    y = functional.bn_add_act(z, norm_of(norms[0]), identity, shortcut, activation=activation, negative_slope=0.2)
    assert type(y.grad_fn).__name__ == "BNAddActFunctionBackward"
    expected = ACTIVATIONS[activation](stock[0](z) + (stock[1](identity) if projection else identity))
    assert_same(results(y, norms), results(expected, stock))
    for ours, other in zip(norms, stock):
        torch.testing.assert_close(dict(ours.named_buffers()), dict(other.named_buffers()), rtol=1e-13, atol=1e-13)


def test_fused_bn_add_act_of_strided_vectors(fused):
    z, identity = maps(2)
    vectors = torch.rand(5, 8, dtype=torch.float64).unbind(1)
    norms = [BatchNorm(*vectors[:4], batch_stats=False), BatchNorm(*vectors[4:], batch_stats=False)]

    def results(call):
        y = call(z, norms[0], identity, norms[1])
        return dict(zip(("output", "grad z", "grad identity"), (y, *torch.autograd.grad(y.square().sum(), [z, identity]))))

    assert_same(results(functional.bn_add_act), results(reference.bn_add_act))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("projection", [False, True])
def test_fused_bn_add_act_twice(fused, projection, training):
    z, identity = (torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    vectors = [(torch.randn(3).double() + 1).requires_grad_() for _ in range(4)]
    running = torch.randn(3).double(), torch.rand(3).double() + 0.5

    def run(z, identity, a, b, c, d):
        norms = [BatchNorm(weight, bias, *running, training) for weight, bias in ((a, b), (c, d))]
        shortcut = norms[1] if projection else None
        return functional.bn_add_act(z, norms[0], identity, shortcut, activation="leaky_relu", negative_slope=0.2)

    assert torch.autograd.gradcheck(run, (z, identity, *vectors))
    assert torch.autograd.gradgradcheck(run, (z, identity, *vectors))


@pytest.mark.parametrize("projection", [False, True])
def test_fused_bn_add_act_of_maps_in_any_layout(fused, projection):
    z = torch.randn(3, 10, 14, 6, dtype=torch.float64)[:, ::2, ::2].requires_grad_()
    (identity,) = maps(1, channels_last=True)
    norms = [batch_norm() for _ in range(2)]
    stock = copy.deepcopy(norms)
    expected = F.relu(stock[0](z) + (stock[1](identity) if projection else identity))
    y = functional.bn_add_act(z, norm_of(norms[0]), identity, norm_of(norms[1]) if projection else None)
    grad = torch.randn(3, 7, 6, 5, dtype=torch.float64).movedim(-1, 1)

    def results(out):
        return dict(zip(("output", "grad z", "grad identity"), (out, *torch.autograd.grad(out, [z, identity], grad))))

    assert_same(results(y), results(expected))


@pytest.mark.parametrize("channels_last", [False, True])
def test_fused_bn_add_act_reads_a_slice_where_it_is(fused, channels_last):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    buffer, identity = (torch.randn(2, n, 4, 3).double().contiguous(memory_format=memory_format) for n in (9, 5))
    z, norm = buffer[:, 2:7].requires_grad_(), batch_norm()
    y = functional.bn_add_act(z, norm_of(norm), identity, None)
    assert any(t is not None and t.data_ptr() == z.data_ptr() for t in y.grad_fn.saved_tensors)
    expected = F.relu(norm(z) + identity)
    assert_same(*({"output": out, "grad z": torch.autograd.grad(out.sum(), z)[0]} for out in (y, expected)))


def test_fused_bn_add_act_keeps_only_what_it_needs(fused):
    z, identity = maps(2)
    grad = torch.randn_like(z)
    y = functional.bn_add_act(z, norm_of(batch_norm()), identity)
    with torch.no_grad():
        identity.zero_()
    y.backward(grad, retain_graph=True)
    assert torch.equal(identity.grad, grad * (y > 0))
    with torch.no_grad():
        z.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(grad)


def test_running_statistics_without_momentum_stay():
    module = batch_norm()
    z, identity = maps(2)
    functional.bn_add_act(z, norm_of(module, momentum=None), identity)
    assert module.running_mean.eq(0).all() and module.num_batches_tracked == 1


@pytest.mark.parametrize(
    ("identity", "error", "message"),
    [
        (torch.zeros(3, 5, 7, 5).double(), ValueError, r"identity: expected shape \(3, 5, 7, 6\), got \(3, 5, 7, 5\)"),
        (torch.zeros(3, 5, 7, 6), TypeError, "identity: expected dtype torch.float64, got torch.float32"),
        (torch.zeros(3, 5, 7, 6, device="meta").double(), ValueError, "identity: expected device cpu .* got meta"),
        (torch.zeros(3, 5, 7, 6).double().numpy(), TypeError, "identity: expected a Tensor, got ndarray"),
    ],
)
def test_bad_operands_change_nothing(identity, error, message):
    module, (z,) = batch_norm(), maps(1)
    with pytest.raises(error, match=message):
        functional.add_act(z, identity)
    with pytest.raises(error, match=message):
        functional.bn_add_act(z, norm_of(module), identity)
    assert module.num_batches_tracked == 0


def test_a_dtype_that_no_kernel_has_changes_nothing():
    module, z = batch_norm(), torch.zeros(3, 5, 7, 6).to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match="z: expected float32, float64, bfloat16 or float16, got torch.float8_e4m3fn"):
        functional.bn_add_act(z, norm_of(module), z)
    assert module.num_batches_tracked == 0


def test_bad_norms_change_nothing():
    module, (z, identity) = batch_norm(), maps(2)
    with pytest.raises(ValueError, match=r"identity_norm.weight: expected shape \(5,\), one value a channel, got \(4,\)"):
        functional.bn_add_act(z, norm_of(module), identity, BatchNorm(torch.ones(4)))
    assert module.num_batches_tracked == 0
    with pytest.raises(ValueError, match="activation: expected relu"):
        functional.bn_add_act(z, norm_of(module), identity, activation="gelu")


class TestChannelStats:
    def test_equivalent(self):
        x = torch.randn(3, 5, 7, 6).double()
        mean, m2 = functional.channel_stats(x)
        assert torch.allclose(mean, x.mean([0, 2, 3]), rtol=1e-13, atol=1e-15)
        assert torch.allclose(m2, x.var([0, 2, 3], unbiased=False) * 126, rtol=1e-13)

    def test_gradients(self):
        (x,) = maps(1)
        assert torch.autograd.gradcheck(functional.channel_stats, (x,), fast_mode=True)

    @pytest.mark.parametrize(
        ("x", "error", "message"),
        [
            (torch.zeros(3, 5), ValueError, "x: expected 3, 4 or 5 dimensions"),
            (torch.zeros(0, 5, 2), ValueError, r"x: expected at least one value a channel, got shape \(0, 5, 2\)"),
            (torch.zeros(3, 5, 2).int(), TypeError, "x: expected float32, float64, bfloat16 or float16, got torch.int32"),
        ],
    )
    def test_bad_input(self, x, error, message):
        with pytest.raises(error, match=message):
            functional.channel_stats(x)
