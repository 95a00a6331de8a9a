import math

import pytest
import torch
import torch.nn.functional as F
from tolerance import (
    assert_within_noise,
    assert_within_rule,
    module_run,
    one_ulp,
    rounding_noise,
    torch_runs,
    true_run,
)
from torch import nn


def network():
    layers = []
    for width in (3, 8, 8, 8):
        layers += [nn.Conv2d(width, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


class OtherConv(nn.Conv2d):
    """The same convolution, added up in another order."""

    def forward(self, x):
        half = x.shape[1] // 2
        right = F.conv2d(x[:, half:], self.weight[:, half:], self.bias, self.stride, self.padding)
        return right + F.conv2d(x[:, :half], self.weight[:, :half], None, self.stride, self.padding)


def in_another_order(net):
    for module in net.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = OtherConv
    return net


def case(dtype):
    net = network()
    inputs = {"x": torch.randn(4, 3, 12, 12).to(dtype)}
    params = {name: t.to(dtype) if t.is_floating_point() else t for name, t in net.state_dict().items()}
    return net, inputs, params


def off_by(factor, name, truth, runs):
    """A result that is right but for `name`, which is `factor` times as far from truth as torch ever is."""
    worst = max(runs, key=lambda run: (run[name].double() - truth[name]).norm())
    return {**runs[0], name: truth[name] + factor * (worst[name].double() - truth[name])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_another_order_of_summation_is_within_the_rule(dtype):
    net, inputs, params = case(dtype)
    truth = true_run(module_run(net), inputs, params)
    runs = torch_runs(module_run(net), inputs, params)
    assert len(runs) == 8
    ours = module_run(in_another_order(net))(dict(inputs), dict(params))
    assert_within_rule(ours, truth, runs, dtype)


def test_the_rule_holds_under_autocast():
    net, inputs, params = case(torch.float32)
    run = module_run(net, autocast=torch.bfloat16)
    truth = true_run(run, inputs, params)
    assert truth["output"].dtype == torch.float64
    exact = true_run(module_run(net), inputs, params)
    assert torch.equal(truth["output"], exact["output"])
    runs = torch_runs(run, inputs, params)
    ours = module_run(in_another_order(net), autocast=torch.bfloat16)(dict(inputs), dict(params))
    assert_within_rule(ours, truth, runs, torch.bfloat16)
    with pytest.raises(AssertionError, match="grad x"):
        assert_within_rule(off_by(3, "grad x", truth, runs), truth, runs, torch.bfloat16)


@pytest.mark.parametrize("name", ["output", "grad x", "grad 3.weight", "buffer 7.running_var"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_three_times_torchs_error_is_refused(dtype, name):
    net, inputs, params = case(dtype)
    truth = true_run(module_run(net), inputs, params)
    runs = torch_runs(module_run(net), inputs, params)
    assert_within_rule(off_by(1.9, name, truth, runs), truth, runs, dtype)
    error = 3 * max((run[name].double() - truth[name]).norm() for run in runs)
    slack = torch.finfo(dtype).eps * truth[name].norm()
    if error / 3 > 2 * slack:  # else the error is that of storing the result, which the rule's last term grants
        with pytest.raises(AssertionError, match=rf"^{name}: norm error .*, limit .*, ratio 1\.\d+ \(torch's own"):
            assert_within_rule(off_by(3, name, truth, runs), truth, runs, dtype)
    with pytest.raises(AssertionError, match=f"^{name}: "):
        assert_within_rule({**runs[0], name: truth[name] * (1 + 100 * error / truth[name].norm())}, truth, runs, dtype)


def test_one_wrong_corner_is_refused():
    truth = {"output": torch.randn(2, 64, 64, 64, dtype=torch.float64)}
    runs = [{"output": truth["output"].bfloat16()}]
    ours = runs[0]["output"].clone()
    assert_within_rule({"output": ours}, truth, runs, torch.bfloat16)
    ours[0, 0, 0, 0] += 1
    with pytest.raises(AssertionError, match="output: largest error"):
        assert_within_rule({"output": ours}, truth, runs, torch.bfloat16)


def test_a_gradient_that_should_be_zero_may_be_rounding_of_the_largest():
    truth = {"output": torch.zeros(2), "grad bias": torch.zeros(4), "grad weight": torch.ones(100)}
    eps = torch.finfo(torch.float32).eps
    right = {**truth, "grad bias": torch.full((4,), 0.04 * eps)}
    wrong = {**truth, "grad bias": torch.full((4,), 0.06 * eps)}
    assert_within_rule(right, truth, [truth], torch.float32)
    with pytest.raises(AssertionError, match="grad bias"):
        assert_within_rule(wrong, truth, [truth], torch.float32)
    with pytest.raises(AssertionError, match="output"):
        assert_within_rule({**right, "output": torch.full((2,), 1e-3 * eps)}, truth, [truth], torch.float32)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(bad):
    truth = {"output": torch.ones(3)}
    with pytest.raises(AssertionError, match="output: norm error"):
        assert_within_rule({"output": torch.tensor([1, bad, 1])}, truth, [truth], torch.float32)
    with pytest.raises(AssertionError, match="output: error"):
        assert_within_noise({"output": torch.tensor([1, bad, 1])}, truth, {"output": 1.0})
    runs = [truth, {"output": torch.tensor([1, bad, 1])}, truth]
    with pytest.raises(ValueError, match="output.*not finite"):
        assert_within_rule(truth, truth, runs, torch.float32)


def test_missing_extra_and_misshapen_tensors_are_named():
    truth = {"output": torch.ones(3), "grad x": torch.ones(3), "grad w": torch.ones(2)}
    ours = {"output": torch.ones(3), "grad x": torch.ones(1), "grad b": torch.ones(1)}
    expected = r"^grad x: shape \(1,\), expected \(3,\)\ngrad w: missing\ngrad b: not expected$"
    with pytest.raises(AssertionError, match=expected):
        assert_within_rule(ours, truth, [truth], torch.float32)
    with pytest.raises(AssertionError, match=expected):
        assert_within_noise(ours, truth, dict.fromkeys(truth, 1.0))


def test_empty_tensors_pass():
    truth = {"output": torch.ones(0, 3)}
    assert_within_rule(truth, truth, [truth], torch.float32)


def test_noise_covers_another_order_and_refuses_a_hundred_times_it():
    net, inputs, params = case(torch.float32)
    run = module_run(net)
    noise = rounding_noise(run, inputs, params)
    stock = true_run(run, inputs, params)
    ours = true_run(module_run(in_another_order(net)), inputs, params)
    assert not torch.equal(ours["output"], stock["output"])
    assert_within_noise(ours, stock, noise)
    for name in ("output", "grad x", "grad 0.weight", "buffer 4.running_mean"):
        assert 0 < noise[name] < 1e-10 * stock[name].norm()
        direction = torch.randn_like(stock[name])
        wrong = stock[name] + 100 * noise[name] * direction / direction.norm()
        with pytest.raises(AssertionError, match=rf"^{name}: error .* ratio 10 "):
            assert_within_noise({**ours, name: wrong}, stock, noise)


def test_integer_buffers_must_be_equal():
    net, inputs, params = case(torch.float32)
    noise = rounding_noise(module_run(net), inputs, params)
    stock = true_run(module_run(net), inputs, params)
    counts = [name for name in stock if "num_batches_tracked" in name]
    assert len(counts) == 4 and all(noise[name] == 0 and stock[name] == 1 for name in counts)
    with pytest.raises(AssertionError, match=counts[0]):
        assert_within_noise({**stock, counts[0]: stock[counts[0]] + 1}, stock, noise)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_ulp_moves_every_number_to_a_neighbour(dtype):
    values = torch.tensor([1.0, -1.0, 0.0, 3.14, -1e-4] * 100).to(dtype)
    given = values.clone()
    moved = one_ulp({"t": values, "i": torch.arange(3)}, torch.Generator().manual_seed(0))
    assert torch.equal(values, given) and torch.equal(moved["i"], torch.arange(3))
    assert torch.equal(moved["t"] == given, given == 0)
    change = (moved["t"].double() - given.double()).abs()
    assert (change <= torch.finfo(dtype).eps * given.double().abs()).all()
    for value in (1.0, -1.0):
        assert len(moved["t"][given == value].unique()) == 2


def test_a_run_changes_neither_module_nor_inputs():
    net, inputs, params = case(torch.float32)
    before = {name: t.clone() for name, t in {**net.state_dict(), **inputs}.items()}
    torch_runs(module_run(net), inputs, params, changes=1)
    true_run(module_run(net), inputs, params)
    assert all(torch.equal(t, before[name]) for name, t in {**net.state_dict(), **inputs}.items())
    assert all(p.grad is None for p in net.parameters()) and not inputs["x"].requires_grad


@pytest.mark.parametrize("shape, formats", [((2, 3, 8), 1), ((2, 3, 4, 4), 2), ((2, 3, 4, 4, 4), 2)])
def test_both_memory_formats_are_run_where_there_are_two(shape, formats):
    seen = []

    def run(inputs, params):
        seen.append(inputs["x"].stride())
        return {"output": inputs["x"]}

    assert len(torch_runs(run, {"x": torch.randn(shape)}, {}, changes=2)) == len(seen) == 3 * formats
    assert len(set(seen)) == formats
