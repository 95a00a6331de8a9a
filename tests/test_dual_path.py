"""Dual path stages: agreement with plain PyTorch, memory, statistics, and the rules that keep autograd honest."""

import copy
import re
import warnings

import pytest
import torch
from small_nets import NORMS, assert_same, engine, images, randomise, steps  # noqa: F401
from test_dense_block import POLICIES, backend, policy, same, state  # noqa: F401
from tolerance import assert_within_rule, module_run, torch_runs, true_run
from torch import nn
from torch.utils.checkpoint import checkpoint

import resdense_ext as rd
from resdense_ext import functional, reference
from resdense_ext.functional import Activation
from resdense_ext.nn.engine import why_stock
from resdense_ext.nn.read import read_dual_path_block
from resdense_ext.ops import backend as backends
from resdense_ext.ops import dual_path_stage as op
from resdense_ext.ops import operator
from resdense_ext.ops.units import UNIT, flat_tensors

R, GROWTH, WIDTH, INPUTS = 6, 3, 4, 5


def stage_of(layers=3, policy="alternate", projection=True, dtype=torch.float64, **options):
    """A stage; without a projection one that goes on with ``R`` and ``3 * GROWTH`` channels."""
    torch.manual_seed(0)
    options = dict(groups=2, stride=2 if projection else 1) | options
    blocks = list(rd.nn.DualPathStage(layers + (not projection), INPUTS, WIDTH, R, GROWTH, **options))
    stage = rd.nn.Chain(*(blocks if projection else blocks[1:]), policy=policy and "fast")
    for i, block in enumerate(stage):
        block.policy = POLICIES[i % 2] if policy == "alternate" else policy
    return randomise(stage).to(dtype)


def input_of(stage, sizes=(7, 6), samples=3, channels_last=False):
    channels = stage[0].c1x1_a.bn.num_features
    x = images(samples, channels, *sizes)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.dim()]) if channels_last else x


def halves_of(x, stage, first=None):
    """What a stage takes, of one tensor: that or two, of which the first has ``first`` channels."""
    first = R if stage[0].projection is None else first
    return x if first is None else tuple(x.tensor_split([first], 1))


class Joined(nn.Module):
    """A stage from one tensor to one tensor; its input is split in two where there is a width of the first half."""

    def __init__(self, stage, first=None):
        super().__init__()
        self.stage, self.first = stage, first

    def forward(self, x):
        return torch.cat(self.stage(halves_of(x, self.stage, self.first)), 1)


def stock_of(net):
    return rd.revert(copy.deepcopy(net))


def agree_in_float64(stage, x, first=None):
    net = Joined(stage, first)
    ours = steps(net, x)
    assert_same(ours, steps(stock_of(net), x))
    return ours


def norms_of(module):
    return [m for m in module.modules() if isinstance(m, NORMS)]


@pytest.fixture(params=["one input", "two inputs", "no projection"])
def kind(request):
    """The options of a stage and the channels of the first input."""
    return {"one input": ({}, None), "two inputs": ({}, 2), "no projection": (dict(projection=False), None)}[request.param]


