"""Conversion of residual networks: torchvision's ResNets, inside other models too, and this library's own blocks."""

import copy
import itertools
import pickle
from collections import OrderedDict

import pytest
import torch
from small_nets import (  # noqa: F401
    POLICIES,
    assert_same,
    engine,
    images,
    policy,
    randomise,
    steps,
    ten_losses,
    torchvision_models,
)
from stock import import_torchvision
from tolerance import assert_within_noise, assert_within_rule, module_run, rounding_noise, torch_runs, true_run
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import resdense_ext as rd
from resdense_ext.convert import budget as budgets



KINDS = {
    "basic": ("BasicBlock", [2, 1, 1, 1], {}),
    "bottleneck": ("Bottleneck", [2, 1, 1, 1], {}),
    "resnext": ("Bottleneck", [1, 1, 1, 1], dict(groups=4, width_per_group=4)),
    "dilated": ("Bottleneck", [1, 1, 2, 2], dict(replace_stride_with_dilation=[False, True, True])),
}


def small_resnet(kind="bottleneck", **options):
    block, layers, given = KINDS[kind]
    models = torchvision_models()
    torch.manual_seed(0)
    net = models.ResNet(getattr(models.resnet, block), layers, num_classes=5, **given, **options)
    return randomise(net).double()


def blocks_of(model):
    return [m for m in model.modules() if hasattr(m, "residual_modules")]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_same_as_stock(engine, kind, channels_last):  # noqa: F811
    stock, x = small_resnet(kind), images(2, 3, 40, 33)
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert_all_as_stock([rd.convert(copy.deepcopy(stock), policy) for policy in POLICIES], stock, x, changes=1)
    assert engine == [policy for policy in POLICIES for _ in range(sum(KINDS[kind][1]))]


def assert_as_stock(model, stock, x):
    """A step of a whole network, within ten times its rounding noise."""
    assert_all_as_stock([model], stock, x)


def assert_all_as_stock(models, stock, x, changes=3, run_of=module_run):
    """Within ten times the rounding noise of what ``run_of(network)`` gives."""
    run, params = run_of(stock), stock.state_dict()
    noise = rounding_noise(run, {"x": x}, params, changes)
    expected, *ours = (each({"x": x.clone()}, copy.deepcopy(params)) for each in (run, *map(run_of, models)))
    for results in ours:
        assert_within_noise(results, expected, noise)
    return expected


def assert_same_losses(models, stock, x, target, rate):
    def run_of(net):
        def run(inputs, params):
            trained = copy.deepcopy(net)
            trained.load_state_dict(params)
            losses = ten_losses(trained, inputs["x"], target, rate)
            return {f"loss {step}": torch.tensor(loss, dtype=torch.float64) for step, loss in enumerate(losses)}

        return run

    losses = assert_all_as_stock(models, stock, x, changes=2, run_of=run_of)
    assert losses["loss 0"] > losses["loss 9"]


def whole_network(name):
    torch.manual_seed(0)
    return randomise(getattr(torchvision_models(), name)(num_classes=10)).double()


def under_every_policy(stock, x):
    """What is kept: raw maps, block outputs alone, and of some blocks the one and of others the other."""
    planned = rd.convert(copy.deepcopy(stock), memory_budget=0.45, example_input=x)
    kept = {block.engine_policy for block in blocks_of(planned)}
    assert kept == set(POLICIES)
    return [planned, *(rd.convert(copy.deepcopy(stock), policy) for policy in POLICIES)]


WHOLE = ("resnet18", "resnet50", "resnext50_32x4d")


@pytest.mark.parametrize(
    ("name", "training"),
    [("resnet50", True), ("resnet50", False)]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in itertools.product(("resnet18", "resnext50_32x4d"), (True, False))],
)
def test_within_the_rounding_noise(name, training):
    """Outputs, gradients, and running statistics, which have counted one step."""
    stock, x = whole_network(name).train(training), images(2, 3, 33, 36)
    assert_all_as_stock(under_every_policy(stock, x), stock, x, changes=1)


def test_eval_without_gradients_and_revert(engine, policy):  # noqa: F811
    stock, x = small_resnet().eval(), images(2, 3, 40, 33)
    model = rd.convert(copy.deepcopy(stock), policy)
    with torch.no_grad():
        assert_same({"output": model(x)}, {"output": stock(x)})
    assert len(engine) == 5
    assert isinstance(model, type(stock)) and list(model.state_dict()) == list(stock.state_dict())
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
    rd.revert(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]


