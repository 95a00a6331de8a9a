"""Conversion of modules that no adapter knows: by their trace, with stock's numbers, or left alone with the reason."""

import copy
import gc
import pickle
import sys
import re
import warnings
import weakref
from collections import OrderedDict, namedtuple

import pytest
import strangers as S
import torch
import torch.nn.functional as F
from small_nets import CONSTRUCTED, assert_same, engine, images, library, policy, silent, steps, without_garbage_collector  # noqa: F401
from tolerance import assert_within_noise, assert_within_rule, module_run, rounding_noise, torch_runs, true_run
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import checkpoint

import resdense_ext as rd
from resdense_ext.convert import verify
from resdense_ext.convert.strangers import Stranger, left_in

STRANGERS = {
    S.GrowingList: (2, 8, 9, 7),
    S.StochasticDepth: (2, 8, 9, 7),
    S.Recursive: (2, 3, 12, 10),
    S.SequentialBlock: (2, 8, 9, 7),
    S.CopiedBlock: (2, 8, 9, 7),
    S.ByMode: (2, 8, 9, 7),
    S.NewMapsOnly: (2, 8, 9, 7),
    S.Residual: (2, 3, 16, 14),
}
CALLS = {S.Recursive: 2, S.Residual: 4}
"""Of the engine in a forward, where it is not one."""


@pytest.fixture(params=STRANGERS, ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


def seeded(model, x):
    torch.manual_seed(5)
    return model(x)


@pytest.mark.usefixtures("silent")
class TestStrangers:
    def test_numbers(self, kind, policy, engine):
        stock, x = S.stranger(kind), images(*STRANGERS[kind])
        model = rd.convert(copy.deepcopy(stock), policy)
        for training in (True, False):
            engine.clear()
            ours = steps(model.train(training), x, count=2, call=seeded)
            assert_same(ours, steps(stock.train(training), x, count=2, call=seeded))
            assert engine == [policy] * 2 * CALLS.get(kind, 1)

    def test_stays_the_same_model_and_comes_back(self, kind):
        stock, x = S.stranger(kind), images(*STRANGERS[kind])
        model = copy.deepcopy(stock)
        tensors, modules = list(model.state_dict(keep_vars=True).values()), list(model.modules())
        classes, attributes, printed = list(map(type, modules)), [dict(vars(m)) for m in modules], repr(model)
        assert rd.convert(model) is model and isinstance(model, kind)
        assert list(model.state_dict()) == list(stock.state_dict()) and repr(model) == printed
        assert all(a is b for a, b in zip(model.state_dict(keep_vars=True).values(), tensors, strict=True))
        assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
        assert any(isinstance(m, Stranger) for m in modules)
        model(x)
        rd.revert(model)
        assert list(map(type, model.modules())) == classes
        assert [vars(m) for m in model.modules()] == attributes
        assert_same(steps(model.eval(), x), steps(rd.convert(model).eval(), x))

    def test_copies(self, kind, engine):
        model, x = rd.convert(S.stranger(kind), "min"), images(*STRANGERS[kind])
        expected = steps(model, x, call=seeded)
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            engine.clear()
            assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
            assert_same(steps(again, x, call=seeded), expected, tolerance=0)
            assert engine == ["min"] * CALLS.get(kind, 1)

    def test_dropout_leaves_the_same_random_state(self, policy):
        stock, x = S.stranger(S.CopiedBlock), images(2, 8, 9, 7)
        draws = []
        for model in (stock, rd.convert(copy.deepcopy(stock), policy)):
            seeded(model, x)
            draws.append(torch.rand(3))
        assert torch.equal(*draws)

    @pytest.mark.parametrize("channels_last", [False, True])
    def test_memory_format_and_autocast(self, kind, channels_last):
        stock, x = S.stranger(kind).float(), images(*STRANGERS[kind]).float()
        if channels_last:
            stock, x = stock.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
        model = rd.convert(copy.deepcopy(stock))
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                ours, theirs = seeded(model, x), seeded(stock, x)
            assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())

    def test_again_with_another_policy_and_a_budget(self, engine):
        model, x = rd.convert(S.stranger(S.Recursive)), images(2, 3, 12, 10)
        rd.convert(model, "min")(x)
        assert engine == ["min", "min"]
        model = rd.convert(S.stranger(S.SequentialBlock), memory_budget=0.15, example_input=images(2, 8, 9, 7))
        engine.clear()
        model(images(2, 8, 9, 7))
        assert len(engine) == 1 and 0 < sum(engine[0]) < len(engine[0]) == 6
        report = rd.report(model, images(2, 8, 9, 7))
        assert report.plan.predicted_bytes == report.saved_bytes <= 0.15 * report.stock_saved_bytes

    def test_slices(self, engine):
        stock, x = S.stranger(S.Recursive).block1, images(2, 8, 9, 7)
        model = rd.convert(copy.deepcopy(stock))
        assert_same(steps(model[:3], x), steps(stock[:3], x))
        assert engine == ["fast"]

    def test_report_has_a_row_a_block(self, policy):
        model, x = rd.convert(S.stranger(S.Residual), policy), images(2, 3, 16, 14)
        report = rd.report(model, x)
        assert [(row.path, row.layers, row.policy) for row in report.rows[:-1]] == [
            ("stem", 0, policy), *((f"layers.{i}", 2, policy) for i in range(4))
        ]
        assert report.saved_bytes == rd.memory.saved_bytes(lambda: model(x))
        stock = rd.revert(model)
        assert report.stock_saved_bytes == rd.memory.saved_bytes(lambda: stock(x))

    def test_a_converted_model_is_collected(self):
        model = rd.convert(S.stranger(S.GrowingList))
        model(images(2, 8, 9, 7))
        alive = weakref.ref(model)
        del model
        gc.collect()
        assert alive() is None


OWN = {
    S.GrowingList: lambda: rd.nn.DenseBlock(6, 8, 2, 4),
    S.SequentialBlock: lambda: rd.nn.DenseBlock(6, 8, 4, 4, 0.2),
    S.CopiedBlock: lambda: rd.nn.DenseBlock(6, 8, 4, 4, 0.2),
    S.PostActivation: lambda: rd.nn.BasicBlock(8, 8),
    S.PreActivation: lambda: rd.nn.PreActBlock(8, 8),
}


@pytest.mark.parametrize("kind", OWN, ids=lambda kind: kind.__name__)
def test_saves_what_the_librarys_own_block_saves(kind, policy):
    options = {"channels": 8, "planes": 8} if kind in (S.PostActivation, S.PreActivation) else {}
    stock, own, x = S.stranger(kind, **options), OWN[kind]().double(), images(2, 8, 24, 24)
    kept = {"stranger": rd.memory.saved_bytes(lambda: stock(x)), "own": rd.memory.saved_bytes(lambda: rd.convert(own, policy)(x))}
    kept["converted"] = rd.memory.saved_bytes(lambda: rd.convert(stock, policy)(x))
    stocks_own = rd.memory.saved_bytes(lambda: rd.revert(own)(x))
    assert kept["stranger"] - kept["converted"] >= 0.8 * (stocks_own - kept["own"]) > 0


@pytest.mark.usefixtures("silent")
def test_a_pool_in_the_shortcut(policy, engine):
    pool, x = nn.AvgPool2d(2, ceil_mode=True), images(2, 8, 9, 7)
    stock = S.stranger(S.PostActivation, channels=8, planes=12, stride=2, pool=pool)
    model = rd.convert(copy.deepcopy(stock), policy)
    assert_same(steps(model, x), steps(stock, x))
    assert engine == [policy]


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("one, planes", [("conv2", 8), ("conv2", 12), ("project", 12)])
def test_an_addition_of_one_position_to_all(one, planes, policy, engine):
    """A convolution as large as the map leaves one; on larger maps, two, the sides do not fit in stock either."""
    stock, x = S.stranger(S.PreActivation, channels=8, planes=planes, stride=1), images(2, 8, 5, 5)
    setattr(stock, one, nn.Conv2d(getattr(stock, one).in_channels, planes, 5).double())
    model = rd.convert(copy.deepcopy(stock), policy)
    assert_same(steps(model, x), steps(stock, x))
    assert isinstance(model, Stranger) and not engine
    with pytest.raises(ValueError, match="shortcut.*expected an output of shape"):
        model(images(2, 8, 6, 6))


