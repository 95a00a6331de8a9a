"""Our dense modules: torchvision's names and stock forward, and the engine in its place."""

import copy
import pickle
import re
from operator import attrgetter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_nets import assert_same, engine, images, policy, randomise, small_block, steps, torchvision_densenet  # noqa: F401
from torch import nn

import resdense_ext as rd

ACTIVATIONS = {"relu": nn.ReLU, "relu6": nn.ReLU6, "leaky_relu": nn.LeakyReLU, "elu": nn.ELU, "silu": nn.SiLU, "identity": nn.Identity}


def block(layers=3, channels=6, bn_size=2, growth=4, **options):
    torch.manual_seed(0)
    return randomise(rd.nn.DenseBlock(layers, channels, bn_size, growth, **options)).double()


def stock(module):
    return rd.revert(copy.deepcopy(module))


def test_the_readme_names_what_is_public():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    for path in re.findall(r"`rd\.([\w.]+)", text):
        assert attrgetter(path)(rd) is not None
    functions = {name for name in rd.functional.__all__ if name.islower()}
    assert {f"rd.functional.{name}(" for name in functions} <= set(re.findall(r"rd\.functional\.\w+\(", text))
    assert not [name for name in rd.nn.__all__ if not re.search(rf"\b{name}\b", text)]


class TestDenseLayer:
    def test_is_torchvisions(self):
        theirs = small_block().denselayer2
        ours = rd.nn.DenseLayer(10, 4, 2).double()
        ours.load_state_dict(theirs.state_dict())
        assert list(dict(ours.named_modules())) == list(dict(theirs.named_modules()))
        assert_same(steps(ours, images(2, 10, 5, 4)), steps(theirs, images(2, 10, 5, 4)), tolerance=0)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("spatial_dims", [1, 2, 3])
    def test_without_bottleneck(self, spatial_dims, activation):
        layer = rd.nn.DenseLayer(6, 4, 0, spatial_dims=spatial_dims, activation=activation).double()
        assert [name for name, _ in layer.named_children()] == ["norm1", "relu1", "conv1"]
        assert type(layer.relu1) is ACTIVATIONS[activation]
        x = images(2, 6, *(5, 4, 3)[:spatial_dims])
        expected = layer.conv1(layer.relu1(layer.norm1(x)))
        assert torch.equal(layer(x), expected) and expected.shape == (2, 4, *x.shape[2:])

    def test_dropout(self):
        layer, x = rd.nn.DenseLayer(6, 4, 2, 0.3).double(), images(2, 6, 5, 4)
        undropped = layer.units[1][2](layer.units[1][1](layer.units[1][0](layer.conv1(layer.relu1(layer.norm1(x))))))
        torch.manual_seed(5)
        output = layer(x)
        torch.manual_seed(5)
        assert torch.equal(output, F.dropout(undropped, 0.3))
        assert torch.equal(layer.eval()(x), layer(x))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(spatial_dims=0), "spatial_dims: expected 1, 2 or 3, got 0"),
            (dict(spatial_dims=4), "spatial_dims: expected 1, 2 or 3, got 4"),
            (dict(activation="gelu"), "activation: expected one of relu, relu6, leaky_relu, elu, silu, identity, got 'gelu'"),
            (dict(drop_rate=1.5), "drop_rate: expected a probability from 0 to 1, got 1.5"),
            (dict(drop_rate=-0.5), "drop_rate: expected a probability from 0 to 1, got -0.5"),
        ],
        ids=str,
    )
    def test_bad_arguments(self, options, message):
        for make in (lambda: rd.nn.DenseLayer(6, 4, **options), lambda: rd.nn.DenseBlock(2, 6, growth_rate=4, **options)):
            with pytest.raises(ValueError, match=message):
                make()


