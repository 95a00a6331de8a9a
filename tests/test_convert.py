"""Conversion: the same model to everything around it, the same numbers, and the stock path where it has to be."""

import copy
import inspect
import io
import pickle
import re
import subprocess
import sys
import types
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_nets import (  # noqa: F401
    CONSTRUCTED,
    assert_same,
    engine,
    images,
    policy,
    silent,
    small_block,
    small_densenet,
    steps,
    torchvision_densenet,
)
from tolerance import assert_within_rule, module_run, torch_runs, true_run
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_hooks
from torch.nn.utils import parametrizations
from torch.optim import swa_utils
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import resdense_ext as rd
from resdense_ext.nn.read import read_layers

densenet = torchvision_densenet()
BatchNorms = nn.modules.batchnorm._BatchNorm


def converted(model, policy="fast"):
    return rd.convert(copy.deepcopy(model), policy)


def norms(model):
    return [m for m in model.modules() if isinstance(m, BatchNorms)]


@pytest.mark.usefixtures("silent")
class TestStaysTheSameModel:
    def test_objects_names_and_classes(self, policy):
        model = small_densenet()
        parameters, buffers = list(model.parameters()), list(model.buffers())
        modules, keys, printed = dict(model.named_modules()), list(model.state_dict()), repr(model)
        assert rd.convert(model, policy) is model
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        assert all(a is b for a, b in zip(model.buffers(), buffers, strict=True))
        assert list(model.state_dict()) == keys
        assert list(dict(model.named_modules())) == list(modules)
        assert all(module is modules[path] for path, module in model.named_modules())
        assert repr(model) == printed
        assert isinstance(model, densenet.DenseNet)
        assert isinstance(model.features.denseblock1, densenet._DenseBlock)
        assert isinstance(model.features.denseblock1, nn.ModuleDict)

    def test_called_and_described_as_stock(self, policy, engine):
        stock, x = small_densenet(), images(2, 16, 5, 4)
        model = converted(stock, policy)
        for path, module in model.named_modules():
            assert inspect.signature(module.forward) == inspect.signature(stock.get_submodule(path).forward)
            assert inspect.getdoc(type(module)) == inspect.getdoc(type(stock.get_submodule(path)))
        assert_same(*({"output": net.features.denseblock1(init_features=x)} for net in (model, stock)))
        assert engine == [policy]
        with pytest.raises(TypeError, match="missing a required argument: 'init_features'"):
            model.features.denseblock1(x=x)

    def test_bare_block(self, policy, engine):
        block = small_block()
        assert rd.convert(block, policy) is block
        block(images(2, 6, 5, 4))
        assert engine == [policy]

    def test_again_with_another_policy(self, engine):
        model = rd.convert(rd.convert(small_densenet(), "fast"), "min")
        kind = type(model.features.denseblock1)
        assert kind.__bases__[1] is densenet._DenseBlock
        assert kind is type(converted(small_densenet()).features.denseblock1)
        model(images(2, 3, 32, 32))
        assert engine == ["min", "min"]

    def test_revert(self, policy, engine):
        stock = small_densenet()
        before = copy.deepcopy(stock.__dict__["_modules"])
        model = converted(stock, policy)
        model(images(2, 3, 32, 32))
        assert rd.revert(model) is model
        assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]
        assert [sorted(vars(m)) for m in model.modules()] == [sorted(vars(m)) for m in stock.modules()]
        assert repr(model._modules) == repr(before)
        engine.clear()
        x = images(2, 3, 32, 32)
        assert torch.equal(model.eval()(x), steps(model, x)["output"]) and not engine

    def test_revert_of_a_stock_model(self):
        stock = small_densenet()
        assert rd.revert(stock) is stock
        assert type(stock.features.denseblock1) is densenet._DenseBlock

    def test_converts_again_after_revert(self, policy, engine):
        model = rd.convert(rd.revert(converted(small_densenet())), policy)
        model(images(2, 3, 32, 32))
        assert engine == [policy, policy]

    def test_state_dict_both_ways(self, policy):
        stock, other = small_densenet(), small_densenet()
        model = converted(stock, policy)
        model(images(2, 3, 32, 32))
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values(), strict=True))
        model.load_state_dict(stock.state_dict())
        x = images(2, 3, 33, 31)
        assert_same(steps(model, x), steps(stock, x))
        model.load_state_dict({name: t.clone() for name, t in stock.state_dict().items()}, assign=True)
        assert_same(steps(model, x), steps(stock, x))

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_pickle(self, policy, protocol, engine):
        model, x = converted(small_densenet(), policy).eval(), images(2, 3, 32, 32)
        again = pickle.loads(pickle.dumps(model, protocol))
        assert type(again.features.denseblock1) is type(model.features.denseblock1)
        assert torch.equal(again(x), model(x))
        assert engine == [policy] * 4

    def test_whole_model_in_a_file_and_a_fresh_process(self, policy, tmp_path):
        model, x = converted(small_densenet(), policy).eval(), images(2, 3, 32, 32)
        torch.save((model, x), tmp_path / "model.pt")
        code = inspect.cleandoc("""
            import sys, torch
            sys.path[:0] = sys.argv[2:]
            from stock import import_torchvision
            import_torchvision()
            model, x = torch.load(sys.argv[1], weights_only=False)
            from resdense_ext.convert.classes import ConvertedDenseBlock
            assert isinstance(model.features.denseblock1, ConvertedDenseBlock)
            torch.save(model(x).detach(), sys.argv[1])
        """)
        here = Path(__file__).parent
        command = [sys.executable, "-c", code, tmp_path / "model.pt", here, here.parent]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        torch.testing.assert_close(torch.load(tmp_path / "model.pt"), model(x).detach(), rtol=1e-12, atol=1e-12)

    def test_deepcopy_is_its_own(self, policy, engine):
        model, x = converted(small_densenet(), policy), images(2, 3, 32, 32)
        again = copy.deepcopy(model)
        rd.revert(model)
        assert all(a is not b for a, b in zip(again.parameters(), model.parameters()))
        assert_same(steps(again, x), steps(model, x))
        assert engine == [policy, policy]

    @pytest.mark.parametrize("before", [True, False])
    def test_optimizer_built_before_or_after(self, policy, before):
        stock = small_densenet()
        model = copy.deepcopy(stock)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (stock, model)]
        rd.convert(model, policy)
        if not before:
            optimizers[1] = torch.optim.SGD(model.parameters(), lr=0.1)
        for net, optimizer in zip((stock, model), optimizers):
            net(images(2, 3, 32, 32)).square().sum().backward()
            optimizer.step()
        assert_same(dict(model.named_parameters()), dict(stock.named_parameters()))

    def test_slices_and_inner_modules(self, policy):
        stock = small_densenet()
        model, x = converted(stock, policy), images(2, 3, 32, 32)
        assert_same(steps(model.features[:6], x), steps(stock.features[:6], x))
        h = images(2, 16, 5, 4)
        for path in ("transition1.norm", "denseblock1.denselayer1", "denseblock1.denselayer1.conv1", "denseblock1"):
            x = images(2, 32, 5, 4) if "transition" in path else h
            assert_same(steps(model.features.get_submodule(path), x), steps(stock.features.get_submodule(path), x))
        layer = model.features.denseblock1.denselayer2
        assert layer([h, images(2, 8, 5, 4)]).shape == (2, 8, 5, 4)

    def test_subclass_that_keeps_the_forward(self, policy, engine):
        class Block(densenet._DenseBlock):
            def extra(self):
                return len(self)

        block = small_block()
        block.__class__ = Block
        model = converted(block, policy)
        assert model.extra() == 3 and isinstance(model, Block)
        assert_same(steps(model, images(2, 6, 5, 4)), steps(block, images(2, 6, 5, 4)))
        assert engine == [policy]
        assert type(rd.revert(model)) is Block

    def test_says_what_it_converted(self, caplog):
        with caplog.at_level("INFO", "resdense_ext"):
            rd.convert(small_densenet())
            rd.convert(small_block())
        assert caplog.messages == [
            "converted 2 blocks to policy 'fast': features.denseblock1, features.denseblock2",
            "converted 1 blocks to policy 'fast': _DenseBlock",
        ]


