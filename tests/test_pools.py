"""Pools by themselves, behind a dropout or not: to the bit what stock computes, of a byte a maximum and of nothing else."""

import pytest
import torch
import torch.nn.functional as F
from test_dense_block import built
from torch import nn

import resdense_ext as rd
from resdense_ext.nn.engine import run_pool
from resdense_ext.nn.leaves import pool_of
from resdense_ext.ops.avg_pool import AvgPoolFunction, avg_pool
from resdense_ext.ops.max_pool import MaxPoolFunction, max_pool
from resdense_ext.reference import Pool

MAXIMA = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
AVERAGES = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
CASES = [
    ((9,), dict(kernel_size=2)),
    ((9,), dict(kernel_size=3, stride=2, padding=1)),
    ((8, 6), dict(kernel_size=2)),
    ((7, 9), dict(kernel_size=2)),
    ((7, 6), dict(kernel_size=(3, 1))),
    ((7, 8), dict(kernel_size=3, stride=2, padding=1)),
    ((8, 9), dict(kernel_size=3, stride=2, ceil_mode=True)),
    ((6, 5), dict(kernel_size=3, stride=1, padding=1, ceil_mode=True)),
    ((1, 2), dict(kernel_size=(3, 2), padding=1)),
    ((15, 17), dict(kernel_size=(15, 16))),
    ((4, 5, 6), dict(kernel_size=2)),
    ((5, 6, 7), dict(kernel_size=3, stride=2, padding=1)),
    ((5, 3, 7), dict(kernel_size=(1, 3, 2), stride=(1, 2, 3))),
]
TWO = Pool("maximum", (2, 2), (2, 2), (0, 0))


def a_map(sizes, dtype=torch.float64, channels_last=False):
    torch.manual_seed(0)
    x = torch.randn(2, 3, *sizes, dtype=dtype)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.dim()]) if channels_last and x.dim() in formats else x


def drawn(f, x, seed=1):
    """Output, gradient and the state of the generator behind; gradients of whole numbers, whose sums are exact in any order."""
    x = x.detach().requires_grad_()
    torch.manual_seed(seed)
    y = f(x)
    after = torch.get_rng_state()
    grad = torch.randint(-8, 9, y.shape).to(y.dtype)
    y.backward(grad)
    return y, x.grad, after


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.2, 1.0])  # 1 / (1 - p) is a number of 16 bits, as which stock has it on CPUs
@pytest.mark.parametrize(("sizes", "options"), CASES)
def test_the_same_as_stock_to_the_bit(sizes, options, p, dtype, channels_last):
    x, pool = a_map(sizes, dtype, channels_last), MAXIMA[len(sizes)](**options)
    stock, ours = drawn(lambda x: pool(F.dropout(x, p)), x), drawn(lambda x: max_pool(x, pool_of(pool)[0], p), x)
    assert all(map(torch.equal, ours, stock))
    assert ours[0].stride() == stock[0].stride() and ours[1].stride() == x.stride()


@built
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("sizes", "options"), CASES)
def test_maxima_are_found_by_kernels(sizes, options, channels_last, monkeypatch):
    """Whose numbers are those that the framework's operators find: a backward by these takes them, too."""
    x, pool = a_map(sizes, torch.float64, channels_last).requires_grad_(), MAXIMA[len(sizes)](**options)
    y = max_pool(x, pool_of(pool)[0])
    grad = torch.randint(-8, 9, y.shape).to(y.dtype)
    (by_operators,) = torch.autograd.grad(y, x, grad, create_graph=True)
    monkeypatch.setattr("resdense_ext.ops.max_pool._places", None)
    (by_kernels,) = torch.autograd.grad(max_pool(x, pool_of(pool)[0]), x, grad)
    assert torch.equal(by_kernels, by_operators) and by_kernels.stride() == x.stride()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("sizes", "options"), CASES)
def test_averages_are_the_same_as_stock_to_the_bit(sizes, options, dtype, channels_last):
    x, pool = a_map(sizes, dtype, channels_last), AVERAGES[len(sizes)](**options)
    stock, ours = drawn(pool, x), drawn(lambda x: avg_pool(x, pool_of(pool)[0]), x)
    assert all(map(torch.equal, ours, stock))
    assert ours[0].stride() == stock[0].stride() and ours[1].stride() == x.stride()
    assert rd.memory.saved_bytes(lambda: avg_pool(x.requires_grad_(), pool_of(pool)[0])) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_averages_in_16_bits(dtype):
    """Of numbers whose averages are numbers of 16 bits."""
    x, pool = a_map((6, 8), torch.float32, True).mul(8).round().to(dtype), nn.AvgPool2d(2)
    assert all(map(torch.equal, drawn(lambda x: avg_pool(x, pool_of(pool)[0]), x), drawn(pool, x)))


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.MaxPool2d(3, stride=2, ceil_mode=True)], ids=["", "ceil"])
def test_of_equal_values_the_one_that_stock_takes(pool):
    for value in (0.0, 1.0, float("inf"), -float("inf"), float("nan")):
        x = torch.full((1, 2, 6, 6), value)
        assert all(map(torch.equal, drawn(lambda x: max_pool(x, pool_of(pool)[0]), x)[1:], drawn(pool, x)[1:]))