class TestAgreement:
    @pytest.mark.parametrize("channels_last", [False, True])
    def test_kinds(self, backend, policy, kind, channels_last, engine):
        options, first = kind
        stage = stage_of(policy=policy, **options)
        agree_in_float64(stage, input_of(stage, channels_last=channels_last), first)
        assert engine == [[policy == "fast"] * 3], "one node"

    @pytest.mark.parametrize("channels_last", [False, True])
    def test_layout_and_shape_are_stocks(self, kind, channels_last):
        options, first = kind
        stage = stage_of(**options)
        x = halves_of(input_of(stage, channels_last=channels_last), stage, first)
        for ours, stock in zip(stage(x), stock_of(stage)(x)):
            assert (ours.shape, ours.stride(), ours.dtype) == (stock.shape, stock.stride(), stock.dtype)

    @pytest.mark.parametrize("stride", [1, 2])
    @pytest.mark.parametrize("sizes", [(1, 1), (1, 6), (9, 5)], ids=str)
    def test_odd_sizes(self, backend, sizes, stride):
        stage = stage_of(stride=stride)
        agree_in_float64(stage, input_of(stage, sizes, channels_last=True))

    @pytest.mark.parametrize("rank", [1, 3])
    def test_other_dimensions(self, backend, rank):
        stage = stage_of(spatial_dims=rank)
        agree_in_float64(stage, input_of(stage, (5, 4, 3)[:rank], channels_last=rank == 3))

    @pytest.mark.parametrize("activation", ["leaky_relu", "elu", "silu", "identity"])
    def test_activations(self, activation):
        stage = stage_of(activation=activation)
        agree_in_float64(stage, input_of(stage))

    @pytest.mark.parametrize("channels_last", [False, True])
    def test_one_channel_everywhere(self, backend, channels_last):
        stage = rd.nn.Chain(*rd.nn.DualPathStage(3, 1, 1, 1, 1)).double()
        layout = torch.channels_last if channels_last else torch.contiguous_format
        agree_in_float64(stage, images(2, 1, 5, 6).contiguous(memory_format=layout))

    def test_halves_of_two_layouts(self, backend):
        stage = stage_of(projection=False)
        runs = []
        for net in (stage, stock_of(stage)):
            residual, dense = input_of(stage).tensor_split([R], 1)
            halves = residual.contiguous(memory_format=torch.channels_last).requires_grad_(), dense.contiguous().requires_grad_()
            y = net(halves)
            (y[0].square().sum() + y[1].square().sum()).backward()
            runs.append([*y, *(half.grad for half in halves)])
        same(*runs)

    @pytest.mark.parametrize("frozen", ["all", "c1x1_a", "c3x3_b", "c1x1_c", "c1x1_w", "every other", "the last block"])
    def test_frozen_norms_while_parameters_train(self, kind, frozen):
        options, first = kind
        stage = stage_of(**options)
        for i, (name, norm) in enumerate((name, m) for name, m in stage.named_modules() if isinstance(m, NORMS)):
            chosen = {"all": True, "every other": i % 2, "the last block": name.startswith("2.")}
            norm.train(not chosen.get(frozen, frozen in name))
        agree_in_float64(stage, input_of(stage), first)

    def test_training_norms_in_an_eval_stage(self, backend, kind):
        options, first = kind
        stage = stage_of(**options).eval()
        stage[1].c1x1_a.bn.train()
        stage[2].c1x1_c.bn.train()
        agree_in_float64(stage, input_of(stage), first)

    @pytest.mark.parametrize("attributes", [dict(momentum=None), dict(track_running_stats=False), dict(affine=False)], ids=str)
    def test_other_norms(self, kind, attributes):
        options, first = kind
        stage = stage_of(**options)
        for module in list(stage.modules()):
            if hasattr(module, "bn"):
                module.bn = nn.BatchNorm2d(module.bn.num_features, **attributes).double()
        agree_in_float64(stage, input_of(stage), first)

    def test_biases(self, backend, kind):
        options, first = kind
        stage = stage_of(**options)
        for module in stage.modules():
            if isinstance(module, nn.Conv2d):
                module.bias = nn.Parameter(images(module.out_channels))
        agree_in_float64(stage, input_of(stage), first)

    def test_a_first_unit_that_is_no_1x1(self, backend, kind):
        options, first = kind
        stage = stage_of(**options)
        for block in stage:
            block.c1x1_a.conv = nn.Conv2d(block.c1x1_a.bn.num_features, WIDTH, 3, padding=1, bias=False).double()
        agree_in_float64(stage, input_of(stage), first)

    @pytest.mark.parametrize("which", ["", "0.c1x1_a.bn", "1.c1x1_a.conv", "c1x1_w", "2.c3x3_b", "nothing"])
    def test_only_some_gradients(self, kind, which):
        options, first = kind
        stage = stage_of(**options)
        for name, parameter in stage.named_parameters():
            parameter.requires_grad_(which in name)
        for input_grad, used in ((True, 0), (False, 1), (True, 1)):
            runs = []
            for net in (stage, stock_of(stage)):
                x = input_of(stage).requires_grad_(input_grad)
                y = net(halves_of(x, stage, first))[used]
                wanted = [t for t in (x, *net.parameters()) if t.requires_grad]
                # What does not reach the half that is used has no gradient in stock, and a zero one in ours.
                options = dict(allow_unused=True, materialize_grads=True)
                runs.append(list(torch.autograd.grad(y.square().sum(), wanted, **options)) if wanted else [])
            if runs[1]:
                same(*runs)

    def test_the_gradient_that_comes_in_is_not_changed_and_may_be_expanded(self, kind):
        options, first = kind
        stage = stage_of(**options)
        x = input_of(stage).requires_grad_()
        results = []
        for net in (Joined(stage, first), stock_of(Joined(stage, first))):
            y = net(x)
            (grad,) = torch.autograd.grad(y, x, torch.ones((), dtype=y.dtype).expand(y.shape), retain_graph=True)
            upstream = images(*y.shape, seed=2)
            before = upstream.clone()
            results.append((grad, *torch.autograd.grad(y, x, upstream)))
            assert torch.equal(upstream, before)
        same(*results)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_lower_precision(self, backend, dtype):
        net = Joined(stage_of(dtype=torch.float32, stride=1))
        params = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state(net).items()}
        inputs = {"x": input_of(net.stage, (9, 7), channels_last=True).to(dtype)}
        run = module_run(stock_of(net))
        ours = module_run(net)({"x": inputs["x"].clone()}, copy.deepcopy(params))
        assert_within_rule(ours, true_run(run, inputs, params), torch_runs(run, inputs, params), dtype)

    def test_autocast(self):
        net = Joined(stage_of(dtype=torch.float32))
        params, inputs = state(net), {"x": input_of(net.stage, (9, 7)).bfloat16()}
        run = module_run(stock_of(net), torch.bfloat16)
        ours = module_run(net, torch.bfloat16)({"x": inputs["x"].clone()}, copy.deepcopy(params))
        truth = true_run(module_run(stock_of(net)), inputs, params)
        assert_within_rule(ours, truth, torch_runs(run, inputs, params), torch.bfloat16)
        stock = run({"x": inputs["x"].clone()}, copy.deepcopy(params))
        assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in stock.items()}

    def test_autocast_of_wide_halves(self):
        stage = stage_of(projection=False, dtype=torch.float32)
        x, runs = input_of(stage).float(), []
        for net, narrow in ((stage, True), (stock_of(stage), True), (stock_of(stage), False)):
            leaf = x.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
                y = net(halves_of(leaf, net))
            runs.append([*y, *torch.autograd.grad(y[0].sum() + y[1].sum(), leaf)])
        for mine, theirs, truth in zip(*runs):
            assert mine.dtype == theirs.dtype == torch.float32
            assert 0 < (mine - truth).norm() <= 2 * (theirs - truth).norm()

    def test_empty_batch(self, kind):
        options, first = kind
        net = Joined(stage_of(**options), first)
        x = input_of(net.stage, samples=0)
        assert net(x).shape == stock_of(net)(x).shape

    def test_reference_is_the_stock_path(self, kind):
        options, first = kind
        stage = stage_of(**options)
        x = halves_of(input_of(stage), stage, first)
        ours = reference.dual_path_stage(x, described(stage))
        same(list(ours), list(stock_of(stage)(x)))

    def test_a_network(self, backend, policy, engine):
        net = randomise(rd.models.DPN((2, 3), (2, 3), 6, 4, 2, 5, num_classes=4, policy=policy).double())
        x = images(2, 3, 33, 32)
        assert_same(steps(net, x, count=2), steps(stock_of(net), x, count=2))
        assert engine == [[policy == "fast"] * n for n in (2, 3)] * 2


