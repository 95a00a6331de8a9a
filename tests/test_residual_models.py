"""Residual, dual path and segmentation networks and their blocks: torchvision's and timm's names, and what the papers say."""

import hashlib
import re

import pytest
import torch
import torch.nn.functional as F
from small_nets import assert_same, images, randomise, steps, torchvision_models
from torch import nn as torch_nn

from resdense_ext import models, nn, reference
from resdense_ext.memory import saved_bytes
from resdense_ext.models.parts import crop_like
from resdense_ext.nn.engine import why_stock
from resdense_ext.nn.leaves import Unsupported

RESNETS = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "wide_resnet50_2",
]
ACTIVATIONS = ["relu", "leaky_relu", "elu", "silu", "identity"]
BLOCKS = [nn.BasicBlock, nn.Bottleneck, nn.PreActBlock, nn.PreActBottleneck]
SHALLOW = {
    "basic": ("BasicBlock", {}),
    "bottleneck": ("Bottleneck", {}),
    "grouped": ("Bottleneck", {"groups": 32, "width_per_group": 4}),
    "wide": ("Bottleneck", {"width_per_group": 128}),
    "dilated": ("Bottleneck", {"replace_stride_with_dilation": [False, True, True]}),
}
TINY = {
    "resnet": lambda **o: models.ResNet(nn.BasicBlock, (1, 1), 5, **o),
    "resnet, small inputs": lambda **o: models.ResNet(nn.Bottleneck, (1,), 5, small_inputs=True, **o),
    "preact, basic": lambda **o: models.PreActResNet(nn.PreActBlock, (1, 2), 4, 5, **o),
    "preact, bottleneck": lambda **o: models.PreActResNet(nn.PreActBottleneck, (1, 2), 4, 5, **o),
    "dpn": lambda **o: models.DPN((2, 1), (2, 3), 8, 4, 2, 6, num_classes=5, **o),
    "dpn, small inputs": lambda **o: models.DPN((1, 2), (2, 3), 8, 4, 2, 6, num_classes=5, small_inputs=True, **o),
    "fc_densenet": lambda **o: models.FCDenseNet(3, (1, 2), 2, (2, 1), 6, 0.0, 5, **o),
    "residual_unet": lambda **o: models.ResidualUNet(5, (4, 6, 8), **{"in_channels": 3, "spatial_dims": 2} | o),
}
CLASSIFIERS = [name for name in TINY if name not in ("fc_densenet", "residual_unet")]


@pytest.fixture(scope="module")
def stock():
    return torchvision_models()


def listing(model):
    return [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items()]


def shallow(stock, case, **ours):
    """torchvision's network of one block a stage, and ours with its weights, in float64."""
    block, options = SHALLOW[case]
    theirs = stock.ResNet(getattr(stock.resnet, block), [1, 1, 1, 1], 7, **options)
    mine = models.ResNet(getattr(nn, block), (1, 1, 1, 1), 7, **options, **ours)
    randomise(theirs)
    mine.load_state_dict(theirs.state_dict())
    return theirs.double(), mine.double()


def parameters(model):
    return sum(p.numel() for p in model.parameters())


# The networks


@pytest.mark.parametrize("name", RESNETS)
def test_state_dict_is_torchvisions(name, stock):
    with torch.device("meta"):
        ours, theirs = getattr(models, name)(), getattr(stock, name)()
    assert listing(ours) == listing(theirs)
    assert [path for path, _ in ours.named_modules()] == [path for path, _ in theirs.named_modules()]
    for ours, theirs in zip(ours.modules(), theirs.modules()):
        if isinstance(theirs, (torch_nn.Conv2d, torch_nn.MaxPool2d)):
            assert repr(ours) == repr(theirs)


@pytest.mark.parametrize("zero_init_residual", [False, True])
@pytest.mark.parametrize("case", ["basic", "grouped"])
def test_a_seed_gives_torchvisions_weights(case, zero_init_residual, stock):
    block, options = SHALLOW[case]
    torch.manual_seed(3)
    ours = models.ResNet(getattr(nn, block), (1, 1, 1, 1), 7, zero_init_residual, **options).state_dict()
    torch.manual_seed(3)
    theirs = stock.ResNet(getattr(stock.resnet, block), [1, 1, 1, 1], 7, zero_init_residual, **options).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("case", SHALLOW)
def test_a_training_step_is_torchvisions(case, stock):
    theirs, ours = shallow(stock, case)
    x = images(2, 3, 41, 32)
    assert_same(steps(ours, x), steps(theirs, x))


