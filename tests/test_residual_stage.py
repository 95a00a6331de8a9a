"""Residual blocks in one node: what they compute and keep one after another, and which of them share a node."""

import copy
from contextlib import nullcontext

import pytest
import torch
from small_nets import assert_same
from stock import import_torchvision
from test_dense_block import backend, policy  # noqa: F401
from test_residual_block import Block
from torch import nn

import resdense_ext as rd
from resdense_ext import functional
from resdense_ext.nn import BasicBlock, Chain
from resdense_ext.nn.dispatch import stock_path

FORMS = {
    "basic": lambda stride: dict(widths=(6, 8, 8) if stride > 1 else (8, 8, 8), kernels=(3, 3)),
    "bottleneck": lambda stride: dict(widths=(6 if stride > 1 else 16, 4, 4, 16), kernels=(1, 3, 1)),
}


def blocks_of(form="basic", pre=False, count=3):
    """Some of one stage, of which the first has a stride and a projection."""
    made = []
    for i in range(count):
        stride = 1 if i else 2
        projection = None if i else "activated" if pre else "normed"
        made.append(Block(**FORMS[form](stride), stride=stride, projection=projection, pre=pre))
    return nn.ModuleList(made)


def images(samples=3, channels=6, size=9, seed=1):
    torch.manual_seed(seed)
    return torch.randn(samples, channels, size, size)


def in_one(x, blocks, **options):
    return functional.residual_stage(x, [block.described() for block in blocks], **options)


def one_by_one(x, blocks, policy="fast", **options):
    policies = [policy] * len(blocks) if isinstance(policy, str) else policy
    for block, of_block in zip(blocks, policies):
        x = functional.residual_block(x, block.described(), policy=of_block, **options)
    return x


def trained(call, blocks, x, steps=3, **options):
    """The last step's output and gradients, and all buffers; steps that come again are replayed."""
    for _ in range(steps):
        blocks.zero_grad()
        inputs = x.clone().requires_grad_()
        y = call(inputs, blocks, **options)
        torch.manual_seed(3)
        y.backward(torch.randn_like(y))
    return {"y": y.detach(), "x": inputs.grad, **{n: p.grad for n, p in blocks.named_parameters()}, **dict(blocks.named_buffers())}


