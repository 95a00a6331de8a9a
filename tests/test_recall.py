"""Blocks are read and checked once, and again where anything that a reading depends on has changed."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import OrderedDict

import pytest
import torch
from small_nets import Joined, assert_same, images, library, steps_of, without_garbage_collector
from stock import import_torchvision
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import resdense_ext as rd
from resdense_ext import checks
from resdense_ext.nn import read as reading
from resdense_ext.nn import recall


X = images(2, 16, 5, 5)


@pytest.fixture
def readings(monkeypatch):
    """How often residual blocks and graphs of convolutions were read, and checked."""
    counts = {"read": 0, "checked": 0}
    of_blocks = (reading, "read_residual_block", "read"), (checks, "check_residual_stage", "checked")
    of_graphs = (reading, "read_conv_graph", "read"), (checks, "check_conv_graph", "checked")
    for module, name, what in (*of_blocks, *of_graphs):
        call = getattr(module, name)

        def counted(*args, call=call, what=what):
            counts[what] += 1
            return call(*args)

        monkeypatch.setattr(module, name, counted)
    return counts


def small_block() -> nn.Module:
    torch.manual_seed(0)
    return rd.nn.Bottleneck(16, 4).double()


def recalled_block() -> nn.Module:
    """One that has been read."""
    block = small_block()
    block(X)
    assert vars(block)[recall._KEY].holds(block)
    return block


def stock_of(block: nn.Module) -> nn.Module:
    return rd.revert(copy.deepcopy(block))


def assert_as_stock(block: nn.Module) -> None:
    """Output, gradients and buffers of a step."""
    stock = stock_of(block)
    block.zero_grad()  # a copy has no gradients
    assert_same(steps_of(block, X), steps_of(stock, X))


def test_read_and_checked_once(readings):
    block = small_block()
    for _ in range(3):
        block(X).sum().backward()
    assert readings == {"read": 1, "checked": 1}
    block(images(3, 16, 5, 5))
    block(X)
    assert readings == {"read": 1, "checked": 2}


def test_not_too_much_is_known():
    block = recalled_block()
    for size in range(2, 2 * recall._MOST_KNOWN):
        with torch.no_grad():
            block(images(2, 16, 3, size))
    assert 0 < len(vars(block)[recall._KEY].reading.known) <= recall._MOST_KNOWN


def with_another_geometry(block):
    block.conv2.padding = block.conv2.dilation = (2, 2)


CHANGES = {
    "training": lambda block: block.eval(),
    "a child's training": lambda block: block.bn2.eval(),
    "eps": lambda block: setattr(block.bn1, "eps", 0.5),
    "momentum": lambda block: setattr(block.bn1, "momentum", 0.5),
    "geometry": with_another_geometry,
    "a child": lambda block: setattr(block, "bn2", nn.BatchNorm2d(4, eps=0.5).double()),
    "an activation": lambda block: setattr(block, "relu", nn.LeakyReLU(0.3)),
    "an activation in its place": lambda block: block._modules.update(relu=nn.SiLU()),
    "a parameter": lambda block: setattr(block.conv1, "weight", nn.Parameter(2 * block.conv1.weight.detach())),
    "no parameter any more": lambda block: block.bn1._parameters.update(weight=None),
    "a buffer": lambda block: setattr(block.bn1, "running_mean", torch.ones(4).double()),
    "a bias": lambda block: setattr(block.conv1, "bias", nn.Parameter(torch.ones(4).double())),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_a_change_is_seen(change, readings):
    block = recalled_block()
    change(block)
    assert_as_stock(block)
    assert readings["read"] == 2
    block(X)
    assert readings["read"] == 2


def test_what_lists_hold_is_seen(readings):
    block = small_block()
    block.conv2.padding, block.conv2.dilation = [1, 1], [1, 1]
    block(X)
    block.conv2.padding[:] = block.conv2.dilation[:] = 2, 2
    assert_as_stock(block)
    assert readings["read"] == 2


@pytest.mark.parametrize("where", ["conv1", "bn2", "relu"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_a_hook_is_seen(where, kind):
    block, seen = recalled_block(), []
    hook = getattr(getattr(block, where), f"register_{kind}_hook")(lambda *args: seen.append(where))
    with pytest.warns(UserWarning, match="carries hooks"):
        block(X)
    assert seen
    hook.remove()
    del seen[:]
    assert_as_stock(block)
    assert not seen


def test_what_holds_hooks_and_parameters_may_be_another():
    """As where hooks are cleared by a new dict."""
    block, seen = recalled_block(), []
    block.conv1._forward_hooks = OrderedDict()
    block.conv1.register_forward_hook(lambda *args: seen.append(args))
    with pytest.warns(UserWarning, match="carries hooks"):
        block(X)
    assert seen
    block.conv1._forward_hooks = OrderedDict()
    block(X)
    block.conv1._parameters = {"weight": nn.Parameter(2 * block.conv1.weight.detach()), "bias": None}
    assert_as_stock(block)


def test_a_global_hook_is_seen():
    block, seen = recalled_block(), []
    hook = nn.modules.module.register_module_forward_hook(lambda *args: seen.append(args[0]))
    try:
        with pytest.warns(UserWarning, match="global module hooks"):
            block(X)
    finally:
        hook.remove()
    assert block.conv1 in seen


def test_a_forward_of_a_module_is_seen():
    block = recalled_block()
    block.conv1.forward = lambda x: 2 * nn.Conv2d.forward(block.conv1, x)
    with pytest.warns(UserWarning, match="has a forward of its own"):
        y = block(X)
    assert torch.equal(y, block.stock_forward(X))
    del block.conv1.forward
    assert_as_stock(block)


def test_a_class_of_a_child_is_seen():
    class Twice(nn.ReLU):
        def forward(self, x):
            return 2 * super().forward(x)

    block = recalled_block()
    block.relu.__class__ = Twice
    with pytest.warns(UserWarning, match="is Twice"):
        y = block(X)
    assert torch.equal(y, block.stock_forward(X))


def test_a_class_that_is_patched_is_seen(monkeypatch):
    densenet = import_torchvision().models.densenet

    class Layer(densenet._DenseLayer):
        pass

    block, x = densenet._DenseBlock(2, 8, 2, 4, 0.0).double(), images(2, 8, 5, 5)
    block.denselayer2.__class__ = Layer
    rd.convert(block)(x)
    assert vars(block)[recall._KEY].holds(block)
    monkeypatch.setattr(Layer, "forward", lambda self, x: 2 * densenet._DenseLayer.forward(self, x))
    with pytest.warns(UserWarning, match="has a forward of its own"):
        y = block(x)
    assert torch.equal(y, block.stock_forward(x))


@pytest.mark.parametrize("change", ["a dtype", "a buffer that requires grad", "a shape"])
def test_what_fits_no_more_is_an_error(change):
    block = recalled_block()
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
            block(X)


def test_an_input_that_does_not_fit_is_an_error_every_time():
    block = recalled_block()
    for _ in range(3):
        with pytest.raises(ValueError, match="expected more than 1 value per channel"):
            block(images(1, 16, 1, 1))


def test_a_cumulative_average_is_read_anew(readings):
    block = small_block()
    block.bn2.momentum = None
    stock = stock_of(block)
    for i in range(3):
        assert_same(steps_of(block, i + X), steps_of(stock, i + X))
    assert readings["read"] == 3


def test_attributes_that_may_change_unseen_are_not_recalled(readings):
    block = small_block()
    block.settings = {"unknown": object()}
    for _ in range(3):
        block(X)
    assert readings["read"] == 3


class Traced(nn.Module):
    """A residual block that only its trace shows, or a graph of two convolutions."""

    def __init__(self, adds):
        super().__init__()
        self.adds = adds
        self.convs = nn.ModuleList([nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(2)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(16) for _ in range(2)])
        self.act = nn.ReLU()

    def forward(self, x):
        y = self.act(self.norms[0](self.convs[0](x)))
        y = self.norms[1](self.convs[1](y))
        return torch.relu(y + x if self.adds else y)


@pytest.fixture(params=[True, False], ids=["residual", "graph"])
def traced(request, readings):
    """Converted, and called a few times."""
    torch.manual_seed(0)
    owner = rd.convert(Traced(request.param).double())
    for _ in range(3):
        owner(X)
    return owner


def test_a_part_of_a_trace_is_read_and_checked_once(traced, readings):
    before = dict(readings)
    for _ in range(3):
        traced(X).sum().backward()
    assert readings == before
    traced(images(3, 16, 5, 5))
    traced(X)
    assert readings == {**before, "checked": before["checked"] + 1}


LAYERS = {
    "training": lambda owner: owner.norms[1].eval(),
    "eps": lambda owner: setattr(owner.norms[0], "eps", 0.5),
    "geometry": lambda owner: [setattr(owner.convs[1], name, (2, 2)) for name in ("padding", "dilation")],
    "a parameter": lambda owner: setattr(owner.convs[0], "weight", nn.Parameter(2 * owner.convs[0].weight.detach())),
    "a buffer": lambda owner: setattr(owner.norms[1], "running_mean", torch.ones(16).double()),
    "a child": lambda owner: owner.convs.__setitem__(1, nn.Conv2d(16, 16, 5, padding=2).double()),
    "an activation": lambda owner: setattr(owner, "act", nn.LeakyReLU(0.3)),
    "its owner's attribute": lambda owner: setattr(owner, "adds", not owner.adds),
}


@pytest.mark.parametrize("change", LAYERS.values(), ids=list(LAYERS))
def test_a_change_of_a_parts_layers_is_seen(change, traced, readings):
    before = readings["read"]
    change(traced)
    assert_as_stock(traced)
    assert readings["read"] > before


def test_a_hook_of_a_parts_layer_is_called(traced):
    seen = []
    with pytest.warns(UserWarning, match="hooks"):
        handle = traced.convs[1].register_forward_hook(lambda *args: seen.append(args))
        traced(X)
    handle.remove()
    traced(X)
    assert len(seen) == 1


def test_a_block_that_changes_with_every_call_is_let_be(readings):
    block = small_block()
    for i in range(20):
        block.calls = i
        block(X)
    assert vars(block)[recall._KEY] is False
    assert readings["read"] == 20


def test_a_block_that_changes_now_and_then_is_recalled(readings):
    block = small_block()
    for i in range(20):
        block.train(i % 2 == 0)
        block(X)
        block(X)
    assert readings["read"] == 20


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))])
def test_copies(copied):
    """They are of their own, whatever becomes of the block."""
    block = recalled_block()
    other = copied(block)
    if copied is not copy.copy:
        assert vars(other)[recall._KEY] is None
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.5)
    for _ in range(2):
        assert_as_stock(other)
        assert_as_stock(block)


def test_nothing_is_left_by_revert():
    model = rd.convert(rd.models.resnet18(num_classes=3).double())
    known = {name: set(vars(module)) for name, module in copy.deepcopy(rd.revert(model)).named_modules()}
    model = rd.convert(model)
    model(images(2, 3, 32, 32))
    assert any(recall._KEY in vars(module) for module in model.modules())
    rd.revert(model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == known


def test_parameters_of_a_call_are_let_go():
    block = recalled_block()
    others = {name: 2 * p for name, p in block.named_parameters()}
    torch.func.functional_call(block, others, (X,))
    gone = [weakref.ref(p) for p in others.values()]
    gc.collect()
    del others
    assert not [found for of in gone if (found := of()) is not None]
    assert_as_stock(block)


@pytest.mark.parametrize("transformed", ["export", "trace", "make_fx", "compile"])
def test_a_block_that_is_recalled_is_transformed(transformed):
    block, x = recalled_block().eval(), X
    y = block(x)
    assert vars(block)[recall._KEY].holds(block)
    if transformed == "export":
        other = torch.export.export(block, (x,)).module()
    elif transformed == "trace":
        other = torch.jit.trace(block, x)
    elif transformed == "make_fx":
        other = make_fx(block)(x)
    else:
        other = torch.compile(block, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert_same({"output": other(x)}, {"output": y})
        assert torch.equal(block(x), y)


def references(model: nn.Module) -> list[weakref.ref]:
    return [weakref.ref(part) for part in (*model.modules(), *model.parameters())]


def alive(inner: list[weakref.ref]) -> int:
    return sum(of() is not None for of in inner)


@pytest.mark.parametrize("build", [rd.models.resnet18, rd.models.densenet121])
def test_a_network_that_is_let_go_is_gone(build):
    """At once, with its parameters, as no cycle holds it."""
    model = build(num_classes=3).double()
    for _ in range(2):
        model(images(2, 3, 32, 32)).sum().backward()
    assert any(vars(module).get(recall._KEY) for module in model.modules())
    inner = references(model)
    with without_garbage_collector():
        del model
        assert alive(inner) == 0


class NormOverPieces(nn.Module):
    """Of which every piece has a part of the norm's weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.last = nn.BatchNorm2d(8), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        y = self.first(x)
        return self.last(torch.relu(self.norm(torch.cat([y, self.second(y)], 1))))


