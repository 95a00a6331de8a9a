"""The dense block: agreement with stock PyTorch, memory, statistics, and the rules that keep autograd honest."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from small_nets import ten_losses
from stock import import_torchvision
from tolerance import assert_within_noise, assert_within_rule, module_run, rounding_noise, torch_runs, true_run
from torch import nn
from torch.utils.checkpoint import checkpoint

import resdense_ext as rd
from resdense_ext import functional, reference
from resdense_ext.functional import Activation, BatchNorm, Conv, DenseLayer, Unit
from resdense_ext.nn.dispatch import stock_path
from resdense_ext.ops import backend as backends
from resdense_ext.ops._library import CPU_LIBRARY
from resdense_ext.ops.reference_backend import ReferenceBackend
from resdense_ext.ops.triton import interpreting
from resdense_ext.ops.units import flat_tensors

POLICIES = ("fast", "min")
built = pytest.mark.skipif(CPU_LIBRARY is not None, reason=f"the CPU library is {CPU_LIBRARY}")
# The same tests serve Triton's kernels in its interpreter: see test_triton.py.
BACKENDS = ["triton"] if interpreting() else ["reference", pytest.param("cpu", marks=built)]
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@pytest.fixture(params=BACKENDS)
def backend(request):
    with rd.use_backend(request.param):
        yield request.param


@pytest.fixture(params=POLICIES)
def policy(request):
    return request.param


def random_block(layers=3, channels=5, growth=4, spatial_dims=2, bn_size=2, seed=0, **kwargs):
    torch.manual_seed(seed)
    block = rd.nn.DenseBlock(layers, channels, bn_size, growth, spatial_dims=spatial_dims, **kwargs)
    for module in block.modules():
        if isinstance(module, NORMS):
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
            nn.init.normal_(module.running_mean, 0.0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return block


def state(module):
    return {name: t.clone() for name, t in module.state_dict().items()}


def stock_of(block):
    return rd.revert(copy.deepcopy(block))


def agree_in_float64(block, x, tolerance=1e-12):
    """Output, gradients and buffers of ours against the stock path, relative to each tensor's norm."""
    params, inputs = state(block.double()), {"x": x.double()}
    stock = module_run(stock_of(block))({"x": inputs["x"].clone()}, copy.deepcopy(params))
    ours = module_run(block)({"x": inputs["x"].clone()}, copy.deepcopy(params))
    assert ours.keys() == stock.keys()
    largest = max(t.norm() for name, t in stock.items() if name.startswith("grad "))
    for name, t in stock.items():
        scale = t.double().norm() + (0.01 * largest if name.startswith("grad ") else 0)
        assert (ours[name] - t).double().norm() <= tolerance * scale, name
    return ours


def same(ours, stock, tolerance=1e-12):
    """Tensors of two runs in float64, in order, each by its norm; a (nearly) zero one is the rounding of the largest."""
    assert [t is None for t in ours] == [t is None for t in stock]
    pairs = [(a, b.double()) for a, b in zip(ours, stock) if b is not None]
    largest = max(b.norm() for _, b in pairs)
    for a, b in pairs:
        assert (a - b).norm() <= tolerance * (b.norm() + 0.01 * largest)


def maps(shape, channels_last=False, seed=1):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.dim()]) if channels_last else x