class TestAsOneByOne:
    """To the bit: the same operators do the same."""

    @pytest.mark.parametrize("channels_last", [False, True])
    @pytest.mark.parametrize("pre", [False, True])
    @pytest.mark.parametrize("form", FORMS)
    def test_gradients_and_buffers(self, form, pre, channels_last, backend, policy):
        blocks, x = blocks_of(form, pre), images()
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        with rd.use_backend(backend):
            expected = trained(one_by_one, copy.deepcopy(blocks), x, policy=policy)
            assert_same(trained(in_one, blocks, x, policy=policy), expected)

    def test_policies_one_a_block(self):
        blocks, x, policies = blocks_of(), images(), ["min", "fast", "min"]
        expected = trained(one_by_one, copy.deepcopy(blocks), x, policy=policies)
        assert_same(trained(in_one, blocks, x, policy=policies), expected)

    @pytest.mark.parametrize("activation", ["leaky_relu", "silu"])
    def test_activations(self, activation, policy):
        options = dict(activation=activation, final_activation="elu", negative_slope=0.3, policy=policy)
        blocks, x = blocks_of("bottleneck"), images()
        expected = trained(one_by_one, copy.deepcopy(blocks), x, **options)
        assert_same(trained(in_one, blocks, x, **options), expected)

    def test_both_forms_in_one_stage(self, policy):
        blocks = nn.ModuleList([*blocks_of(), *blocks_of(pre=True)[1:]])
        expected = trained(one_by_one, copy.deepcopy(blocks), images(), policy=policy)
        assert_same(trained(in_one, blocks, images(), policy=policy), expected)

    def test_autocast(self, policy):
        """A block of float64 convolutions in between, which autocast leaves alone, too."""
        blocks = blocks_of("bottleneck")
        blocks[1].convs.double()

        def cast(call):
            def run(x, *rest, **options):
                with torch.autocast("cpu", torch.bfloat16):
                    return call(x, *rest, **options)

            return run

        expected = trained(cast(one_by_one), copy.deepcopy(blocks), images(), policy=policy)
        assert_same(trained(cast(in_one), blocks, images(), policy=policy), expected)

    def test_evaluation(self):
        blocks = blocks_of().eval()
        with torch.no_grad():
            for _ in range(3):
                assert torch.equal(in_one(images(), blocks), one_by_one(images(), blocks))

    @pytest.mark.parametrize("wanted", ["x", "1.norms.0.weight", "2.convs.1.weight", "0.projection.weight"])
    def test_single_gradients(self, wanted, policy):
        blocks, found = blocks_of(), []
        for call in (one_by_one, in_one):
            x = images().requires_grad_(wanted == "x")
            given = x if wanted == "x" else dict(blocks.named_parameters())[wanted]
            for name, p in blocks.named_parameters():
                p.requires_grad_(name == wanted)
            y = call(x, blocks, policy=policy)
            found.append(torch.autograd.grad(y, given, torch.cos(y.detach())))
        assert_same(*({wanted: of} for (of,) in found))

    def test_no_positions(self):
        blocks = blocks_of().eval()
        x = torch.randn(0, 6, 9, 9, requires_grad=True)
        y = in_one(x, blocks)
        assert y.shape == (0, 8, 5, 5) and y.requires_grad

    def test_second_derivatives(self, policy):
        blocks, found = blocks_of(pre=True, count=2).double().eval(), []
        for call in (one_by_one, in_one):
            x = images().double().requires_grad_()
            y = call(x, blocks, activation="silu", policy=policy)
            (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            first.square().sum().backward()
            found.append({"first": first.detach(), "second": x.grad})
        assert_same(*found)


class TestMemory:
    @pytest.mark.parametrize("pre", [False, True])
    def test_keeps_what_blocks_keep(self, pre, policy):
        blocks, x = blocks_of("bottleneck", pre), images(size=17).requires_grad_()
        kept = [rd.memory.saved_bytes(lambda: call(x, blocks, policy=policy)) for call in (in_one, one_by_one)]
        assert kept[0] == kept[1]

    @pytest.mark.parametrize("autocast", [False, True])
    @pytest.mark.parametrize("frozen", [1, 2, 3])
    def test_frozen_blocks_in_front_keep_nothing(self, frozen, autocast, policy):
        blocks, x = blocks_of("bottleneck"), images(size=17)
        blocks[:frozen].requires_grad_(False)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            kept = [rd.memory.saved_bytes(lambda: call(x, blocks, policy=policy)) for call in (in_one, one_by_one)]
        assert kept[0] == kept[1]

    @pytest.mark.unpoisoned
    @pytest.mark.parametrize("training", [False, True])
    def test_without_gradients_no_output_outlives_its_reader(self, training):
        blocks, x, peaks = blocks_of("bottleneck", count=5).train(training), images(size=65), []
        with torch.no_grad():
            for call in (in_one, one_by_one):
                peaks.append(rd.memory.peak_bytes(lambda: call(x, blocks), warmup=3))
        assert peaks[0] <= peaks[1] + x.nbytes // 100  # what is no map's

    def test_a_changed_output_is_refused(self):
        y = in_one(images().requires_grad_(), blocks_of())
        y.mul_(2)
        with pytest.raises(RuntimeError, match="residual_block: its output"):
            y.sum().backward()


class TestErrors:
    def test_names_the_block(self):
        first, second, _ = (block.described() for block in blocks_of())
        with pytest.raises(ValueError, match=r"blocks\[1\]\.units\[0\]\.conv\.weight: expected \[K, 8 / groups"):
            functional.residual_stage(images(), [first, blocks_of("bottleneck")[1].described()])
        with pytest.raises(ValueError, match=r"blocks\[0\]\.shortcut: expected an output of shape"):
            functional.residual_stage(images(), [first._replace(shortcut=None), second])
        with pytest.raises(TypeError, match=r"blocks\[1\]\.units\[1\]\.conv\.weight: expected dtype torch.float32"):
            functional.residual_stage(images(), [first, second._replace(units=(second.units[0], in_double(second.units[1])))])

    def test_arguments(self):
        blocks = [block.described() for block in blocks_of()]
        with pytest.raises(ValueError, match="blocks: expected one or more, got 0"):
            functional.residual_stage(images(), [])
        with pytest.raises(TypeError, match="^blocks: expected a sequence of ResidualBlock, got ResidualBlock"):
            functional.residual_stage(images(), blocks[0])
        with pytest.raises(TypeError, match="^blocks: expected a sequence of ResidualBlock, got generator"):
            functional.residual_stage(images(), (block for block in blocks))
        with pytest.raises(TypeError, match=r"^blocks\[1\]: expected a ResidualBlock, got NoneType"):
            functional.residual_stage(images(), [blocks[0], None])
        with pytest.raises(ValueError, match=r"blocks\[1\]\.units: expected one or more, got 0"):
            functional.residual_stage(images(), [blocks[0], blocks[1]._replace(units=())])
        with pytest.raises(ValueError, match="policy: expected 3 names, one a block, got 2"):
            functional.residual_stage(images(), blocks, policy=["fast", "min"])
        with pytest.raises(ValueError, match="^policy: expected one of fast, min, got None"):
            functional.residual_stage(images(), blocks, policy=None)
        with pytest.raises(ValueError, match="policy: expected one of fast, min, got 'most'"):
            functional.residual_stage(images(), blocks, policy=["fast", "min", "most"])

    def test_nothing_is_changed(self):
        blocks = blocks_of()
        before = copy.deepcopy(dict(blocks.named_buffers()))
        described = [block.described() for block in blocks]
        described[2] = described[2]._replace(norm=described[2].norm._replace(eps=-1.0))
        with pytest.raises(ValueError, match=r"blocks\[2\]\.norm\.eps"):
            functional.residual_stage(images(), described)
        assert_same(dict(blocks.named_buffers()), before)


def in_double(unit):
    return unit._replace(conv=unit.conv._replace(weight=unit.conv.weight.detach().double()))


def stage(*policies, planes=8, stride=2):
    """Basic blocks as ResNets have them: a projection in front."""
    torch.manual_seed(0)
    down = nn.Sequential(nn.Conv2d(6, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))
    first, *others = policies
    return [BasicBlock(6, planes, stride, down, policy=first), *(BasicBlock(planes, planes, policy=policy) for policy in others)]


def nodes(y):
    """The numbers of blocks in the nodes behind y, from the first to the last."""
    found, left = set(), [y.grad_fn]
    while left:
        node = left.pop()
        found.add(node)
        left += [before for before, _ in node.next_functions if before is not None and before not in found]
    stages = [node for node in found if node.name() == "ResidualStageFunctionBackward"]
    return [len(node.configs) for node in sorted(stages, key=lambda node: node._sequence_nr())]


def check_nodes(modules, expected, x=None):
    """Which share one, and that they compute what they do in plain PyTorch."""
    x = (images() if x is None else x).double()
    chain, found = Chain(*modules).double(), []
    stock = copy.deepcopy(chain)
    assert nodes(chain(x.clone().requires_grad_())) == expected
    chain.load_state_dict(stock.state_dict())
    for net in (chain, stock):
        with stock_path() if net is stock else nullcontext():
            found.append(trained(lambda x, net: net(x), net, x, steps=1))
    assert_same(*found)


class TestNodes:
    """Which blocks of a chain share one."""

    def test_all(self):
        check_nodes(stage("fast", "fast", "fast"), [3])

    def test_a_projection_begins_another(self):
        down = nn.Sequential(nn.Conv2d(8, 8, 1, 2, bias=False), nn.BatchNorm2d(8))
        check_nodes([*stage("fast", "fast"), BasicBlock(8, 8, 2, down), BasicBlock(8, 8)], [2, 2])

    def test_min_is_alone(self):
        """What it spares is not to be held longer than needed."""
        check_nodes(stage("fast", "fast", "min", "min", "fast", "fast"), [2, 1, 1, 2])

    def test_another_module_or_activation_between(self):
        blocks = stage("fast", "fast", "fast", "fast")
        blocks[3].relu = nn.LeakyReLU(0.2)
        check_nodes([blocks[0], nn.Tanh(), *blocks[1:]], [1, 2, 1])

    def test_hooks(self):
        blocks, seen = stage("fast", "fast", "fast", "fast"), []
        blocks[1].register_forward_hook(lambda module, args, out: seen.append(out))
        check_nodes(blocks, [1, 1, 2])
        assert len(seen) == 3

    def test_large_weights(self):
        """Of 4.8, 9.4 and 9.4 MB; 16 at most are handed on at once."""
        check_nodes(stage("fast", "fast", "fast", planes=256), [2, 1], images(2, size=5))

    def test_the_same_block_twice(self):
        blocks = stage("fast", "fast")
        check_nodes([*blocks, blocks[1], blocks[1]], [2, 1, 1])

    def test_a_norm_of_two_blocks(self):
        blocks = stage("fast", "fast", "fast")
        blocks[2].bn1 = blocks[1].bn1
        check_nodes(blocks, [2, 1])

    def test_a_projections_norm_in_another_block(self):
        blocks = stage("fast", "fast", "fast")
        blocks[1].bn1 = blocks[0].downsample[1]
        blocks[1].bn1.momentum = None  # the mean of all, in which the other's is counted
        check_nodes(blocks, [1, 2])

    def test_a_single_position_is_left_to_stock(self):
        """Which broadcasts the shortcut of the second block."""
        blocks = stage("fast", "fast")
        blocks[1].conv1.padding = (2, 2)
        check_nodes(blocks, [1], images(size=2))

    def test_watched_blocks_are_alone(self):
        chain = Chain(*stage("fast", "fast", "fast"))
        rows = rd.report(chain, images()).rows[:3]
        assert [row.path for row in rows] == ["0", "1", "2"] and all(0 < row.saved_bytes < row.stock_saved_bytes for row in rows)
        assert sum(row.saved_bytes for row in rows) == rd.memory.saved_bytes(lambda: chain(images()))

    @pytest.mark.parametrize("name", ["resnet18", "preact_resnet110"])
    def test_networks(self, name):
        net = rd.models.create(name)
        y = net(images(2, 3, 32).requires_grad_())
        assert nodes(y) == {"resnet18": [2, 2, 2, 1, 1], "preact_resnet110": [18, 18, 18]}[name]

    def test_converted(self):
        net = rd.convert(import_torchvision().models.resnet50())
        assert nodes(net(images(2, 3, 64))) == [3, 4, 3, 3, 1, 1, 1]