class TestNumbers:
    @pytest.mark.parametrize("channels_last", [False, True])
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("size", [(32, 32), (33, 31)], ids=str)
    def test_whole_network(self, policy, size, training, channels_last):
        stock = small_densenet().train(training)
        x = images(3, 3, *size)
        if channels_last:
            stock, x = stock.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
        assert_same(steps(converted(stock, policy), x), steps(stock, x))

    def test_own_model(self, policy, engine):
        model = rd.models.DenseNet(8, (2, 3), 16, num_classes=5, policy=None).double()
        x = images(2, 3, 32, 32)
        assert_same(steps(converted(model, policy), x), steps(model, x))
        assert engine == [policy, policy]
        assert_same(steps(rd.revert(converted(model, policy)), x), steps(model, x))
        assert engine == [policy, policy]

    def test_ten_steps_of_sgd(self, policy):
        def losses(model):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
            result = []
            for step in range(10):
                loss = F.cross_entropy(model(images(4, 3, 32, 32, seed=step)), torch.arange(4))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                result.append(loss.item())
            return torch.tensor(result, dtype=torch.float64)

        stock = small_densenet()
        torch.testing.assert_close(losses(converted(stock, policy)), losses(stock), rtol=1e-9, atol=1e-9)

    def test_memory_efficient_counts_once(self, policy):
        stock = small_densenet(memory_efficient=True)
        ours, x = steps(converted(stock, policy), images(2, 3, 32, 32)), images(2, 3, 32, 32)
        counts = [int(t) for name, t in ours.items() if name.endswith("num_batches_tracked")]
        assert counts == [1] * len(norms(stock))
        theirs = steps(stock, x)
        assert theirs["buffer features.denseblock1.denselayer1.norm1.num_batches_tracked"] == 2
        assert_same(ours, steps(small_densenet(), x))

    @pytest.mark.parametrize("channels_last", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("drop_rate", [0.3, 1.0])
    def test_dropout_masks_are_stocks(self, policy, dtype, drop_rate, channels_last):
        stock = small_block(dtype, drop_rate=drop_rate)
        x = images(4, 6, 9, 7).to(dtype)
        if channels_last:
            x = x.to(memory_format=torch.channels_last)

        def seeded(model, x):
            torch.manual_seed(5)
            return model(x)

        ours, theirs = (steps(m, x, call=seeded) for m in (converted(stock, policy), stock))
        assert torch.equal(ours["output"][:, 6:] == 0, theirs["output"][:, 6:] == 0)
        if dtype == torch.float64:
            assert_same(ours, theirs)

    def test_dropout_leaves_the_same_random_state(self, policy):
        stock, x = small_block(drop_rate=0.3), images(2, 6, 5, 4)
        draws = []
        for model in (stock, converted(stock, policy)):
            torch.manual_seed(5)
            model(x)
            draws.append(torch.rand(3))
        assert torch.equal(*draws)

    def test_no_dropout_in_eval(self, policy):
        stock, x = small_block(drop_rate=0.5).eval(), images(2, 6, 5, 4)
        state = torch.get_rng_state()
        assert_same(steps(converted(stock, policy), x), steps(stock, x))
        assert torch.equal(torch.get_rng_state(), state)
        # As in stock, the layer itself decides.
        stock.denselayer2.training = True
        torch.manual_seed(5)
        expected = stock(x)
        torch.manual_seed(5)
        torch.testing.assert_close(converted(stock, policy)(x), expected)

    def test_input_stays_as_it_was(self, policy):
        x = images(2, 6, 5, 4)
        block, before = converted(small_block(), policy), x.clone()
        block(x).sum().backward()
        assert torch.equal(x, before)

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    @pytest.mark.parametrize("training", [True, False])
    def test_without_gradients(self, policy, context, training):
        stock = small_densenet().train(training)
        ours, x = converted(stock, policy), images(2, 3, 32, 32)
        with context():
            a, b = ours(x), stock(x)
        assert a.is_inference() == b.is_inference() and not a.requires_grad
        assert_same({"output": a, **dict(ours.named_buffers())}, {"output": b, **dict(stock.named_buffers())})

    @pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("training", [True, False])
    def test_autocast(self, policy, x_dtype, training):
        stock = small_block(torch.float32).train(training)
        inputs, params = {"x": images(4, 6, 9, 7).to(x_dtype)}, stock.state_dict()
        ours = module_run(converted(stock, policy), torch.bfloat16)(
            {"x": inputs["x"].clone()}, {name: t.clone() for name, t in params.items()}
        )
        run = module_run(stock, torch.bfloat16)
        runs = torch_runs(run, inputs, params)
        assert_within_rule(ours, true_run(run, inputs, params), runs, torch.bfloat16)
        assert {name: t.dtype for name, t in ours.items()} == {name: t.dtype for name, t in runs[0].items()}

    @pytest.mark.parametrize("autocast", [False, True])
    @pytest.mark.parametrize(
        "make",
        [
            lambda x: x,
            lambda x: x.to(memory_format=torch.channels_last),
            lambda x: x.repeat(1, 2, 1, 1)[:, ::2],
            lambda x: x.repeat(1, 2, 1, 1).to(memory_format=torch.channels_last)[:, 3:9],
            lambda x: x.transpose(2, 3),
            lambda x: x[:1].expand(4, -1, -1, -1),
            lambda x: x[:, :, :1, :1],
        ],
        ids=["contiguous", "channels last", "every other channel", "slice", "transposed", "expanded", "1x1"],
    )
    @pytest.mark.parametrize("channels_last_weights", [False, True])
    def test_memory_format(self, policy, make, autocast, channels_last_weights):
        stock, x = small_block(torch.float32), make(images(4, 6, 9, 7).float())
        if channels_last_weights:
            stock = stock.to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ours, theirs = converted(stock, policy)(x), stock(x)
        assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("make", [lambda v: torch.stack([v, v], 1)[:, 0], lambda v: v[:1].expand(len(v))], ids=["strided", "expanded"])
    def test_vectors_of_any_stride(self, policy, make, training):
        ours, stock = (small_densenet().train(training) for _ in range(2))  # a copy's would be contiguous
        for module in (*norms(ours), *norms(stock)):
            module.weight, module.bias = (nn.Parameter(make(v.detach())) for v in (module.weight, module.bias))
            if not training:
                module.running_mean, module.running_var = make(module.running_mean), make(module.running_var)
        x = images(2, 3, 32, 32)
        results = []
        for model in (rd.convert(ours, policy), stock):
            output = model(x)
            output.square().sum().backward()
            results.append({"output": output} | {f"grad {name}": p.grad for name, p in model.named_parameters()})
        assert_same(*results)

    def test_empty_batch(self, policy):
        stock, x = small_block(), images(0, 6, 5, 4)
        assert_same(steps(converted(stock, policy), x), steps(stock, x))

    def test_two_forwards_before_the_backward(self, policy):
        def call(model, x):
            return model(x) + model(x.flip(0)) * 2

        stock, x = small_densenet(), images(2, 3, 32, 32)
        assert_same(steps(converted(stock, policy), x, call=call), steps(stock, x, call=call))

    def test_gradients_accumulate(self, policy):
        stock, x = small_densenet(), images(2, 3, 32, 32)
        assert_same(steps(converted(stock, policy), x, count=3), steps(stock, x, count=3))

    def test_graph_is_kept_for_a_second_backward(self, policy):
        def call(model, x):
            output = model(x)
            output.sum().backward(retain_graph=True)
            return output

        stock, x = small_block(), images(2, 6, 5, 4)
        assert_same(steps(converted(stock, policy), x, call=call), steps(stock, x, call=call))

    def test_input_may_change_after_the_forward(self, policy):
        def call(model, x):
            x = x * 1
            output = model(x)
            x.zero_()
            return output

        stock, x = small_block(), images(2, 6, 5, 4)
        assert_same(steps(converted(stock, policy), x, call=call), steps(stock, x, call=call))

    def test_saved_tensors_may_be_kept_elsewhere(self, policy):
        stock, x = small_block(), images(2, 6, 5, 4)
        expected = steps(stock, x)
        with torch.autograd.graph.save_on_cpu():
            assert_same(steps(converted(stock, policy), x), expected)

    def test_updated_by_update_bn(self, policy):
        def averaged(model):
            model = swa_utils.AveragedModel(model)
            model.update_parameters(model.module)
            swa_utils.update_bn([images(2, 6, 5, 4), images(2, 6, 5, 4, seed=1)], model)
            return dict(model.named_buffers())

        stock = small_block()
        assert_same(averaged(converted(stock, policy)), averaged(stock))

    @pytest.mark.parametrize("use_reentrant", [True, False])
    @pytest.mark.parametrize("drop_rate", [0.0, 0.3])
    def test_inside_a_checkpoint(self, policy, use_reentrant, drop_rate):
        def call(model, x):
            torch.manual_seed(5)
            return checkpoint(model.features, x, use_reentrant=use_reentrant).mean((2, 3))

        stock, x = small_densenet(drop_rate=drop_rate), images(2, 3, 32, 32)
        assert_same(steps(converted(stock, policy), x, call=call), steps(stock, x, call=call))

    def test_functional_call_with_other_tensors(self, policy, engine):
        stock, x = small_densenet(), images(2, 3, 32, 32)
        results = []
        for model in (stock, converted(stock, policy)):
            state = {name: t.detach() * 1.5 for name, t in model.state_dict().items() if t.is_floating_point()}
            for name, _ in model.named_parameters():
                state[name].requires_grad_()
            output = torch.func.functional_call(model, state, (x,))
            output.square().sum().backward()
            results.append({"output": output} | state | {f"grad {n}": t.grad for n, t in state.items() if t.requires_grad})
        assert_same(*reversed(results))
        assert engine == [policy, policy]

    @pytest.mark.parametrize("trained", ["norm", "conv", "last layer", "nothing", "bias"])
    def test_only_some_parameters_train(self, policy, trained):
        stock, x = small_densenet(), images(2, 3, 32, 32)
        for name, p in stock.named_parameters():
            p.requires_grad_(trained.replace("last layer", "denselayer3") in name)
        assert_same(steps(converted(stock, policy), x), steps(stock, x))


def replace_norms(model, **options):
    for module in list(model.modules()):
        for name, norm in list(module.named_children()):
            if isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, nn.BatchNorm2d(norm.num_features, **options).double())