def described(stage):
    return [read_dual_path_block(block.dual_path_modules())[0] for block in stage]


class TestStatistics:
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_without_gradients(self, kind, mode):
        options, first = kind
        net = Joined(stage_of(**options), first)
        stock = stock_of(net)
        with mode():
            same([net(input_of(net.stage))], [stock(input_of(net.stage))])
        same(list(net.buffers()), list(stock.buffers()), 1e-14)
        assert {int(norm.num_batches_tracked) for norm in norms_of(net)} == {1}

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_a_users_checkpoint_counts_as_in_stock(self, use_reentrant):
        net, results = Joined(stage_of()), []
        for module in (net, stock_of(net)):
            x = input_of(net.stage).requires_grad_()
            checkpoint(module, x, use_reentrant=use_reentrant).square().sum().backward()
            results.append([x.grad, *(p.grad for p in module.parameters()), *module.buffers()])
        same(*results)

    def test_eval_leaves_buffers_alone(self, kind):
        options, first = kind
        net = Joined(stage_of(**options), first).eval()
        before = state(net)
        net(input_of(net.stage)).sum().backward()
        assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())


class TestAutograd:
    def check(self, check, kind, activation, **kwargs):
        options, first = kind
        stage = stage_of(2, activation=activation, stride=1, **options)
        blocks = described(stage)
        tensors = flat_tensors(op.units_of(blocks))
        at = [i for i, t in enumerate(tensors) if t is not None and t.requires_grad]
        config = op.DualPathStageConfig.of(blocks, Activation(), [], "reference")

        def run(x, *leaves):
            given = list(tensors)
            for i, leaf in zip(at, leaves):
                given[i] = leaf
            x, again = halves_of(x, stage, first), config.blocks(given)
            return functional.dual_path_stage(x, again, activation=activation, negative_slope=0.2, policy=[True, False])

        x = input_of(stage, (4, 3), samples=2).requires_grad_()
        leaves = [tensors[i].detach().clone().requires_grad_() for i in at]
        assert check(run, (x, *leaves), fast_mode=True, **kwargs)

    @pytest.mark.unpoisoned  # gradcheck itself reads uninitialised memory
    def test_gradcheck(self, backend, kind):
        self.check(torch.autograd.gradcheck, kind, "leaky_relu")

    @pytest.mark.unpoisoned
    def test_gradgradcheck(self):
        self.check(torch.autograd.gradgradcheck, (dict(projection=False), None), "silu")

    def test_create_graph_gives_the_same_gradients(self, kind):
        options, first = kind
        net = Joined(stage_of(**options), first)
        x = input_of(net.stage).requires_grad_()
        wanted = [x, *net.parameters()]
        plain = torch.autograd.grad(net(x).square().sum(), wanted)
        graph = torch.autograd.grad(net(x).square().sum(), wanted, create_graph=True)
        assert all(t.requires_grad for t in graph)
        same(graph, plain)

    @pytest.mark.parametrize("of", ["dense", "view", "detached", "input", "parameter"])
    def test_a_stale_use_raises_and_names_the_stage(self, policy, of):
        stage = stage_of(policy=policy)
        x = input_of(stage).requires_grad_() * 1
        residual, dense = stage(x)
        loss = residual.sum() + dense.sum()
        with torch.no_grad():
            targets = {"dense": dense, "view": dense[:, 1:2], "detached": dense.detach(), "input": x}
            targets.get(of, stage[0].c1x1_a.conv.weight).mul_(2)
        with pytest.raises(RuntimeError, match="dual_path_stage: its output, or a parameter of it, was changed in place"):
            loss.backward()

    @pytest.mark.parametrize("batch_stats", [True, False])
    def test_opcheck(self, kind, batch_stats):
        options, first = kind
        stage = stage_of(2, dtype=torch.float32, **options).train(batch_stats)
        blocks = described(stage)
        tensors = [None if t is None else t.detach() for t in flat_tensors(op.units_of(blocks))]
        x = input_of(stage, (5, 4), samples=2).float()
        x = halves_of(x, stage, first)
        xs = list(x) if isinstance(x, tuple) else [x]
        chosen = backends.choose(xs[0], xs[0].dtype)
        config = op.DualPathStageConfig.of(blocks, Activation(), ["fast", "min"], chosen.name)
        utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(torch.ops.resdense.dual_path_stage.default, (xs, tensors, *config), test_utils=utilities)
        residual, dense, stats, kept = torch.ops.resdense.dual_path_stage(xs, tensors, *config)
        present = [True] * len(xs) + [tensors[at + i] is not None for at in range(0, len(tensors), UNIT) for i in (0, 1, 4, 5)]
        for needs in (present, [False] * len(present)):
            for grads in ((torch.randn_like(residual), torch.randn_like(dense)), (None, torch.randn_like(dense))):
                arguments = (*grads, dense, xs, tensors, *config, stats, kept, needs)
                torch.library.opcheck(torch.ops.resdense.dual_path_stage_backward.default, arguments, test_utils=utilities)