@pytest.mark.usefixtures("silent")
def test_relu6(policy, engine):
    """Both its ends are reached, everywhere."""
    stock, x = S.stranger(S.Clipped), images(2, 8, 9, 7)
    norms = [m for m in stock.modules() if isinstance(m, nn.BatchNorm2d)]
    ends = []
    for norm in norms:
        nn.init.normal_(norm.weight, 6.0, 1.0)
    hooks = [m.register_forward_hook(lambda m, _, y: ends.append(min((y < 0).any(), (y > 6).any()))) for m in norms]
    stock(x)
    assert len(ends) == 7 and all(ends)
    for hook in hooks:
        hook.remove()
    model = rd.convert(copy.deepcopy(stock), policy)
    for training in (True, False):
        engine.clear()
        assert_same(steps(model.train(training), x), steps(stock.train(training), x))
        assert engine == [policy] * 2
    report = rd.report(model.train(), x)
    assert [row.layers for row in report.rows] == [3, 3, 2, 0]
    assert all(row.saved_bytes < row.stock_saved_bytes for row in report.rows[:-1])


class Padded(nn.Module):
    """Every other position, and channels of zeros beside: the shortcut without parameters (option A of He et al., 2016)."""

    def forward(self, x):
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))


def test_a_shortcut_of_zeros_is_named_and_the_rest_converted(policy, engine):
    stock = nn.Sequential(*(S.stranger(S.PostActivation, channels=a, planes=b, stride=b // a) for a, b in ((8, 8), (8, 16), (16, 16))))
    stock[1].shortcut, x = Padded(), images(2, 8, 8, 6)
    model = rd.convert(copy.deepcopy(stock), policy, example_input=x)
    assert [isinstance(block, Stranger) for block in model] == [True] * 3  # of the second, the convolutions
    (reason,) = rd.report(model, x).left
    assert reason.startswith("1: iadd") and "adds what is not made by convolutions, batch norms and activations" in reason
    engine.clear()
    assert_same(steps(model, x), steps(stock, x))
    assert engine == [policy] * 2


def test_a_pool_of_maxima_in_the_shortcut_is_named():
    with pytest.warns(UserWarning, match="shortcut.0 is MaxPool2d, and not torch's average pool"):
        rd.convert(S.stranger(S.PostActivation, channels=8, planes=12, stride=2, pool=nn.MaxPool2d(2)))


def test_several_inputs_and_one_that_is_left_out(engine):
    class Scaled(S.GrowingList):
        def forward(self, x, y, scale=None):
            x = super().forward(x)
            return torch.cat([x if scale is None else x * scale, y], 1)

    stock, x, y = S.stranger(Scaled), images(2, 8, 5, 4), images(2, 3, 5, 4, seed=1)
    model = rd.convert(copy.deepcopy(stock).eval())
    stock.eval()
    assert_same({"output": model(x, y)}, {"output": stock(x, y)})
    assert_same({"output": model(y=y, x=x)}, {"output": stock(x, y)})
    for scale in (torch.tensor(2.0), 0.5, None):
        assert_same({"output": model(x, y, scale=scale)}, {"output": stock(x, y, scale)})
    assert engine == ["fast"] * 5


class Inputs(nn.Module):
    """A level of a decoder; what a case gives to it, it says itself."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = S.ConvNorm(8, 8), S.ConvNorm(16, 8), S.ConvNorm(8, 8)

    def level(self, x, skip):
        return self.b(torch.cat([F.interpolate(self.a(x), skip.shape[2:]), skip], 1))


class Given:
    """Forwards, and the inputs of their calls; those that are in no list run on the engine."""

    def a_list(self, features):
        skip, features = features[0], features[1:][::-1]
        return self.level(features[0], skip)

    def a_dict(self, features):
        return self.level(features["x"], features["skip"])

    def lists_in_a_tuple(self, features):
        return self.level(features[1][0], features[0])

    def an_optional_map(self, x, skip=None):
        x = self.c(self.a(x))
        return x if skip is None else self.b(torch.cat([F.interpolate(x, skip.shape[2:]), skip], 1))

    def sizes(self, x, height, width):
        return self.b.conv(torch.cat([F.interpolate(self.a(x), (height, width))] * 2, 1))

    def a_flag(self, x, twice=False):
        x = self.c(self.a(x))
        return self.b(torch.cat([x, x], 1)) if twice else x

    def a_mode(self, x, mode="nearest"):
        return F.interpolate(self.c(self.a(x)), scale_factor=2, mode=mode)


def _calls(x, skip):
    return {
        "a_list": [([skip, x],), ((skip, x, x),)],
        "a_dict": [({"x": x, "skip": skip},)],
        "lists_in_a_tuple": [((skip, [x]),)],
        "an_optional_map": [(x, skip), (x,), (x, None), (x, skip)],
        "sizes": [(x, 6, 8), (x, 3, 2)],
        "a_flag": [(x, True), (x, False), (x,)],
        "a_mode": [(x,), (x, "bilinear"), (x, "nearest")],
    }


class TestGiven:
    def made(self, name, *options):
        torch.manual_seed(0)
        cls = type("Own", (Inputs,), {"forward": getattr(Given, name)})
        stock = S.randomise(cls()).double()
        return stock, rd.convert(copy.deepcopy(stock), *options)

    @pytest.mark.usefixtures("silent")
    @pytest.mark.parametrize("name", [name for name in vars(Given) if name[0] != "_"])
    def test_runs_on_the_engine(self, name, policy):
        stock, model = self.made(name, policy)
        x, skip = images(2, 8, 4, 3), images(2, 8, 8, 6, seed=1)
        for i, inputs in enumerate(_calls(x, skip)[name] * 2):
            for mode in (True, False):
                ours, theirs = model.train(mode)(*inputs), stock.train(mode)(*inputs)
                assert_same({"output": ours}, {"output": theirs})
                weights = [dict(net.named_parameters()) for net in (model, stock)]
                grads = [torch.autograd.grad(y.square().sum(), [*of.values()], allow_unused=True) for y, of in zip((ours, theirs), weights)]
                named = [{k: g for k, g in zip(weights[0], of) if g is not None} for of in grads]
                assert_same(*named)
            kept = [rd.memory.saved_bytes(lambda: net.train()(*inputs)) for net in (model, stock)]
            assert kept[0] < kept[1]

    def test_a_report_knows_what_was_given(self):
        stock, model = self.made("an_optional_map")
        x, skip = images(2, 8, 4, 3), images(2, 8, 8, 6, seed=1)
        for inputs in ((x,), (x, skip), (x,)):
            report = rd.report(model, inputs)
            assert report.saved_bytes == rd.memory.saved_bytes(lambda: model(*inputs)) and not any(row.note for row in report.rows)
            assert report.stock_saved_bytes == rd.memory.saved_bytes(lambda: stock(*inputs))

    @pytest.mark.parametrize("name, beside", [("a_list", lambda x: [x, None, x]), ("a_dict", lambda x: {"skip": x, "x": x, "more": "no"})])
    def test_what_else_is_in_a_list_is_left_to_stock(self, name, beside):
        """A forward may ask whether it is None."""
        stock, model = self.made(name)
        inputs = beside(images(2, 8, 4, 3))
        with pytest.warns(UserWarning, match="an? Own runs its stock path: is called with other inputs"):
            assert torch.equal(model(inputs), stock(inputs))

    @pytest.mark.usefixtures("silent")
    def test_a_forward_that_tries_an_attribute(self):
        """Which tensors do not have."""

        class Nested(Inputs):
            def forward(self, x):
                x = x.tensors if hasattr(x, "tensors") else x
                return self.c(self.a(getattr(x, "mask", x)))

        torch.manual_seed(0)
        stock, x = S.randomise(Nested()).double(), images(2, 8, 4, 3)
        model = rd.convert(copy.deepcopy(stock))
        assert_same(steps(model, x), steps(stock, x))
        kept = [rd.memory.saved_bytes(lambda: net(x)) for net in (model, stock)]
        assert kept[0] < kept[1]

    def test_a_forward_that_asks_for_a_list(self):
        class Either(Inputs):
            def forward(self, x):
                x = x if isinstance(x, torch.Tensor) else x[0] + x[1]
                return self.c(self.a(x))

        torch.manual_seed(0)
        stock, x = S.randomise(Either()).double(), images(2, 8, 4, 3)
        model = rd.convert(copy.deepcopy(stock))
        assert_same({"output": model(x)}, {"output": stock(x)})
        with pytest.warns(UserWarning, match="an? Either runs its stock path: is called with other inputs"):
            assert torch.equal(model([x, x]), stock([x, x]))

    def test_any_number_of_inputs(self):
        class Any(Inputs):
            def forward(self, x, *skips, **more):
                x = self.c(self.a(x))
                return x if not skips else self.b(torch.cat([x, *skips], 1))

        torch.manual_seed(0)
        stock, x = S.randomise(Any()).double(), images(2, 8, 4, 3)
        model = rd.convert(copy.deepcopy(stock))
        assert_same({"output": model(x)}, {"output": stock(x)})
        for args, more in (((x, x), {}), ((x,), {"y": x})):
            model = rd.convert(copy.deepcopy(stock))
            with pytest.warns(UserWarning, match="an? Any runs its stock path: is called with other inputs"):
                assert torch.equal(model(*args, **more), stock(*args, **more))

    @pytest.mark.parametrize("args, options", [((), {}), ((1, 2, 3), {}), ((1,), {"x": 1}), ((1,), {"nothing": 1})])
    def test_calls_that_stock_refuses(self, args, options):
        stock, model = self.made("an_optional_map")
        for net in (stock, model):
            with pytest.raises(TypeError, match="argument"):
                net(*args, **options)


class Wrapped(nn.Module):
    """What a case does is done around or inside of a dense block."""

    def __init__(self):
        super().__init__()
        self.layers = S.NewMapsOnly(depth=3).layers
        self.calls = 0
        self.kept = {"calls": [], "layers": list(self.layers), "method": self.count}

    def count(self):
        self.calls += 1
        return self.calls

    def maps(self, x):
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class Refused:
    """Forwards that a graph does not stand for, or in which something else happens than in a block."""

    def shared_norm(self, x):
        for one in (self.layers[0], self.layers[0]):
            x = torch.cat([x, one(x)], 1)[:, :8]
        return x

    def in_front(self, x):
        for layer in self.layers:
            x = torch.cat([layer(x), x], 1)
        return x

    def by_value(self, x):
        return self.maps(x) if x.sum() > 0 else self.maps(x) * 2

    def by_chance(self, x):
        return self.maps(x) * (2 if torch.rand(()) > 0.5 else 1)

    def counts(self, x):
        self.calls += 1
        return self.maps(x) * self.calls

    def counts_in_a_list(self, x):
        self.kept["calls"].append(1)
        return self.maps(x) * len(self.kept["calls"])

    def counts_by_a_method_that_it_keeps(self, x):
        return self.maps(x) * self.kept["method"]()

    def asks_which_layer_it_is(self, x):
        for layer in self.kept["layers"]:
            x = torch.cat([x, layer(x) if layer is self.layers[1] else layer(x) * 2], 1)
        return x

    def without_gradient(self, x):
        with torch.no_grad():
            y = self.maps(x)
        return y * x.mean()

    def asks_for_gradients(self, x):
        return self.maps(x) if torch.is_grad_enabled() else self.maps(x) * 2

    def checkpointed(self, x):
        return checkpoint(self.maps, x, use_reentrant=False)

    def made_a_tensor_by_a_function_in_c(self, x):
        return self.maps(torch.as_tensor(x) if isinstance(x, torch.Tensor) else x)

    def own_derivative(self, x):
        return self.maps(Doubled.apply(torch.relu(x)))

    def matched_by_its_type(self, x):
        match torch.relu(x):
            case torch.Tensor() as y:
                return self.maps(y)

    def changed_in_place(self, x):
        return self.maps(x).mul_(2)

    def input_changed_in_place(self, x):
        x = x * 1
        y = x.view(x.shape)
        F.relu(y, inplace=True)
        return self.maps(x)

    def noise_changed_when_read(self, x):
        noise = torch.rand_like(x)
        x = x + noise
        noise.zero_()
        return self.maps(x) * noise.mean()

    def read_in_between(self, x):
        new = self.layers[0](x)
        x = torch.cat([x, new], 1)
        second = self.layers[1](x)
        x = torch.cat([x, second * new.mean()], 1)
        return torch.cat([x, self.layers[2](x)], 1)

    def random_in_between(self, x):
        x = torch.cat([x, F.dropout(self.layers[0](x), 0.5)], 1)
        noise = torch.rand_like(x[:, :1])
        x = torch.cat([x, F.dropout(self.layers[1](x), 0.5)], 1)
        return torch.cat([x, F.dropout(self.layers[2](x), 0.5)], 1) * noise

    def half_a_layer(self, x):
        return torch.cat([x, self.layers[0][2](self.layers[0][0](x))], 1)


REASONS = {
    "shared_norm": "serves twice",
    "by_value": "depends on values",
    "by_chance": "draws random numbers",
    "counts": "sets attributes",
    "counts_in_a_list": "sets attributes",
    "counts_by_a_method_that_it_keeps": "sets attributes",
    "without_gradient": "changes a mode of autograd",
    "asks_for_gradients": "recognised no dense or residual block",
    "made_a_tensor_by_a_function_in_c": "asks for the type of x",
    "own_derivative": "asks for the type of relu",
    "matched_by_its_type": "asks for the type of relu",
    # Which it is depends on what torch has loaded by then.
    "checkpointed": "does not trace|depends on values|changes a mode|asks for the type",
    "input_changed_in_place": "changes a value in place that may be read elsewhere",
    "noise_changed_when_read": "changes a value in place that may be read elsewhere",
}


def refused(name):
    torch.manual_seed(0)
    cls = type("Own", (Wrapped,), {"forward": getattr(Refused, name)})
    return S.randomise(cls()).double()


@pytest.mark.parametrize("name", REASONS)
def test_left_alone_with_the_reason(name, engine):
    stock, x = refused(name), images(2, 8, 5, 4)
    model = copy.deepcopy(stock)
    state, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        rd.convert(model)
    assert re.search(REASONS[name], str([*left_in(model), *(each.message for each in given)]))
    assert model.calls == 0 and not model.kept["calls"]
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_same(dict(model.state_dict()), dict(state), tolerance=0)
    # A convolution behind norm and activation may be on an engine, by itself.
    untouched = not any(isinstance(m, Stranger) for m in model.modules())
    exact = {"tolerance": 0} if untouched else {}
    assert_same(steps(model, x, call=seeded), steps(stock, x, call=seeded), **exact)
    assert not engine


def test_what_does_not_trace_is_named_and_looked_into(policy, engine):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = S.GrowingList()

        def forward(self, x):
            return self.block(x) if x.sum() > 0 else self.block(x) * 2

    stock, x = S.stranger(Outer), images(2, 8, 5, 4)
    model = rd.convert(copy.deepcopy(stock), policy)
    assert type(model) is Outer and isinstance(model.block, Stranger)
    for x in (x.abs(), -x.abs()):
        assert_same(steps(model, x), steps(stock, x))
    assert engine == [policy] * 2
    report = rd.report(model, x)
    assert len(report.left) == 1 and "Outer: its forward depends on values" in report.left[0]
    assert "left stock: Outer: its forward depends on values" in str(report)


@pytest.mark.parametrize("reason", ["its forward depends on values", "changes a value in place"])
def test_in_a_sequence_that_is_not_called_itself_every_module_is_looked_into(reason, policy):
    """What it would do if it were called, a chain of all of them, never runs."""

    def layer():
        units = [(nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1, bias=False)) for _ in range(2)]
        return nn.Sequential(*(module for unit in units for module in unit))

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.stages = nn.Sequential(nn.Sequential(layer(), layer()))

        def forward(self, x):
            for stage in self.stages:
                for layer in stage:
                    y = layer(x)
                    if reason.startswith("changes"):
                        x = x.to(x.dtype, copy=True).sub_(y)
                    else:
                        x = x - y if x.sum() > y.sum() else y
            return x

    stock, x = S.stranger(Outer), images(2, 6, 9, 7)
    model = rd.convert(copy.deepcopy(stock), policy)
    report = rd.report(model, x)
    assert [row.path for row in report.rows] == ["stages.0.0", "stages.0.1", "(everything else)"]
    assert len(report.left) == 1 and reason in report.left[0]
    assert report.saved_bytes < 0.6 * report.stock_saved_bytes
    assert_same(steps(model, x), steps(stock, x))


def test_slices_that_a_forward_makes_are_looked_into(policy):
    class Sliced(nn.Module):
        def __init__(self):
            super().__init__()
            units = [(nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()) for _ in range(4)]
            self.features = nn.Sequential(*(module for unit in units for module in unit))

        def forward(self, x):
            first = self.features[:6](x)
            return first, self.features[6:](first)

    stock, x = S.stranger(Sliced), images(2, 6, 9, 7)
    model = rd.convert(copy.deepcopy(stock), policy)
    report = rd.report(model, x)
    assert [(row.path, row.layers) for row in report.rows] == [("Sliced", 4), ("(everything else)", 0)] and not report.left
    assert report.saved_bytes < 0.6 * report.stock_saved_bytes
    assert_same(*(steps(net, x, call=lambda net, x: torch.cat(net(x))) for net in (model, stock)))
    del model.features[9:]
    del stock.features[9:]
    assert_same({"y": model(x)[1]}, {"y": stock(x)[1]})


@pytest.mark.parametrize("order", ["compiled before", "compiled after"])
@pytest.mark.filterwarnings("error:resdense_ext")
def test_torch_compile_of_a_module_inside(order):
    """What stands around it runs on the engine; in it, under torch.compile, the stock path."""
    torch.compiler.reset()
    stock, x = S.stranger(S.Recursive), images(*STRANGERS[S.Recursive])
    model = copy.deepcopy(stock)
    for step in order.split()[:: 1 if order.endswith("before") else -1]:
        if step == "compiled":
            model.block2 = torch.compile(model.block2, backend="eager")
        else:
            rd.convert(model)
    assert isinstance(model, Stranger)
    assert_same({"output": model(x)}, {"output": stock(x)})
    assert not rd.report(model, x).left


def test_a_graph_module_is_named_and_runs_by_the_trace_of_what_calls_it(policy, engine):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.graph = torch.fx.symbolic_trace(S.GrowingList())

        def forward(self, x):
            return self.graph(x)

    with pytest.warns(UserWarning, match="is a torch.fx.GraphModule.*convert a module that calls it"):
        rd.convert(torch.fx.symbolic_trace(S.GrowingList()))
    stock, x = S.stranger(Outer), images(2, 8, 5, 4)
    model = copy.deepcopy(rd.convert(copy.deepcopy(stock), policy))
    assert_same(steps(model, x), steps(stock, x))
    assert engine == [policy]


@pytest.mark.filterwarnings("ignore:resdense_ext.convert recognised")
@pytest.mark.parametrize("name", [name for name in vars(Refused) if name[0] != "_"])
def test_never_wrong(name):
    stock, x = refused(name), images(2, 8, 5, 4)
    model = rd.convert(copy.deepcopy(stock))
    for training in (True, False):
        assert_same(steps(model.train(training), x, call=seeded), steps(stock.train(training), x, call=seeded))
        with torch.no_grad():
            assert_same({"output": seeded(model, x)}, {"output": seeded(stock, x)})


CHANGES = {
    "another activation": lambda m: setattr(m.layers[1], "1", nn.SiLU()),
    "a layer more": lambda m: m.layers.append(
        nn.Sequential(nn.BatchNorm2d(28), nn.ReLU(), nn.Conv2d(28, 4, 3, padding=1)).double()
    ),
    "a layer less": lambda m: m.layers.__delitem__(4),
    "a convolution of a function": lambda m: setattr(m.layers[1], "2", nn.Sequential(m.layers[1][2], nn.Tanh())),
    "frozen": lambda m: [layer[0].eval() for layer in m.layers],
    "one frozen": lambda m: m.layers[2].eval(),
    "a forward of its own": lambda m: setattr(m.layers[1], "forward", lambda x: x[:, :4] * 2),
}


@pytest.mark.filterwarnings("ignore:resdense_ext")
@pytest.mark.parametrize("change", CHANGES)
def test_changes_after_the_conversion_count(change):
    stock, x = S.stranger(S.NewMapsOnly), images(2, 8, 5, 4)
    model = rd.convert(copy.deepcopy(stock))
    model(x)
    model.load_state_dict(stock.state_dict())
    for net in (stock, model):
        torch.manual_seed(1)
        CHANGES[change](net)
    assert_same(steps(model, x), steps(stock, x))


def test_an_attribute_that_the_forward_reads_counts(policy, engine):
    stock, x = S.stranger(S.SequentialBlock), images(2, 8, 5, 4)
    model = rd.convert(copy.deepcopy(stock), policy)
    for net in (stock, model):
        for one in net:
            one.drop = 0.0
    assert_same(steps(model, x), steps(stock, x))
    assert engine == [policy]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
class TestHooks:
    @pytest.mark.parametrize("path", ["convs.2", "norms.0"])
    def test_on_a_layer(self, path, policy, engine):
        stock, x, calls = S.stranger(S.GrowingList), images(2, 8, 5, 4), []
        model = rd.convert(copy.deepcopy(stock), policy)
        handle = model.get_submodule(path).register_forward_hook(lambda *_: calls.append(path))
        with pytest.warns(UserWarning, match=f"runs its stock path: {path} carries hooks"):
            assert torch.equal(model(x), stock(x))
        assert calls == [path] and not engine
        handle.remove()
        model.load_state_dict(stock.state_dict())
        assert_same(steps(model, x), steps(stock, x))
        assert engine == [policy]

    def test_on_a_container(self, policy, engine):
        stock, x, calls = S.stranger(S.Recursive), images(2, 3, 12, 10), []
        model = rd.convert(copy.deepcopy(stock), policy)
        model.block1[2].register_forward_hook(lambda *_: calls.append(2))
        model.block2.register_forward_hook(lambda *_: calls.append("block2"))
        assert_same({"output": model(x)}, {"output": stock(x)})
        assert calls == [2, "block2"]

    def test_global(self, policy, engine):
        stock, x, calls = S.stranger(S.GrowingList), images(2, 8, 5, 4), []
        model = rd.convert(copy.deepcopy(stock), policy)
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(type(module).__name__))
        try:
            expected = stock(x)
            stocks = calls[:]
            calls.clear()
            with pytest.warns(UserWarning, match="global module hooks are set"):
                assert torch.equal(model(x), expected)
        finally:
            handle.remove()
        assert calls == stocks and not engine


GRAPHS = {
    S.ResidualDense: 8 + 5 * 4,
    S.ResidualInResidualDense: 3 * (8 + 4 * 4),
    S.Harmonic: 8 + 4 * (4 + 8),
    S.OneShot: 8 + (4 * 6 + 10) + (4 * 6 + 12),
    # The last layer's new map is read by nobody but whoever reads the output.
    S.MapsInFront: 8 + 4 * 8 + 3 * 4,
}
"""The channels that they keep: inputs, and what convolutions write."""
NORMED = {S.Harmonic: 48, S.OneShot: 4 * 6 + 10 + 4 * 6 + 12, S.MapsInFront: GRAPHS[S.MapsInFront]}
"""Those of them that have two statistics each."""


CHAINS = {
    # Stock keeps the input, every map, and every map activated.
    S.Chain: (8 * 63 + 2 * (12 * 63 + 12 * 20 + 6 * 20), 8 * 63 + 12 * 63 + 12 * 20 + 6 * 20, 12 + 12 + 6),
    # ... and what it normalises for a leaky ReLU, too.
    S.BranchingChain: (8 * 63 + 35 * (3 * 6 + 2 * 4), 8 * 63 + 35 * (6 + 4), 6 + 4),
}
"""The values of a sample that stock keeps and that we do, and the channels that have statistics."""


@pytest.fixture(params=[*GRAPHS, *CHAINS], ids=lambda kind: kind.__name__)
def graph(request):
    return request.param


@pytest.mark.usefixtures("silent")
class TestConcatenations:
    def test_numbers(self, graph):
        stock, x = S.stranger(graph), images(2, 8, 9, 7)
        model = rd.convert(copy.deepcopy(stock), example_input=x)
        for training in (True, False):
            stock.train(training), model.train(training)
            run, state = module_run(stock), stock.state_dict()
            ours = module_run(model)({"x": x.clone()}, state)
            assert_within_noise(ours, run({"x": x.clone()}, state), rounding_noise(run, {"x": x}, state))
            again = copy.deepcopy(model)
            again.load_state_dict(state)
            with torch.no_grad():
                assert torch.equal(again(x), ours["output"])

    @pytest.mark.parametrize("graph", GRAPHS, ids=lambda kind: kind.__name__)
    def test_keeps_every_map_once_and_no_concatenation(self, graph):
        stock, x = S.stranger(graph), images(2, 8, 9, 7).requires_grad_()
        concatenated = []
        hooks = [
            m.register_forward_pre_hook(lambda m, args: concatenated.append(args[0].nbytes * (m.in_channels not in (8, 10))))
            for m in stock.modules()
            if isinstance(m, nn.Conv2d)
        ]
        before = rd.memory.saved_bytes(lambda: stock(x))
        for hook in hooks:
            hook.remove()
        after = rd.memory.saved_bytes(lambda: rd.convert(stock)(x))
        assert after == 8 * (GRAPHS[graph] * 2 * 9 * 7 + 2 * NORMED.get(graph, 0))
        assert before - after >= 0.8 * sum(concatenated) > 0

    @pytest.mark.parametrize("graph", CHAINS, ids=lambda kind: kind.__name__)
    def test_keeps_every_map_of_a_chain_once(self, graph):
        stock, x = S.stranger(graph), images(2, 8, 9, 7).requires_grad_()
        *values, normed = CHAINS[graph]
        expected = [8 * (2 * each + 2 * normed) for each in values]
        assert [rd.memory.saved_bytes(lambda: net(x)) for net in (stock, rd.convert(copy.deepcopy(stock)))] == expected

    def test_stays_the_same_model_and_comes_back(self, graph):
        stock, x = S.stranger(graph), images(2, 8, 9, 7)
        model = copy.deepcopy(stock)
        tensors, classes = list(model.state_dict(keep_vars=True).values()), list(map(type, model.modules()))
        rd.convert(model)
        assert list(model.state_dict()) == list(stock.state_dict()) and repr(model) == repr(stock)
        assert all(a is b for a, b in zip(model.state_dict(keep_vars=True).values(), tensors, strict=True))
        assert any(isinstance(m, Stranger) for m in model.modules())
        again = pickle.loads(pickle.dumps(model))
        assert_same(steps(again, x), steps(model, x), tolerance=0)
        rd.revert(model)
        assert list(map(type, model.modules())) == classes
        assert_same(steps(model, x), steps(stock, x), tolerance=0)

    @pytest.mark.parametrize("autocast", [None, torch.bfloat16])
    def test_memory_format_and_autocast(self, graph, autocast):
        stock, x = S.stranger(graph).float(), images(2, 8, 9, 7).to(autocast or torch.float32)
        for module in stock.modules():
            if isinstance(module, nn.Conv2d):
                module.to(x.dtype)  # autocast would round away a change in its last place
        inputs, params = {"x": x}, stock.state_dict()
        run = module_run(stock, autocast)
        truth, runs = true_run(run, inputs, params), torch_runs(run, inputs, params)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = inputs["x"].to(memory_format=memory_format)
            theirs, model = (copy.deepcopy(stock).to(memory_format=memory_format) for _ in range(2))
            rd.convert(model)
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                outputs = [net(x) for net in (model, theirs)]
            assert len({(y.dtype, y.shape, y.stride()) for y in outputs}) == 1
            ours = module_run(model, autocast)({"x": x.clone()}, copy.deepcopy(params))
            assert_within_rule(ours, truth, runs, autocast or torch.float32)

    def test_report(self, graph):
        model, x = rd.convert(S.stranger(graph)), images(2, 8, 9, 7)
        report = rd.report(model, x)
        assert sum(row.layers for row in report.rows) == sum(isinstance(m, nn.Conv2d) for m in model.modules())
        assert report.rows[-1].saved_bytes == 0 and not report.left

    def test_a_hook_inside(self, graph):
        stock, x, calls = S.stranger(graph), images(2, 8, 9, 7), []
        model = rd.convert(copy.deepcopy(stock))
        conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
        handle = conv.register_forward_hook(lambda *_: calls.append(1))
        with pytest.warns(UserWarning, match="runs its stock path: .* carries hooks"):
            assert_same({"output": model(x)}, {"output": stock(x)})
        assert calls == [1]
        handle.remove()
        model.load_state_dict(stock.state_dict())
        assert_same(steps(model, x), steps(stock, x))


class Concatenates(nn.Module):
    """Units of every kind; what a case concatenates, it says itself."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = S.ConvNorm(8, 4), S.ConvNorm(12, 4), S.ConvNorm(16, 4)
        self.pre = nn.Sequential(nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 4, 3, padding=1))
        self.gate, self.strided = nn.Conv2d(4, 4, 1), nn.Conv2d(12, 4, 1, stride=2)
        self.late = nn.Conv2d(8, 4, 1, padding_mode="reflect", padding=1)


class Concatenated:
    def attention_between(self, x):
        y = self.a(x)
        y = y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        z = self.b(torch.cat([y, x], 1))
        return self.c(torch.cat([x, z, y], 1))

    def unknown_activation(self, x):
        y = torch.tanh(self.a[1](self.a[0](x)))
        return torch.tanh(self.b[1](self.b[0](torch.cat([x, y], 1))))

    def norm_behind_activated_maps(self, x):
        z = self.pre(torch.cat([self.a(x), x], 1))
        return self.b(torch.cat([x, z], 1))

    def raw_and_activated(self, x):
        raw = self.a[0](x)
        return self.b(torch.cat([raw.relu(), raw, self.a[1](raw)], 1)) * raw.mean()

    def one_map_twice(self, x):
        y = self.a(x)
        return self.b(torch.cat([y, y, y], 1)) + self.gate(y)

    def read_on_the_way(self, x):
        y = self.a(x)
        z = torch.cat([x, y], 1)
        first = self.b(z)
        scale = F.adaptive_avg_pool2d(z, 1).mean()
        return self.c(torch.cat([z, first], 1)) * scale + z.mean()

    def cut_within_a_concatenation(self, x):
        y = self.a(x)
        z = self.b(torch.cat([x, y], 1))
        w = torch.tanh(z)
        return self.c(torch.cat([torch.cat([x, y], 1), w], 1))

    def strided(self, x):
        y = self.a(x)
        return torch.cat([self.strided(torch.cat([y, x], 1)), self.gate(y)[:, :, ::2, ::2]], 1)

    def padded_by_reflection(self, x):
        y = self.a(x)
        return self.late(torch.cat([y, self.b(torch.cat([y, x], 1))], 1))

    def shared(self, x):
        y = self.gate(self.gate(self.a(x)))
        return self.b(torch.cat([x, y], 1))

    def nobody_reads_it(self, x):
        y = self.a(x)
        self.b(torch.cat([x, y], 1))
        return y

    def changed_afterwards(self, x):
        y = self.a(x)
        return self.gate(self.b(torch.cat([x, y], 1))).mul_(2)

    def slices(self, x):
        first, second = x.chunk(2, 1)
        y = self.gate(second)
        return self.b(torch.cat([first, second, y], 1))


@pytest.mark.filterwarnings("ignore:resdense_ext.convert recognised")
@pytest.mark.parametrize("name", [name for name in vars(Concatenated) if name[0] != "_"])
def test_concatenations_of_every_kind(name):
    torch.manual_seed(0)
    cls = type("Own", (Concatenates,), {"forward": getattr(Concatenated, name)})
    stock, x = S.randomise(cls()).double(), images(2, 8, 6, 4)
    model = rd.convert(copy.deepcopy(stock))
    assert isinstance(model, Stranger)
    for training in (True, False):
        assert_same(steps(model.train(training), x, 2), steps(stock.train(training), x, 2))
        with torch.no_grad():
            assert_same({"output": model(x)}, {"output": stock(x)})
    kept = [rd.memory.saved_bytes(lambda: m.train()(x.requires_grad_())) for m in (model, stock)]
    # What nobody reads dies with stock's graph of it, and ours lives on with the rest.
    assert (kept[0] < kept[1]) == (name != "nobody_reads_it")


class Fused(nn.Module):
    """Maps that end in a concatenation of which, without a norm, stock keeps one map less than the engine would."""

    def __init__(self, skips):
        super().__init__()
        self.first, self.second, self.fuse = (nn.Conv2d(n, 8, 1) for n in (3, 3, 16))
        self.relu, self.out, self.skips = nn.ReLU(inplace=True), nn.Conv2d(8, 2, 1), skips

    def forward(self, x):
        skip = self.first(x)
        y = self.resized(self.second(F.avg_pool2d(x, 2)), 2.0)
        y = self.relu(self.fuse(torch.cat([y, skip if self.skips else self.resized(skip, 1.0)], 1)))
        return self.out(y) if not self.skips else self.out(self.resized(y, 2.0)), self.out(skip)

    def resized(self, x, factor):
        """In a way of which no graph knows."""
        return F.interpolate(x, scale_factor=factor, recompute_scale_factor=True)


@pytest.mark.filterwarnings("ignore:resdense_ext.convert recognised")
@pytest.mark.parametrize("skips", [False, True])
def test_concatenations_are_worth_their_maps(skips, policy):
    """One of the two maps is kept for another reader, too, or none is."""
    torch.manual_seed(0)
    stock, x = Fused(skips).double(), images(2, 3, 8, 6)
    model = rd.convert(copy.deepcopy(stock), policy)
    for training in (True, False):
        ours, theirs = (net.train(training)(x.clone()) for net in (model, stock))
        assert_same(dict(zip("ab", ours)), dict(zip("ab", theirs)))
    kept = [rd.memory.saved_bytes(lambda: net(x.clone().requires_grad_())) for net in (model, stock)]
    assert (kept[0] < kept[1]) if skips else (kept[0] == kept[1])


class Chains(nn.Module):
    """What a case makes of them, it says itself."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = S.ConvNorm(8, 8), S.ConvNorm(8, 8), S.ConvNorm(8, 8, stride=2)
        self.linear, self.first, self.second = nn.Linear(8, 8), nn.ReLU(inplace=True), nn.ReLU(inplace=True)
        self.drop, self.relu = nn.Dropout(0.3, inplace=True), nn.ReLU()


class Chained:
    def classified(self, x):
        x = torch.flatten(F.adaptive_avg_pool2d(self.b(self.a(x)), 1), 1)
        return self.first(self.linear(self.drop(x)))

    def an_activation_alone_in_between(self, x):
        return self.second(self.c.conv(self.first(self.b.conv(self.a(x)))))

    def an_activation_that_is_added(self, x):
        return self.relu(self.a.norm(self.a.conv(x))) + x * self.relu(self.b.norm(self.b.conv(x)))

    def several_read_a_map(self, x):
        z = self.a.conv(x)
        y = self.relu(self.a.norm(z))
        return self.b.conv(y) + self.c.conv(y).mean() + z.sigmoid()

    def another_activation_behind(self, x):
        return F.selu(self.c.norm(self.c.conv(self.b(self.a(x)))), inplace=True)

    def a_map_changed_in_place(self, x):
        return self.b.conv(self.a(x)).mul_(2)

    def read_before_it_ends(self, x):
        y = self.a(x)
        return self.c.conv(self.b(y)) * self.b.conv(y).mean()


@pytest.mark.parametrize("name", [name for name in vars(Chained) if name[0] != "_"])
def test_chains_of_every_kind(name, policy):
    torch.manual_seed(0)
    cls = type("Own", (Chains,), {"forward": getattr(Chained, name)})
    stock, x = S.randomise(cls()).double(), images(2, 8, 6, 4)
    model = rd.convert(copy.deepcopy(stock), policy, example_input=x)
    assert isinstance(model, Stranger)
    for training in (True, False):
        ours = steps(model.train(training), x, 2, seeded)
        assert_same(ours, steps(stock.train(training), x, 2, seeded))
    kept = [rd.memory.saved_bytes(lambda: m.train()(x.requires_grad_())) for m in (model, stock)]
    assert kept[0] < kept[1]


class Augmented:
    """Assignments by `+=` and its like change a value for everybody who has it."""

    def its_own(self, x):
        y = self.b.norm(self.b.conv(self.a(x)))
        y += x
        y *= 2
        return self.c(y)

    def behind_a_converted_module(self, x):
        y = self.inner(x)
        y -= x
        return self.c.norm(self.c.conv(F.relu(y)))

    def sizes(self, x):
        height, width = x.shape[2:]
        height += 1
        width -= width // 3
        return F.interpolate(self.b(self.a(x)), (height, width))

    def in_a_list(self, x):
        y, maps = self.b.norm(self.b.conv(self.a(x))), []
        maps.append(y)
        y += x
        return maps[0] * self.a.conv(x)

    def behind_a_view(self, x):
        y = self.b.norm(self.b.conv(self.a(x)))
        flat = y.flatten(1)
        y /= 2
        return flat + y.flatten(1)

    def a_buffer(self, x):
        mean = self.mean
        mean *= 0.9
        mean += 0.1 * x.detach().mean((0, 2, 3))
        return self.b(self.a(x)) - mean.view(-1, 1, 1)

    def its_data(self, x):
        y = self.b.norm(self.b.conv(self.a(x)))
        y.data += 1
        return y

    def an_attribute(self, x):
        y = self.b.norm(self.b.conv(self.a(x)))
        y.scale = 2
        return y * y.scale

    def an_input(self, x):
        y = x.detach().clone()
        y += 1
        x = x * 1
        x += y
        return self.b(self.a(x))


@pytest.mark.filterwarnings("ignore:resdense_ext.convert recognised")
@pytest.mark.parametrize("name", [name for name in vars(Augmented) if name[0] != "_"])
def test_augmented_assignments(name, policy):
    torch.manual_seed(0)
    own = type("Own", (Chains,), {"forward": getattr(Augmented, name)})()
    own.inner = nn.Sequential(S.ConvNorm(8, 8), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
    own.register_buffer("mean", torch.ones(8))
    stock, x = S.randomise(own).double(), images(2, 8, 6, 5)
    model = rd.convert(copy.deepcopy(stock), policy)
    for training in (True, False):
        assert_same(steps(model.train(training), x, 2), steps(stock.train(training), x, 2))
    assert torch.equal(model.mean, stock.mean)
    if name in ("its_own", "behind_a_converted_module", "sizes", "an_input"):
        kept = [rd.memory.saved_bytes(lambda: m.train()(x.requires_grad_())) for m in (model, stock)]
        assert kept[0] < kept[1]


@pytest.mark.usefixtures("silent")
def test_a_dropout_of_nothing_ends_no_chain(policy):
    """As MONAI's networks have them; one that drops does."""
    torch.manual_seed(0)
    chain = [nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.0), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    stock, x = S.randomise(nn.Sequential(*chain)).double(), images(2, 8, 7, 6)
    model = rd.convert(copy.deepcopy(stock), policy)

    def kept(net):
        return rd.memory.saved_bytes(lambda: net(x.clone().requires_grad_()))

    assert kept(model) < kept(stock)
    assert_same(steps(model, x), steps(stock, x))
    stock[2].p = model[2].p = 0.5
    with pytest.warns(UserWarning, match="runs its stock path"):
        assert_same(steps(model, x, 2, seeded), steps(stock, x, 2, seeded))


@pytest.mark.parametrize(
    ("pool", "average"),
    [
        (nn.MaxPool2d(2, ceil_mode=True), False),
        (lambda x: F.max_pool2d(x, 2, ceil_mode=True), False),
        (lambda x: F.max_pool2d(x, kernel_size=(2, 2), stride=2, ceil_mode=True), False),
        (nn.AvgPool2d(2, ceil_mode=True), True),
        (lambda x: F.avg_pool2d(x, 3, stride=2, padding=1, ceil_mode=True), True),
    ],
    ids=["module", "function", "options", "averages", "function of averages"],
)
def test_pools_between_chains_keep_a_byte_a_maximum(pool, average, policy, monkeypatch):
    """And not the map that they are of, which in stock is there for them alone. No graph takes windows that reach beyond the map."""
    torch.manual_seed(0)

    def forward(self, x):
        y = self.b(self.a(x))
        return self.c(self.pool(y)) + y.mean()

    own = type("Own", (Chains,), {"forward": forward})()
    own.pool = pool
    stock, x = S.randomise(own).double(), images(2, 8, 6, 5)
    model = rd.convert(copy.deepcopy(stock), policy, example_input=x)
    for training in (True, False):
        assert_same(steps(model.train(training), x), steps(stock.train(training), x))
    kept = rd.memory.saved_bytes(lambda: model(x))
    monkeypatch.setattr(sys.modules["resdense_ext.convert.program"], "run_pool", lambda layer, x: layer(x))
    of_maxima = 0 if average else (8 - 1) * 2 * 8 * 3 * 3
    assert rd.memory.saved_bytes(lambda: model(x)) - kept == x.nbytes + of_maxima


class Unchained:
    def nothing_is_spared(self, x):
        return self.first(self.b.conv(self.a(x)[:, :, 1:]))

    def no_norm(self, x):
        return self.second(self.b.conv(self.first(self.a.conv(x))))

    def shared_norm(self, x):
        return self.a.norm(self.b.conv(self.first(self.a.norm(self.a.conv(x)))))

    def changed_in_the_middle(self, x):
        z = self.a.conv(x)
        y = self.b.conv(self.relu(self.a.norm(z)))
        return y + z.mul_(2)


UNCHAINED = {"shared_norm": "a.norm serves twice", "changed_in_the_middle": "mul_: changes a value in place"}


@pytest.mark.parametrize("name", [name for name in vars(Unchained) if name[0] != "_"])
def test_chains_that_are_left_alone(name):
    torch.manual_seed(0)
    cls = type("Own", (Chains,), {"forward": getattr(Unchained, name)})
    stock, x = S.randomise(cls()).double(), images(2, 8, 6, 4)
    model = copy.deepcopy(stock)
    with pytest.warns(UserWarning, match=UNCHAINED.get(name, "recognised no dense or residual block")):
        rd.convert(model)
    assert not any(isinstance(m, Stranger) for m in model.modules())
    assert torch.equal(model(x), stock(x))


def test_what_is_frozen_keeps_nothing():
    stock, x = S.stranger(S.Chain), images(2, 8, 9, 7)
    stock[0].requires_grad_(False), stock[1].requires_grad_(False)
    model = rd.convert(copy.deepcopy(stock))
    assert_same(steps(model, x), steps(stock, x))
    assert rd.memory.saved_bytes(lambda: model(x)) == 8 * (2 * (12 * 20 + 6 * 20) + 2 * (12 + 12 + 6))


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("kind", [S.Aggregated, S.Listed, S.Crossing], ids=lambda kind: kind.__name__)
def test_what_runs_on_the_engine_does_so_in_every_mode_and_in_copies(kind):
    """Though what is found in a module may be nothing of what its containers find in their own forwards."""
    stock, x = S.stranger(kind), images(2, 8, 9, 7)
    model = rd.convert(copy.deepcopy(stock))
    again = copy.deepcopy(model)
    for training in (True, False):
        reports = [rd.report(net.train(training), x) for net in (model, again)]
        assert reports[0] == reports[1] and all(row.stock_saved_bytes for row in reports[0].rows[:-1])
        assert_same(steps(model, x), steps(stock.train(training), x))


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("kind", STRANGERS, ids=lambda kind: kind.__name__)
def test_layers_that_have_only_a_constructor_of_their_own(kind, policy, engine):
    stock, x = S.stranger(kind), images(*STRANGERS[kind])
    for module in stock.modules():
        module.__class__ = CONSTRUCTED.get(type(module), type(module))
    model = rd.convert(copy.deepcopy(stock), policy)
    assert_same(steps(model, x, call=seeded), steps(stock, x, call=seeded))
    assert engine == [policy] * CALLS.get(kind, 1)


def with_frozen_norms(model):
    """The same with torchvision's frozen norms."""
    frozen = library("torchvision.ops").FrozenBatchNorm2d
    for parent in list(model.modules()):
        for name, norm in parent.named_children():
            if isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, frozen(norm.num_features, norm.eps))
                getattr(parent, name).load_state_dict(norm.state_dict())
    return model


@pytest.mark.usefixtures("silent")
class TestFrozenNorms:
    """Plain arithmetic in torchvision's class, a batch norm here."""

    @pytest.mark.parametrize("kind", [S.GrowingList, S.Residual, S.OneShot, S.Recursive], ids=lambda kind: kind.__name__)
    def test_as_stock_and_less_is_kept(self, kind):
        stock, x = with_frozen_norms(S.stranger(kind)).double(), images(*STRANGERS.get(kind, (2, 8, 9, 7)))
        model = rd.convert(copy.deepcopy(stock), "min")
        assert_same(steps(model, x, count=2), steps(stock, x, count=2))
        theirs, ours = (rd.memory.saved_bytes(lambda: net(x)) for net in (stock, model))
        assert ours <= 0.7 * theirs

    @pytest.mark.parametrize("pool", [nn.AvgPool2d(2), nn.MaxPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Identity()], ids=str)
    @pytest.mark.parametrize("kind", [S.SequentialBlock, S.OneShot], ids=lambda kind: kind.__name__)
    def test_widen_what_autocast_has_narrowed(self, kind, pool):
        """As stock's arithmetic does."""
        channels = {S.SequentialBlock: 32, S.OneShot: 12}[kind]
        stock = nn.Sequential(S.stranger(kind), nn.BatchNorm2d(channels), nn.ReLU(), pool)
        stock, x = with_frozen_norms(stock).float().eval(), images(2, 8, 9, 7).bfloat16()
        for module in stock.modules():
            if isinstance(module, nn.Conv2d):
                module.to(x.dtype)  # autocast would round away a change in its last place
        model, inputs, params = rd.convert(copy.deepcopy(stock)), {"x": x}, stock.state_dict()
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype == stock(x).dtype == torch.float32
        run = module_run(stock, torch.bfloat16)
        ours = module_run(model, torch.bfloat16)({"x": x.clone()}, copy.deepcopy(params))
        assert_within_rule(ours, true_run(run, inputs, params), torch_runs(run, inputs, params), torch.bfloat16)


def test_a_model_that_is_given_up_is_gone():
    """At once, as a stock one is, not when the garbage collector comes by."""
    x = images(2, 8, 6, 4)
    with without_garbage_collector():
        for make in (lambda: S.stranger(S.Chain), lambda: refused("by_value")):
            model = make()
            vars(model).pop("kept", None)  # in which it keeps itself
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                rd.convert(model)
            rd.report(model, x)
            model(x)
            alive = weakref.ref(model)
            del model
            assert alive() is None


class TestExampleInput:
    def test_agrees(self, kind):
        model, x = S.stranger(kind), images(*STRANGERS[kind])
        state, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        rd.convert(model, example_input=x)
        assert any(isinstance(m, Stranger) for m in model.modules())
        assert_same(dict(model.state_dict()), dict(state), tolerance=0)
        assert torch.equal(torch.get_rng_state(), random_state)
        assert all(p.grad is None for p in model.parameters())

    def test_on_the_meta_device(self):
        model, x = S.stranger(S.Chain).to("meta"), images(2, 8, 6, 4).to("meta")
        rd.convert(model, memory_budget="1GiB", example_input=x)
        assert isinstance(model, Stranger) and rd.report(model, x).plan.budget == 2**30

    def test_statistics_that_are_zero_but_for_rounding(self):
        """What was convolved of a map that a norm has centred has the mean zero."""

        def unit(inputs, outputs):
            return nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)

        torch.manual_seed(0)
        model = nn.Sequential(*unit(4, 8), nn.ReLU(), *unit(8, 8), *unit(8, 8), nn.ReLU(), *unit(8, 4))
        rd.convert(model, example_input=images(2, 4, 9, 7, dtype=torch.float32))
        assert isinstance(model, Stranger)

    @pytest.mark.parametrize("wrong", ["output 0", "gradient of input 0", "buffer norms.0.running_mean"])
    def test_a_mismatch_is_refused(self, wrong, monkeypatch):
        run = verify._run

        def tampered(owner, args, by_trace):
            results = run(owner, args, by_trace)
            if by_trace:
                results[wrong] = results[wrong] * (1 + 1e-6)
            return results

        monkeypatch.setattr(verify, "_run", tampered)
        model = S.stranger(S.GrowingList)
        with pytest.warns(UserWarning, match=rf"GrowingList: its {wrong} differs by \S+e-0[67]"):
            rd.convert(model, example_input=images(2, 8, 5, 4))
        assert type(model) is S.GrowingList and "resdense_policy" not in vars(model)

    def test_the_models_own_error(self):
        """Also of a forward that nothing is found in."""
        for model in (S.stranger(S.Recursive), refused("by_value")):
            classes, state = list(map(type, model.modules())), copy.deepcopy(model.state_dict())
            with pytest.raises(RuntimeError, match="expected input|running_mean should contain"):
                rd.convert(model, example_input=images(2, 4, 5, 4))
            assert list(map(type, model.modules())) == classes
            assert_same(dict(model.state_dict()), dict(state), tolerance=0)