def set_on_norms(model, **attributes):
    for i, norm in enumerate(norms(model)):
        for name, value in attributes.items():
            setattr(norm, name, value(i) if callable(value) else value)


def first_norms(model, training):
    for layer in model.values():
        layer.norm1.train(training)


CORNERS = {
    "frozen": lambda m: [norm.eval() for norm in norms(m)],
    "trained": lambda m: [norm.train() for norm in norms(m)],
    "first frozen": lambda m: first_norms(m, False),
    "first trained": lambda m: first_norms(m, True),
    "momentum None": partial(set_on_norms, momentum=None),
    "momentum 0": partial(set_on_norms, momentum=0.0),
    "momentum 1": partial(set_on_norms, momentum=1.0),
    "momentum a norm": partial(set_on_norms, momentum=lambda i: 0.05 * (i + 1)),
    "eps a norm": partial(set_on_norms, eps=lambda i: 10.0 ** -(i + 1)),
    "built without statistics": partial(replace_norms, track_running_stats=False),
    "statistics switched off": partial(set_on_norms, track_running_stats=False),
    "statistics removed": partial(set_on_norms, running_mean=None, running_var=None),
    "counter removed": partial(set_on_norms, num_batches_tracked=None),
    "counter removed, momentum None": partial(set_on_norms, num_batches_tracked=None, momentum=None),
    "affine=False": partial(replace_norms, affine=False),
    "nothing": partial(replace_norms, affine=False, track_running_stats=False, momentum=None),
}
if "bias" in inspect.signature(nn.BatchNorm2d).parameters:  # not in torch 2.11
    CORNERS["bias=False"] = partial(replace_norms, bias=False)