FLOAT = 4


def saved_channels(layers, policy):
    """Channels beside the input's of a stage of stride 1: between the blocks, in the buffer, and the inner maps."""
    inner = 2 * WIDTH * layers if policy == "fast" else 0
    return (layers - 1) * R + (2 + layers) * GROWTH + inner


def statistics(layers, inputs):
    """Numbers of a stage's statistics: two a channel, of every map once."""
    return 2 * (inputs + (layers - 1) * R + (2 + layers) * GROWTH + layers * 2 * WIDTH)


class TestMemory:
    """What the product is: these fail where a change loses the saving."""

    @pytest.mark.parametrize(("layers", "channels_last"), [(1, True), (2, False), (5, True)])
    def test_bytes(self, policy, layers, channels_last):
        stage = stage_of(layers, policy, stride=1, dtype=torch.float32)
        x = input_of(stage, (20, 18), 2, channels_last).float()
        kept = (INPUTS + saved_channels(layers, policy)) * 2 * 20 * 18 + statistics(layers, INPUTS)
        assert rd.memory.saved_bytes(lambda: stage(x)) == FLOAT * kept

    def test_bytes_by_block(self):
        stage = stage_of(4, "min", stride=1, dtype=torch.float32)
        stage[1].policy = stage[2].policy = "fast"
        x = input_of(stage, (20, 18), 2).float()
        kept = INPUTS + saved_channels(4, "min") + 2 * 2 * WIDTH
        assert rd.memory.saved_bytes(lambda: stage(x)) == FLOAT * (kept * 2 * 20 * 18 + statistics(4, INPUTS))

    def test_without_a_projection_the_dense_input_is_in_the_buffer(self, policy):
        stage = stage_of(2, policy, projection=False, dtype=torch.float32)
        halves = tuple(t.contiguous() for t in input_of(stage, (20, 18), 2).float().tensor_split([R], 1))
        dense = halves[1].shape[1] + 2 * GROWTH
        inner = 2 * WIDTH * 2 if policy == "fast" else 0
        numbers = 2 * (2 * R + dense + 2 * 2 * WIDTH)
        kept = (2 * R + dense + inner) * 2 * 20 * 18 + numbers
        assert rd.memory.saved_bytes(lambda: stage(halves)) == FLOAT * kept

    def test_a_network_keeps_its_blocks_outputs(self, policy):
        """Besides the image, the stem's output and a byte a maximum; every storage once, whoever reads it."""
        layers, growths = (3, 4), (GROWTH, 2 * GROWTH)
        net = rd.models.DPN(layers, growths, 2 * R, 2 * WIDTH, 2, 8, num_classes=4, policy=policy)
        x = torch.randn(2, 3, 64, 64)
        stem, positions = 2 * 32**2 * 8, [2 * 16**2, 2 * 8**2]
        outputs = inner = 0
        for i, (depth, growth, count) in enumerate(zip(layers, growths, positions)):
            outputs += count * (depth * (2 * R << i) + (2 + depth) * growth)
            # A strided block's first map has its input's size.
            inner += 2 * (2 * WIDTH << i) * depth * count + (3 * (2 * WIDTH << i) * count if i else 0)
        pooled = positions[0] * 8
        maps = x.numel() + stem + pooled + outputs + (inner if policy == "fast" else 0)
        saved = rd.memory.saved_bytes(lambda: net(x))
        least = FLOAT * maps + pooled  # a byte a maximum
        assert least <= saved <= 1.1 * least, "the rest are statistics and the head's vectors"
        assert rd.memory.saved_bytes(lambda: stock_of(net)(x)) > {"fast": 1.6, "min": 2.5}[policy] * saved

    def test_peak(self, policy):
        """In backward beside what is kept: a gradient of the buffer and of one residual half, coming in and our own, and the
        scratch of a block."""
        layers = 12
        stage = stage_of(layers, policy, stride=1, dtype=torch.float32)
        x = input_of(stage, (64, 64), 4, True).float()

        def step():
            stage.zero_grad(set_to_none=True)
            residual, dense = stage(x)
            (residual.mean() + dense.mean()).backward()

        scratch = 2 * ((2 + layers) * GROWTH + R) + 9 * WIDTH + R
        most = FLOAT * (saved_channels(layers, policy) + scratch) * 4 * 64 * 64
        assert rd.memory.peak_bytes(step) <= 1.05 * most

    def test_nothing_without_gradients(self, kind):
        options, first = kind
        net = Joined(stage_of(**options), first).requires_grad_(False)
        assert rd.memory.saved_bytes(lambda: net(input_of(net.stage))) == 0

    @pytest.mark.parametrize("replayed", [True, False])
    @pytest.mark.parametrize("channels_last", [False, True])
    def test_slices_are_not_copied(self, channels_last, replayed, monkeypatch):
        """The two halves as slices of one map, as a block called by itself returns them."""
        if not replayed:
            monkeypatch.setattr(operator, "may_replay", lambda names: False)
        formatted = dict(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        stage = stage_of(2, "min", projection=False, dtype=torch.float32)
        x = images(2, R + 3 * GROWTH, 48, 40).float().contiguous(**formatted)
        slices = [half.requires_grad_() for half in x.split([R, 3 * GROWTH], 1)]
        wholes = [half.detach().contiguous(**formatted).requires_grad_() for half in slices]

        def step(halves):
            stage.zero_grad(set_to_none=True)
            torch.autograd.grad(sum(half.square().sum() for half in stage(tuple(halves))), halves)

        ours, expected = (rd.memory.peak_bytes(lambda: step(halves), warmup=2) for halves in (slices, wholes))
        assert ours <= expected

    def test_inference_lets_go_of_every_block(self):
        """The peak grows by the buffer, and by the tile of it that is in the cache."""
        x, peaks = images(4, INPUTS, 64, 64).float(), []
        for layers in (12, 24):
            stage = stage_of(layers, stride=1, dtype=torch.float32).eval()
            with torch.no_grad():
                peaks.append(rd.memory.peak_bytes(lambda: stage(x)))
        assert peaks[1] - peaks[0] <= 1.3 * FLOAT * 12 * GROWTH * 4 * 64 * 64


class TestModules:
    def test_blocks_by_themselves(self, engine):
        stage = stage_of()
        separate = nn.Sequential(*stage)
        x = input_of(stage)
        ours = steps(separate, x, call=lambda net, x: torch.cat(net(x), 1))
        assert_same(ours, steps(stock_of(separate), x, call=lambda net, x: torch.cat(net(x), 1)))
        assert engine == [[True], [False], [True]]

    def test_a_chain_goes_on_behind_what_it_cannot_run(self, engine):
        stage, heard = stage_of(5, "fast"), []
        stage[2].c3x3_b.register_forward_hook(lambda *_: heard.append("inner"))
        with pytest.warns(UserWarning, match="a DualPathBlock runs its stock path: c3x3_b carries hooks") as said:
            ours = steps(Joined(stage), input_of(stage))
        assert len(said) == 1 and heard == ["inner"]
        assert engine == [[True] * 2] * 2
        assert_same(ours, steps(stock_of(Joined(stage_of(5))), input_of(stage)))

    def test_the_stock_path_is_said_once(self, policy):
        stage = stage_of(1, policy)
        stage[0].c1x1_c.relu = nn.GELU()
        with pytest.warns(UserWarning, match="a DualPathBlock runs its stock path: c1x1_c.relu is GELU"):
            stage(input_of(stage))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            stage(input_of(stage))

    def test_a_blocks_own_hooks_are_called(self, engine):
        stage, heard = stage_of(4, "fast"), []
        stage[2].register_forward_hook(lambda block, inputs, output: heard.append(output))
        stage(input_of(stage))
        assert len(heard) == 1 and engine == [[True] * 2, [True], [True]]

    def test_a_projections_norm_in_another_block(self, engine):
        stage = rd.nn.DualPathStage(3, WIDTH, WIDTH, R, GROWTH)
        stage[1].c3x3_b.bn = stage[0].projection.bn
        stage(images(2, WIDTH, 5, 6).float())
        assert engine == [[True], [True] * 2]

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda block: setattr(block.c1x1_c.conv, "groups", 3), "c1x1_c.conv has 3 groups"),
            (lambda block: setattr(block.c3x3_b, "relu", nn.ELU()), r"the units' activations differ: \['elu', 'relu'\]"),
            (lambda block: setattr(block.c1x1_c, "bn", block.c3x3_b.bn), "c3x3_b.bn serves twice"),
            (lambda block: setattr(block.c3x3_b, "bn", nn.InstanceNorm2d(WIDTH)), "c3x3_b.bn is InstanceNorm2d"),
            (lambda block: block.c1x1_a.add_module("more", nn.Identity()), "c1x1_a holds bn, relu, conv, more"),
        ],
    )
    def test_what_is_not_supported_is_named(self, change, reason):
        block = stage_of(1)[0]
        assert why_stock(block) is None
        change(block)
        assert re.search(reason, why_stock(block))

    def test_a_policy_of_none_is_plain_pytorch(self, engine):
        stage = stage_of(policy=None)
        stage(input_of(stage))
        assert engine == []

    def test_convert_and_revert(self, engine):
        net = rd.models.DPN((2, 1), (2, 3), 8, 4, 2, 6, num_classes=5, policy=None)
        x = torch.randn(2, 3, 32, 32)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            rd.convert(net, "min")
        net(x)
        assert engine == [[False] * 2, [False]]
        rd.revert(net)
        net(x)
        assert len(engine) == 2

    def test_the_report(self, policy):
        net = rd.models.DPN((2, 1), (2, 3), 8, 4, 2, 6, num_classes=5, policy=policy)
        x = torch.randn(2, 3, 32, 32)
        report = rd.report(net, x)
        first, second, other, rest = report.rows
        assert [(row.path, row.layers, row.policy, row.note) for row in report.rows[:3]] == [
            (f"features.{name}", 3, policy, "") for name in ("conv2_1", "conv2_2", "conv3_1")
        ]
        assert second.saved_bytes == 0 < second.stock_saved_bytes, "it runs in the node of the block before it"
        assert first.saved_bytes < first.stock_saved_bytes + second.stock_saved_bytes
        assert other.saved_bytes < other.stock_saved_bytes and rest.saved_bytes < rest.stock_saved_bytes
        assert report.saved_bytes == rd.memory.saved_bytes(lambda: net(x))

    @pytest.mark.parametrize("share", [0.4, 1.0])
    def test_a_budget(self, share):
        net = rd.models.DPN((2, 3), (2, 3), 8, 4, 2, 6, num_classes=5)
        x = torch.randn(2, 3, 64, 64)
        least, most = (rd.memory.saved_bytes(lambda: rd.convert(net, policy)(x)) for policy in ("min", "fast"))
        budget = int(least + share * (most - least))
        rd.convert(net, memory_budget=budget, example_input=x)
        plan = rd.report(net, x).plan
        assert rd.memory.saved_bytes(lambda: net(x)) == plan.predicted_bytes <= budget
        assert plan.bottlenecks == 5 and plan.kept == sum(block.policy == "fast" for block in net.features[2:-1])
        assert (plan.kept == 5) == (share == 1.0) and plan.kept > 0
        assert (plan.recomputed_flops == 0) == (share == 1.0)

    def test_a_budget_for_what_runs_its_stock_path(self):
        net = rd.models.DPN((2, 3), (2, 3), 8, 4, 2, 6, num_classes=5)
        net.features.conv3_2.c3x3_b.register_forward_hook(lambda *_: None)
        x = torch.randn(2, 3, 64, 64)
        with pytest.warns(UserWarning, match="c3x3_b carries hooks"):
            rd.convert(net, memory_budget="1GiB", example_input=x)
        plan = rd.report(net, x).plan
        assert plan.bottlenecks == plan.kept == 4
        assert rd.memory.saved_bytes(lambda: net(x)) == plan.predicted_bytes


