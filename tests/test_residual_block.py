"""The residual block: agreement with plain PyTorch, memory, statistics, and the rules that keep autograd honest."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from stock import import_torchvision
from small_nets import assert_same
from test_dense_block import BACKENDS, POLICIES, _format, backend, maps, policy, same, state  # noqa: F401
from tolerance import assert_within_rule, module_run, torch_runs, true_run
from torch import nn
from torch.utils.checkpoint import checkpoint

import resdense_ext as rd
from resdense_ext import functional, reference
from resdense_ext.functional import Activation, BatchNorm, Conv, Pool, ResidualBlock, Shortcut, Unit
from resdense_ext.ops import backend as backends
from resdense_ext.ops import residual_maps as op
from resdense_ext.ops.units import flat_tensors

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
ACTIVATIONS = {
    "relu": nn.ReLU(),
    "leaky_relu": nn.LeakyReLU(0.2),
    "elu": nn.ELU(),
    "silu": nn.SiLU(),
    "identity": nn.Identity(),
}


class Block(nn.Module):
    """A residual block of any form: by the functional call where it has a ``policy``, else in plain PyTorch.

    ``widths`` are the channels from the input to the output, ``kernels`` a convolution's each; the first one that is no 1x1 has
    the stride, the dilation and the groups. ``pool``, the options of an average, stands in front of the projection.
    """

    def __init__(
        self, widths, kernels, *, pre=False, projection=None, stride=1, dilation=1, groups=1, bias=False, rank=2,
        activation="relu", final=None, policy=None, pool=None,
    ):  # fmt: skip
        super().__init__()
        torch.manual_seed(0)
        conv, norm = CONVS[rank - 1], NORMS[rank - 1]
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        special = next((i for i, kernel in enumerate(kernels) if kernel > 1), 0)
        for i, kernel in enumerate(kernels):
            options = dict(stride=stride, dilation=dilation, groups=groups) if i == special else {}
            padding = (kernel - 1) // 2 * options.get("dilation", 1)
            self.convs.append(conv(widths[i], widths[i + 1], kernel, padding=padding, bias=bias, **options))
            self.norms.append(norm(widths[i if pre else i + 1]))
        self.pool = pool and POOLS[rank - 1](**pool)
        self.projection = projection and conv(widths[0], widths[-1], 1, stride=1 if pool else stride, bias=bias)
        self.projection_norm = norm(widths[-1]) if projection == "normed" else None
        self.pre, self.activated, self.policy = pre, projection == "activated", policy
        self.activation = activation
        self.final = final or ("identity" if pre else activation)
        for module in self.modules():
            if isinstance(module, NORMS):
                nn.init.normal_(module.weight, 1.0, 0.3), nn.init.normal_(module.bias, 0.0, 0.3)
                nn.init.normal_(module.running_mean, 0.0, 0.3), nn.init.uniform_(module.running_var, 0.5, 1.5)

    def forward(self, x):
        if self.policy is not None:
            names = dict(activation=self.activation, final_activation=self.final, negative_slope=0.2)
            return functional.residual_block(x, self.described(), policy=self.policy, **names)
        act, y, first = ACTIVATIONS[self.activation], x, None
        for norm, conv in zip(self.norms, self.convs):
            if self.pre:
                first = act(norm(y)) if first is None else first
                y = conv(first if y is x else act(norm(y)))
            else:
                y = norm(conv(y if y is x else act(y)))
        pooled = x if self.pool is None else self.pool(x)
        shortcut = x if self.projection is None else self.projection(first if self.activated else pooled)
        shortcut = shortcut if self.projection_norm is None else self.projection_norm(shortcut)
        return ACTIVATIONS[self.final](y + shortcut)

    def described(self):
        norms = [described_norm(norm) for norm in self.norms]
        convs = [described_conv(conv) for conv in self.convs]
        end = None if self.pre else norms.pop()
        units = tuple(map(Unit, norms if self.pre else [None, *norms], convs))
        if self.projection is None:
            return ResidualBlock(units, end)
        norm = None if self.projection_norm is None else described_norm(self.projection_norm)
        pool = None if self.pool is None else described_pool(self.pool, self.projection.weight.dim() - 2)
        return ResidualBlock(units, end, Shortcut(described_conv(self.projection), norm, self.activated, pool))


def described_pool(m, rank):
    sizes = (n if isinstance(n, tuple) else (n,) * rank for n in (m.kernel_size, m.stride, m.padding))
    return Pool("average", *sizes, m.ceil_mode)


def described_norm(m):
    tensors = (m.weight, m.bias, m.running_mean, m.running_var)
    momentum = m.momentum if m.training else None
    return BatchNorm(*tensors, m.training, momentum, m.eps, m.num_batches_tracked if m.training else None)


def described_conv(m):
    return Conv(m.weight, m.bias, m.padding, m.dilation, m.groups, m.stride)


CEILED = dict(kernel_size=2, stride=2, ceil_mode=True, count_include_pad=False)
BLOCKS = {
    "basic": dict(widths=(6, 6, 6), kernels=(3, 3)),
    "basic down": dict(widths=(4, 8, 8), kernels=(3, 3), stride=2, projection="normed"),
    "bottleneck": dict(widths=(8, 3, 4, 8), kernels=(1, 3, 1)),
    "bottleneck down": dict(widths=(8, 4, 4, 16), kernels=(1, 3, 1), stride=2, projection="normed"),
    "grouped": dict(widths=(8, 6, 6, 8), kernels=(1, 3, 1), groups=3, dilation=2),
    "stride first": dict(widths=(4, 4, 8), kernels=(1, 1), stride=2, projection="normed", bias=True),
    "projection alone": dict(widths=(6, 4, 8), kernels=(3, 1), projection="plain", bias=True),
    "pooled": dict(widths=(4, 8, 8), kernels=(3, 3), stride=2, projection="normed", pool=CEILED),
    "one convolution": dict(widths=(6, 6), kernels=(3,)),
    "pre": dict(widths=(6, 6, 6), kernels=(3, 3), pre=True),
    "pre bottleneck": dict(widths=(8, 3, 4, 8), kernels=(1, 3, 1), pre=True, bias=True),
    "pre down": dict(widths=(6, 8, 8), kernels=(3, 3), pre=True, stride=2, projection="plain"),
    "pre activated": dict(widths=(6, 4, 4, 12), kernels=(1, 3, 1), pre=True, stride=2, projection="activated"),
    "pre one": dict(widths=(6, 6), kernels=(1,), pre=True, final="relu"),
}


@pytest.fixture(params=BLOCKS)
def options(request):
    return BLOCKS[request.param]


def input_of(block, sizes=(7, 6), channels_last=False, samples=3):
    return maps((samples, block.convs[0].in_channels, *sizes), channels_last)


def stock_of(block):
    stock = copy.deepcopy(block)
    stock.policy = None
    return stock


def agree_in_float64(block, x, tolerance=1e-12):
    params, inputs = state(block.double()), {"x": x.double()}
    stock, ours = (module_run(b)({"x": inputs["x"].clone()}, copy.deepcopy(params)) for b in (stock_of(block), block))
    assert ours["output"].stride() == stock["output"].stride()
    assert ours.keys() == stock.keys()
    same([ours[name] for name in stock], list(stock.values()), tolerance)
    return ours


class TestAgreement:
    @pytest.mark.parametrize("channels_last", [False, True])
    def test_forms(self, backend, policy, options, channels_last):
        block = Block(**options, policy=policy)
        agree_in_float64(block, input_of(block, channels_last=channels_last))

    @pytest.mark.parametrize("sizes", [(1, 1), (1, 6), (9, 5)], ids=str)
    @pytest.mark.parametrize("name", ["bottleneck down", "pre activated", "pooled"])
    def test_odd_sizes(self, backend, policy, name, sizes):
        block = Block(**BLOCKS[name], policy=policy)
        agree_in_float64(block, input_of(block, sizes, True))

    @pytest.mark.parametrize("rank", [1, 3])
    @pytest.mark.parametrize("name", ["bottleneck down", "pre", "pooled"])
    def test_other_dimensions(self, backend, policy, name, rank):
        block = Block(**BLOCKS[name], rank=rank, policy=policy)
        agree_in_float64(block, input_of(block, (5, 4, 3)[:rank]))

    @pytest.mark.parametrize(
        "pool",
        [
            dict(kernel_size=2),
            dict(kernel_size=(2, 3), stride=2, padding=(0, 1)),
            dict(kernel_size=3, stride=2, padding=1, ceil_mode=True),
            dict(kernel_size=(1, 2), stride=2, ceil_mode=True),
        ],
        ids=str,
    )
    def test_other_pools(self, backend, policy, pool):
        """Of whole windows, of those that overlap and pad, and of one that reaches behind the map."""
        block = Block(**BLOCKS["bottleneck down"] | dict(pool=pool), policy=policy)
        sizes = (8, 6) if pool == dict(kernel_size=2) else (8, 7) if isinstance(pool["kernel_size"], tuple) else (7, 9)
        agree_in_float64(block, input_of(block, sizes))

    def test_a_pool_without_a_norm_behind_a_norm_and_in_front_of_a_stride(self, backend, policy):
        """None of them in a network that we know; the operator takes them all."""
        pool = dict(kernel_size=3, stride=1, padding=1)
        block = Block((6, 8, 8), (3, 3), pre=True, stride=2, projection="plain", pool=pool, policy=policy)
        block.projection.stride = (2, 2)
        agree_in_float64(block, input_of(block))

    @pytest.mark.parametrize("name", ["bottleneck", "basic down", "pre"])
    @pytest.mark.parametrize("activation", ["leaky_relu", "elu", "silu", "identity"])
    def test_activations(self, policy, name, activation):
        block = Block(**BLOCKS[name], activation=activation, policy=policy)
        agree_in_float64(block, input_of(block))

    @pytest.mark.parametrize("final", ["identity", "silu", "elu"])
    def test_another_final_activation(self, backend, policy, final):
        block = Block(**BLOCKS["bottleneck"], final=final, policy=policy)
        agree_in_float64(block, input_of(block))

    @pytest.mark.parametrize("which", ["all", "norms.1"])
    def test_frozen_norms_while_parameters_train(self, policy, options, which):
        block = Block(**options, policy=policy)
        for name, module in block.named_modules():
            if isinstance(module, NORMS) and (which == "all" or name.startswith(which)):
                module.eval()
        agree_in_float64(block, input_of(block))

    @pytest.mark.parametrize("name", ["basic down", "stride first", "grouped", "pooled"])
    def test_frozen_norms_of_weight_zero(self, backend, policy, name):
        """The gradient of such a weight, as of a residual branch that begins with nothing, is there all the same."""
        block = Block(**BLOCKS[name], policy=policy).eval()
        nn.init.zeros_(block.norms[-1].weight)
        agree_in_float64(block, input_of(block))

    @pytest.mark.parametrize("name", ["bottleneck down", "pre activated", "pooled"])
    @pytest.mark.parametrize("which", ["weight", "convs.0", "norms.1", "convs.1", "projection", "nothing"])
    @pytest.mark.parametrize("input_grad", [True, False])
    @pytest.mark.parametrize("training", [True, False])
    def test_only_some_gradients(self, policy, name, which, input_grad, training):
        block = Block(**BLOCKS[name], policy=policy).double().train(training)
        for path, parameter in block.named_parameters():
            parameter.requires_grad_(which in path)
        results = []
        for net in (block, stock_of(block)):
            x = input_of(block).double().requires_grad_(input_grad)
            y = net(x)
            if y.requires_grad:
                y.square().sum().backward()
            results.append([x.grad, *(p.grad for p in net.parameters())])
        if any(t is not None for t in results[1]):
            same(*results)

    @pytest.mark.parametrize("channels_last", [False, True])
    @pytest.mark.parametrize("name", ["bottleneck", "basic down", "pre activated", "pooled"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("training", [True, False])
    def test_lower_precision(self, backend, policy, name, dtype, channels_last, training):
        block = Block(**BLOCKS[name], policy=policy).train(training)
        params = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state(block).items()}
        inputs = {"x": input_of(block, (9, 7)).to(dtype)}
        run = module_run(stock_of(block))
        ours = module_run(block)({"x": inputs["x"].contiguous(memory_format=_format(channels_last))}, copy.deepcopy(params))
        assert_within_rule(ours, true_run(run, inputs, params), torch_runs(run, inputs, params), dtype)

    @pytest.mark.parametrize("name", ["bottleneck", "basic down", "pre", "pooled"])
    @pytest.mark.parametrize("training", [True, False])
    def test_autocast(self, policy, name, training):
        block = Block(**BLOCKS[name], policy=policy).train(training)
        params, inputs = state(block), {"x": input_of(block, (9, 7)).bfloat16()}
        run = module_run(stock_of(block), torch.bfloat16)
        ours = module_run(block, torch.bfloat16)({"x": inputs["x"].clone()}, copy.deepcopy(params))
        truth = true_run(module_run(stock_of(block)), inputs, params)
        assert_within_rule(ours, truth, torch_runs(run, inputs, params), torch.bfloat16)
        stock = run({"x": inputs["x"].clone()}, copy.deepcopy(params))
        assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in stock.items()}

    def test_a_mean_of_a_thousand_deviations(self, backend, policy):
        block = Block(**BLOCKS["pre"], policy=policy)
        params, inputs = state(block), {"x": input_of(block) + 1000 * torch.arange(1.0, 7).view(1, 6, 1, 1)}
        run = module_run(stock_of(block))
        ours = module_run(block)({"x": inputs["x"].clone()}, copy.deepcopy(params))
        assert_within_rule(ours, true_run(run, inputs, params), torch_runs(run, inputs, params), torch.float32)

    @pytest.mark.parametrize("channels_last", [False, True])
    def test_strided_input_and_expanded_gradient(self, policy, options, channels_last):
        block = Block(**options, policy=policy).double()
        wide = maps((3, 16, 14, 6), channels_last).double()
        C = block.convs[0].in_channels
        for view in (
            wide[:, 1 : C + 1],
            wide[1:, :C, :3, :1],
            wide[:, :C, ::2],
            wide[:, 1 : C + 1, 7:].transpose(2, 3),
            wide[:1, :C].expand(3, C, 14, 6),
            wide[:, :1].expand(3, C, 14, 6),
        ):
            results = []
            for net in (block, stock_of(block)):
                x = view.detach().requires_grad_()
                y = net(x)
                y.backward(torch.ones((), dtype=y.dtype).expand(y.shape))
                results.append((y.detach(), x.grad))
            same(*results)

    @pytest.mark.parametrize("channels_last", [False, True])
    @pytest.mark.parametrize("rank", [2, 3])
    def test_a_contiguous_input(self, backend, policy, options, rank, channels_last):
        """Then weights say what the output's layout is."""
        formatted = {2: torch.channels_last, 3: torch.channels_last_3d}[rank] if channels_last else torch.contiguous_format
        block = Block(**options, policy=policy, rank=rank).to(memory_format=formatted)
        x = input_of(block, (7, 6, 5)[:rank])
        assert block(x).stride() == stock_of(block)(x).stride()
        self.same_gradients(block.double(), x.double())

    @pytest.mark.parametrize("channels_last", [False, True])
    def test_a_volume_of_one_channel(self, backend, policy, channels_last):
        """Of which no layout can be told."""
        formatted = torch.channels_last_3d if channels_last else torch.contiguous_format
        block = Block((1, 4, 4), (3, 3), projection="normed", policy=policy, rank=3).to(memory_format=formatted)
        x = input_of(block, (7, 6, 5))
        assert block(x).stride() == stock_of(block)(x).stride()
        self.same_gradients(block.double(), x.double())

    def same_gradients(self, block, x):
        results = []
        for net in (block, stock_of(block)):
            given = x.clone().requires_grad_()
            y = net(given)
            results.append([y.detach(), *torch.autograd.grad(y.square().sum(), [given, *net.parameters()])])
        same(*results)

    def test_the_gradient_that_comes_in_is_not_changed(self, policy, options):
        block = Block(**options, policy=policy)
        y = block(input_of(block).requires_grad_())
        grad = torch.randn_like(y)
        before = grad.clone()
        y.backward(grad)
        assert torch.equal(grad, before)

    def test_empty_batch(self, policy, options):
        block = Block(**options, policy=policy)
        x = input_of(block, samples=0)
        assert block(x).shape == stock_of(block)(x).shape

    @pytest.mark.parametrize("kind", ["BasicBlock", "Bottleneck"])
    def test_reference_is_torchvisions_block(self, kind):
        torch.manual_seed(0)
        stock = getattr(import_torchvision().models.resnet, kind)
        down = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
        stock = stock(8, 16 // stock.expansion, 2, down).double()
        convs = [getattr(stock, f"conv{i}") for i in (1, 2, 3) if hasattr(stock, f"conv{i}")]
        norms = [getattr(stock, f"bn{i}") for i in (1, 2, 3) if hasattr(stock, f"bn{i}")]
        *inner, end = map(described_norm, norms)
        units = tuple(map(Unit, [None, *inner], map(described_conv, convs)))
        block = ResidualBlock(units, end, Shortcut(described_conv(down[0]), described_norm(down[1])))
        x = maps((2, 8, 9, 7)).double()
        assert_same({"output": reference.residual_block(x, block)}, {"output": stock(x)})


class TestStatistics:
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_without_gradients(self, policy, options, mode):
        block = Block(**options, policy=policy).double()
        stock = stock_of(block)
        with mode():
            same([block(input_of(block).double())], [stock(input_of(block).double())])
        same(list(block.buffers()), list(stock.buffers()), 1e-14)
        assert block.norms[0].num_batches_tracked == 1

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_a_users_checkpoint_counts_as_in_stock(self, policy, use_reentrant):
        block = Block(**BLOCKS["bottleneck down"], policy=policy).double()
        results = []
        for net in (block, stock_of(block)):
            x = input_of(block).double().requires_grad_()
            checkpoint(net, x, use_reentrant=use_reentrant).square().sum().backward()
            results.append([x.grad, *(p.grad for p in net.parameters()), *net.buffers()])
        same(*results)

    def test_eval_leaves_buffers_alone(self, policy, options):
        block = Block(**options, policy=policy).eval()
        before = state(block)
        block(input_of(block)).sum().backward()
        assert all(torch.equal(before[name], t) for name, t in block.state_dict().items())


def parts_of(block):
    described = block.described()
    tensors = flat_tensors(op.units_of(described))
    return described, tensors, [i for i, t in enumerate(tensors) if t is not None and t.requires_grad]


class TestAutograd:
    def check(self, check, options, policy, activation, **kwargs):
        block = Block(**options, activation=activation, policy=policy).double()
        described, tensors, at = parts_of(block)
        again = op.ResidualBlockConfig.of(described, Activation(), Activation(), [], "reference")

        def run(x, *leaves):
            given = list(tensors)
            for i, leaf in zip(at, leaves):
                given[i] = leaf
            names = dict(activation=activation, final_activation=block.final, negative_slope=0.2)
            return functional.residual_block(x, again.block(given), policy=policy, **names)

        x = input_of(block, (4, 3), samples=2).double().requires_grad_()
        leaves = [tensors[i].detach().clone().requires_grad_() for i in at]
        assert check(run, (x, *leaves), fast_mode=True, **kwargs)

    @pytest.mark.unpoisoned  # gradcheck itself reads uninitialised memory
    def test_gradcheck(self, backend, policy, options):
        self.check(torch.autograd.gradcheck, options, policy, "leaky_relu")

    @pytest.mark.unpoisoned
    def test_gradgradcheck(self, policy, options):
        self.check(torch.autograd.gradgradcheck, options, policy, "silu")

    def test_create_graph_gives_the_same_gradients(self, policy, options):
        block = Block(**options, policy=policy).double()
        x = input_of(block).double().requires_grad_()
        wanted = [x, *block.parameters()]
        plain = torch.autograd.grad(block(x).square().sum(), wanted)
        graph = torch.autograd.grad(block(x).square().sum(), wanted, create_graph=True)
        assert all(t.requires_grad for t in graph)
        same(graph, plain)

    @pytest.mark.parametrize("of", ["output", "view", "detached", "input", "parameter"])
    def test_a_stale_use_raises_and_names_the_block(self, policy, of):
        block = Block(**BLOCKS["bottleneck"], policy=policy)
        x = input_of(block).requires_grad_() * 1
        y = block(x)
        loss = y.sum()
        with torch.no_grad():
            targets = {"output": y, "view": y[:, 1:2], "detached": y.detach(), "input": x}
            targets.get(of, block.convs[0].weight).mul_(2)
        with pytest.raises(RuntimeError, match="residual_block: its .*output, or a parameter of it, was changed in place"):
            loss.backward()

    def test_backward_twice_needs_retain_graph(self, policy):
        block = Block(**BLOCKS["bottleneck"], policy=policy)
        y = block(input_of(block)).sum()
        y.backward(retain_graph=True)
        y.backward()
        with pytest.raises(RuntimeError, match="^Trying to backward through the graph a second time"):
            y.backward()

    @pytest.mark.parametrize(("final", "batch_stats"), [("relu", True), ("silu", True), ("relu", False)])
    def test_opcheck(self, policy, options, batch_stats, final):
        block = Block(**options | dict(final=final)).train(batch_stats)
        described, tensors, _ = parts_of(block)
        last = Activation(final)
        x = input_of(block, (5, 4), samples=2)
        plan = op.plan_of(x.shape, described, last, policy)
        chosen = backends.choose(x, x.dtype)
        config = op.ResidualBlockConfig.of(described, Activation(), last, plan, chosen.name)
        tensors = [None if t is None else t.detach() for t in tensors]
        utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(torch.ops.resdense.residual_block.default, (x, tensors, *config), test_utils=utilities)
        out, stats, kept = torch.ops.resdense.residual_block(x, tensors, *config)
        present = [True] + [tensors[at + i] is not None for at in range(0, len(tensors), 6) for i in (0, 1, 4, 5)]
        mark = out if op.reads_out(last) else None
        for needs in (present, [False] * len(present)):
            arguments = (torch.randn_like(out), mark, x, tensors, *config, stats, kept, needs)
            torch.library.opcheck(torch.ops.resdense.residual_block_backward.default, arguments, test_utils=utilities)


class TestMemory:
    """What the product is: these fail where a change loses the saving."""

    def kept(self, block, train=True):
        """Bytes beside the input's, the output's and the statistics', in maps of 2 x 20 x 18 values of float32."""
        x = input_of(block, (20, 18), samples=2).requires_grad_()
        y = block(x)
        saved = rd.memory.saved_bytes(lambda: block(x))
        taken = sum(4 * 2 * m.num_features for m in block.modules() if isinstance(m, NORMS) and m.training)
        return saved - x.nbytes - taken, y.nbytes

    @pytest.mark.parametrize(
        ("name", "maps_kept"),
        [("basic", 12), ("bottleneck", 7), ("grouped", 12 + 8), ("pre", 6), ("pre bottleneck", 7)],
    )
    @pytest.mark.parametrize("final", ["relu", "silu", "identity"])
    def test_bytes(self, policy, name, maps_kept, final):
        """Behind a last 1x1 convolution that doubles the channels (the bottlenecks') nothing of its map."""
        if BLOCKS[name].get("pre"):
            final = "identity"
        kept, out = self.kept(Block(**BLOCKS[name], final=final, policy=policy))
        one = 2 * 20 * 18 * 4
        expected = maps_kept * one if policy == "fast" else 0
        if final == "relu" or (final == "silu" and policy == "fast"):
            expected += out  # the output itself, or what it was activated of
        assert kept == expected

    @pytest.mark.parametrize(("name", "maps_kept"), [("basic down", 8 + 8), ("bottleneck down", 4 * 4 + 4), ("pooled", 8 + 8)])
    def test_of_a_projection_nothing(self, policy, name, maps_kept):
        """It is a 1x1 convolution in front of a norm, as a bottleneck's last: the moments of what these read are enough. What a
        pool makes of the input is made again."""
        kept, out = self.kept(Block(**BLOCKS[name], policy=policy))
        assert kept == out + (maps_kept * 2 * 10 * 9 * 4 if policy == "fast" else 0)

    def test_with_fewer_positions_than_channels_the_map_itself(self):
        block = Block((32, 24, 40), (3, 1), projection="normed", policy="fast")
        x = maps((2, 32, 3, 3)).requires_grad_()
        saved = rd.memory.saved_bytes(lambda: block(x))
        assert saved == 4 * (18 * (32 + 24 + 40 + 40 + 40) + 2 * (24 + 40 + 40))
        agree_in_float64(block, x.detach())
        block = Block((32, 24, 40), (3, 1), stride=2, projection="normed", pool=CEILED, policy="fast")
        saved = rd.memory.saved_bytes(lambda: block(x))
        assert saved == 4 * (18 * 32 + 8 * (24 + 40 + 40 + 40) + 2 * (24 + 40 + 40))
        agree_in_float64(block, x.detach())

    @pytest.mark.parametrize(("name", "maps_kept"), [("basic", 6), ("bottleneck", 7), ("grouped", 12)])
    def test_running_statistics_need_no_last_output(self, policy, name, maps_kept):
        """What the norm behind a convolution of any kernel asks for follows from the gradient of the convolution's weight."""
        block = Block(**BLOCKS[name], policy=policy).eval()
        kept, out = self.kept(block)
        one = 2 * 20 * 18 * 4
        assert kept == out + (maps_kept * one if policy == "fast" else 0)
        block.convs[-1].requires_grad_(False)  # of which there is no gradient then: the output is kept
        kept, out = self.kept(block)
        assert kept == out + (maps_kept * one + out if policy == "fast" else 0)

    def test_frozen_norms_need_only_what_convolutions_read(self):
        block = Block(**BLOCKS["bottleneck down"], policy="fast").eval()
        for norm in [*block.norms, block.projection_norm]:
            norm.requires_grad_(False)
        quarter = 2 * 10 * 9 * 4
        kept, out = self.kept(block)
        assert kept == out + 4 * 4 * quarter + 4 * quarter
        for norm in [*block.norms, block.projection_norm]:
            norm.reset_running_stats()
        agree_in_float64(block, input_of(block))

    @pytest.mark.parametrize("channels_last", [False, True])
    @pytest.mark.parametrize("name", ["basic down", "bottleneck", "pre activated", "pooled"])
    def test_a_slice_is_not_copied(self, name, channels_last):
        """It takes as much memory as a tensor of its own, forward and backward."""
        block = Block(**BLOCKS[name], policy="min").to(memory_format=_format(channels_last))
        C = block.convs[0].in_channels
        part = maps((2, 2 * C, 64, 60), channels_last)[:, :C].requires_grad_()
        whole = part.detach().contiguous(memory_format=_format(channels_last)).requires_grad_()
        inputs = [part, whole]
        step = lambda x: torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])  # noqa: E731
        with torch.no_grad():
            forward = [rd.memory.peak_bytes(lambda: block(x), warmup=0) for x in inputs]
        both = [rd.memory.peak_bytes(lambda: step(x), warmup=0) for x in inputs]
        assert forward[0] <= forward[1] and both[0] <= both[1]

    def test_nothing_without_gradients(self, policy, options):
        block = Block(**options, policy=policy).requires_grad_(False)
        assert rd.memory.saved_bytes(lambda: block(input_of(block))) == 0