class TestTransformations:
    @pytest.mark.parametrize("kind", [S.GrowingList, S.Residual], ids=lambda kind: kind.__name__)
    def test_compile_export_and_fx(self, kind, engine):
        torch.compiler.reset()
        stock, x = S.stranger(kind).eval(), images(*STRANGERS[kind])
        model, expected = rd.convert(copy.deepcopy(stock)), {"output": stock(x)}
        assert_same({"output": torch.compile(model, backend="eager", fullgraph=True)(x)}, expected)
        assert_same({"output": torch.fx.symbolic_trace(model)(x)}, expected)
        assert_same({"output": torch.export.export(model, (x,)).module()(x)}, expected)
        assert not engine

    @pytest.mark.parametrize("kind", [S.GrowingList, S.Harmonic], ids=lambda kind: kind.__name__)
    def test_make_fx(self, kind, engine):
        stock, x = S.stranger(kind).eval(), images(2, 8, 9, 7)
        traced = make_fx(rd.convert(copy.deepcopy(stock)))(x)
        assert_same({"output": traced(x.flip(0))}, {"output": stock(x.flip(0))})
        assert "resdense" not in traced.code and not engine


Both = namedtuple("Both", "first second")
RETURNED = {
    "a list": lambda a, b: [a, b],
    "a tuple": lambda a, b: (a, b, 3),
    "a dict": lambda a, b: {"out": a, "more": [b, None]},
    "an OrderedDict": lambda a, b: OrderedDict(out=a, aux=b),
    "a namedtuple": lambda a, b: Both(a, {"b": b}),
    "itself": lambda a, b: a,
}


