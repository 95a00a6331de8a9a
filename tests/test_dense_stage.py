"""A dense block and the transition or head behind it in one node, and the chains in which they are found."""

import copy
import gc
import itertools

import pytest
import torch
from small_nets import assert_same, engine, images, small_densenet, steps  # noqa: F401
from stock import import_torchvision
from test_dense_block import BACKENDS, _format, functional_layers, leaves, maps, random_block, rebuilt, same, state
from tolerance import assert_within_rule, module_run, torch_runs, true_run
from torch import nn

import resdense_ext as rd
from resdense_ext import functional
from resdense_ext.functional import Activation, BatchNorm, Conv, Pool, PooledUnit
from resdense_ext.ops import cpu, pooled_unit
from resdense_ext.ops.dense_block import DenseBlockConfig
from resdense_ext.ops.units import flat_tensors

FLOAT = 4
POLICIES = ("fast", "min", (True, False, True))


@pytest.fixture(params=BACKENDS)
def backend(request):
    with rd.use_backend(request.param):
        yield request.param


@pytest.fixture(params=POLICIES, ids=str)
def policy(request):
    return request.param


@pytest.fixture(params=["transition", "head"])
def behind(request):
    return request.param


def stage(behind, policy="fast", rank=2, **options):
    """A chain of a block and what stands behind it."""
    block = random_block(spatial_dims=rank, policy=policy, **options)
    channels = 5 + 3 * 4
    if behind == "transition":
        return rd.nn.Chain(block, rd.nn.Transition(channels, 6, spatial_dims=rank))
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1](channels)
    pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[rank - 1](1)
    return rd.nn.Chain(block, norm, nn.ReLU(), pool)


def stock_of(chain):
    return rd.revert(copy.deepcopy(chain))


def agree(chain, x):
    params, inputs = state(chain.double()), {"x": x.double()}
    stock = module_run(stock_of(chain))({"x": inputs["x"].clone()}, copy.deepcopy(params))
    ours = module_run(chain)({"x": inputs["x"].clone()}, copy.deepcopy(params))
    assert ours.keys() == stock.keys()
    same(list(ours.values()), list(stock.values()))


@pytest.fixture
def calls(monkeypatch):
    """What stood behind the blocks of the functional calls."""
    found, call = [], functional.checked_dense_block

    def counted(*args, **options):
        found.append(options["behind"])
        return call(*args, **options)

    monkeypatch.setattr(functional, "checked_dense_block", counted)
    return found


class TestAgreement:
    @pytest.mark.parametrize("channels_last", [False, True])
    @pytest.mark.parametrize("shape", [(2, 5, 9, 7), (1, 5, 2, 3), (2, 5, 7), (2, 5, 5, 4, 3)], ids=str)
    def test_shapes(self, backend, policy, behind, shape, channels_last, calls):
        if channels_last and len(shape) == 3:
            pytest.skip("one spatial dimension has one memory format")
        agree(stage(behind, policy, len(shape) - 2), maps(shape, channels_last))
        assert calls[0] is not None

    @pytest.mark.parametrize("which", list(itertools.product([True, False], repeat=2)), ids=str)
    def test_eval_and_frozen_norms(self, backend, policy, behind, which):
        chain = stage(behind, policy)
        for module, frozen in zip((chain[0], chain[1]), which):
            module.train(not frozen)
        agree(chain, maps((2, 5, 9, 7)))

    @pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)), ids=str)
    def test_only_some_gradients(self, backend, policy, behind, needs):
        results = []
        for stock in (False, True):
            chain = stage(behind, policy).double()
            chain[0].requires_grad_(needs[1])
            chain[1].requires_grad_(needs[2])
            x = maps((2, 5, 9, 7)).double().requires_grad_(needs[0])
            y = (rd.revert(chain) if stock else chain)(x)
            if any(needs):
                y.square().sum().backward()
            results.append([x.grad, *(p.grad for p in chain.parameters())])
        if any(needs):
            same(*results)

    @pytest.mark.parametrize("channels_last", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_lower_precision(self, backend, policy, behind, dtype, channels_last):
        chain = stage(behind, policy)
        params = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state(chain).items()}
        inputs = {"x": maps((3, 5, 9, 7)).to(dtype)}
        run = module_run(stock_of(chain))
        ours = module_run(chain)({"x": inputs["x"].contiguous(memory_format=_format(channels_last))}, copy.deepcopy(params))
        assert_within_rule(ours, true_run(run, inputs, params), torch_runs(run, inputs, params), dtype)

    def test_autocast(self, policy, behind):
        chain = stage(behind, policy)
        params, inputs = state(chain), {"x": maps((3, 5, 9, 7))}
        run = module_run(stock_of(chain), torch.bfloat16)
        ours = module_run(chain, torch.bfloat16)({"x": inputs["x"].clone()}, copy.deepcopy(params))
        truth = true_run(module_run(stock_of(chain)), inputs, params)
        assert_within_rule(ours, truth, torch_runs(run, inputs, params), torch.bfloat16)
        stock = run({"x": inputs["x"].clone()}, copy.deepcopy(params))
        assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in stock.items()}

    def test_dropout(self, policy, behind):
        results = []
        for stock in (False, True):
            chain = stage(behind, policy, drop_rate=0.4).double()
            torch.manual_seed(1)
            y = (rd.revert(chain) if stock else chain)(maps((2, 5, 9, 7)).double())
            y.square().sum().backward()
            results.append([y.detach(), *(p.grad for p in chain.parameters())])
        same(*results)