NETWORKS = {
    "dense": lambda: rd.models.DenseNet(8, (2, 3), 16, num_classes=5),
    "residual": lambda: rd.models.resnet18(num_classes=5),
    "dual path": lambda: nn.Sequential(
        nn.Conv2d(3, 12, 3), rd.nn.DualPathBlock(12, 4, 4, 2, projection=True), rd.nn.DualPathBlock(10, 4, 4, 2), Joined()
    ),
    "pairs of convolutions": lambda: library("timm").create_model("dpn48b", num_classes=5),
    "pieces": NormOverPieces,
    "U-Net": lambda: library("monai.networks.nets").BasicUNet(2, 3, 2, (4, 4, 4, 8, 8, 4), norm="batch"),
}


@pytest.mark.parametrize("first", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("build", NETWORKS.values(), ids=list(NETWORKS))
def test_parameters_that_change_in_their_place(build, first):
    """Optimizers change values, which no reading looks at; and what was read without gradients has gradients then."""
    torch.manual_seed(0)
    model, x = rd.convert(build().double()), images(2, 3, 64, 64)
    found = []
    for net in (stock_of(model), model):
        optimizer, losses = torch.optim.SGD(net.parameters(), 1e-3), []
        with first():
            net(x)
        for _ in range(3):
            optimizer.zero_grad()
            loss = net(x).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        found.append({f"loss {i}": loss for i, loss in enumerate(losses)})
    assert_same(*found)


@pytest.mark.parametrize("adds", [True, False])
def test_a_traced_network_that_is_let_go_is_gone(adds):
    owner = rd.convert(Traced(adds).double())
    for _ in range(2):
        owner(X).sum().backward()
    inner = references(owner)
    del owner
    gc.collect()  # a trace leaves cycles
    assert alive(inner) == 0