class TestErrors:
    BLOCK = staticmethod(lambda: Block(**BLOCKS["bottleneck down"], policy="fast"))

    @pytest.mark.parametrize(
        ("x", "error", "message"),
        [
            (torch.zeros(3, 5), ValueError, r"x: expected 3, 4 or 5 dimensions .* got 2: \(3, 5\)"),
            (torch.zeros(3, 8, 7), ValueError, r"block.units\[0\].conv.weight: expected 3 dimensions as x has, got 4"),
            (torch.zeros(3, 6, 7, 7), ValueError, r"block.units\[0\].conv.weight: expected \[K, 6 / groups"),
            (torch.zeros(3, 8, 7, 7).long(), TypeError, "x: expected float32, float64, bfloat16 or float16, got torch.int64"),
            (torch.zeros(3, 8, 7, 7).double(), TypeError, "conv.weight: expected dtype torch.float64, got torch.float32"),
            (torch.zeros(3, 8, 7, 7, device="meta"), ValueError, "expected device meta .* got cpu"),
            (torch.zeros(1, 8, 2, 2), ValueError, r"more than 1 value per channel when training, got input size \(1, 4, 1, 1\)"),
        ],
        ids=["rank", "dimensions", "channels", "integer", "dtype", "device", "one value"],
    )
    def test_bad_input_changes_nothing(self, x, error, message):
        block = self.BLOCK()
        before = state(block)
        with pytest.raises(error, match=message):
            block(x)
        assert all(torch.equal(before[name], t) for name, t in block.state_dict().items())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (dict(policy="tiny"), "policy: expected one of fast, min, got 'tiny'"),
            (dict(activation="gelu"), "^activation: expected relu, .* got 'gelu'"),
            (dict(final_activation="gelu"), "final_activation: expected relu, .* got 'gelu'"),
            (dict(units=()), "block.units: expected one or more, got 0"),
            (dict(shortcut=None), r"block.shortcut: expected an output of shape \(3, 16, 4, 3\), as the units', got \(3, 8, 7, 6\)"),
            (dict(stride=(2,)), r"block.shortcut.conv: expected padding and dilation of 2 numbers each, and as many of the stride"),
            (dict(stride=(0, 1)), "block.shortcut.conv: expected padding of 0 or more, dilation and stride of 1 or more"),
            (dict(stride=(1, 2)), r"block.shortcut.conv: expected an output of shape \(3, 16, 4, 3\), .* got \(3, 16, 7, 3\)"),
            (dict(dilation=(9, 9), weight=torch.zeros(12, 8, 3, 3)), "block.shortcut.conv: expected windows within"),
        ],
        ids=str,
    )
    def test_options(self, change, message):
        block = self.BLOCK()
        described = block.described()
        conv = described.shortcut.conv
        of_conv = {name: value for name, value in change.items() if name in conv._fields}
        described = described._replace(shortcut=described.shortcut._replace(conv=conv._replace(**of_conv)))
        described = described._replace(**{name: value for name, value in change.items() if name in described._fields})
        names = {n: v for n, v in change.items() if n not in (*conv._fields, *described._fields)}
        with pytest.raises(ValueError, match=message):
            functional.residual_block(input_of(block), described, **names)
        assert block.norms[0].num_batches_tracked == 0


    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (dict(kind="maximum"), "block.shortcut.pool: expected an average with 2 numbers of each kind, got Pool"),
            (dict(stride=(2,)), "block.shortcut.pool: expected an average with 2 numbers of each kind, got Pool"),
            (dict(stride=(0, 2)), "block.shortcut.pool: expected windows and strides of 1 or more"),
            (dict(padding=(2, 0)), "block.shortcut.pool: .* padding of at most half a window"),
            (dict(kernel_size=(8, 2), ceil_mode=False), "block.shortcut.pool: expected windows within the padded x of shape"),
            (dict(ceil_mode=False), r"block.shortcut.conv: expected an output of shape \(3, 8, 4, 3\), .* got \(3, 8, 3, 3\)"),
        ],
        ids=str,
    )
    def test_pools(self, change, message):
        block = Block(**BLOCKS["pooled"], policy="fast")
        described = block.described()
        shortcut = described.shortcut
        with pytest.raises(ValueError, match=message):
            pooled = shortcut._replace(pool=shortcut.pool._replace(**change))
            functional.residual_block(input_of(block), described._replace(shortcut=pooled))
        activated = described._replace(shortcut=shortcut._replace(activated=True))
        with pytest.raises(ValueError, match="block.shortcut.pool: expected None in a shortcut that is activated, got Pool"):
            functional.residual_block(input_of(block), activated)
        assert block.norms[0].num_batches_tracked == 0