class Returns(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.make = make

    def forward(self, x):
        a = F.elu(self.norm2(self.conv2(F.elu(self.norm(self.conv(x))))))
        return self.make(a, a + 1)


@pytest.mark.parametrize("what", RETURNED)
def test_what_a_forward_returns_is_of_stocks_kinds(what):
    stock, x = Returns(RETURNED[what]).double(), images(2, 4, 6, 5)
    model = rd.convert(copy.deepcopy(stock))
    assert isinstance(model, Stranger)
    (ours, spec), (theirs, expected) = (tree_flatten(net(x)) for net in (model, stock))
    assert spec == expected
    ours, theirs = ({str(i): t for i, t in enumerate(leaves) if isinstance(t, torch.Tensor)} for leaves in (ours, theirs))
    assert_same(ours, theirs)
    if what == "a list":
        first, second = model(x), model(x)
        first.append(0)  # the caller's own
        assert len(second) == len(model(x)) == 2


class TakesAList(nn.Module):
    """Of which it takes the last away."""

    def forward(self, maps):
        return maps.pop() + maps[0]


class Hands(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), TakesAList()
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.norm2(self.conv2(F.elu(self.norm(self.conv(x)))))
        return self.last([x, F.elu(y)])


def test_a_module_that_carries_hooks_gets_lists_that_it_may_change():
    stock, x = Hands().double(), images(2, 4, 6, 5)
    model = rd.convert(copy.deepcopy(stock))
    assert isinstance(model, Stranger)
    seen = []
    model.last.register_forward_hook(lambda module, args, out: seen.append(type(args[0])))
    assert_same({"output": model(x)}, {"output": stock(x)})
    assert seen == [list]