@pytest.mark.parametrize("policy", ["fast", None])
@pytest.mark.parametrize("case", ["basic", "dilated"])
def test_evaluation_is_torchvisions(case, policy, stock):
    theirs, ours = shallow(stock, case, policy=policy)
    x = images(2, 3, 41, 32)
    assert_same(steps(ours.eval(), x), steps(theirs.eval(), x))


def test_weights_go_either_way(stock):
    ours, theirs = models.resnet18(num_classes=7).double().eval(), stock.resnet18(num_classes=7).double().eval()
    theirs.load_state_dict(ours.state_dict())
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        assert_same({"output": ours(x)}, {"output": theirs(x)})


@pytest.mark.parametrize("block", [nn.BasicBlock, nn.Bottleneck])
def test_dilation_keeps_the_resolution(block):
    net = models.ResNet(block, (1, 2, 1), replace_stride_with_dilation=(False, True))
    x = net.layer1(torch.randn(1, 64, 9, 9))
    assert net.layer3(net.layer2(x)).shape[2:] == (5, 5)
    assert net.layer3[0].conv2.dilation == (1, 1) and net.layer3[0].downsample[0].stride == (1, 1)
    assert models.ResNet(block, (1, 1, 2), replace_stride_with_dilation=(True, True)).layer3[1].conv2.dilation == (4, 4)


@pytest.mark.parametrize(
    ("name", "digest"), [("dpn68", "dbd595b1a2959e3e"), ("dpn92", "9c53329c9d84c27c"), ("dpn98", "4928807a3101334c")]
)
def test_state_dict_is_timms(name, digest):
    """The digest is that of the names and shapes in timm 1.0.31, which the tests do not install."""
    with torch.device("meta"):
        state = getattr(models, name)().state_dict()
    names = "\n".join(f"{name} {tuple(tensor.shape)}" for name, tensor in state.items())
    assert hashlib.sha256(names.encode()).hexdigest().startswith(digest)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("preact_resnet110", 1.7),
        ("preact_resnet164", 1.7),
        ("preact_resnet1001", 10.3),
        ("dpn68", 12.6),
        ("dpn92", 37.7),
        ("dpn98", 61.6),
    ],
)
def test_number_of_parameters(name, millions):
    with torch.device("meta"):
        assert round(parameters(models.create(name)) / 1e6, 1) == millions


@pytest.mark.parametrize(("name", "millions"), [("fc_densenet56", 1.4), ("fc_densenet67", 3.5), ("fc_densenet103", 9.4)])
def test_number_of_parameters_and_statistics(name, millions):
    with torch.device("meta"):
        state = models.create(name).state_dict()
    assert round(sum(t.numel() for t in state.values() if t.dim() > 0) / 1e6, 1) == millions


def test_fc_densenet103_has_the_papers_widths():
    with torch.device("meta"):
        net = models.fc_densenet103(policy=None)
        seen = []
        for block in (*net.down, net.bottleneck, *net.up):
            block.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
        assert net(torch.empty(1, 3, 224, 224)).shape == (1, 12, 224, 224)
    # The paper's table has 578 where its rule gives 576.
    assert seen == [112, 192, 304, 464, 656, 896, 1088, 816, 576, 384, 256]


def test_preact_resnet1001_has_1001_layers():
    with torch.device("meta"):
        net = models.preact_resnet1001()
    shortcuts = [m.downsample for m in net.modules() if getattr(m, "downsample", None) is not None]
    layers = sum(isinstance(m, (torch_nn.Conv2d, torch_nn.Linear)) for m in net.modules()) - len(shortcuts)
    assert layers == 1001 and len(shortcuts) == 3


@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
@pytest.mark.parametrize("name", TINY)
def test_every_parameter_learns(name, spatial_dims):
    sizes = (17, 15, 18)[:spatial_dims]
    net = TINY[name](in_channels=2, spatial_dims=spatial_dims)
    y = net(torch.randn(2, 2, *sizes))
    assert y.shape == (2, 5, *(() if name in CLASSIFIERS else sizes))
    y.square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in net.parameters())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", TINY)
def test_policies_agree(name, training):
    x, (stock, *ours) = images(2, 3, 23, 18), (TINY[name](policy=p).double().train(training) for p in (None, "fast", "min"))
    randomise(stock)
    for net in ours:
        net.load_state_dict(stock.state_dict())
        assert_same(steps(net, x), steps(stock, x))