@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.usefixtures("silent")
def test_batch_norm_corners(corner, training, policy, engine):
    stock, x = small_block().train(training), images(2, 6, 5, 4)
    CORNERS[corner](stock)
    assert_same(steps(converted(stock, policy), x, count=3), steps(stock, x, count=3))
    assert engine == [policy] * 3


def conv(**options):
    return lambda old: nn.Conv2d(old.in_channels, old.out_channels, old.kernel_size, bias=False, **options).double()


def set_on(module, **attributes):
    vars(module).update(attributes)
    return module


def every(name, make):
    return lambda block: [setattr(layer, name, make(getattr(layer, name))) for layer in block.values()]


def both_activations(make):
    return lambda block: [setattr(layer, name, make()) for layer in block.values() for name in ("relu1", "relu2")]


SERVED = {
    "silu": both_activations(nn.SiLU),
    "elu": both_activations(nn.ELU),
    "leaky_relu": both_activations(lambda: nn.LeakyReLU(0.2, inplace=True)),
    "identity": both_activations(nn.Identity),
    "padding same": every("conv2", conv(padding="same")),
    "padding valid": every("conv1", conv(padding="valid")),
    "padding as a number": every("conv2", lambda old: set_on(old, padding=1)),
    "dilation": every("conv2", conv(padding=2, dilation=2)),
    "dilation as a number": every("conv2", lambda old: set_on(old, padding=(2, 2), dilation=2)),
    "groups": every("conv2", lambda old: nn.Conv2d(8, 4, 3, padding=1, groups=2).double()),
    "padding mode without padding": every("conv1", conv(padding_mode="reflect")),
    "subclasses": lambda block: [set_class(m, CONSTRUCTED[type(m)]) for m in block.modules() if type(m) in CONSTRUCTED],
}