class TestDenseBlock:
    def test_is_torchvisions(self, policy):
        theirs, ours = small_block(), block(policy=policy)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        ours.load_state_dict(theirs.state_dict())
        assert_same(steps(ours, images(2, 6, 5, 4)), steps(theirs, images(2, 6, 5, 4)))
        theirs.load_state_dict(ours.state_dict())

    @pytest.mark.parametrize("bn_size", [0, 2])
    @pytest.mark.parametrize("spatial_dims", [1, 2, 3])
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_runs_on_the_engine_what_its_stock_path_is(self, spatial_dims, bn_size, activation, policy, engine):
        ours = block(bn_size=bn_size, spatial_dims=spatial_dims, activation=activation, drop_rate=0.2, policy=policy)
        x = images(2, 6, *(5, 4, 3)[:spatial_dims])

        def seeded(model, x):
            torch.manual_seed(5)
            return model(x)

        assert_same(steps(ours, x, call=seeded), steps(stock(ours), x, call=seeded))
        assert engine == [policy]

    def test_stock_path_is_plain_pytorch(self, engine):
        ours, x = block(policy=None), images(2, 6, 5, 4)
        expected = x
        for layer in copy.deepcopy(ours).values():
            expected = torch.cat([expected, layer(expected)], 1)
        assert torch.equal(ours(x), expected)
        assert not engine

    def test_no_layers(self, policy):
        x = images(2, 6, 5, 4)
        assert torch.equal(block(layers=0, policy=policy)(x), x)

    def test_policy_can_change(self, engine):
        ours, x = block(), images(2, 6, 5, 4)
        for policy in ("min", None, "fast"):
            ours.policy = policy
            ours(x)
        assert engine == ["min", "fast"]

    @pytest.mark.parametrize("policy", ["fastest", 1])
    def test_unknown_policy(self, policy):
        message = f"policy: expected one of fast, min, or None for the stock path, got {policy!r}"
        with pytest.raises(ValueError, match=message):
            block(policy=policy)
        ours = block()
        ours.policy = policy
        with pytest.raises(ValueError, match=message):
            ours(images(2, 6, 5, 4))
        assert ours.denselayer1.norm1.num_batches_tracked == 0

    def test_prints_its_policy(self, policy):
        assert repr(block(policy=policy)).startswith(f"DenseBlock(\n  policy={policy!r}\n  (denselayer1): DenseLayer(\n")

    def test_copies(self, policy):
        ours, x = block(policy=policy).eval(), images(2, 6, 5, 4)
        for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert again.policy == policy and torch.equal(again(x), ours(x))

    def test_replaced_layer_takes_the_stock_path(self, policy, engine):
        class Doubled(rd.nn.DenseLayer):
            def forward(self, x):
                return super().forward(x) * 2

        ours, x = block(policy=policy), images(2, 6, 5, 4)
        ours.denselayer2 = Doubled(10, 4, 2).double()
        with pytest.warns(UserWarning, match="a DenseBlock runs its stock path: denselayer2 has a forward of its own"):
            output = steps(ours, x)
        assert_same(output, steps(stock(ours), x), tolerance=0)
        ours.denselayer2 = nn.Conv2d(10, 4, 3, padding=1).double()
        with pytest.warns(UserWarning, match="denselayer2 is Conv2d"):
            output = steps(ours, x)
        assert_same(output, steps(stock(ours), x), tolerance=0)
        assert not engine


class TestTransition:
    @pytest.mark.parametrize("spatial_dims", [1, 2, 3])
    def test_halves_positions(self, spatial_dims):
        transition = rd.nn.Transition(6, 3, spatial_dims=spatial_dims).double()
        assert transition(images(2, 6, *(8, 6, 5)[:spatial_dims])).shape == (2, 3, *(4, 3, 2)[:spatial_dims])

    def test_is_torchvisions(self):
        theirs, ours = torchvision_densenet()._Transition(6, 3).double(), rd.nn.Transition(6, 3).double()
        ours.load_state_dict(theirs.state_dict())
        assert_same(steps(ours, images(2, 6, 8, 6)), steps(theirs, images(2, 6, 8, 6)))

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="spatial_dims: expected 1, 2 or 3, got 0"):
            rd.nn.Transition(6, 3, spatial_dims=0)