HALF = torch.zeros(3, R, 7, 6)


class TestErrors:
    @pytest.mark.parametrize(
        ("x", "error", "message"),
        [
            (HALF, TypeError, r"x: expected \(residual, dense\) in front of a block without projection, got Tensor"),
            ([HALF] * 2, TypeError, r"x: expected .*\(residual, dense\).*, got list"),
            ((HALF,) * 3, TypeError, r"x: expected \(residual, dense\), got \(Tensor, Tensor, Tensor\)"),
            ((torch.zeros(3, 6), torch.zeros(3, 6)), ValueError, r"x\[0\]: expected 3, 4 or 5 dimensions .* got 2"),
            ((HALF, HALF.long()), TypeError, r"x\[1\]: expected float32, float64, bfloat16 or float16"),
            ((HALF, torch.zeros(3, 6, 7, 5)), ValueError, r"x\[1\]: expected the samples and the spatial sizes"),
            ((HALF, HALF.double()), TypeError, r"x\[1\]: expected dtype torch.float32"),
            ((torch.zeros(3, 7, 7, 6), HALF), ValueError, r"blocks\[0\].residual_channels: expected 7, .* got 6"),
            ((HALF, torch.zeros(3, 7, 7, 6)), ValueError, r"units\[0\].norm.weight: expected shape \(13,\)"),
            ((HALF.double(), torch.zeros(3, 9, 7, 6).double()), TypeError, "expected dtype torch.float64"),
            ((torch.zeros(1, 6, 1, 1), torch.zeros(1, 9, 1, 1)), ValueError, "more than 1 value per channel when training"),
        ],
        ids=lambda value: None,
    )  # fmt: skip
    def test_bad_input_changes_nothing(self, x, error, message):
        stage = stage_of(2, projection=False, dtype=torch.float32)
        before = state(stage)
        with pytest.raises(error, match=message):
            functional.dual_path_stage(x, described(stage))
        assert all(torch.equal(before[name], t) for name, t in stage.state_dict().items())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda blocks: [], "blocks: expected one or more, got 0"),
            (lambda blocks: [blocks[0], blocks[0]], r"blocks\[1\].projection: expected None in a block that is not the first"),
            (lambda blocks: [blocks[0]._replace(units=blocks[0].units[:1])], r"blocks\[0\].units: expected two or more, got 1"),
            (lambda blocks: [blocks[0]._replace(residual_channels=9)], r"units\[2\].conv.weight: .* residual_channels = 9"),
            (lambda blocks: [blocks[0]._replace(residual_channels=0)], "which are at least 1"),
            (lambda blocks: [blocks[0], blocks[1]._replace(residual_channels=5)], r"blocks\[1\].residual_channels: expected 6"),
            (lambda blocks: [_changed(blocks[0], 1, norm=None)], r"blocks\[0\].units\[1\].norm: expected a batch norm, got None"),
            (lambda blocks: [_changed(blocks[0], 2, groups=3)], r"blocks\[0\].units\[2\].conv.groups: expected 1 .*, got 3"),
            (lambda blocks: [_changed(blocks[0], 1, stride=(1, 1))], r"units\[2\].conv: expected an output of the halves'"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )  # fmt: skip
    def test_blocks(self, change, message):
        stage = stage_of(2, dtype=torch.float32)
        with pytest.raises(ValueError, match=message):
            functional.dual_path_stage(input_of(stage).float(), change(described(stage)))
        assert {int(norm.num_batches_tracked) for norm in norms_of(stage)} == {0}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(policy="tiny"), "policy: expected one of fast, min, .* got 'tiny'"),
            (dict(policy=[True]), "policy: expected 2 bools, .* got 1"),
            (dict(activation="gelu"), "activation: expected relu, .* got 'gelu'"),
        ],
    )
    def test_options(self, options, message):
        stage = stage_of(2, dtype=torch.float32)
        with pytest.raises(ValueError, match=message):
            functional.dual_path_stage(input_of(stage).float(), described(stage), **options)

    def test_a_modules_bad_policy(self):
        for stage in (stage_of(1), stage_of(2)):
            stage[0].policy = "tiny"
            with pytest.raises(ValueError, match="policy: expected one of fast, min, .* got 'tiny'"):
                stage(input_of(stage))