def test_a_pools_sizes_are_torchs():
    for size, kernel, stride, ceil_mode in itertools.product(range(1, 9), range(1, 5), range(1, 5), (False, True)):
        for padding in range(kernel // 2 + 1):
            try:
                expected = F.avg_pool1d(torch.empty(1, 1, size, device="meta"), kernel, stride, padding, ceil_mode).shape[2:]
            except RuntimeError:
                expected = (0,)  # no window fits
            found = Pool("average", (kernel,), (stride,), (padding,), ceil_mode).outputs((size,))
            assert max(found, (0,)) == expected, (size, kernel, stride, padding, ceil_mode)


def test_deterministic_mode_repeats_bitwise(backend, policy):
    block = Block(**BLOCKS["bottleneck down"], policy=policy)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [module_run(block)({"x": input_of(block, (17, 13))}, state(block)) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    for other in runs[1:]:
        assert all(torch.equal(t, other[name]) for name, t in runs[0].items())


@pytest.mark.gpu
def test_agrees_with_the_cpu_in_float64(policy, options):
    block = Block(**options, policy=policy).double()
    x = input_of(block, channels_last=True).double()
    expected = module_run(stock_of(block))({"x": x.clone()}, state(block))
    ours = module_run(block.cuda())({"x": x.cuda()}, {name: t.cuda() for name, t in state(block).items()})
    same([ours[name].cpu() for name in expected], list(expected.values()))