class TestAutograd:
    @pytest.mark.unpoisoned
    @pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
    @pytest.mark.parametrize("batch_stats", [True, False])
    def test_gradcheck(self, behind, check, batch_stats):
        layers = functional_layers(batch_stats=batch_stats)
        x = maps((2, 3, 3, 4)).double().requires_grad_()
        vectors = [torch.randn(7, dtype=torch.float64).requires_grad_() for _ in range(2)]
        weight = torch.randn(2, 7, 1, 1, dtype=torch.float64).requires_grad_()
        running = (torch.randn(7, dtype=torch.float64), torch.rand(7, dtype=torch.float64) + 0.5)

        def run(x, gamma, beta, weight, *tensors):
            unit = unit_of(behind, BatchNorm(gamma, beta, *running, batch_stats), weight)
            return functional.dense_block(x, rebuilt(layers, tensors), activation="silu", behind=unit)

        weight.requires_grad_(behind == "transition")
        assert check(run, (x, *vectors, weight, *leaves(layers)), fast_mode=True)

    @pytest.mark.parametrize("batch_stats", [True, False])
    def test_opcheck(self, backend, policy, behind, batch_stats):
        layers = functional_layers(torch.float32, batch_stats)
        x = maps((2, 3, 5, 4))
        vectors = (torch.randn(7), torch.randn(7), torch.randn(7), torch.rand(7) + 0.5)
        unit = unit_of(behind, BatchNorm(*vectors, batch_stats), torch.randn(2, 7, 1, 1))
        keep = [policy == "fast"] * 2
        numbers = (*DenseBlockConfig.of(layers, Activation(), keep, backend), flat_tensors([(unit.norm, unit.conv)]))
        numbers += pooled_unit.PooledUnitConfig.of(unit, Activation(), backend)
        tensors = [None if t is None else t.detach() for t in flat_tensors(unit for layer in layers for unit in layer.units)]
        utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(torch.ops.resdense.dense_stage.default, (x, tensors, [], *numbers), test_utils=utilities)
        out, buffer, *kept = torch.ops.resdense.dense_stage(x, tensors, [], *numbers)
        for needs in ([True], [False]):
            needs = [*needs * (1 + 4 * 4 + 2), *needs * (behind == "transition"), False, False][: 1 + 4 * 4 + 4]
            for grad_buffer in (None, torch.randn_like(buffer)):
                arguments = (torch.randn_like(out), grad_buffer, buffer, tensors, [], *numbers, *kept, needs)
                torch.library.opcheck(torch.ops.resdense.dense_stage_backward.default, arguments, test_utils=utilities)

    def test_a_changed_parameter_raises(self, behind):
        chain = stage(behind)
        y = chain(maps((2, 5, 9, 7)).requires_grad_())
        with torch.no_grad():
            chain[0].denselayer1.conv1.weight.mul_(2)
        with pytest.raises(RuntimeError, match="dense_block: its output, or a parameter of it, was changed in place"):
            y.sum().backward()


def unit_of(behind, norm, weight):
    if behind == "head":
        return PooledUnit(norm, Pool("global"))
    return PooledUnit(norm, Pool("average", (2, 2), (2, 2), (0, 0)), Conv(weight))