class TestAgreement:
    @pytest.mark.parametrize("channels_last", [False, True])
    @pytest.mark.parametrize("sizes", [(7, 9), (1, 1), (1, 6)], ids=str)
    def test_two_dimensions(self, backend, policy, sizes, channels_last):
        agree_in_float64(random_block(policy=policy), maps((3, 5, *sizes), channels_last))

    @pytest.mark.parametrize("channels_last", [False, True])
    def test_three_dimensions(self, backend, policy, channels_last):
        agree_in_float64(random_block(policy=policy, spatial_dims=3), maps((2, 5, 4, 3, 5), channels_last))

    def test_one_dimension(self, backend, policy):
        agree_in_float64(random_block(policy=policy, spatial_dims=1), maps((2, 5, 11)))

    def test_batch_of_one(self, backend, policy):
        agree_in_float64(random_block(policy=policy), maps((1, 5, 7, 6)))

    @pytest.mark.parametrize("channels_last", [False, True])
    def test_one_channel(self, backend, policy, channels_last):
        agree_in_float64(random_block(channels=1, growth=1, bn_size=1, policy=policy), maps((2, 1, 5, 6), channels_last))

    @pytest.mark.parametrize("channels_last", [False, True])
    def test_without_bottleneck(self, backend, policy, channels_last):
        agree_in_float64(random_block(bn_size=0, policy=policy), maps((3, 5, 7, 6), channels_last))

    @pytest.mark.parametrize("activation", ["leaky_relu", "elu", "silu", "identity"])
    def test_activations(self, policy, activation):
        agree_in_float64(random_block(activation=activation, policy=policy), maps((3, 5, 7, 6)))

    def test_eval(self, backend, policy):
        agree_in_float64(random_block(policy=policy).eval(), maps((3, 5, 7, 6)))

    @pytest.mark.parametrize("frozen", ["norm1", "norm2", "alternate"])
    def test_frozen_norms_while_parameters_train(self, backend, policy, frozen):
        block = random_block(layers=4, policy=policy)
        for i, layer in enumerate(block.values()):
            if frozen == "alternate":
                (layer.norm1 if i % 2 else layer.norm2).eval()
            else:
                getattr(layer, frozen).eval()
        agree_in_float64(block, maps((3, 5, 7, 6)))

    def test_training_norms_in_an_eval_block(self, backend, policy):
        block = random_block(policy=policy).eval()
        block.denselayer2.norm1.train()
        block.denselayer3.norm2.train()
        agree_in_float64(block, maps((3, 5, 7, 6)))

    @pytest.mark.parametrize(
        "options", [dict(momentum=None), dict(track_running_stats=False), dict(affine=False), dict(eps=0.1)], ids=str
    )
    @pytest.mark.parametrize("training", [True, False])
    def test_norm_options(self, backend, policy, options, training):
        block = random_block(policy=policy)
        for i, layer in enumerate(block.values()):
            for name in ("norm1", "norm2"):
                if i != 1:  # beside ordinary ones
                    channels = getattr(layer, name).num_features
                    setattr(layer, name, nn.BatchNorm2d(channels, **options))
        agree_in_float64(block.train(training), maps((3, 5, 7, 6)))

    def test_a_different_eps_and_momentum_a_layer(self, backend, policy):
        block = random_block(policy=policy)
        for i, layer in enumerate(block.values()):
            layer.norm1.eps, layer.norm2.eps = 10.0 ** -(i + 1), 10.0**-i
            layer.norm1.momentum, layer.norm2.momentum = 0.1 * i, 0.3
        agree_in_float64(block, maps((3, 5, 7, 6)))

    @pytest.mark.parametrize("channels_last", [False, True])
    def test_bias_dilation_and_groups(self, backend, policy, channels_last):
        block = random_block(policy=policy)
        for i, layer in enumerate(block.values()):
            layer.conv1 = nn.Conv2d(5 + 4 * i, 8, 1, bias=i != 1)
            layer.conv2 = nn.Conv2d(8, 4, 3, padding=2, dilation=2, groups=(1, 2, 4)[i], bias=i != 2)
        agree_in_float64(block, maps((3, 5, 7, 6), channels_last))

    @pytest.mark.parametrize("which", ["weight", "norm1", "conv1", "norm2", "conv2", "denselayer3", "nothing"])
    @pytest.mark.parametrize("input_grad", [True, False])
    def test_only_some_gradients(self, backend, policy, which, input_grad):
        block = random_block(policy=policy).double()
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(which in name)
        results = []
        for net in (copy.deepcopy(block), stock_of(block)):
            x = maps((3, 5, 7, 6)).double().requires_grad_(input_grad)
            y = net(x)
            assert y.requires_grad == (input_grad or which != "nothing")
            if y.requires_grad:
                y.square().sum().backward()
            results.append([x.grad, *(p.grad for p in net.parameters())])
        if any(t is not None for t in results[1]):
            same(*results)

    @pytest.mark.parametrize("channels_last", [False, True])
    @pytest.mark.parametrize("bn_size", [2, 0])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_lower_precision(self, backend, policy, dtype, bn_size, channels_last):
        block = random_block(layers=4, channels=9, growth=8, bn_size=bn_size, policy=policy)
        params = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state(block).items()}
        inputs = {"x": maps((3, 9, 9, 7)).to(dtype)}
        run = module_run(stock_of(block))
        ours = module_run(block)({"x": inputs["x"].contiguous(memory_format=_format(channels_last))}, copy.deepcopy(params))
        assert_within_rule(ours, true_run(run, inputs, params), torch_runs(run, inputs, params), dtype)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_autocast(self, policy, dtype):
        block = random_block(layers=4, channels=9, growth=8, policy=policy)
        params, inputs = state(block), {"x": maps((3, 9, 9, 7)).to(dtype)}
        run = module_run(stock_of(block), torch.bfloat16)
        ours = module_run(block, torch.bfloat16)({"x": inputs["x"].clone()}, copy.deepcopy(params))
        truth = true_run(module_run(stock_of(block)), inputs, params)
        assert_within_rule(ours, truth, torch_runs(run, inputs, params), torch.bfloat16)
        stock = run({"x": inputs["x"].clone()}, copy.deepcopy(params))
        assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in stock.items()}

    def test_a_mean_of_a_thousand_deviations(self, backend, policy):
        block = random_block(policy=policy)
        params = state(block)
        inputs = {"x": maps((3, 5, 9, 7)) + 1000 * torch.arange(1.0, 6).view(1, 5, 1, 1)}
        run = module_run(stock_of(block))
        ours = module_run(block)({"x": inputs["x"].clone()}, copy.deepcopy(params))
        assert_within_rule(ours, true_run(run, inputs, params), torch_runs(run, inputs, params), torch.float32)

    def test_strided_input_and_expanded_gradient(self, backend, policy):
        block = random_block(policy=policy).double()
        wide = maps((3, 10, 14, 6)).double()
        for view in (wide[:, ::2, ::2], wide[:, 5:, 7:].transpose(2, 3), wide[:1, :5].expand(3, 5, 14, 6)):
            results = []
            for net in (copy.deepcopy(block), stock_of(block)):
                x = view.detach().requires_grad_()
                y = net(x)
                y.backward(torch.ones((), dtype=y.dtype).expand(y.shape))
                results.append((y.detach(), x.grad))
            same(*results)

    def test_the_gradient_that_comes_in_is_not_changed(self, backend, policy):
        y = random_block(policy=policy)(maps((3, 5, 7, 6)).requires_grad_())
        grad = torch.randn_like(y)
        before = grad.clone()
        y.backward(grad)
        assert torch.equal(grad, before)

    def test_empty_batch(self, policy):
        block = random_block(policy=policy)
        y = block(torch.empty(0, 5, 7, 6))
        assert y.shape == stock_of(block)(torch.empty(0, 5, 7, 6)).shape

    def test_no_layers(self, policy):
        x = maps((2, 5, 3, 3))
        assert torch.equal(functional.dense_block(x, [], policy=policy), x)