def test_a_model_of_fake_tensors(engine, policy):  # noqa: F811
    with FakeTensorMode():
        model = rd.convert(torchvision_models().resnet18(), policy)
        model(torch.randn(2, 3, 40, 33)).sum().backward()
    assert engine == [policy] * 8
    assert all(p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("kind", ["basic", "bottleneck", "resnext"])
def test_ten_steps_give_the_same_losses(kind):
    stock, x, target = small_resnet(kind), images(4, 3, 24, 20), torch.tensor([0, 1, 2, 3])
    models = [rd.convert(copy.deepcopy(stock), policy) for policy in POLICIES]
    assert_same_losses(models, stock, x, target, 0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_ten_steps_of_a_whole_network(name):
    # Norms over few positions would make a training chaotic: after five steps of resnext50 on two images of 40x40 stock and stock
    # with one unit in the last place changed have nothing in common any more.
    stock, x, target = whole_network(name), images(6, 3, 64, 64), torch.arange(6)
    assert_same_losses(under_every_policy(stock, x), stock, x, target, 1e-4)


class Maps(nn.Module):
    """A model's maps, which it gives by name, as one tensor."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return torch.cat([y.flatten(1) for y in self.model(x).values()], 1)


def frozen_fpn(name, **options):
    """A backbone with frozen norms, all different, whose last three stages train, and an FPN behind it."""
    tv = import_torchvision()
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    torch.manual_seed(0)
    norm = tv.ops.misc.FrozenBatchNorm2d
    stock = resnet_fpn_backbone(backbone_name=name, weights=None, norm_layer=norm, trainable_layers=3, **options)
    for m in stock.modules():
        if isinstance(m, norm):
            m.weight.normal_(1, 0.3), m.bias.normal_(0, 0.3), m.running_mean.normal_(0, 0.3), m.running_var.uniform_(0.5, 1.5)
    return stock


@pytest.mark.parametrize("autocast", [False, True])
def test_a_detection_backbone(engine, autocast):  # noqa: F811
    """Frozen norms, an FPN behind it, and no gradients in front."""
    stock, x = frozen_fpn("resnet18"), images(2, 3, 40, 46).float()
    models = {policy: rd.convert(copy.deepcopy(stock), policy) for policy in POLICIES}
    dtype = torch.bfloat16 if autocast else None
    run, params = module_run(Maps(stock), dtype), Maps(stock).state_dict()
    truth = true_run(module_run(Maps(stock)), {"x": x}, params)
    runs = torch_runs(run, {"x": x}, params, changes=2)
    for model in models.values():
        ours = module_run(Maps(model), dtype)({"x": x.clone()}, copy.deepcopy(params))
        assert_within_rule(ours, truth, runs, dtype or torch.float32)
    assert engine == ["fast"] * 8 + ["min"] * 8

    results = []
    for net in (stock, *models.values()):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = net(x)
        sum(y.float().square().mean() for y in out.values()).backward()
        dtypes = {name: y.dtype for name, y in out.items()}
        results.append((dtypes, [name for name, p in net.named_parameters() if p.grad is not None]))
    assert results[0] == results[1] == results[2]
    if not autocast:
        # Without batch statistics stock keeps a map a convolution, too.
        theirs, fast, least = (rd.memory.saved_bytes(lambda: list(net(x).values())) for net in (stock, *models.values()))
        assert fast <= theirs and least <= 0.85 * theirs


def test_a_detection_model(engine):  # noqa: F811
    """RetinaNet, whose training needs none of torchvision's compiled operators: images of two sizes, two losses."""
    tv = torchvision_models()
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    backbone = frozen_fpn("resnet18", returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256))
    stock = tv.detection.RetinaNet(backbone, num_classes=4, min_size=64, max_size=80).double()
    x = [images(3, 64, 70), images(3, 50, 64, seed=1)]
    boxes = torch.tensor([[5.0, 6, 40, 50], [10, 6, 30, 40], [1, 1, 60, 45]]).double()
    targets = [{"boxes": boxes[:1], "labels": torch.tensor([1])}, {"boxes": boxes[1:], "labels": torch.tensor([2, 3])}]
    results = []
    for policy in (None, *POLICIES):
        model = copy.deepcopy(stock) if policy is None else rd.convert(copy.deepcopy(stock), policy)
        losses = model(x, copy.deepcopy(targets))
        sum(losses.values()).backward()
        grads = {f"grad {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append({name: loss.detach() for name, loss in losses.items()} | grads)
    assert not {name for name in results[0] if "layer1" in name} and "grad backbone.body.layer2.0.conv1.weight" in results[0]
    for ours in results[1:]:
        assert_same(ours, results[0])
    assert engine == ["fast"] * 8 + ["min"] * 8


def test_a_segmentation_model(engine):  # noqa: F811
    models = torchvision_models()
    torch.manual_seed(0)
    stock = randomise(models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=3)).double().eval()
    models = [rd.convert(copy.deepcopy(stock), policy) for policy in POLICIES]
    assert_all_as_stock([Maps(model) for model in models], Maps(stock), images(1, 3, 33, 40), changes=1)
    assert engine == ["fast"] * 16 + ["min"] * 16


def test_training_a_segmentation_model(engine):  # noqa: F811
    """Dilated, with batch statistics and an auxiliary classifier."""
    segmentation, utils = torchvision_models().segmentation, torchvision_models()._utils
    backbone = utils.IntermediateLayerGetter(small_resnet("dilated"), {"layer3": "aux", "layer4": "out"})
    stock = segmentation.FCN(backbone, *(segmentation.fcn.FCNHead(width, 3).double() for width in (2048, 1024)))
    for m in stock.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    models = [rd.convert(copy.deepcopy(stock), policy) for policy in POLICIES]
    assert_all_as_stock([Maps(model) for model in models], Maps(stock), images(2, 3, 25, 20), changes=1)
    assert engine == ["fast"] * 6 + ["min"] * 6


@pytest.mark.parametrize("downsample", ["pool", "hooked", "named"])
def test_another_shortcut_runs_its_stock_path(engine, downsample):  # noqa: F811
    stock = small_resnet()
    block = stock.layer2[0]
    if downsample == "pool":
        block.downsample = nn.Sequential(nn.MaxPool2d(1), *block.downsample)
    elif downsample == "hooked":
        block.downsample.register_forward_hook(lambda *args: None)
    else:
        block.downsample = nn.Sequential(OrderedDict(zip(("conv", "norm"), block.downsample)))
    x = images(2, 3, 40, 33)
    with pytest.warns(UserWarning, match="downsample"):
        model = rd.convert(copy.deepcopy(stock))
        assert_as_stock(model, stock, x)
    assert len(engine) == 4


def test_a_subclass_with_a_forward_of_its_own_is_left_alone():
    models = torchvision_models()

    class Scaled(models.resnet.BasicBlock):
        def forward(self, x):
            return 2 * super().forward(x)

    net = models.ResNet(Scaled, [1, 1, 1, 1], num_classes=5)
    with pytest.warns(UserWarning, match="left alone layer1.0, .*layer4.0: has a forward of its own"):
        rd.convert(net)
    assert not blocks_of(net)


def test_report():
    model, x = rd.convert(small_resnet()), images(2, 3, 40, 33)
    report = rd.report(model, x)
    assert report.saved_bytes == rd.memory.saved_bytes(lambda: model(x))
    assert [(row.path, row.layers, row.policy, row.note) for row in report.rows[:2]] == [
        ("layer1.0", 3, "fast", ""),
        ("layer1.1", 3, "fast", ""),
    ]
    assert all(row.saved_bytes < row.stock_saved_bytes for row in report.rows)


def pooled(inplanes, outplanes):
    """A ResNet-D's shortcut."""
    pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
    return nn.Sequential(pool, nn.Conv2d(inplanes, outplanes, 1, bias=False), nn.BatchNorm2d(outplanes))


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_budget(share):
    x, stock = images(2, 3, 64, 64), small_resnet("basic")
    stock.layer2[0].downsample = pooled(64, 128).double()
    least, most = (rd.memory.saved_bytes(lambda: rd.convert(copy.deepcopy(stock), p)(x)) for p in ("min", "fast"))
    budget = int(least + share * (most - least))
    model = rd.convert(copy.deepcopy(stock), memory_budget=budget, example_input=x)
    plan, saved = budgets.plan_of(model), rd.memory.saved_bytes(lambda: model(x))
    kept = [block.engine_policy for block in blocks_of(model)]
    assert saved <= budget and plan.predicted_bytes == pytest.approx(saved, rel=0.01)
    assert kept.count("fast") == plan.kept and plan.bottlenecks == 5
    assert (kept.count("fast") in (0, 5)) == (share in (0.0, 1.0))


OWN = {
    "BasicBlock": lambda n, **o: n.BasicBlock(6, 6, **o),
    "Bottleneck": lambda n, **o: n.Bottleneck(8, 4, 2, nn.Sequential(nn.Conv2d(8, 16, 1, 2), nn.BatchNorm2d(16)), **o),
    "pooled BasicBlock": lambda n, **o: n.BasicBlock(6, 8, 2, pooled(6, 8), **o),
    "PreActBlock": lambda n, **o: n.PreActBlock(6, 8, 2, **o),
    "PreActBottleneck": lambda n, **o: n.PreActBottleneck(8, 2, **o),
}


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu"])
@pytest.mark.parametrize("name", OWN)
def test_own_blocks(engine, policy, name, activation):  # noqa: F811
    torch.manual_seed(0)
    block = randomise(OWN[name](rd.nn, activation=activation, policy=policy)).double()
    channels = next(m for m in block.modules() if isinstance(m, nn.Conv2d)).in_channels
    x = images(2, channels, 7, 6)
    assert_same(steps(block, x), steps(rd.revert(copy.deepcopy(block)), x))
    assert engine == [policy]


def test_a_shortcut_that_broadcasts_runs_its_stock_path(engine):  # noqa: F811
    """Of three positions a pool of whole windows leaves one, and the convolutions two."""
    block = rd.nn.BasicBlock(6, 8, 2, pooled(6, 8)).double()
    block.downsample[0].ceil_mode = False
    x = images(2, 6, 3, 3)
    assert_same(steps(block, x), steps(rd.revert(copy.deepcopy(block)), x))
    assert not engine
    assert block(images(2, 6, 4, 4)).shape == (2, 8, 2, 2) and engine == ["fast"]


def test_one_norm_for_two_runs_its_stock_path(engine):  # noqa: F811
    block = rd.nn.BasicBlock(6, 6).double()
    block.bn2 = block.bn1
    with pytest.warns(UserWarning, match="serves twice"):
        block(images(2, 6, 7, 6))
    assert not engine