@pytest.mark.parametrize("change", SERVED)
@pytest.mark.usefixtures("silent")
def test_changed_modules_that_the_engine_serves(change, policy, engine):
    stock, x = small_block(), images(2, 6, 5, 6)
    model = converted(stock, policy)
    torch.manual_seed(0)
    SERVED[change](stock)
    torch.manual_seed(0)
    SERVED[change](model)
    assert_same(steps(model, x), steps(stock, x))
    assert engine == [policy]


def one(path, make):
    def change(block):
        parent, _, name = path.rpartition(".")
        parent = block.get_submodule(parent)
        setattr(parent, name, make(getattr(parent, name)))

    return change


def doubled(module, x):
    return type(module).forward(module, x) * 2


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


class WeightTwice(nn.Conv2d):
    @property
    def weight(self):
        return 2 * self._parameters["weight"]


class OwnNorm(nn.BatchNorm2d):
    def _check_input_dim(self, input):
        input.mul_(2)


class OwnLayer(nn.Module):
    def forward(self, features):
        return torch.cat(features, 1)[:, :4] * 2


def set_class(module, kind):
    module.__class__ = kind
    return module


def patch(module):
    module.forward = types.MethodType(doubled, module)
    return module


def without_registration(old):
    weight = old.weight.detach()
    del old.weight
    old.weight = weight
    return old


def share_second_norms(block):
    block.denselayer2.norm2 = block.denselayer1.norm2


def slopes(block):
    for i, layer in enumerate(block.values()):
        layer.relu1 = nn.LeakyReLU(i / 10)


NOT_SERVED = {
    "one silu": (one("denselayer2.relu1", lambda _: nn.SiLU()), r"the layers' activations differ: \['relu', 'silu'\]"),
    "slopes": (slopes, "the layers' activations differ: .*'leaky_relu'"),
    "gelu": (one("denselayer1.relu2", lambda _: nn.GELU()), r"denselayer1.relu2 is GELU\(approximate='none'\)"),
    "elu": (both_activations(lambda: nn.ELU(0.5)), r"denselayer1.relu1 is ELU\(alpha=0.5\)"),
    "group norm": (one("denselayer3.norm2", lambda _: nn.GroupNorm(2, 8).double()), "denselayer3.norm2 is GroupNorm"),
    "instance norm": (
        every("norm1", lambda old: nn.InstanceNorm2d(old.num_features).double()),
        "denselayer1.norm1 is InstanceNorm2d",
    ),
    "conv subclass": (one("denselayer1.conv2", lambda old: set_class(old, OwnConv)), "denselayer1.conv2 is OwnConv"),
    "conv with another weight": (
        one("denselayer1.conv2", lambda old: set_class(old, WeightTwice)), "denselayer1.conv2 is WeightTwice"
    ),
    "norm subclass": (one("denselayer1.norm2", lambda old: set_class(old, OwnNorm)), "denselayer1.norm2 is OwnNorm"),
    "parametrised": (one("denselayer1.conv1", parametrizations.weight_norm), "denselayer1.conv1 is ParametrizedConv2d"),
    "not registered": (one("denselayer1.conv1", without_registration), "denselayer1.conv1 has no registered 'weight'"),
    "even kernel": (
        one("denselayer1.conv2", lambda _: nn.Conv2d(8, 4, (2, 3), padding="same").double()),
        "denselayer1.conv2 pads one side more than the other",
    ),
    "padding mode": (
        one("denselayer2.conv2", conv(padding=1, padding_mode="circular")),
        "denselayer2.conv2 pads with 'circular'",
    ),
    "shared norm": (share_second_norms, "denselayer1.norm2 serves twice"),
    "own layer": (one("denselayer2", lambda _: OwnLayer()), "denselayer2 is OwnLayer"),
    "patched conv": (one("denselayer2.conv1", patch), "denselayer2.conv1 has a forward of its own"),
    "patched layer": (one("denselayer2", patch), "denselayer2 has a forward of its own"),
}


@pytest.mark.parametrize("change", NOT_SERVED)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_changed_modules_take_the_stock_path(change, policy, engine):
    mutate, reason = NOT_SERVED[change]
    stock, x = small_block(), images(2, 6, 5, 6)
    model = converted(stock, policy)
    for block in (stock, model):
        torch.manual_seed(0)
        mutate(block)
    with pytest.warns(UserWarning, match=f"a _DenseBlock runs its stock path: {reason}"):
        ours, note = steps(model, x), rd.report(model, x).rows[0].note
    assert_same(ours, steps(stock, x), tolerance=0)
    assert not engine
    assert re.match(f"stock path: {reason}", note)