@pytest.mark.parametrize("size", [(4, 4), (4, 7), (5, 6), (13, 8)])
def test_segmentation_keeps_odd_sizes(size):
    for name in ("fc_densenet", "residual_unet"):
        assert TINY[name]()(torch.randn(2, 3, *size)).shape == (2, 5, *size)


def test_segmentation_keeps_positions_in_place():
    """Far from a changed position, nothing changes; the stride's phase stays, whatever is cropped behind it."""
    for name in ("fc_densenet", "residual_unet"):
        net = TINY[name](in_channels=1, spatial_dims=1).double().eval()
        x = images(1, 1, 151)
        changed = x.clone()
        changed[..., 75] += 1
        moved = (net(x) - net(changed)).abs().sum(1)[0].nonzero().flatten()
        assert 75 in moved and moved.min() > 35 and moved.max() < 115
        assert abs((moved.min() + moved.max()) / 2 - 75) <= 4


@pytest.mark.parametrize("drop_rate", [0.0, 0.3])
def test_fc_densenets_transitions_keep_their_input_and_a_byte_a_maximum(drop_rate):
    x = images(2, 9, 8, 6).requires_grad_()
    for policy in ("fast", "min"):
        net = models.FCDenseNet(3, (1, 2), 2, (2, 1), 6, drop_rate, 5, policy=policy).double()
        statistics = 2 * x[0, :, 0, 0].nbytes
        assert saved_bytes(lambda: net.transitions[0](x)) == x.nbytes + statistics + 2 * 9 * 4 * 3


def test_fc_densenet_drops_what_stock_drops():
    x, found = images(2, 3, 23, 18), []
    for policy in (None, "fast", "min"):
        torch.manual_seed(0)
        net = models.FCDenseNet(3, (1, 2), 2, (2, 1), 6, 0.3, 5, policy=policy).double()
        found.append(steps(net, x))
    for ours in found[1:]:
        assert_same(ours, found[0])


def test_crop_like_takes_the_first_positions():
    x = images(1, 2, 4, 6)
    assert torch.equal(crop_like(x, x[:, :1, :3, :5]), x[:, :, :3, :5])


def test_densenet121_3d_takes_volumes_of_one_channel():
    with torch.device("meta"):
        assert models.densenet121_3d(num_classes=3, policy=None)(torch.empty(2, 1, 32, 48, 33)).shape == (2, 3)
        assert models.densenet121_3d(in_channels=4).features.conv0.in_channels == 4


def test_zero_init_residual_makes_every_block_its_shortcut():
    net = models.ResNet(nn.Bottleneck, (2,), zero_init_residual=True)
    x = torch.randn(2, 256, 5, 5).relu()
    assert torch.equal(net.layer1[1](x), x)
    assert not torch.equal(models.ResNet(nn.Bottleneck, (2,)).layer1[1](x), x)


# The blocks


def written_out(block, x, name):
    """The papers' formulas, from the block's parameters."""

    def activate(y):
        return reference.activate(y, reference.Activation(name, 0.01))

    def norm(bn, y):
        return F.batch_norm(y, None, None, bn.weight, bn.bias, training=True, eps=bn.eps)

    def conv(module, y):
        return F.conv2d(y, module.weight, None, module.stride, module.padding, module.dilation, module.groups)

    depth = 3 if hasattr(block, "conv3") else 2
    pairs = [(getattr(block, f"bn{i}"), getattr(block, f"conv{i}")) for i in range(1, depth + 1)]
    if isinstance(block, (nn.BasicBlock, nn.Bottleneck)):
        shortcut = x if block.downsample is None else norm(block.downsample[1], conv(block.downsample[0], x))
        y = x
        for bn, convolution in pairs[:-1]:
            y = activate(norm(bn, conv(convolution, y)))
        return activate(norm(pairs[-1][0], conv(pairs[-1][1], y)) + shortcut)
    y = activate(norm(pairs[0][0], x))
    shortcut = x if block.downsample is None else conv(block.downsample, y)
    y = conv(pairs[0][1], y)
    for bn, convolution in pairs[1:]:
        y = conv(convolution, activate(norm(bn, y)))
    return y + shortcut


