"""Conversion by a budget of bytes instead of a policy."""

import copy

import pytest
import torch
from small_nets import Joined, assert_same, images, randomise, small_densenet, steps
from torch import nn

import resdense_ext as rd
from resdense_ext.convert import budget as budgets

X = (2, 3, 64, 64)


def saved(model, x):
    return rd.memory.saved_bytes(lambda: model(x))


def policies(model):
    return [m.engine_policy for m in model.modules() if hasattr(m, "layer_modules")]


@pytest.fixture
def limits():
    x = images(*X)
    return [saved(rd.convert(small_densenet(), policy), x) for policy in ("min", "fast")]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.8, 1.0])
def test_keeps_what_fits_and_what_it_predicted(share, limits):
    least, most = limits
    budget, x = int(least + share * (most - least)), images(*X)
    stock = small_densenet()
    model = rd.convert(copy.deepcopy(stock), memory_budget=budget, example_input=x)
    plan = budgets.plan_of(model)
    assert saved(model, x) <= budget
    assert abs(plan.predicted_bytes - saved(model, x)) <= 0.01 * saved(model, x)
    assert sum(map(sum, policies(model))) == plan.kept and plan.bottlenecks == 5
    assert (plan.recomputed_flops == 0) == (share == 1.0)
    model.load_state_dict(stock.state_dict())  # the forwards above have moved the running statistics
    assert_same(steps(model, x), steps(stock, x))