def _format(channels_last):
    return torch.channels_last if channels_last else torch.contiguous_format


class TestTorchvision:
    @pytest.mark.parametrize("channels_last", [False, True])
    def test_one_block_within_1e_12(self, backend, policy, channels_last):
        torch.manual_seed(0)
        stock = import_torchvision().models.densenet._DenseBlock(6, 16, 4, 12, 0.0).double()
        x = maps((2, 16, 13, 11), channels_last).double()
        params = state(stock)
        expected = module_run(stock)({"x": x.clone()}, copy.deepcopy(params))
        ours = module_run(rd.convert(copy.deepcopy(stock), policy))({"x": x.clone()}, copy.deepcopy(params))
        for name, t in expected.items():
            assert (ours[name] - t).double().norm() <= 1e-12 * t.double().norm(), name

    def test_densenet121_within_the_rounding_noise(self, policy):
        torch.manual_seed(0)
        stock = import_torchvision().models.densenet121()
        run, params, inputs = module_run(stock), state(stock.double()), {"x": maps((2, 3, 64, 64)).double()}
        noise = rounding_noise(run, inputs, params)
        expected = run({"x": inputs["x"].clone()}, copy.deepcopy(params))
        ours = module_run(rd.convert(copy.deepcopy(stock), policy))({"x": inputs["x"].clone()}, copy.deepcopy(params))
        assert_within_noise(ours, expected, noise)

    def test_ten_steps_give_the_same_losses(self, policy):
        torch.manual_seed(0)
        models = import_torchvision().models
        stock = models.DenseNet(8, (2, 3), 16, num_classes=5).double()
        x, target = maps((4, 3, 40, 40)).double(), torch.tensor([0, 1, 2, 3])
        expected, ours = (
            ten_losses(net, x, target, 0.1) for net in (copy.deepcopy(stock), rd.convert(copy.deepcopy(stock), policy))
        )
        assert expected[0] > expected[-1]
        same(*([torch.tensor(losses, dtype=torch.float64)] for losses in (ours, expected)))


