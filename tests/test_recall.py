"""Blocks are read and checked once, and again where anything that a reading depends on has changed."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import OrderedDict

import pytest
import torch
from small_nets import images
from stock import import_torchvision
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import resdense_ext as rd
from resdense_ext import checks
from resdense_ext.nn import read as reading
from resdense_ext.nn import recall


@pytest.fixture
def readings(monkeypatch):
    """How often residual blocks were read, and checked."""
    counts = {"read": 0, "checked": 0}
    for module, name, what in ((reading, "read_residual_block", "read"), (checks, "check_residual_stage", "checked")):
        call = getattr(module, name)

        def counted(*args, call=call, what=what):
            counts[what] += 1
            return call(*args)

        monkeypatch.setattr(module, name, counted)
    return counts


def small_block() -> nn.Module:
    torch.manual_seed(0)
    return rd.nn.Bottleneck(16, 4).double()


def stock_of(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return rd.revert(copy.deepcopy(block))(x)


def test_read_and_checked_once(readings):
    block, x = small_block(), images(2, 16, 5, 5)
    for _ in range(3):
        block(x).sum().backward()
    assert readings == {"read": 1, "checked": 1}
    block(images(3, 16, 5, 5))
    block(x)
    assert readings == {"read": 1, "checked": 2}


def with_stride(block):
    block.conv2.stride, block.conv2.padding = (1, 1), (2, 2)
    block.conv2.dilation = (2, 2)


def with_another_norm(block):
    block.bn2 = nn.BatchNorm2d(4, eps=0.5).double()


def with_another_weight(block):
    block.conv1.weight = nn.Parameter(2 * block.conv1.weight.detach())


def with_a_list_that_grows(block):
    block.conv2.padding[0] = block.conv2.padding[1] = 2
    block.conv2.dilation = (2, 2)


CHANGES = {
    "training": lambda block: block.eval(),
    "a child's training": lambda block: block.bn2.eval(),
    "eps": lambda block: setattr(block.bn1, "eps", 0.5),
    "momentum": lambda block: setattr(block.bn1, "momentum", 0.5),
    "geometry": with_stride,
    "a child": with_another_norm,
    "an activation": lambda block: setattr(block, "relu", nn.LeakyReLU(0.3)),
    "an activation in its place": lambda block: block._modules.update(relu=nn.SiLU()),
    "a parameter": with_another_weight,
    "no parameter any more": lambda block: block.bn1._parameters.update(weight=None),
    "a buffer": lambda block: setattr(block.bn1, "running_mean", torch.ones(4).double()),
    "a bias": lambda block: setattr(block.conv1, "bias", nn.Parameter(torch.ones(4).double())),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_a_change_is_seen(change, readings):
    block, x = small_block(), images(2, 16, 5, 5)
    for _ in range(2):
        block(x)
    change(block)
    expected, before = stock_of(block, x), copy.deepcopy(block.state_dict())
    torch.testing.assert_close(block(x), expected)
    assert readings["read"] == 2
    other = rd.revert(copy.deepcopy(block))
    other.load_state_dict(before)
    other(x)
    torch.testing.assert_close(block.state_dict(), other.state_dict())
    block(x)
    assert readings["read"] == 2


def test_what_lists_hold_is_seen(readings):
    block, x = small_block(), images(2, 16, 5, 5)
    block.conv2.padding = [1, 1]
    for _ in range(2):
        block(x)
    with_a_list_that_grows(block)
    torch.testing.assert_close(block(x), stock_of(block, x))
    assert readings["read"] == 2


@pytest.mark.parametrize("where", ["conv1", "bn2", "relu"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_a_hook_is_seen(where, kind):
    block, x, seen = small_block(), images(2, 16, 5, 5), []
    for _ in range(2):
        block(x)
    hook = getattr(getattr(block, where), f"register_{kind}_hook")(lambda *args: seen.append(where))
    with pytest.warns(UserWarning, match="carries hooks"):
        block(x)
    assert seen
    hook.remove()
    del seen[:]
    block(x)
    assert not seen


def test_what_holds_hooks_and_parameters_may_be_another():
    """As where hooks are cleared by a new dict."""
    block, x, seen = small_block(), images(2, 16, 5, 5), []
    for _ in range(2):
        block(x)
    block.conv1._forward_hooks = OrderedDict()
    block.conv1.register_forward_hook(lambda *args: seen.append(args))
    with pytest.warns(UserWarning, match="carries hooks"):
        block(x)
    assert seen
    block.conv1._forward_hooks = OrderedDict()
    for _ in range(2):
        block(x)
    block.conv1._parameters = {"weight": nn.Parameter(2 * block.conv1.weight.detach()), "bias": None}
    torch.testing.assert_close(block(x), stock_of(block, x))


def test_a_global_hook_is_seen():
    block, x, seen = small_block(), images(2, 16, 5, 5), []
    for _ in range(2):
        block(x)
    hook = nn.modules.module.register_module_forward_hook(lambda *args: seen.append(args[0]))
    try:
        with pytest.warns(UserWarning, match="global module hooks"):
            block(x)
    finally:
        hook.remove()
    assert block.conv1 in seen


def test_a_forward_is_seen(monkeypatch):
    """Of a module, and of a class."""
    block, x = small_block(), images(2, 16, 5, 5)
    for _ in range(2):
        block(x)
    block.conv1.forward = lambda x: 0 * nn.Conv2d.forward(block.conv1, x)
    with pytest.warns(UserWarning, match="has a forward of its own"):
        torch.testing.assert_close(block(x), block.stock_forward(x))
    del block.conv1.forward

    class Twice(nn.ReLU):
        pass

    block.relu = Twice()
    with pytest.warns(UserWarning, match="is Twice"):
        block(x)


def test_a_class_that_is_patched_is_seen(monkeypatch):
    densenet = import_torchvision().models.densenet

    class Layer(densenet._DenseLayer):
        pass

    block, x = densenet._DenseBlock(2, 8, 2, 4, 0.0).double(), images(2, 8, 5, 5)
    block.denselayer2.__class__ = Layer
    block = rd.convert(block)
    for _ in range(2):
        block(x)
    monkeypatch.setattr(Layer, "forward", lambda self, x: 2 * densenet._DenseLayer.forward(self, x))
    with pytest.warns(UserWarning, match="has a forward of its own"):
        torch.testing.assert_close(block(x), block.stock_forward(x))


@pytest.mark.parametrize("change", ["a dtype", "a buffer that requires grad", "a shape"])
def test_what_fits_no_more_is_an_error(change):
    block, x = small_block(), images(2, 16, 5, 5)
    for _ in range(2):
        block(x)
    if change == "a dtype":
        block.conv2.float()
        expected = TypeError, r"conv\.weight: expected dtype torch.float64, got torch.float32"
    elif change == "a shape":
        block.bn1.weight.data = torch.ones(5).double()
        expected = ValueError, r"norm.weight: expected shape \(4,\), one value a channel, got \(5,\)"
    else:
        block.bn1.running_mean.requires_grad_()
        expected = ValueError, "expected a buffer that training can update, got one that requires grad"
    for _ in range(3):
        with pytest.raises(expected[0], match=expected[1]):
            block(x)


def test_an_input_that_does_not_fit_is_an_error_every_time():
    block = small_block()
    block(images(2, 16, 5, 5))
    for _ in range(3):
        with pytest.raises(ValueError, match="expected more than 1 value per channel"):
            block(images(1, 16, 1, 1))


def test_a_cumulative_average_is_read_anew(readings):
    block, x = small_block(), images(2, 16, 5, 5)
    block.bn2.momentum = None
    stock = rd.revert(copy.deepcopy(block))
    for i in range(3):
        torch.testing.assert_close(block(i + x), stock(i + x))
    torch.testing.assert_close(block.state_dict(), stock.state_dict())
    assert readings["read"] == 3


def test_attributes_that_may_change_unseen_are_not_recalled(readings):
    block, x = small_block(), images(2, 16, 5, 5)
    block.settings = {"unknown": object()}
    for _ in range(3):
        block(x)
    assert readings["read"] == 3


def test_a_block_that_changes_with_every_call_is_let_be(readings):
    block, x = small_block(), images(2, 16, 5, 5)
    for i in range(20):
        block.calls = i
        block(x)
    assert vars(block)[recall._KEY] is False
    assert readings["read"] == 20


def test_a_block_that_changes_now_and_then_is_recalled(readings):
    block, x = small_block(), images(2, 16, 5, 5)
    for i in range(20):
        block.train(i % 2 == 0)
        block(x)
        block(x)
    assert readings["read"] == 20


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))])
def test_copies(copied):
    """They are of their own, whatever becomes of the block."""
    block, x = small_block(), images(2, 16, 5, 5)
    for _ in range(2):
        block(x)
    other = copied(block)
    if copied is not copy.copy:
        assert vars(other)[recall._KEY] is None
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.5)
    for _ in range(2):
        torch.testing.assert_close(other(x), stock_of(other, x))
        torch.testing.assert_close(block(x), stock_of(block, x))


def test_nothing_is_left_by_revert():
    model = rd.convert(rd.models.resnet18(num_classes=3).double())
    known = {name: set(vars(module)) for name, module in copy.deepcopy(rd.revert(model)).named_modules()}
    model = rd.convert(model)
    for _ in range(2):
        model(images(2, 3, 32, 32))
    rd.revert(model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == known


def test_parameters_of_a_call_are_let_go():
    block, x = small_block(), images(2, 16, 5, 5)
    for _ in range(2):
        block(x)
    others = {name: 2 * p for name, p in block.named_parameters()}
    torch.func.functional_call(block, others, (x,))
    gone = [weakref.ref(p) for p in others.values()]
    gc.collect()
    del others
    assert not [found for of in gone if (found := of()) is not None]
    torch.testing.assert_close(block(x), stock_of(block, x))


@pytest.mark.parametrize("transformed", ["export", "trace", "make_fx", "compile"])
def test_a_block_that_is_recalled_is_transformed(transformed):
    block, x = small_block().eval(), images(2, 16, 5, 5)
    for _ in range(2):
        y = block(x)
    if transformed == "export":
        other = torch.export.export(block, (x,)).module()
    elif transformed == "trace":
        other = torch.jit.trace(block, x)
    elif transformed == "make_fx":
        other = make_fx(block)(x)
    else:
        other = torch.compile(block, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(other(x), y)
        torch.testing.assert_close(block(x), y)


@pytest.mark.parametrize("build", [rd.models.resnet18, rd.models.densenet121])
def test_a_network_that_is_let_go_is_gone(build):
    """At once, with its parameters, as no cycle holds it."""
    model = build(num_classes=3).double()
    for _ in range(2):
        model(images(2, 3, 32, 32)).sum().backward()
    inner = [weakref.ref(module) for module in model.modules()] + [weakref.ref(p) for p in model.parameters()]
    gc.disable()
    try:
        del model
        assert not [found for of in inner if (found := of()) is not None]
    finally:
        gc.enable()