def test_more_budget_recomputes_less(limits):
    x, left = images(*X), []
    model, (least, most) = small_densenet(), limits
    for budget in (*range(least, most, (most - least) // 4), most):
        rd.convert(model, memory_budget=budget, example_input=x)
        left.append(budgets.plan_of(model).recomputed_flops)
    assert left == sorted(left, reverse=True) and left[0] > left[-1] == 0


def test_a_share_of_what_stock_keeps():
    x, stock = images(*X), small_densenet()
    model = rd.convert(copy.deepcopy(stock), memory_budget=0.4, example_input=x)
    assert budgets.plan_of(model).budget == int(0.4 * saved(stock, x))
    assert saved(model, x) <= 0.4 * saved(stock, x)


@pytest.mark.parametrize("budget", ["1GiB", 2**30, float(2**30)])
def test_words_and_numbers(budget):
    model = rd.convert(small_densenet(), memory_budget=budget, example_input=images(*X))
    assert policies(model) == [(True,) * 2, (True,) * 3]
    assert budgets.plan_of(model).budget == 2**30


def test_counts_under_autocast():
    x = images(*X).float()
    model = randomise(rd.models.DenseNet(8, (2, 3), 16, num_classes=5)).float()
    with torch.autocast("cpu", torch.bfloat16):
        rd.convert(model, memory_budget="1GiB", example_input=x)
        assert budgets.plan_of(model).predicted_bytes == pytest.approx(saved(model, x), rel=0.01)


def test_layers_without_bottlenecks_have_no_choice():
    model = rd.models.DenseNet(8, (2, 3), 16, bn_size=0, num_classes=5).double()
    rd.convert(model, memory_budget="1GiB", example_input=images(*X))
    assert budgets.plan_of(model).bottlenecks == 0 and policies(model) == [(False,) * 2, (False,) * 3]
    assert_same(steps(model, images(*X)), steps(rd.revert(copy.deepcopy(model)), images(*X)))


def test_a_block_that_runs_twice_is_counted_twice():
    block = rd.nn.DenseBlock(2, 8, 2, 4).double()
    for layer in block.values():
        for norm in (layer.norm1, layer.norm2):
            norm.track_running_stats = False

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block

        def forward(self, x):
            return self.block(self.block(x)[:, :8])

    model, x = Twice(), images(2, 8, 9, 9)
    rd.convert(model, memory_budget="1GiB", example_input=x)
    assert budgets.plan_of(model).predicted_bytes == pytest.approx(saved(model, x), rel=0.01)


BLOCKS = {
    "dense": lambda: rd.nn.DenseBlock(2, 8, 2, 2),
    "residual": lambda: rd.nn.Bottleneck(12, 3),
    "dual path": lambda: nn.Sequential(
        rd.nn.DualPathBlock(12, 4, 4, 2, projection=True), rd.nn.DualPathBlock(10, 4, 4, 2), Joined()
    ),
    "chain": lambda: chain(12, 24, 24, 12),
}


def chain(*widths):
    layers = [(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in zip(widths, widths[1:])]
    return nn.Sequential(*(layer for unit in layers for layer in unit))


def test_chains_are_kept_or_computed_again():
    """Between the least and all: the plan is what is kept, to the byte. (A pool that no graph takes is between the two.)"""
    blocks = [chain(12, 24, 24, 12), nn.MaxPool2d(2, ceil_mode=True), chain(12, 48, 48, 12), nn.Flatten(), nn.LazyLinear(5)]
    model, x = randomise(nn.Sequential(*blocks).double()), images(2, 12, 8, 8)
    model(x)
    found, shown = [], []
    most, least = (saved(rd.convert(model, policy), x) for policy in ("fast", "min"))
    for budget in (most, (most + least) // 2, least):
        rd.convert(model, memory_budget=budget, example_input=x)
        plan = budgets.plan_of(model)
        assert saved(model, x) == plan.predicted_bytes <= budget and plan.bottlenecks == 6
        found.append((plan.kept, plan.recomputed_flops))
        shown.append([row.policy for row in rd.report(model, x).rows if row.layers])
        assert_same(steps(copy.deepcopy(model), x), steps(rd.revert(copy.deepcopy(model)), x))
    (_, none), (_, some), (_, every) = found
    assert [kept for kept, _ in found] == [6, 3, 0] and 0 == none < some < every
    assert shown == [["fast", "fast"], ["min and 1 more", "min and 2 more"], ["min", "min"]]


@pytest.mark.parametrize("kind", BLOCKS)
def test_what_is_frozen_in_front_has_no_choice(kind):
    """It keeps nothing under either policy, and is not computed again."""
    channels = 8 if kind == "dense" else 12
    x, model = images(2, channels, 9, 9), nn.Sequential(BLOCKS[kind](), nn.Conv2d(12, channels, 3), BLOCKS[kind]()).double()
    model[0].requires_grad_(False)
    budget = saved(rd.convert(model, "fast"), x)
    assert saved(rd.convert(model, "min"), x) < budget
    rd.convert(model, memory_budget=budget, example_input=x)
    plan = budgets.plan_of(model)
    assert saved(model, x) == plan.predicted_bytes == budget and plan.recomputed_flops == 0


class TestAuto:
    def test_keeps_all_where_there_is_room(self, monkeypatch):
        monkeypatch.setattr(budgets, "_free_bytes", lambda device: 2**34)
        model = rd.convert(small_densenet(), "auto", example_input=images(*X))
        assert policies(model) == [(True,) * 2, (True,) * 3]

    def test_keeps_the_least_where_there_is_none(self, monkeypatch, limits):
        monkeypatch.setattr(budgets, "_free_bytes", lambda device: 1000)
        model = rd.convert(small_densenet(), "auto", example_input=images(*X))
        assert policies(model) == [(False,) * 2, (False,) * 3]
        assert budgets.plan_of(model).budget == limits[0]

    def test_asks_the_system(self):
        assert 2**20 < budgets._free_bytes(torch.device("cpu")) < 2**50

    def test_leaves_room_for_gradients_and_scratch(self, monkeypatch):
        monkeypatch.setattr(budgets, "_free_bytes", lambda device: 2**24)
        model = rd.convert(small_densenet(), "auto", example_input=images(*X))
        gradients_and_moments = 3 * sum(p.nbytes for p in model.parameters())
        first_buffer = 2 * (16 + 2 * 8) * 16 * 16 * 8
        assert budgets.plan_of(model).budget <= 0.9 * 2**24 - gradients_and_moments - first_buffer


def test_the_report_shows_the_choice():
    x = images(*X)
    model = rd.convert(small_densenet(), memory_budget=0.35, example_input=x)
    report = rd.report(model, x)
    plan = budgets.plan_of(model)
    assert report.plan == plan and report.saved_bytes == pytest.approx(plan.predicted_bytes, rel=0.01)
    kept = [row.policy for row in report.rows if row.layers]
    assert kept == [f"{sum(policy)} of {len(policy)} kept" for policy in policies(model)]
    assert str(report).splitlines()[-1] == str(plan)
    assert str(plan).startswith(f"plan: {rd.memory.format_bytes(plan.predicted_bytes)} of a budget of ")
    rd.convert(model, "min")
    assert rd.report(model, x).plan is None


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, r"memory_budget: expected at least \d+ bytes \(.*\), the least that DenseNet can keep", dict(memory_budget=1000)),
        (ValueError, "memory_budget: expected at least", dict(memory_budget=0.01)),
        (ValueError, 'memory_budget: expected a string such as "8GiB"', dict(memory_budget="lots")),
        (TypeError, "memory_budget: expected bytes", dict(memory_budget=[1])),
        (ValueError, "memory_budget: expected None beside policy \"auto\"", dict(policy="auto", memory_budget=0.5)),
        (ValueError, "policy: expected one of fast, min, auto, got 'tiny'", dict(policy="tiny")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("was", ["stock", "converted", "ours"])
def test_errors_leave_the_model_as_it_was(error, message, options, was):
    model = rd.models.DenseNet(8, (2, 3), 16, num_classes=5).double() if was == "ours" else small_densenet()
    if was == "converted":
        rd.convert(model, "min")
    x, state = images(*X), {name: t.clone() for name, t in model.state_dict().items()}
    before = [(type(m), sorted(vars(m)), m.__dict__.get("resdense_policy")) for m in model.modules()], policies(model)
    with pytest.raises(error, match=message):
        rd.convert(model, example_input=x, **options)
    assert before == ([(type(m), sorted(vars(m)), m.__dict__.get("resdense_policy")) for m in model.modules()], policies(model))
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("options", [dict(memory_budget=0.5), dict(policy="auto")])
def test_needs_an_example(options):
    with pytest.raises(ValueError, match="example_input: expected an input"):
        rd.convert(small_densenet(), **options)


@pytest.mark.parametrize("options", [{}, dict(memory_budget=0.5)], ids=["", "budget"])
def test_an_example_that_the_model_refuses(options):
    model = small_densenet()
    classes, state = list(map(type, model.modules())), copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="to have 3 channels, but got 4 channels"):
        rd.convert(model, **options, example_input=images(2, 4, 64, 64))
    assert not policies(model) and list(map(type, model.modules())) == classes
    assert_same(dict(model.state_dict()), dict(state), tolerance=0)