class TestStatistics:
    def test_counted_once_and_equal_to_stock(self, backend, policy):
        block = random_block(policy=policy).double()
        stock = stock_of(block)
        x = maps((3, 5, 7, 6)).double()
        for net in (block, stock):
            net(x).sum().backward()
        for name, buffer in stock.named_buffers():
            ours = block.get_buffer(name)
            if name.endswith("num_batches_tracked"):
                assert ours == 1
            else:
                assert (ours - buffer).norm() <= 1e-14 * buffer.norm()

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_a_users_checkpoint_counts_as_in_stock(self, policy, use_reentrant):
        block = random_block(policy=policy).double()
        results = []
        for net in (block, stock_of(block)):
            x = maps((3, 5, 7, 6)).double().requires_grad_()
            checkpoint(net, x, use_reentrant=use_reentrant).square().sum().backward()
            results.append([x.grad, *(p.grad for p in net.parameters()), *net.buffers()])
        same(*results)

    def test_eval_and_no_grad_leave_buffers_alone(self, policy):
        block = random_block(policy=policy).eval()
        before = state(block)
        with torch.no_grad():
            block(maps((3, 5, 7, 6)))
        assert all(torch.equal(before[name], t) for name, t in block.state_dict().items())

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_training_statistics_without_gradients(self, policy, mode):
        block = random_block(policy=policy).double()
        stock = stock_of(block)
        with mode():
            ours, expected = block(maps((3, 5, 7, 6)).double()), stock(maps((3, 5, 7, 6)).double())
        assert not ours.requires_grad
        same([ours], [expected])
        assert block.denselayer3.norm2.num_batches_tracked == 1


class TestDropout:
    @pytest.mark.parametrize("p", [0.3, 1.0])
    def test_masks_are_stocks(self, backend, policy, p):
        block = random_block(drop_rate=p, policy=policy)
        agree = []
        for net in (block, stock_of(block)):
            net = copy.deepcopy(net).double()
            torch.manual_seed(5)
            x = maps((3, 5, 7, 6)).double().requires_grad_()
            y = net(x)
            y.square().sum().backward()
            agree.append([y.detach(), x.grad, *(q.grad for q in net.parameters()), torch.rand(1)])
        same(*agree)

    def test_none_in_eval(self, policy):
        block = random_block(drop_rate=0.5, policy=policy).double().eval()
        x = maps((3, 5, 7, 6)).double()
        same([block(x)], [stock_of(block)(x)])

    def test_channel_masks_are_stocks(self):
        like = torch.randn(3, 5, 7, 6)
        torch.manual_seed(5)
        mask, scale = functional.dropout_mask(like, 4, 0.4, per_channel=True)
        torch.manual_seed(5)
        assert torch.equal(mask * torch.ones(3, 4, 7, 6) * scale, F.dropout2d(torch.ones(3, 4, 7, 6), 0.4))

    def test_a_wrong_probability_is_refused(self):
        with pytest.raises(ValueError, match="p: expected a probability from 0 to 1, got 1.5"):
            functional.dropout_mask(torch.zeros(1, 1, 1), 1, 1.5)