SUBCLASSED = {
    rd.nn.BasicBlock: lambda own: [own(5, 5), own(5, 5)],
    rd.nn.PreActBlock: lambda own: [own(5, 5), own(5, 5)],
    rd.nn.DenseBlock: lambda own: [own(2, 5, 4, 1), rd.nn.Transition(7, 5)],
    rd.nn.Transition: lambda own: [rd.nn.DenseBlock(2, 5, 4, 1), own(7, 5)],
    rd.nn.DualPathBlock: lambda own: [own(5, 4, 6, 3, projection=True)],
    rd.nn.DualPathStage: lambda own: [own(2, 5, 4, 6, 3)],
    rd.nn.Chain: lambda own: [own(nn.ReLU())],
}
"""Modules of a chain; those of one of our classes are made by ``own``."""


class Wrapper(nn.Module):
    """As those of `torch.distributed` are."""

    def __init__(self, module, seen):
        super().__init__()
        self.module, self.seen = module, seen

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)

    def forward(self, x):
        self.seen.append(self)
        return self.module(x)


class TestChain:
    def test_what_carries_hooks_is_called_by_itself(self, behind, calls):
        x = maps((2, 5, 9, 7))
        for index in range(len(stage(behind))):
            chain, seen = stage(behind), []
            chain[index].register_forward_hook(lambda *_, seen=seen: seen.append(1))
            agree(chain, x)
            assert len(seen) == 2, "ours and stock's"
            assert calls.pop() is None

    @pytest.mark.parametrize("cls", SUBCLASSED)
    def test_a_subclass_with_a_forward_of_its_own_is_called(self, cls):
        class Own(cls):
            def forward(self, x):
                seen.append(self)
                return super().forward(x)

        chain, seen = rd.nn.Chain(*SUBCLASSED[cls](Own)), []
        chain(maps((2, 5, 9, 7)))
        assert seen == [module for module in chain if isinstance(module, Own)]

    @pytest.mark.parametrize("cls", SUBCLASSED)
    def test_a_wrapper_is_called(self, cls):
        seen = []
        chain = rd.nn.Chain(*SUBCLASSED[cls](lambda *args, **options: Wrapper(cls(*args, **options), seen)))
        chain(maps((2, 5, 9, 7)))
        assert seen == [module for module in chain if isinstance(module, Wrapper)]

    def test_a_slice_is_a_chain(self, calls):
        chain = stage("head")
        assert type(chain[:2]) is rd.nn.Chain
        agree(chain[:2], maps((2, 5, 9, 7)))
        assert calls == [None]

    def test_other_activations_behind_the_block(self, behind, calls):
        chain = stage(behind)
        if behind == "head":
            chain[2] = nn.LeakyReLU(0.1)
        else:
            chain[1].relu = nn.LeakyReLU(0.1)
        agree(chain, maps((2, 5, 9, 7)))
        assert calls == [None]

    def test_any_modules(self):
        chain = rd.nn.Chain(nn.Identity(), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(60, 3), nn.BatchNorm1d(3))
        agree(chain, maps((4, 5, 9, 7)))
        assert rd.nn.Chain()(1) == 1 and rd.nn.Chain(nn.Identity())("x") == "x"

    def test_unknown_policy(self):
        with pytest.raises(ValueError, match="policy: expected one of fast, min, or None for the stock path, got 'fastest'"):
            rd.nn.Chain(nn.ReLU(), policy="fastest")

    def test_prints_and_keys_are_those_of_a_sequential(self):
        modules = [nn.Conv2d(3, 4, 1), nn.ReLU()]
        assert rd.nn.Chain(*modules).state_dict().keys() == nn.Sequential(*modules).state_dict().keys()


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_whole_network_on_a_gpu_agrees_with_the_cpu(channels_last):
    model, x = rd.convert(small_densenet()), images(2, 3, 33, 31)
    expected = steps(copy.deepcopy(model), x)
    ours = steps(model.cuda(), x.cuda().contiguous(memory_format=_format(channels_last)))
    assert_same({name: t.cpu() for name, t in ours.items()}, expected)