def _changed(block, index, **changes):
    """The block with other fields of one unit, or of its convolution."""
    units = list(block.units)
    unit = units[index]
    of_unit = {name: value for name, value in changes.items() if name in unit._fields}
    of_conv = {name: value for name, value in changes.items() if name in unit.conv._fields}
    units[index] = unit._replace(**of_unit)._replace(conv=unit.conv._replace(**of_conv))
    return block._replace(units=tuple(units))


def test_deterministic_mode_repeats_bitwise(backend, policy):
    net = Joined(stage_of(policy=policy, dtype=torch.float32))
    torch.use_deterministic_algorithms(True)
    try:
        runs = [module_run(net)({"x": input_of(net.stage, (17, 13)).float()}, state(net)) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    for other in runs[1:]:
        assert all(torch.equal(t, other[name]) for name, t in runs[0].items())


@pytest.mark.gpu
def test_agrees_with_the_cpu_in_float64(policy, kind):
    options, first = kind
    net = Joined(stage_of(policy=policy, **options), first)
    x = input_of(net.stage, channels_last=True)
    expected = module_run(stock_of(net))({"x": x.clone()}, state(net))
    ours = module_run(net.cuda())({"x": x.cuda()}, {name: t.cuda() for name, t in state(net).items()})
    same([ours[name].cpu() for name in expected], list(expected.values()))