def functional_layers(dtype=torch.float64, batch_stats=True, bottleneck=True, masked=False):
    torch.manual_seed(0)
    layers, channels = [], 3
    for _ in range(2):
        widths = [(channels, 4, 1), (4, 2, 3)] if bottleneck else [(channels, 2, 3)]
        units = []
        for inputs, outputs, kernel in widths:
            running = (torch.randn(inputs, dtype=dtype), torch.rand(inputs, dtype=dtype) + 0.5)
            vectors = [(torch.randn(inputs, dtype=dtype) + 1).requires_grad_() for _ in range(2)]
            weight = torch.randn(outputs, inputs, kernel, kernel, dtype=dtype).requires_grad_()
            bias = torch.randn(outputs, dtype=dtype).requires_grad_()
            padding = (kernel // 2,) * 2
            units.append(Unit(BatchNorm(*vectors, *running, batch_stats), Conv(weight, bias, padding)))
        mask = torch.rand(2, 2, 3, 4) > 0.4 if masked else None
        layers.append(DenseLayer(tuple(units), mask, 1.6))
        channels += 2
    return layers


def leaves(layers):
    return [t for layer in layers for norm, conv in layer.units for t in (norm.weight, norm.bias, conv.weight, conv.bias)]


def rebuilt(layers, tensors):
    tensors = iter(tensors)
    return [
        layer._replace(
            units=tuple(
                Unit(norm._replace(weight=next(tensors), bias=next(tensors)),
                     conv._replace(weight=next(tensors), bias=next(tensors)))
                for norm, conv in layer.units
            )
        )
        for layer in layers
    ]  # fmt: skip


VARIANTS = [dict(), dict(batch_stats=False), dict(bottleneck=False), dict(masked=True)]


class TestAutograd:
    @pytest.mark.unpoisoned  # gradcheck itself reads uninitialised memory
    @pytest.mark.parametrize("variant", VARIANTS, ids=str)
    def test_gradcheck(self, backend, policy, variant):
        layers = functional_layers(**variant)
        x = maps((2, 3, 3, 4)).double().requires_grad_()

        def block(x, *tensors):
            return functional.dense_block(x, rebuilt(layers, tensors), activation="leaky_relu", policy=policy)

        assert torch.autograd.gradcheck(block, (x, *leaves(layers)), fast_mode=True)

    @pytest.mark.unpoisoned
    @pytest.mark.parametrize("variant", VARIANTS, ids=str)
    def test_gradgradcheck(self, policy, variant):
        layers = functional_layers(**variant)
        x = maps((2, 3, 3, 4)).double().requires_grad_()

        def block(x, *tensors):
            return functional.dense_block(x, rebuilt(layers, tensors), activation="silu", policy=policy)

        assert torch.autograd.gradgradcheck(block, (x, *leaves(layers)), fast_mode=True)

    def test_create_graph_gives_the_same_gradients(self, backend, policy):
        block = random_block(policy=policy).double()
        x = maps((3, 5, 7, 6)).double().requires_grad_()
        wanted = [x, *block.parameters()]
        plain = torch.autograd.grad(block(x).square().sum(), wanted)
        graph = torch.autograd.grad(block(x).square().sum(), wanted, create_graph=True)
        assert all(t.requires_grad for t in graph)
        same(graph, plain)

    def test_a_penalty_on_the_gradient_trains(self, policy):
        block = random_block(activation="silu", policy=policy).double()
        results = []
        for net in (block, stock_of(block)):
            x = maps((3, 5, 7, 6)).double().requires_grad_()
            (dx,) = torch.autograd.grad(net(x).square().mean(), x, create_graph=True)
            dx.square().sum().backward()
            results.append([p.grad for p in net.parameters()])
        same(*results)

    def test_a_second_forward_before_the_backward(self, backend, policy):
        block = random_block(policy=policy).double()
        results = []
        for net in (block, stock_of(block)):
            a, b = (maps((3, 5, 7, 6), seed=s).double().requires_grad_() for s in (1, 2))
            first, second = net(a), net(b)
            first.square().sum().backward()
            second.square().sum().backward()
            results.append([a.grad, b.grad, *(p.grad for p in net.parameters())])
        same(*results)

    @pytest.mark.parametrize("of", ["output", "view", "detached", "parameter"])
    def test_a_stale_use_raises_and_names_the_block(self, backend, policy, of):
        block = random_block(policy=policy)
        y = block(maps((3, 5, 7, 6)).requires_grad_())
        loss = y.sum()
        with torch.no_grad():
            target = {"output": y, "view": y[:, 6:7], "detached": y.detach(), "parameter": block.denselayer1.conv1.weight}[of]
            target.mul_(2)
        with pytest.raises(RuntimeError, match="dense_block: its output, or a parameter of it, was changed in place"):
            loss.backward()

    def test_the_input_may_change_afterwards(self, policy):
        block = random_block(policy=policy).double()
        x = maps((3, 5, 7, 6)).double()
        expected = module_run(block)({"x": x.clone()}, state(block))["grad denselayer1.conv1.weight"]
        source = x.clone().requires_grad_()
        y = block(source * 1)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
        with torch.no_grad():
            source.zero_()
        y.backward(weights.double())
        assert torch.equal(block.denselayer1.conv1.weight.grad, expected)

    def test_backward_twice_needs_retain_graph(self, policy):
        y = random_block(policy=policy)(maps((3, 5, 7, 6)).requires_grad_()).sum()
        y.backward(retain_graph=True)
        y.backward()
        with pytest.raises(RuntimeError, match="^Trying to backward through the graph a second time"):
            y.backward()

    @pytest.mark.parametrize("variant", VARIANTS, ids=str)
    def test_opcheck(self, backend, policy, variant):
        layers = functional_layers(torch.float32, **variant)
        x = maps((2, 3, 3, 4))
        from resdense_ext.ops import dense_block as op

        keep = [policy == "fast" and len(layer.units) == 2 for layer in layers]
        config = op.DenseBlockConfig.of(layers, Activation(), keep, backend)
        units = (unit for layer in layers for unit in layer.units)
        tensors = [None if t is None else t.detach() for t in flat_tensors(units)]
        masks = [layer.mask for layer in layers if layer.mask is not None]
        utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(torch.ops.resdense.dense_block.default, (x, tensors, masks, *config), test_utils=utilities)
        out, stats, kept = torch.ops.resdense.dense_block(x, tensors, masks, *config)
        for needs in ([True], [False]):
            needs = needs * (1 + 4 * sum(config.units))
            arguments = (torch.randn_like(out), out, tensors, masks, *config, stats, kept, needs)
            torch.library.opcheck(torch.ops.resdense.dense_block_backward.default, arguments, test_utils=utilities)


class TestMemory:
    """What the product is: these fail where a change loses the saving."""

    SIZES = (20, 18)

    def kept(self, block, channels_last=False):
        x = maps((2, block.denselayer1.norm1.num_features, *self.SIZES), channels_last).requires_grad_()
        return rd.memory.saved_bytes(lambda: block(x))

    @pytest.mark.parametrize("channels_last", [False, True])
    @pytest.mark.parametrize("layers", [6, 24, 96])
    def test_linear_in_depth(self, policy, layers, channels_last):
        channels, growth, bn_size = 16, 8, 4
        block = random_block(layers, channels, growth, bn_size=bn_size, policy=policy)
        maps_kept = channels + layers * growth + (bn_size * growth * layers if policy == "fast" else 0)
        expected = maps_kept * 2 * self.SIZES[0] * self.SIZES[1] * 4
        assert expected <= self.kept(block, channels_last) <= 1.02 * expected

    def test_a_thousand_layers_train(self, policy):
        """In bytes that grow by a map a layer (with "fast" by a bottleneck, too), and its statistics."""
        torch.manual_seed(0)
        block = rd.nn.DenseBlock(1000, 4, 1, 1, policy=policy)
        x = maps((2, 4, 6, 6)).requires_grad_()
        channels = 4 + 1000 * (2 if policy == "fast" else 1)
        statistics = 2 * (4 + 1000) + 2 * 1000
        assert rd.memory.saved_bytes(lambda: block(x)) == 4 * (channels * 72 + statistics)
        block(x).square().mean().backward()
        assert all(p.grad.isfinite().all() for p in block.parameters()) and x.grad.abs().sum() > 0

    def test_without_bottleneck_only_the_maps(self, policy):
        expected = (16 + 12 * 8) * 2 * 20 * 18 * 4
        assert expected <= self.kept(random_block(12, 16, 8, bn_size=0, policy=policy)) <= 1.02 * expected

    def test_dropout_keeps_a_byte_an_element(self, policy):
        positions = 2 * 20 * 18
        without = self.kept(random_block(12, 16, 8, bn_size=4, policy=policy))
        with_masks = self.kept(random_block(12, 16, 8, bn_size=4, drop_rate=0.5, policy=policy))
        assert with_masks - without == 12 * 8 * positions

    def test_nothing_kept_without_gradients(self, policy):
        block = random_block(policy=policy).requires_grad_(False)
        assert rd.memory.saved_bytes(lambda: block(maps((2, 5, 20, 18)))) == 0

    @built
    @pytest.mark.parametrize("channels_last", [False, True])
    @pytest.mark.parametrize("bn_size", [2, 0])
    def test_the_peak_is_two_buffers_and_a_scratch(self, policy, bn_size, channels_last):
        """Forward and backward allocate nothing of the size of a layer's input beside the buffer and its gradient."""
        layers, channels, growth, positions = 24, 32, 8, 4 * 28 * 28
        block = random_block(layers, channels, growth, bn_size=bn_size, policy=policy)
        x = maps((4, channels, 28, 28), channels_last).requires_grad_()
        buffer = (channels + layers * growth) * positions * 4
        width = bn_size * growth * positions * 4
        kept = width * layers if policy == "fast" else 0
        # One sample's input and its gradient for a 3x3 without bottleneck; else some maps of the bottleneck's width,
        # the framework's copies of them in its own layout, and a tile a thread.
        sample = (channels + layers * growth) * positions // 4 * 4
        scratch = 3 * sample if bn_size == 0 else 8 * width
        grad = torch.ones(4, channels + layers * growth, 28, 28).contiguous(memory_format=_format(channels_last))

        def step():
            block(x).backward(grad)

        assert 2 * buffer + kept <= rd.memory.peak_bytes(step) <= 2 * buffer + kept + scratch + 2**20


@pytest.mark.gpu
class TestCuda:
    @pytest.mark.parametrize("channels_last", [False, True])
    def test_agrees_with_the_cpu_in_float64(self, policy, channels_last):
        block, x = random_block(policy=policy).double(), maps((3, 5, 7, 6), channels_last).double()
        expected = module_run(stock_of(block))({"x": x.clone()}, state(block))
        ours = module_run(block.cuda())({"x": x.cuda()}, {name: t.cuda() for name, t in state(block).items()})
        same([ours[name].cpu() for name in expected], list(expected.values()))

    def test_memory(self, policy):
        block = random_block(24, 16, 8, bn_size=4, policy=policy).cuda()
        x = maps((2, 16, 20, 18)).cuda()
        expected = (16 + 24 * 8 + (4 * 8 * 24 if policy == "fast" else 0)) * 2 * 20 * 18 * 4
        assert expected <= rd.memory.saved_bytes(lambda: block(x)) <= 1.02 * expected


class TestErrors:
    def block(self, policy="fast", **kwargs):
        return random_block(policy=policy, **kwargs)

    @pytest.mark.parametrize(
        ("x", "error", "message"),
        [
            (torch.zeros(3, 5), ValueError, r"x: expected 3, 4 or 5 dimensions .* got 2: \(3, 5\)"),
            (torch.zeros(3, 5, 7), ValueError, "weight: expected 3 dimensions as x has, got 4"),
            (torch.zeros(3, 6, 7, 7), ValueError, r"layers\[0\].units\[0\].norm.weight: expected shape \(6,\).*got \(5,\)"),
            (torch.zeros(3, 5, 7, 7).long(), TypeError, "x: expected float32, float64, bfloat16 or float16, got torch.int64"),
            (torch.zeros(3, 5, 7, 7).double(), TypeError, "weight: expected dtype torch.float64, got torch.float32"),
            (torch.zeros(3, 5, 7, 7, device="meta"), ValueError, "expected device meta .* got cpu"),
            (torch.zeros(1, 5, 1, 1), ValueError, "expected more than 1 value per channel when training"),
        ],
        ids=["rank", "dimensions", "channels", "integer", "dtype", "device", "one value"],
    )
    def test_bad_input_changes_nothing(self, policy, x, error, message):
        block = self.block(policy, drop_rate=0.5)
        before, random = state(block), torch.get_rng_state()
        with pytest.raises(error, match=message):
            block(x)
        assert all(torch.equal(before[name], t) for name, t in block.state_dict().items())
        assert torch.equal(torch.get_rng_state(), random)

    def test_a_wrong_drop_rate_draws_nothing(self, policy):
        block = self.block(policy, drop_rate=0.5)
        block.denselayer2.drop_rate = 1.5
        random = torch.get_rng_state()
        with pytest.raises(ValueError, match="drop_rate: expected a probability from 0 to 1, got 1.5"):
            block(maps((3, 5, 7, 6)))
        assert torch.equal(torch.get_rng_state(), random)

    def test_a_buffer_that_cannot_be_updated(self, policy):
        block = self.block(policy)
        with torch.inference_mode():
            block.denselayer3.norm2.running_var = torch.ones(8)
        before = state(block)
        with pytest.raises(ValueError, match="running_var: expected a buffer that training can update, got one made in infer"):
            block(maps((3, 5, 7, 6)))
        assert all(torch.equal(before[name], t) for name, t in block.state_dict().items())

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (dict(policy="tiny"), ValueError, "policy: expected one of fast, min, or a bool a layer, got 'tiny'"),
            (dict(policy=None), ValueError, "policy: expected one of fast, min, or a bool a layer, got None"),
            (dict(activation="gelu"), ValueError, "activation: expected relu, .* got 'gelu'"),
        ],
    )
    def test_options(self, change, error, message):
        with pytest.raises(error, match=message):
            functional.dense_block(maps((2, 3, 3, 4)).double(), functional_layers(), **change)

    def changed(self, **change):
        """One layer whose first norm or convolution is changed."""
        layer = functional_layers()[0]
        norm, conv = layer.units[0]
        norm = norm._replace(**{k: v for k, v in change.items() if k in norm._fields and k not in ("weight", "bias", "groups")})
        conv = conv._replace(**{k: v for k, v in change.items() if k in conv._fields})
        return [DenseLayer((Unit(norm, conv), *layer.units[1:]))]

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (dict(running_mean=None, batch_stats=False), ValueError, "expected running_mean and running_var where"),
            (dict(eps=0.0), ValueError, r"layers\[0\].units\[0\].norm.eps: expected a positive number, got 0.0"),
            (dict(running_mean=None, momentum=0.1), ValueError, "running_mean and running_var both or neither"),
            (dict(running_mean=torch.zeros(3).long()), TypeError, "running_mean: expected a floating dtype"),
            (dict(running_var=torch.ones(1).expand(3), momentum=0.1), ValueError, "got an expanded one"),
            (dict(running_var=torch.ones(3, requires_grad=True), momentum=0.1), ValueError, "got one that requires grad"),
            (dict(padding=(1, 1)), ValueError, "expected a convolution that keeps the spatial size"),
            (dict(padding=(0,)), ValueError, "expected padding and dilation of 2 numbers"),
            (dict(groups=2), ValueError, "with K a multiple of groups = 2"),
            (dict(bias=torch.zeros(3).double()), ValueError, r"bias: expected shape \(4,\), got \(3,\)"),
        ],
        ids=str,
    )
    def test_layers(self, change, error, message):
        with pytest.raises(error, match=message):
            functional.dense_block(maps((2, 3, 3, 4)).double(), self.changed(**change))

    def test_number_of_units_and_mask(self):
        x, layer = maps((2, 3, 3, 4)).double(), functional_layers()[0]
        with pytest.raises(ValueError, match=r"layers\[0\].units: expected one or two, got 0"):
            functional.dense_block(x, [DenseLayer(())])
        with pytest.raises(ValueError, match=r"mask: expected a shape that broadcasts to \(2, 2, 3, 4\), got \(2, 3, 3, 4\)"):
            functional.dense_block(x, [layer._replace(mask=torch.ones(2, 3, 3, 4))])
        with pytest.raises(ValueError, match=r"layers\[0\].mask_scale: expected a positive number, got 0.0"):
            functional.dense_block(x, [layer._replace(mask=torch.ones(2, 2, 3, 4), mask_scale=0.0)])