def test_tensors_that_wrap_others_take_the_stock_path(policy, engine):
    model, x = converted(small_block(), policy), images(2, 6, 5, 6)
    expected = model(x)
    with pytest.warns(UserWarning, match="the input is TwoTensor"):
        output = model(TwoTensor(x, x))
    assert_same({"output": output.a}, {"output": expected})
    norm = model.denselayer1.norm2
    norm.weight = nn.Parameter(TwoTensor(norm.weight.detach(), norm.weight.detach()))
    with pytest.warns(UserWarning, match="denselayer1.norm2 holds TwoTensor"):
        assert isinstance(model(x), TwoTensor)
    assert engine == [policy]


def test_subclass_of_tensor_stays_one(policy, engine):
    class Image(torch.Tensor):
        pass

    stock, x = small_block(), images(2, 6, 5, 6)
    output = converted(stock, policy)(x.as_subclass(Image))
    assert type(output) is type(stock(x.as_subclass(Image))) is Image
    assert engine == [policy]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weight_norm_by_a_hook_takes_the_stock_path(policy, engine):
    stock, x = small_block(), images(2, 6, 5, 6)
    model = converted(stock, policy)
    for block in (stock, model):
        nn.utils.weight_norm(block.denselayer1.conv1)
    with pytest.warns(UserWarning, match="denselayer1.conv1 carries hooks"):
        assert torch.equal(model(x), stock(x))
    nn.utils.remove_weight_norm(model.denselayer1.conv1)
    assert_same({"output": model(x)}, {"output": stock(x)})
    assert engine == [policy]


def test_lazy_convolution_takes_the_stock_path_until_it_knows_its_shape(policy, engine):
    model, x = converted(small_block(), policy), images(2, 6, 5, 6)
    model.denselayer2.conv1 = nn.LazyConv2d(8, 1, bias=False, dtype=torch.float64)
    with pytest.warns(UserWarning, match="denselayer2.conv1 is LazyConv2d"):
        expected = model.eval()(x)
    assert_same({"output": model(x)}, {"output": expected})
    assert engine == [policy]


@pytest.mark.parametrize("training", [True, False])
def test_sync_batch_norm_in_one_process_is_batch_norm(policy, training, engine):
    stock, x = small_block().train(training), images(2, 6, 5, 6)
    before = converted(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(stock)), policy)
    for model in (before, nn.SyncBatchNorm.convert_sync_batchnorm(converted(stock, policy))):
        assert isinstance(model.denselayer1.norm1, nn.SyncBatchNorm)
        assert_same(steps(model, x), steps(stock, x))
    assert engine == [policy] * 2


def test_mismatched_modules_raise_what_stock_raises(policy):
    model = converted(small_block(), policy)
    model.denselayer1.norm1 = nn.BatchNorm1d(6).double()
    with pytest.warns(UserWarning, match="denselayer1.norm1 is BatchNorm1d"):
        with pytest.raises(ValueError, match="got 4D") as raised:
            model(images(2, 6, 5, 6))
    assert raised.value.__context__ is None
    model = converted(small_block(), policy)
    model.denselayer1.conv2.padding = "valid"
    with pytest.warns(UserWarning, match="padding 'valid'"), pytest.raises(RuntimeError, match="Sizes of tensors"):
        model(images(2, 6, 5, 6))


MODULE_HOOKS = {
    "forward": lambda module, hook: module.register_forward_hook(hook),
    "forward with kwargs": lambda module, hook: module.register_forward_hook(hook, with_kwargs=True),
    "forward pre": lambda module, hook: module.register_forward_pre_hook(hook),
    "backward": lambda module, hook: module.register_full_backward_hook(hook),
    "backward pre": lambda module, hook: module.register_full_backward_pre_hook(hook),
}
GLOBAL_HOOKS = {
    "forward": module_hooks.register_module_forward_hook,
    "forward pre": module_hooks.register_module_forward_pre_hook,
    "backward": module_hooks.register_module_full_backward_hook,
    "backward pre": module_hooks.register_module_full_backward_pre_hook,
}