def test_gradients_of_gradients_and_in_batches():
    x = a_map((7, 6)).requires_grad_()
    for pool in (Pool("maximum", (2, 3), (2, 3), (0, 0)), Pool("maximum", (3, 3), (2, 2), (1, 1))):
        assert torch.autograd.gradcheck(lambda x: max_pool(x, pool), x)
        assert torch.autograd.gradgradcheck(lambda x: max_pool(x, pool), x)
        assert torch.autograd.gradgradcheck(lambda x: avg_pool(x, pool._replace(kind="average")), x)
    for y in (max_pool(x, TWO, 0.4), avg_pool(x, TWO._replace(kind="average"))):
        grads = torch.randn(4, *y.shape, dtype=y.dtype)
        alone = torch.stack([torch.autograd.grad(y, x, grad, retain_graph=True)[0] for grad in grads])
        (batched,) = torch.autograd.grad(y, x, grads, is_grads_batched=True)
        assert torch.equal(batched, alone)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_byte_a_maximum_is_kept(p):
    x = a_map((8, 7)).requires_grad_()
    assert rd.memory.saved_bytes(lambda: max_pool(x, TWO, p)) == 2 * 3 * 4 * 3


@built
@pytest.mark.unpoisoned
def test_a_backward_has_its_result_alone():
    """And a few vectors: neither the map nor places in it are in memory."""
    x = torch.randn(2, 16, 32, 32).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = max_pool(x, Pool("maximum", (3, 3), (2, 2), (1, 1)))
    grad = torch.ones_like(y)
    peak = rd.memory.peak_bytes(lambda: torch.autograd.grad(y, x, grad, retain_graph=True))
    assert x.nbytes <= peak < 1.1 * x.nbytes


def test_what_is_infinite_and_dropped_stays_alone():
    x = a_map((4, 4)).requires_grad_()
    torch.manual_seed(1)
    y = max_pool(x, TWO, 0.5)
    (grad,) = torch.autograd.grad(y, x, torch.full_like(y, float("inf")))
    assert not grad.isnan().any() and grad.isinf().any() and (y == 0).any()


def hooked(module):
    module.register_forward_hook(lambda *_: None)
    return module


@pytest.mark.parametrize(
    ("dropout", "pool", "one_node"),
    [
        (nn.Dropout(0.3), nn.MaxPool2d(2), True),
        (nn.Dropout(0.3).eval(), nn.MaxPool2d(2), True),
        (nn.Dropout(0.3), nn.MaxPool2d((3, 2), stride=(3, 2)), True),
        (hooked(nn.Dropout(0.3)), nn.MaxPool2d(2), False),
        (nn.Dropout(0.3), hooked(nn.MaxPool2d(2)), False),
        (nn.Dropout(0.3, inplace=True), nn.MaxPool2d(2), False),
        (nn.Dropout2d(0.3), nn.MaxPool2d(2), False),
        (None, nn.MaxPool2d(2), True),
        (None, hooked(nn.MaxPool2d(2)), False),
        (nn.Identity(), nn.MaxPool2d(2), False),
        (nn.Dropout(0.3), nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True), True),
        (nn.Dropout(0.3), nn.MaxPool2d(2, dilation=2), False),
        (nn.Dropout(0.3), nn.MaxPool2d(16), False),
        (nn.Dropout(0.3), nn.AvgPool2d(2), False),
        (None, nn.AvgPool2d(3, stride=2, padding=1), True),
        (None, nn.AvgPool2d(2, count_include_pad=False, padding=1), False),
        (None, nn.AvgPool2d(2, divisor_override=3), False),
        (None, nn.AdaptiveAvgPool2d(1), False),
        (nn.Dropout(0.3), nn.AdaptiveMaxPool2d(2), False),
    ],
)
def test_modules_that_are_no_such_pair_are_called(dropout, pool, one_node):
    x = a_map((17, 19))
    modules = nn.Sequential(*[module for module in (dropout, pool) if module is not None])
    stock, ours = drawn(lambda x: modules(x * 1), x), drawn(lambda x: run_pool(pool, x * 1, dropout), x)
    assert all(map(torch.equal, ours, stock))
    nodes = [f"{function.__name__}Backward" for function in (MaxPoolFunction, AvgPoolFunction)]
    assert (type(ours[0].grad_fn).__name__ in nodes) == one_node


def test_where_nothing_is_to_be_kept_the_modules_are_called(monkeypatch):
    ours, x = [], a_map((6, 6)).requires_grad_()
    monkeypatch.setattr("resdense_ext.nn.engine.max_pool", lambda *args: ours.append(args) or max_pool(*args))
    for enabled, of in ((False, x), (True, x.detach()), (True, x)):
        assert not ours
        with torch.set_grad_enabled(enabled):
            run_pool(nn.MaxPool2d(2), of, nn.Dropout(0.3))
    assert len(ours) == 1