class TestReference:
    def test_dense_block_is_the_stock_path(self):
        block = random_block().double()
        x = maps((3, 5, 7, 6)).double()
        from resdense_ext.nn.read import read_layers

        layers, activation = read_layers(block.layer_modules())
        with stock_path():
            expected = block(x)
        assert torch.allclose(reference.dense_block(x, layers, activation), expected, rtol=1e-12, atol=1e-12)


def test_deterministic_mode_repeats_bitwise(backend, policy):
    block = random_block(policy=policy)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [module_run(block)({"x": maps((4, 5, 17, 13))}, state(block)) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    for other in runs[1:]:
        assert all(torch.equal(t, other[name]) for name, t in runs[0].items())


def test_pickle(policy):
    block = random_block(policy=policy)
    again = pickle.loads(pickle.dumps(block))
    assert again.policy == policy
    assert torch.equal(again(maps((3, 5, 7, 6))), block(maps((3, 5, 7, 6))))


def test_backend_is_remembered_for_the_backward(policy, monkeypatch):
    x = maps((3, 5, 7, 6)).requires_grad_()
    block = random_block(policy=policy)
    calls = []

    class Recording(ReferenceBackend):
        name = "triton"

        def bn_act_conv_backward(self, *args):
            calls.append(self.name)
            return super().bn_act_conv_backward(*args)

    monkeypatch.setitem(backends._backends, "triton", Recording())
    with rd.use_backend("triton"):
        y = block(x)
    y.sum().backward()
    assert calls == ["triton"] * 6


@pytest.mark.parametrize("call", [0, 2, 5])
@pytest.mark.parametrize("during", ["bn_act_conv", "bn_act_conv_backward"])
def test_running_out_of_memory_in_the_middle_changes_nothing(policy, during, call, monkeypatch):
    calls = []

    class Full(ReferenceBackend):
        name = "cuda"

    def fail(self, *args):
        calls.append(during)
        if len(calls) > call:
            raise torch.OutOfMemoryError("no memory left")
        return getattr(ReferenceBackend, during)(self, *args)

    setattr(Full, during, fail)
    monkeypatch.setitem(backends._backends, "cuda", Full())
    block, x = random_block(policy=policy), maps((3, 5, 7, 6)).requires_grad_()
    before = state(block)
    with rd.use_backend("cuda"):
        if during == "bn_act_conv":
            with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
                block(x)
        else:
            y = block(x)
            before = state(block)  # a forward that has ended counts, as in stock
            with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
                y.sum().backward()
            assert x.grad is None and all(p.grad is None for p in block.parameters())
    assert all(torch.equal(before[name], t) for name, t in block.state_dict().items())
    monkeypatch.undo()
    block(x).sum().backward()
    assert all(p.grad is not None for p in block.parameters())