def with_plain_relu(block):
    """In-place activations and backward hooks do not go together in torch."""
    for module in block.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return block


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
class TestHooks:
    @pytest.mark.parametrize("kind", MODULE_HOOKS)
    @pytest.mark.parametrize("path", ["denselayer2", "denselayer1.norm1", "denselayer3.relu2", "denselayer2.conv2"])
    def test_on_an_inner_module(self, path, kind, policy, engine):
        stock, x = with_plain_relu(small_block()), images(2, 6, 5, 4).requires_grad_()
        model, calls = converted(stock, policy), []
        handle = MODULE_HOOKS[kind](model.get_submodule(path), lambda *_: calls.append(path))
        reason = f"{path} carries hooks"
        with pytest.warns(UserWarning, match=f"a _DenseBlock runs its stock path: {reason}$") as said:
            line = inspect.currentframe().f_lineno + 1
            model(x).sum().backward()
        ours = [w for w in said if "resdense_ext" in str(w.message)]
        assert [(w.filename, w.lineno) for w in ours] == [(__file__, line)]
        assert calls == [path]
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "resdense_ext")
            model(x).sum().backward()
        assert calls == [path] * 2 and not engine
        assert rd.report(model, x).rows[0].note == f"stock path: {reason}"
        assert rd.report(model, x).rows[0].policy is None
        model.load_state_dict(stock.state_dict())
        model.zero_grad()
        with pytest.warns(UserWarning, match=reason):
            assert_same(steps(model, x.detach()), steps(stock, x.detach()), tolerance=0)
        assert not engine

        handle.remove()
        assert_same(steps(model, x.detach()), steps(stock, x.detach()))
        assert engine == [policy]
        assert rd.report(model, x).rows[0][2::3] == (policy, "")

    @pytest.mark.parametrize("kind", GLOBAL_HOOKS)
    def test_global(self, kind, policy, engine):
        stock, x = with_plain_relu(small_block()), images(2, 6, 5, 4)
        model, calls = converted(stock, policy), []
        handle = GLOBAL_HOOKS[kind](lambda module, *_: calls.append(type(module).__name__))
        try:
            expected = steps(stock, x)
            stocks = list(calls)
            calls.clear()
            with pytest.warns(UserWarning, match="runs its stock path: global module hooks are set$"):
                ours = steps(model, x)
        finally:
            handle.remove()
        assert calls == stocks and not engine
        assert_same(ours, expected, tolerance=0)
        assert_same(steps(model, x), expected)
        assert engine == [policy]

    @pytest.mark.parametrize("kind", MODULE_HOOKS)
    @pytest.mark.usefixtures("silent")
    def test_on_the_block_itself(self, kind, policy, engine):
        stock, x = small_block(), images(2, 6, 5, 4)
        model, calls = converted(stock, policy), []
        MODULE_HOOKS[kind](model, lambda *_: calls.append(kind))
        assert_same(steps(model, x), steps(stock, x))
        assert calls == [kind] and engine == [policy]

    def test_on_the_block_may_change_what_passes(self, policy, engine):
        stock, x = small_block(), images(2, 6, 5, 4)
        model = converted(stock, policy)
        for block in (stock, model):
            block.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))
            block.register_forward_hook(lambda _, inputs, output: output + 1)
            block.register_full_backward_hook(lambda _, given, grads: (given[0] * 3,))
        assert_same(steps(model, x), steps(stock, x))
        assert engine == [policy]

    def test_of_tensors(self, policy, engine):
        stock, x = small_block(), images(2, 6, 5, 4)
        model = converted(stock, policy)
        for block in (stock, model):
            block.denselayer2.conv1.weight.register_hook(lambda grad: grad * 3)
        for block in (stock, model):
            block(x).sum().backward()
        assert_same(dict(grads(model)), dict(grads(stock)))
        assert engine == [policy]

    def test_another_reason_is_said_too(self):
        model, x = converted(small_block()), images(2, 6, 5, 4)
        model.denselayer1.norm1.register_forward_hook(lambda *_: None)
        with pytest.warns(UserWarning, match="carries hooks"):
            model(x)
        model.denselayer1.norm1 = nn.GroupNorm(2, 6).double()
        with pytest.warns(UserWarning, match="is GroupNorm"):
            model(x)

    def test_warning_points_at_the_users_line_from_a_whole_network(self):
        model = converted(small_densenet())
        model.features.denseblock2.denselayer1.conv1.register_forward_hook(lambda *_: None)
        with pytest.warns(UserWarning, match="denselayer1.conv1 carries hooks") as said:
            line = inspect.currentframe().f_lineno + 1
            model(images(2, 3, 32, 32))
        assert [(w.filename, w.lineno) for w in said] == [(__file__, line)]


def grads(model):
    return ((f"grad {name}", p.grad) for name, p in model.named_parameters())


class TestLeftAlone:
    def test_model_without_dense_blocks(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 1))
        with pytest.warns(UserWarning, match="convert recognised no dense or residual block in Sequential") as said:
            assert rd.convert(model) is model
        assert said[0].filename == __file__
        assert type(model) is nn.Sequential

    def test_where_torchvision_is_not_imported(self, monkeypatch):
        monkeypatch.delitem(sys.modules, "torchvision.models.densenet")
        with pytest.warns(UserWarning, match="recognised no dense or residual block"):
            rd.convert(nn.Sequential())

    def test_block_with_a_forward_of_its_own(self, engine):
        class Block(densenet._DenseBlock):
            def forward(self, x):
                return super().forward(x) * 2

        model = small_densenet()
        model.features.denseblock2.__class__ = Block
        reason = "convert left alone features.denseblock2: has a forward of its own$"
        with pytest.warns(UserWarning, match=reason) as said:
            rd.convert(model)
        assert said[0].filename == __file__
        assert type(model.features.denseblock2) is Block
        model(images(2, 3, 32, 32))
        assert engine == ["fast"]

    @pytest.mark.parametrize("method", ["forward", "bn_function"])
    def test_layer_with_a_method_of_its_own(self, method):
        layer = type("Layer", (densenet._DenseLayer,), {method: lambda self, x: None})
        block = small_block()
        block.denselayer2.__class__ = layer
        with pytest.warns(UserWarning, match=f"left alone _DenseBlock: denselayer2 has a {method} of its own"):
            rd.convert(block)
        assert type(block) is densenet._DenseBlock

    def test_patched_block(self):
        block = small_block()
        block.forward = types.MethodType(doubled, block)
        with pytest.warns(UserWarning, match="left alone _DenseBlock: has a forward of its own"):
            rd.convert(block)

    def test_layer_of_another_class(self):
        block = small_block()
        block.denselayer3 = OwnLayer()
        with pytest.warns(UserWarning, match="left alone _DenseBlock: denselayer3 is OwnLayer"):
            rd.convert(block)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.usefixtures("silent")