class TestMemory:
    """What the product is: these fail where a change loses the saving."""

    @pytest.mark.unpoisoned
    @pytest.mark.parametrize("channels_last", [False, True])
    def test_only_the_buffer_is_kept(self, behind, channels_last):
        chain, x = stage(behind, "min"), maps((4, 5, 33, 32), channels_last)
        saved = rd.memory.saved_bytes(lambda: chain(x))
        assert 0 <= saved - 4 * (5 + 3 * 4) * 33 * 32 * FLOAT <= 8192

    @pytest.mark.unpoisoned
    @pytest.mark.parametrize("channels_last", [False, True])
    def test_one_gradient_of_the_buffer(self, channels_last, monkeypatch):
        """The peak is the buffer, its one gradient, maps of the bottleneck and scratch of a fixed size: no third buffer."""
        monkeypatch.setattr(cpu, "_CACHED", 1)
        block = rd.nn.DenseBlock(6, 64, 4, 8, policy="min")
        chain = rd.nn.Chain(block, rd.nn.Transition(112, 16))
        x = maps((4, 64, 32, 32), channels_last)

        def step():
            chain.zero_grad(set_to_none=True)
            chain(x).sum().backward()

        buffer, bottleneck = 4 * 112 * 1024 * FLOAT, 4 * 32 * 1024 * FLOAT
        assert rd.memory.peak_bytes(step) <= 2 * buffer + 4 * bottleneck + 2**19

    def test_nothing_stays_alive(self, behind):
        chain = stage(behind)
        chain(maps((2, 5, 9, 7)).requires_grad_()).sum().backward()
        gc.collect()
        assert not [o for o in gc.get_objects() if type(o).__name__ == "DenseBlockFunctionBackward"]


class TestNetworks:
    """Stems, transitions and heads of whole networks."""

    def counted(self, monkeypatch):
        calls = []
        for name, of in (("bn_act_pool", "bn_act_pool"), ("transition", "transition"), ("dense_block", "checked_dense_block")):
            call = getattr(functional, of)

            def count(*args, call=call, name=name, **options):
                calls.append(name if options.get("behind") is None else f"{name} and {options['behind'].pool.kind} pool")
                return call(*args, **options)

            monkeypatch.setattr(functional, of, count)
        return calls

    def test_torchvisions_densenet(self, monkeypatch):
        stock, calls = small_densenet(), self.counted(monkeypatch)
        model, x = rd.convert(copy.deepcopy(stock)), images(2, 3, 33, 31)
        assert_same(steps(model, x), steps(stock, x))
        whole = ["bn_act_pool", "dense_block and average pool", "dense_block and global pool"]
        assert calls == whole
        del calls[:]
        assert_same(steps(model.eval(), x), steps(stock.eval(), x))
        assert calls == whole

    def test_our_densenet(self, monkeypatch):
        calls = self.counted(monkeypatch)
        model = rd.models.DenseNet(8, (2, 3), 16, num_classes=5).double()
        x = images(2, 3, 33, 31)
        assert_same(steps(model, x), steps(rd.revert(copy.deepcopy(model)), x))
        assert calls == ["bn_act_pool", "dense_block and average pool", "dense_block and global pool"]

    def test_features_alone(self, monkeypatch):
        stock, calls = small_densenet(), self.counted(monkeypatch)
        model, x = rd.convert(copy.deepcopy(stock)), images(2, 3, 33, 31)
        assert_same(steps(model.features, x), steps(stock.features, x))
        assert calls == ["bn_act_pool", "dense_block and average pool", "dense_block"]

    def test_a_hook_on_the_features_sees_what_it_saw(self, monkeypatch):
        stock, calls = small_densenet(), self.counted(monkeypatch)
        model, x, seen = rd.convert(copy.deepcopy(stock)), images(2, 3, 33, 31), []
        for net in (model, stock):
            net.features.register_forward_hook(lambda _, args, output: seen.append(output.detach()))
            net(x)
        same(*([t] for t in seen))
        assert calls == ["bn_act_pool", "dense_block and average pool", "dense_block"]

    def test_a_densenet_with_its_own_forward(self, monkeypatch):
        DenseNet = import_torchvision().models.DenseNet

        class Scores(DenseNet):
            def forward(self, x):
                return torch.sigmoid(self.features(x).mean((2, 3)))

        torch.manual_seed(0)
        stock, calls = Scores(8, (2, 3), 16, num_classes=5).double(), self.counted(monkeypatch)
        model, x = rd.convert(copy.deepcopy(stock)), images(2, 3, 33, 31)
        assert_same(steps(model, x), steps(stock, x))
        assert calls == ["bn_act_pool", "dense_block and average pool", "dense_block"]
        assert type(model) is Scores

    def test_features_that_were_replaced(self):
        stock = small_densenet()
        model, x = rd.convert(copy.deepcopy(stock)), images(2, 3, 33, 31)
        for net in (model, stock):
            net.features = nn.Sequential(net.features, nn.Identity())
        assert_same(steps(model, x), steps(stock, x))
