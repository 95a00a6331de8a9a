"""The networks against torchvision's: the same parameters, the same initial weights, the same outputs."""

import pickle

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

import small_nets
from resdense_ext import models, nn

TORCHVISION_NAMES = ["densenet121", "densenet161", "densenet169", "densenet201"]


@pytest.fixture(scope="module", name="torchvision_models")
def _torchvision_models():
    return small_nets.torchvision_models()


def shapes(model):
    return [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items()]


def small(**options):
    return models.DenseNet(4, (2, 3), 8, bn_size=2, num_classes=5, **options)


@pytest.mark.parametrize("name", TORCHVISION_NAMES)
def test_state_dict_is_torchvisions(name, torchvision_models):
    with torch.device("meta"):
        ours, stock = getattr(models, name)(), getattr(torchvision_models, name)()
    assert shapes(ours) == shapes(stock)
    assert [path for path, _ in ours.named_modules()] == [path for path, _ in stock.named_modules()]
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in stock.parameters())


def test_a_seed_gives_torchvisions_weights(torchvision_models):
    torch.manual_seed(3)
    ours = models.densenet121().state_dict()
    torch.manual_seed(3)
    stock = torchvision_models.densenet121().state_dict()
    assert all(torch.equal(ours[name], stock[name]) for name in stock)


@pytest.mark.parametrize(
    ("name", "policy"), [("densenet121", "min"), ("densenet121", None), *((name, "fast") for name in TORCHVISION_NAMES)]
)
def test_output_is_torchvisions(name, policy, torchvision_models):
    stock = getattr(torchvision_models, name)(num_classes=7).eval()
    ours = getattr(models, name)(num_classes=7, policy=policy).eval()
    ours.load_state_dict(stock.state_dict())
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(images), stock(images))


def test_torchvision_loads_our_weights(torchvision_models):
    stock = torchvision_models.DenseNet(4, (2, 3), 8, bn_size=2, num_classes=5)
    ours = small()
    stock.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(images), stock(images))


def test_densenet264_is_the_papers():
    with torch.device("meta"):
        model = models.densenet264()
    layers = [len(block) for block in model.features if isinstance(block, nn.DenseBlock)]
    assert layers == [6, 12, 64, 48]
    assert model.classifier.in_features == 2688


@pytest.mark.parametrize("small_inputs", [False, True])
@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
@pytest.mark.parametrize("bn_size", [0, 2])
def test_every_parameter_learns(spatial_dims, small_inputs, bn_size):
    model = models.DenseNet(
        4, (2, 3), 8, bn_size, num_classes=5, in_channels=2, spatial_dims=spatial_dims, small_inputs=small_inputs
    )
    output = model(torch.randn(2, 2, *(18,) * spatial_dims))
    assert output.shape == (2, 5)
    output.square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_small_inputs_keep_their_resolution():
    model = small(small_inputs=True)
    assert model.features.conv0.weight.shape == (8, 3, 3, 3)
    assert list(dict(model.features.named_children()))[:2] == ["conv0", "denseblock1"]
    assert model.features.conv0(torch.randn(1, 3, 9, 7)).shape == (1, 8, 9, 7)


@pytest.mark.filterwarnings("ignore:.*global module hooks are set")
def test_global_hooks_see_modules_of_the_network():
    model, seen = small(), []
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        model(torch.randn(2, 3, 32, 32))
    finally:
        handle.remove()
    assert set(seen) == set(model.modules())


@pytest.mark.parametrize("name", ["densenet_bc40", "resnet18", "preact_resnet110", "dpn68"])
def test_a_network_traced_by_fx_pickles(name):
    """torch.fx writes down how forwards are annotated, and what is postponed it cannot pickle."""
    with torch.device("meta"):
        traced = torch.fx.symbolic_trace(models.create(name))
    assert pickle.loads(pickle.dumps(traced)).code == traced.code


@pytest.mark.parametrize(("reduction", "channels"), [(1.0, 16), (0.5, 8), (0.3, 4)])
def test_reduction_is_rounded_down(reduction, channels):
    assert small(reduction=reduction).features.transition1.conv.out_channels == channels


@pytest.mark.parametrize("policy", ["fast", "min", None])
def test_policy_reaches_the_blocks(policy):
    blocks = [m for m in small(policy=policy).modules() if isinstance(m, nn.DenseBlock)]
    assert [block.policy for block in blocks] == [policy, policy]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spatial_dims": 4}, "spatial_dims: expected 1, 2 or 3, got 4"),
        ({"block_config": ()}, r"block_config: expected at least one block .*, got \(\)"),
        ({"block_config": (2, 0)}, r"block_config: expected .* at least one layer, got \(2, 0\)"),
        ({"reduction": 0.0}, r"reduction: expected a share in \(0, 1\], got 0.0"),
        ({"reduction": 1.5}, "reduction: .* got 1.5"),
        ({"policy": "fastest"}, "fastest"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        models.DenseNet(**options)