class TestTransformations:
    """Whatever rewrites programs gets the stock path, and a right result."""

    def test_jit_trace(self):
        stock = small_densenet().eval()
        traced = torch.jit.trace(converted(stock), images(2, 3, 32, 32))
        assert "aten::cat" in str(traced.inlined_graph) and "resdense" not in str(traced.inlined_graph)
        x = images(3, 3, 33, 31)
        assert_same({"output": traced(x)}, {"output": stock(x)})

    @pytest.mark.parametrize("strict", [False, True])
    def test_export(self, strict, engine):
        stock, x = small_densenet().eval(), images(2, 3, 32, 32)
        exported = torch.export.export(converted(stock), (x,), strict=strict)
        assert not [node for node in exported.graph.nodes if "resdense" in str(node.target)]
        assert_same({"output": exported.module()(x)}, {"output": stock(x)})
        assert not engine

    def test_fx(self, engine):
        stock, x = small_densenet(), images(2, 3, 32, 32)
        traced = torch.fx.symbolic_trace(converted(stock))
        assert_same(steps(traced, x), steps(stock, x))
        assert_same(steps(pickle.loads(pickle.dumps(traced)), x), steps(stock, x))
        assert not engine

    def test_functorch(self, engine):
        stock, x = small_densenet().eval(), images(2, 3, 32, 32)
        results = []
        for model in (stock, converted(stock)):
            parameters = {name: p.detach() for name, p in model.named_parameters()}

            def loss(parameters, x):
                return torch.func.functional_call(model, parameters, (x,)).square().sum()

            results.append(torch.func.grad(loss)(parameters, x))
            results[-1]["vmap"] = torch.vmap(loss, (None, 0))(parameters, x[:, None])
        assert_same(*reversed(results))
        assert not engine

    def test_forward_mode(self, engine):
        stock, x = small_densenet(), images(2, 3, 32, 32)
        model, tangents = converted(stock), []
        for net in (stock, model):
            with forward_ad.dual_level():
                output = net(forward_ad.make_dual(x, torch.ones_like(x)))
                tangents.append({"tangent": forward_ad.unpack_dual(output).tangent})
        assert_same(*reversed(tangents))
        assert not engine

    def test_jit_script_says_what_to_do(self):
        model = converted(small_densenet())
        with pytest.raises(RuntimeError, match=r"call resdense_ext.revert\(model\) first"):
            torch.jit.script(model)
        rd.convert(model)
        x = images(2, 3, 32, 32)
        expected = steps(model, x)["output"]
        assert_same({"output": torch.jit.script(rd.revert(model))(x)}, {"output": expected})


BAD_INPUTS = {
    "dimensions": (lambda x: x[0, 0], ValueError, "x: expected 3, 4 or 5 dimensions .*, got 2"),
    "unbatched": (lambda x: x[0], ValueError, r"layers\[0\]"),
    "channels": (lambda x: x[:, :5], ValueError, r"layers\[0\].units\[0\].norm.weight: expected shape \(5,\), .*got \(6,\)"),
    "dtype": (lambda x: x.float(), TypeError, r"layers\[0\].units\[0\].conv.weight: expected dtype torch.float32, got torch.fl"),
    "integers": (lambda x: x.long(), TypeError, "x: expected float32, float64, bfloat16 or float16, got torch.int64"),
    "one value": (lambda x: x[:1, :, :1, :1], ValueError, "x: expected more than 1 value per channel when training, got"),
    "list": (lambda x: [x], TypeError, "x: expected a Tensor, got list"),
    "None": (lambda x: None, TypeError, "x: expected a Tensor, got NoneType"),
}


class TestErrors:
    @pytest.mark.parametrize("bad", BAD_INPUTS)
    @pytest.mark.parametrize("drop_rate", [0.0, 0.3])
    def test_bad_input_changes_nothing(self, bad, drop_rate, policy):
        make, error, message = BAD_INPUTS[bad]
        block, x = converted(small_block(drop_rate=drop_rate), policy), make(images(2, 6, 5, 4))
        state = {name: t.clone() for name, t in block.state_dict().items()}
        random_state = torch.get_rng_state()
        with pytest.raises(error, match=message) as raised:
            block(x)
        assert all(torch.equal(t, state[name]) for name, t in block.state_dict().items())
        assert torch.equal(torch.get_rng_state(), random_state)
        if isinstance(x, torch.Tensor):
            layers, _ = read_layers(block.layer_modules())
            with pytest.raises(error) as functional_raised:
                rd.functional.dense_block(x, layers)
            assert str(raised.value) == str(functional_raised.value)

    def test_one_value_is_fine_in_eval(self, policy):
        stock, x = small_block().eval(), images(1, 6, 1, 1)
        assert_same(steps(converted(stock, policy), x), steps(stock, x))

    @pytest.mark.parametrize("call", [rd.convert, rd.revert, partial(rd.report, example_input=None)])
    def test_not_a_module(self, call):
        with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got str"):
            call("densenet121")

    def test_policy(self):
        model = small_densenet()
        with pytest.raises(ValueError, match="policy: expected one of fast, min, auto, got 'fastest'"):
            rd.convert(model, "fastest")
        assert type(model.features.denseblock1) is densenet._DenseBlock