def block_of(kind, inplanes, outplanes, stride=1, **options):
    """A block between these channels, with a projection where it needs one."""
    if kind in (nn.BasicBlock, nn.Bottleneck) and (stride != 1 or inplanes != outplanes):
        conv = torch_nn.Conv2d(inplanes, outplanes, 1, stride=stride, bias=False)
        options["downsample"] = torch_nn.Sequential(conv, torch_nn.BatchNorm2d(outplanes))
    return kind(inplanes, outplanes // kind.expansion, stride, **options)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("outplanes", "stride"), [(8, 1), (12, 1), (8, 2)])
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_is_its_formula(kind, outplanes, stride, activation):
    block = randomise(block_of(kind, 8, outplanes, stride, activation=activation).double())
    x = images(2, 8, 7, 6)
    ours, formula = steps(block, x), steps(block, x, call=lambda block, x: written_out(block, x, activation))
    assert_same(*({name: t for name, t in run.items() if "buffer" not in name} for run in (ours, formula)))


@pytest.mark.parametrize("kind", [nn.Bottleneck, nn.PreActBottleneck])
def test_groups_and_dilation_reach_the_3x3(kind):
    conv = kind(16, 4, groups=2, dilation=3).conv2
    assert (conv.groups, conv.dilation, conv.padding) == (2, (3, 3), (3, 3))
    assert kind(16, 4, dilation=3)(torch.randn(2, 16, 9, 5)).shape == (2, 16, 9, 5)


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_blocks_modules_are_those_that_it_runs(kind):
    block = block_of(kind, 8, 12, 2)
    post = kind in (nn.BasicBlock, nn.Bottleneck)
    modules, called = block.residual_modules(), []
    for name, module in block.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda module, *_, name=name: called.append(name))
    names = {module: name for name, module in block.named_modules()}
    block(torch.randn(2, 8, 5, 5))
    units = [names[module] for unit in modules.units for module in unit if module is not None]
    shortcut = [names[module] for module in modules.shortcut]
    order = [*units, *shortcut, "relu"] if post else [*units[:2], *shortcut, *units[2:]]
    assert called == order
    assert modules.form == ("post" if post else "pre") and modules.activation is (block.relu if post else None)


@pytest.mark.parametrize("kind", [nn.BasicBlock, nn.Bottleneck])
def test_an_unknown_shortcut_is_named_and_runs(kind):
    block = kind(8, 8 // kind.expansion, 2, torch_nn.AvgPool2d(2))
    assert block(torch.randn(2, 8, 6, 6)).shape == (2, 8, 3, 3)
    with pytest.raises(Unsupported, match="AvgPool2d"):
        block.residual_modules()
    projection = torch_nn.Conv2d(8, 8, 1), torch_nn.BatchNorm2d(8)
    block.downsample = torch_nn.Sequential(*projection, torch_nn.Identity(), torch_nn.Identity())
    with pytest.raises(Unsupported, match="holds 0, 1, 2, 3, and not 0, 1, 2"):
        block.residual_modules()
    for front, reason in (
        (torch_nn.MaxPool2d(2), "downsample.0 is MaxPool2d, and not torch's average pool"),
        (torch_nn.AvgPool2d(3, 2, 1, count_include_pad=False), r"downsample.0 is AvgPool2d\(kernel_size=3"),
        (torch_nn.AvgPool1d(2), r"downsample.0 is AvgPool1d\(kernel_size"),
    ):
        block.downsample = torch_nn.Sequential(front, *projection)
        assert re.match(reason, why_stock(block))


@pytest.mark.parametrize("stride", [1, 2])
def test_a_dual_path_stage_is_its_formula(stride):
    stage = randomise(nn.DualPathStage(3, 6, 8, 10, 3, 2, stride).double())
    first, *others = stage
    x = images(2, 6, 7, 6)
    residual, dense = stage(x)
    assert residual.shape[1] == 10 and dense.shape[1] == 5 * 3

    projection = getattr(first, f"c1x1_w_s{stride}")
    r, d = projection(x).tensor_split([10], 1)
    joined = x
    for block in (first, *others):
        f = block.c1x1_c(block.c3x3_b(block.c1x1_a(joined)))
        r, d = r + f[:, :10], torch.cat([d, f[:, 10:]], 1)
        joined = torch.cat([r, d], 1)
    halves = {"residual": residual, "dense": dense}
    assert_same(halves, {"residual": r, "dense": d})
    assert_same(dict(zip(halves, stage(x.tensor_split([2], 1)))), halves)


def test_a_dual_path_blocks_modules_are_in_order():
    first, second = nn.DualPathStage(2, 6, 8, 10, 3, stride=2)
    modules = first.dual_path_modules()
    assert modules.residual_channels == 10 and modules.projection[2] is first.c1x1_w_s2.conv
    assert [conv for _, _, conv in modules.units] == [first.c1x1_a.conv, first.c3x3_b.conv, first.c1x1_c.conv]
    assert second.dual_path_modules().projection is None
    second.c3x3_b.register_forward_hook(lambda *_: None)
    with pytest.raises(Unsupported, match="carries hooks"):
        second.dual_path_modules()


# Bad arguments


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spatial_dims": 4}, "spatial_dims: expected 1, 2 or 3, got 4"),
        ({"activation": "gelu"}, "activation: expected one of relu, .*, got 'gelu'"),
        ({"policy": "fastest"}, "policy: expected one of fast, min, .* got 'fastest'"),
        ({"policy": (True,)}, r"policy: .* got \(True,\)"),
    ],
)
def test_a_blocks_bad_arguments_are_named(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(8, 8, **options)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.BasicBlock(8, 4), "downsample: expected a module from 8 to 4 channels with stride 1, got None"),
        (lambda: nn.Bottleneck(8, 2, 2), "downsample: expected a module from 8 to 8 channels with stride 2, got None"),
        (lambda: nn.BasicBlock(8, 8, groups=2), "groups, base_width: expected 1 and 64 .*, got 2 and 64"),
        (lambda: nn.DualPathBlock(8, 4, 6, 2, stride=2), "stride: expected 1, or 2 with a projection, got 2"),
        (lambda: nn.DualPathBlock(8, 4, 6, 2, stride=3, projection=True), "stride: .* got 3"),
        (lambda: nn.DualPathStage(0, 8, 4, 6, 2), "num_layers: expected at least 1, got 0"),
        (lambda: models.ResNet(nn.BasicBlock, ()), r"layers: expected at least one stage .*, got \(\)"),
        (lambda: models.ResNet(nn.BasicBlock, (1, 0)), r"layers: .* at least one block, got \(1, 0\)"),
        (
            lambda: models.resnet18(replace_stride_with_dilation=[True]),
            r"replace_stride_with_dilation: expected None or 3 bools, got \[True\]",
        ),
        (lambda: models.PreActResNet(nn.PreActBlock, (0,)), r"layers: .* got \(0,\)"),
        (lambda: models.DPN((1, 2), (8,)), r"growth_rates: expected one for each of 2 stages, got \(8,\)"),
        (lambda: models.DPN((1, 0), (8, 8)), r"layers: .* got \(1, 0\)"),
        (lambda: models.FCDenseNet(4, (1, 2), 1, (1,)), r"up_layers: expected 2 blocks, .* got \(1,\)"),
        (lambda: models.FCDenseNet(4, (1, 0), 1, (1, 1)), r"down_layers, .*: expected at least one layer .* \(1, 0\)"),
        (lambda: models.ResidualUNet(widths=()), r"widths: expected at least one level .*, got \(\)"),
        (lambda: models.ResidualUNet(num_blocks=0), "num_blocks: expected at least 1, got 0"),
        (lambda: models.resnet18(spatial_dims=4), "spatial_dims: .* got 4"),
        (lambda: models.fc_densenet56(policy="less"), "policy: .* got 'less'"),
    ],
)
def test_bad_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_segmentation_names_a_bad_input():
    net = models.FCDenseNet(4, (1, 1), 1, (1, 1))
    with pytest.raises(ValueError, match=r"x: expected \[N, 3, H, W\], got \(2, 1, 8, 8\)"):
        net(torch.randn(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"x: expected at least 4 positions .*, got \(8, 3\)"):
        net(torch.randn(2, 3, 8, 3))
    with pytest.raises(ValueError, match=r"x: expected \[N, 1, D, H, W\], got \(1, 8, 8, 8\)"):
        models.ResidualUNet(widths=(4, 4))(torch.randn(1, 8, 8, 8))


def test_a_dual_path_block_wants_two_halves():
    with pytest.raises(TypeError, match=r"x: expected \(residual, dense\) .*, got Tensor"):
        nn.DualPathBlock(8, 4, 6, 2)(torch.randn(2, 8, 5, 5))


# By name


def test_networks_have_names():
    assert set(RESNETS) < set(models.names()) and {"densenet121", "preact_resnet1001", "dpn92"} < set(models.names())
    assert all(callable(getattr(models, name)) for name in models.names())
    assert set(models.__all__) >= set(models.names())
    assert models.create("resnet18", num_classes=3).fc.out_features == 3


def test_a_wrong_name_is_answered_with_near_ones():
    with pytest.raises(ValueError, match="name: there is no network 'resnet5O'; did you mean resnet50"):
        models.create("resnet5O")
    with pytest.raises(ValueError, match="'zzz'; expected one of densenet121, .*residual_unet_3d"):
        models.create("zzz")
