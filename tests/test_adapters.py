"""Adapters: other libraries' networks are converted, or left alone with the reason; and classes of a user's own."""

import copy
import pickle
import re
import warnings
from pathlib import Path

import pytest
import torch
from small_nets import assert_same, engine, images, library, policy, randomise, steps  # noqa: F401
from tolerance import assert_within_noise, module_run, rounding_noise
from torch import nn

import resdense_ext as rd
from resdense_ext.convert import registry


def timm_densenet(**options):
    net = library("timm.models.densenet").DenseNet
    return lambda: net(8, (2, 3), num_classes=5, bn_size=2, **options)


def timm_resnet(block, **options):
    models = library("timm.models.resnet")
    return lambda: models.ResNet(getattr(models, block), (2, 1, 1, 1), 5, channels=(8, 12, 16, 20), **options)


def monai_densenet(dims, channels=3, **options):
    net = library("monai.networks.nets.densenet").DenseNet
    return lambda: net(dims, channels, 5, 8, 4, (2, 3), 2, **options)


def monai_resnet(block, dims=3, **options):
    net = library("monai.networks.nets.resnet").ResNet
    return lambda: net(block, [2, 1, 1, 1], [4, 6, 8, 10], dims, 1, num_classes=5, **options)


def cv_densenet(**options):
    net = library("pytorchcv.models.densenet").DenseNet
    return lambda: net([[24, 32], [24, 32, 40]], 16, num_classes=5, **options)


def cv_cifar_densenet(bottleneck):
    net = library("pytorchcv.models.densenet_cifar").CIFARDenseNet
    return lambda: net([[16, 24], [20, 28, 36], [22, 26]], 8, bottleneck=bottleneck, num_classes=5)


def cv_preresnet(bottleneck, conv1_stride):
    net = library("pytorchcv.models.preresnet").PreResNet
    return lambda: net([[8, 8], [12, 12]], 8, bottleneck=bottleneck, conv1_stride=conv1_stride, num_classes=5)


def timm_dpn(**options):
    net = library("timm.models.dpn").DPN
    return lambda: net((1, 3, 1, 1), (3, 4, 2, 5), 4, 2, num_classes=5, small=True, num_init_features=6, **options)


def cv_dpn(b_case, test_time_pool=False):
    """Two stages, of two units and of one."""
    net = library("pytorchcv.models.dpn").DPN
    options = dict(rs=[4, 8], bws=[8, 12], incs=[3, 4], groups=2, b_case=b_case, num_classes=5)
    return lambda: net([[17, 20], [24]], 6, 3, 1, for_training=False, test_time_pool=test_time_pool, **options)


IMAGE, VOLUME = (2, 3, 56, 56), (2, 1, 20, 20, 20)
# What makes the network, an input's shape, its blocks, and of some the largest share of stock's bytes that it keeps.
SERVED = {
    "timm densenet": (lambda: timm_densenet(), (2, 3, 64, 64), 2, None),
    "timm densenet, silu and dropout": (lambda: timm_densenet(act_layer="silu", proj_drop_rate=0.3), (2, 3, 64, 64), 2, 0.3),
    "timm densenet, deep stem": (lambda: timm_densenet(stem_type="deep", drop_rate=0.2), (2, 3, 64, 64), 2, None),
    "timm densenet, memory efficient": (lambda: timm_densenet(memory_efficient=True), (2, 3, 64, 64), 2, None),
    "timm basic": (lambda: timm_resnet("BasicBlock"), (2, 3, 64, 64), 5, 0.6),
    "timm resnext": (lambda: timm_resnet("Bottleneck", cardinality=2, base_width=32, drop_rate=0.2), (2, 3, 64, 64), 5, None),
    "timm resnet d": (
        lambda: timm_resnet("Bottleneck", avg_down=True, stem_type="deep", stem_width=8), (2, 3, 70, 66), 5, 0.6
    ),
    "timm resnet d, tiered": (
        lambda: timm_resnet("BasicBlock", avg_down=True, stem_type="deep_tiered", replace_stem_pool=True), (2, 3, 64, 64), 5, None
    ),
    "timm dilated": (lambda: timm_resnet("Bottleneck", output_stride=8, act_layer="silu"), (2, 3, 64, 64), 5, None),
    "monai densenet 1d": (lambda: monai_densenet(1, dropout_prob=0.2), (3, 3, 64), 2, None),
    "monai densenet 2d": (lambda: monai_densenet(2, dropout_prob=0.2, act=("leakyrelu", {"negative_slope": 0.2})), IMAGE, 2, 0.5),
    "monai densenet 3d": (lambda: monai_densenet(3, 1, act="elu", dropout_prob=0.2), VOLUME, 2, None),
    "monai basic": (lambda: monai_resnet("basic"), VOLUME, 5, 0.65),
    "monai bottleneck": (
        lambda: monai_resnet("bottleneck", bias_downsample=False, no_max_pool=True, conv1_t_stride=2),
        VOLUME,
        5,
        None,
    ),
    "monai basic 1d": (lambda: monai_resnet("basic", 1, feed_forward=False), (4, 1, 64), 5, None),
    "pytorchcv densenet": (lambda: cv_densenet(dropout_rate=0.2), IMAGE, 2, None),
    "pytorchcv densenet cifar": (lambda: cv_cifar_densenet(False), (2, 3, 32, 32), 3, 0.3),
    "pytorchcv densenet cifar bottleneck": (lambda: cv_cifar_densenet(True), (2, 3, 32, 32), 3, None),
    "pytorchcv preresnet": (lambda: cv_preresnet(False, False), IMAGE, 4, None),
    "timm dpn": (lambda: timm_dpn(drop_rate=0.2), (2, 3, 64, 64), 4, 0.5),
    "timm dpn b": (lambda: timm_dpn(b=True, global_pool="avgmax"), (2, 3, 64, 64), 4, 0.5),
    "pytorchcv dpn": (lambda: cv_dpn(False), IMAGE, 2, 0.5),
    "pytorchcv dpn b": (lambda: cv_dpn(True, test_time_pool=True), IMAGE, 2, 0.5),
    "pytorchcv preresnet bottleneck": (lambda: cv_preresnet(True, True), IMAGE, 4, 0.65),
}


# Of a dual path network, whose blocks say each for itself what is kept, how many of them are in a node.
STAGES = {name: (1, 3, 1, 1) if "timm" in name else (2, 1) for name in SERVED if "dpn" in name}


def made(make):
    torch.manual_seed(0)
    return randomise(make()).double()


def seeded(model, x):
    torch.manual_seed(3)
    return model(x)


def blocks_of(model):
    kinds = ("layer_modules", "residual_modules", "dual_path_modules")
    return [m for m in model.modules() if any(hasattr(m, kind) for kind in kinds)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SERVED)
def test_same_as_stock(engine, policy, name, training):  # noqa: F811
    make, shape, blocks, share = SERVED[name]
    stock, x = made(make()).train(training), images(*shape)
    model, printed = copy.deepcopy(stock), repr(stock)
    parameters, keys = list(model.parameters()), list(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        rd.convert(model, policy)
        ours = steps(model, x, call=seeded)
    assert engine == ([[policy == "fast"] * stage for stage in STAGES[name]] if name in STAGES else [policy] * blocks)
    expected = steps(stock, x, call=seeded)
    if "memory efficient" in name:
        # Its second forward counts and averages the first norms' statistics again.
        expected = {key: t for key, t in expected.items() if not re.search(r"norm1\.(running|num)", key)}
        ours = {key: ours[key] for key in expected}
    assert_same(ours, expected)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys and repr(model) == printed
    if training and policy == "min" and share is not None:
        kept, stocks = (rd.memory.saved_bytes(lambda: net(x)) for net in (model, stock))
        assert kept <= share * stocks
    rd.revert(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]


BIG = {
    "timm": (lambda: library("timm.models.densenet").densenet121(), (2, 3, 224, 224), 0.1),
    "pytorchcv": (lambda: library("pytorchcv.models.densenet").densenet121(), (2, 3, 224, 224), 0.1),
    "monai": (lambda: library("monai.networks.nets.densenet").DenseNet121(3, 1, 2), (1, 1, 64, 64, 64), 1 / 6),
    "timm resnet50d": (lambda: library("timm.models.resnet").resnet50d(), (2, 3, 224, 224), 0.37),
}


@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", BIG)
def test_saved_bytes_of_whole_networks(name):
    make, shape, share = BIG[name]
    net, x = make(), torch.randn(shape)
    stock = rd.memory.saved_bytes(lambda: net(x))
    rd.convert(net, "min")
    assert rd.memory.saved_bytes(lambda: net(x)) <= share * stock


def blur_pool():
    return library("timm.layers").BlurPool2d


# What makes the network, an input's shape, why and where it stays stock, and the blocks that are on the engine all the same.
LEFT_ALONE = {
    "squeeze and excitation": (
        lambda: timm_resnet("BasicBlock", block_args=dict(attn_layer="se"), avg_down=True),
        (2, 3, 64, 64),
        r"left alone layer1.0, layer1.1, layer2.0 and 2 more: se is SEModule",
        0,
    ),
    "stochastic depth": (
        lambda: timm_resnet("Bottleneck", drop_path_rate=0.1),
        (2, 3, 64, 64),
        "left alone layer1.1, .*layer4.0: drop_path is DropPath",
        1,
    ),
    "drop block": (
        lambda: timm_resnet("BasicBlock", drop_block_rate=0.1),
        (2, 3, 64, 64),
        "left alone layer3.0, layer4.0: drop_block is DropBlock2d",
        3,
    ),
    "blur pool": (
        lambda: timm_resnet("BasicBlock", aa_layer=blur_pool(), avg_down=True),
        (2, 3, 64, 64),
        "left alone layer2.0, layer3.0, layer4.0: aa is BlurPool2d",
        2,
    ),
    "a pool that pads one side in the shortcut": (
        lambda: timm_resnet("Bottleneck", avg_down=True, output_stride=8),
        (2, 3, 64, 64),
        "a Bottleneck runs its stock path: downsample.0 is AvgPool2dSame, and not torch's average pool",
        3,
    ),
    "group norm": (
        lambda: timm_densenet(norm_layer="groupnorm1"),
        (2, 3, 64, 64),
        "left alone features.denseblock1, features.denseblock2: denselayer1.norm1 is GroupNorm1Act; features.transition1: norm",
        0,
    ),
    "gelu": (lambda: timm_densenet(act_layer="gelu"), (2, 3, 64, 64), "a DenseBlock .*: denselayer1.norm1.act is GELU", 0),
    "blur pool in a transition": (
        lambda: timm_densenet(aa_layer=blur_pool(), aa_stem_only=False),
        (2, 3, 64, 64),
        "a DenseTransition runs its stock path: pool is BlurPool2d",
        2,
    ),
    "instance norm": (
        lambda: monai_densenet(2, norm="instance"),
        IMAGE,
        "a _DenseBlock .*: denselayer1.layers.norm1 is InstanceNorm2d",
        0,
    ),
    "prelu": (lambda: monai_densenet(3, 1, act="prelu"), VOLUME, r"a _DenseBlock .*: denselayer1.layers.relu1 is PReLU", 0),
    "type A shortcut": (
        lambda: monai_resnet("basic", shortcut_type="A"),
        VOLUME,
        r"left alone layer2.0, layer3.0, layer4.0: has a shortcut that pads with zeros \(type A\)",
        2,
    ),
}


def test_what_is_traced(policy):
    """PeleeNet's dense layers, of two branches that activate behind their convolutions, are no adapter's."""
    net = library("pytorchcv.models.peleenet").PeleeNet
    stock, x = made(lambda: net([[16], [24, 32]], 8, [1, 2], 0.0, num_classes=5)), images(*IMAGE)
    model = rd.convert(copy.deepcopy(stock), policy)
    report = rd.report(model, x)
    stages = [row for row in report.rows if "stage" in row.path and row.layers]
    assert [sum(row.layers for row in stages if stage in row.path) for stage in ("stage1", "stage2")] == [5, 11]
    assert [reason.split(":")[0] for reason in report.left] == ["features.stage2.unit2"]  # a batch norm reads it
    assert sum(row.saved_bytes for row in stages) <= 0.64 * sum(row.stock_saved_bytes for row in stages)
    assert report.saved_bytes <= 0.61 * report.stock_saved_bytes
    assert_like_stock(model, stock, x)


@pytest.mark.parametrize("training", [True, False])
def test_norms_with_activations_are_traced(training):
    """timm's, in a network that concatenates (VoVNet); one that nobody knows leaves smaller graphs."""
    config = dict(stem_chs=[8, 8, 8], stage_conv_chs=[4] * 4, stage_out_chs=[8] * 4, layer_per_block=2, block_per_stage=[1] * 4,
                  residual=False, depthwise=False, attn="")  # fmt: skip
    net = library("timm.models.vovnet").VovNet
    stock, x = made(lambda: net(config, num_classes=5, act_layer="silu")).train(training), images(2, 3, 64, 64)
    model = rd.convert(copy.deepcopy(stock))
    report = rd.report(model, x)
    assert [row.layers for row in report.rows] == [6] + [3] * 3 + [0] and not report.left  # with the stem's
    assert all(row.saved_bytes <= 0.5 * row.stock_saved_bytes for row in report.rows[:-1])
    assert_like_stock(model, stock, x)
    model.stages[0].blocks[0].conv_concat.bn.act = stock.stages[0].blocks[0].conv_concat.bn.act = nn.Tanh()
    assert_like_stock(model, stock, x)
    assert sum(row.layers for row in rd.report(model, x).rows) == 12


def timm_regnet(**options):
    models = library("timm.models.regnet")
    return lambda: models.RegNet(models.RegNetCfg(depth=4, w0=8, wa=16.0, wm=1.5, group_size=4, **options), num_classes=5)


def timm_mobilenet(act_layer):
    models, blocks = library("timm.models.efficientnet"), library("timm.models._efficientnet_builder")
    arch = blocks.decode_arch_def([["ds_r1_k3_s1_c8"], ["ir_r2_k3_s2_e2_c8"]])
    return lambda: models.EfficientNet(arch, num_features=16, stem_size=8, num_classes=5, act_layer=act_layer)


def timm_preresnet():
    models, layers = library("timm.models.resnetv2"), library("timm.layers")
    options = dict(conv_layer=layers.create_conv2d, norm_layer=layers.BatchNormAct2d, num_classes=5, stem_chs=8)
    return lambda: models.ResNetV2((1, 2), channels=(16, 32), **options)


HELD = {
    "regnet": (timm_regnet, "conv2.bn", [3] * 4),
    "regnet with SE": (lambda: timm_regnet(se_ratio=0.25), "conv1.bn", [3] + [2] * 3),
    "mobilenet": (lambda: timm_mobilenet(nn.SiLU), "bn1", [2, 3, 3]),
    "preresnet": (timm_preresnet, "norm2", [3] * 3),
}
"""timm's networks of norms that hold their activations, which no adapter knows: a norm inside, and the convolutions of what is found."""


@pytest.mark.parametrize("name", HELD)
def test_residual_blocks_with_norms_that_hold_activations(name, policy):
    make, inside, layers = HELD[name]
    stock, x = made(make()), images(*IMAGE)
    model = rd.convert(copy.deepcopy(stock), policy)
    report = rd.report(model, x)
    found = [row for row in report.rows if row.layers]
    assert [row.layers for row in found] == layers
    assert all(row.saved_bytes <= 0.65 * row.stock_saved_bytes for row in found)
    assert_like_stock(model, stock, x)
    # By the stock paths of what was found, too, no activation is applied twice.
    for norm in (m for path, m in model.named_modules() if path.endswith(inside)):
        norm.act.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=f"{inside}.act carries hooks"):
        assert_like_stock(model.eval(), stock.eval(), x)


def assert_like_stock(model, stock, x):
    """A training step, within the noise of stock's."""
    run, state = module_run(stock), stock.state_dict()
    ours, expected = (each({"x": x.clone()}, copy.deepcopy(state)) for each in (module_run(model), run))
    assert_within_noise(ours, expected, rounding_noise(run, {"x": x}, state))


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone(engine, name):  # noqa: F811
    make, shape, reason, blocks = LEFT_ALONE[name]
    stock, x = made(make()), images(*shape)
    model = copy.deepcopy(stock)
    with pytest.warns(UserWarning, match=reason) as said:
        rd.convert(model)
        ours = steps(model, x, call=seeded)
    assert {w.filename for w in said if "resdense_ext" in str(w.message)} <= {__file__, steps.__code__.co_filename}
    assert engine == ["fast"] * blocks
    assert_same(ours, steps(stock, x, call=seeded))


def test_a_block_of_another_version_is_left_alone():
    """The same path, other attributes."""
    models = library("timm.models.resnet")

    class BasicBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.convolution(x) + x

    BasicBlock.__module__, BasicBlock.__qualname__ = models.__name__, "BasicBlock"
    with pytest.warns(UserWarning, match="left alone 0: convolution is Conv2d, which the engine does not know"):
        rd.convert(nn.Sequential(BasicBlock()))
    net = BasicBlock()
    net.convolution = None
    with pytest.warns(UserWarning, match="is not as its adapter knows it: 'BasicBlock' object has no attribute 'conv1'"):
        rd.convert(net)
    assert type(net) is BasicBlock


HOOKED = {
    "timm densenet": [("features", 2), ("global_pool", 2), ("features.denseblock1.denselayer1.norm2.act", 1)],
    "timm basic": [("layer1.0.act1", 4), ("layer1.1", 5)],
    "monai densenet 2d": [("features.denseblock2.denselayer1.layers", 1), ("class_layers", 2)],
    "pytorchcv densenet": [("features.stage2", 2), ("features.stage2.trans2", 2), ("features.stage2.unit1.conv1", 1)],
    "pytorchcv preresnet": [("features.post_activ", 4), ("features.stage1.unit1.body.conv2", 3)],
    "timm dpn": [
        ("features", 4),
        ("features.conv2_1", 4),
        ("features.conv3_2", 6),
        ("features.conv3_2.c1x1_a", 5),
        ("features.conv5_bn_ac", 4),
        ("global_pool", 4),
    ],
    "pytorchcv dpn": [
        ("features", 2),
        ("features.stage1", 2),
        ("features.stage1.unit1", 3),
        ("features.stage1.unit2.conv1", 2),
        ("features.final_block", 2),
        ("features.final_block.activ", 2),
    ],
}


def tensors(inputs, outputs):
    """What a hook sees, as it is then."""
    seen = *inputs, *(outputs if isinstance(outputs, tuple) else (outputs,))
    return {f"hooked {i}": t.detach().clone() for i, t in enumerate(seen) if t is not None}


@pytest.mark.parametrize(("name", "path", "blocks"), [(name, *case) for name, cases in HOOKED.items() for case in cases])
@pytest.mark.filterwarnings("ignore:resdense_ext:UserWarning")
def test_hooks_are_called(engine, name, path, blocks):  # noqa: F811
    make, shape, *_ = SERVED[name]
    stock, x = made(make()), images(*shape)
    model, calls = rd.convert(copy.deepcopy(stock)), []
    for net in (stock, model):
        net.get_submodule(path).register_forward_hook(lambda module, *seen: calls.append(tensors(*seen)))
    results = []
    for net in (model, stock):
        torch.manual_seed(3)
        output = net(x)
        output.square().sum().backward()
        gradients = {f"grad {key}": p.grad for key, p in net.named_parameters()}
        results.append({"output": output.detach()} | calls.pop() | gradients | dict(net.named_buffers()))
    assert not calls and len(engine) == blocks
    assert_same(*results)


@pytest.mark.parametrize(
    "name",
    [
        "timm densenet",
        "timm resnet d",
        pytest.param("timm dpn b", marks=pytest.mark.slow),
        "pytorchcv densenet",
        "pytorchcv preresnet",
    ],
)
def test_around_a_converted_model(engine, name):  # noqa: F811
    make, shape, blocks, _ = SERVED[name]
    stock, x = made(make()).eval(), images(*shape)
    model = rd.convert(copy.deepcopy(stock))
    exported = torch.export.export(model, (x,), strict=False)
    assert not engine
    expected = {"output": stock(x)}
    assert_same({"output": exported.module()(x)}, expected)
    again = pickle.loads(pickle.dumps(model))
    assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
    assert_same({"output": again(x)}, expected)
    assert len(engine) == len(STAGES.get(name, range(blocks)))
    model.train()
    report = rd.report(model, x)
    assert report.saved_bytes == rd.memory.saved_bytes(lambda: model(x))
    assert report.saved_bytes < report.stock_saved_bytes and all(row.note == "" for row in report.rows[:-1])
    if name not in STAGES:  # whose nodes are counted with their first blocks
        assert all(row.saved_bytes < row.stock_saved_bytes for row in report.rows[:-1])
    policies = {m.engine_policy for m in blocks_of(rd.convert(model, memory_budget=0.99, example_input=x))}
    assert policies == {"fast"} or all(all(policy) for policy in policies)
    assert rd.memory.saved_bytes(lambda: model(x)) <= 0.99 * rd.memory.saved_bytes(lambda: stock.train()(x))


def test_volumes_under_autocast(engine, policy):  # noqa: F811
    """On a CPU torch has no average of volumes in 16 bits: stock goes on in 32 behind a transition, ours averages in 32."""
    stock, x = made(monai_densenet(3, 1)), images(*VOLUME)
    params = stock.state_dict()
    truth = module_run(stock)({"x": x.clone()}, copy.deepcopy(params))
    rounded = {key: t.float() if t.is_floating_point() else t.clone() for key, t in params.items()}
    nets = stock, rd.convert(copy.deepcopy(stock), policy)
    theirs, ours = (module_run(net, torch.bfloat16)({"x": x.float()}, copy.deepcopy(rounded)) for net in nets)
    assert engine == [policy] * 2
    for name in ("output", "grad x"):
        assert ours[name].dtype == theirs[name].dtype
        assert (ours[name] - truth[name]).norm() <= 2 * (theirs[name] - truth[name]).norm(), name


COMPILED = {
    "timm densenet": lambda: library("timm.models.densenet").DenseNet(8, (1, 1), num_classes=5, bn_size=2),
    "timm basic": lambda: SERVED["timm basic"][0]()(),
    "monai densenet": lambda: library("monai.networks.nets.densenet").DenseNet(2, 3, 5, 8, 4, (1, 1), 2),
    "pytorchcv densenet": lambda: library("pytorchcv.models.densenet").DenseNet([[24], [24]], 16, num_classes=5),
    "timm dpn b": lambda: SERVED["timm dpn b"][0]()(),
    "pytorchcv dpn": lambda: SERVED["pytorchcv dpn"][0]()(),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if "dpn" in name else []) for name in COMPILED])
def test_compile(engine, name):  # noqa: F811
    stock, x = made(COMPILED[name]).eval(), images(*IMAGE)
    torch.compiler.reset()
    compiled = torch.compile(rd.convert(copy.deepcopy(stock)), backend="eager", fullgraph=True)
    assert_same({"output": compiled(x)}, {"output": stock(x)})
    assert engine


@pytest.mark.filterwarnings("ignore:resdense_ext:UserWarning")
@pytest.mark.parametrize("name", ["timm densenet", "monai densenet 2d", "pytorchcv densenet"])
def test_global_hooks_see_every_module(engine, name):  # noqa: F811
    make, shape, *_ = SERVED[name]
    stock, x, seen = made(make()), images(*shape), []
    model = rd.convert(copy.deepcopy(stock))
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        model(x)
        ours = seen.copy()
        seen.clear()
        stock(x)
    finally:
        handle.remove()
    assert ours == seen and not engine


def test_timm_checkpoints_its_blocks_where_it_is_told_to(policy):
    make, shape, *_ = SERVED["timm basic"]
    stock, x = made(make()), images(*shape)
    model = rd.convert(copy.deepcopy(stock), policy)
    for net in (stock, model):
        net.set_grad_checkpointing()
    assert_same(steps(model, x), steps(stock, x))


def test_timm_gives_features(engine):  # noqa: F811
    features = library("timm.models._features").FeatureListNet
    make, shape, *_ = SERVED["timm densenet"]
    stock, x = made(make()), images(*shape)
    nets = [features(net, out_indices=(0, 1, 2), flatten_sequential=True) for net in (copy.deepcopy(stock), stock)]
    rd.convert(nets[0])
    ours, expected = ({str(i): y for i, y in enumerate(net(x))} for net in nets)
    assert_same(ours, expected)
    assert len(engine) == 2


@pytest.mark.parametrize("part", [slice(0, 1), slice(1, 3), slice(2, None), slice(0, 3)], ids=str)
def test_a_slice_of_a_stage(part):
    stock = made(cv_densenet())
    model = rd.convert(copy.deepcopy(stock))
    inner, outer = model.features.stage2[part], stock.features.stage2[part]
    x = images(2, next(m for m in outer.modules() if isinstance(m, nn.BatchNorm2d)).num_features, 8, 6)
    assert_same(steps(inner, x), steps(outer, x))


def test_transition_and_the_units_in_front_of_it_share_a_node(monkeypatch):
    """Across the stages that they belong to."""
    make, shape, *_ = SERVED["pytorchcv densenet"]
    behind, dense_block = [], rd.functional.checked_dense_block

    def spied(*args, **options):
        behind.append(options["behind"])
        return dense_block(*args, **options)

    monkeypatch.setattr(rd.functional, "checked_dense_block", spied)
    model = rd.convert(made(make()))
    model(images(*shape))
    assert [unit.pool.kind for unit in behind] == ["average", "average"]
    assert [unit.conv is None for unit in behind] == [False, True]


def example():
    """The README's, as its names."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "def read(" in code]
    names = {"__name__": "example"}
    exec(code, names)
    return names


@pytest.fixture
def registrations(monkeypatch):
    monkeypatch.setattr(registry, "_blocks", dict(registry._blocks))
    return registry._blocks


@pytest.mark.usefixtures("registrations")
class TestYourOwn:
    def test_the_example_in_the_readme(self, engine):  # noqa: F811
        names = example()
        model = randomise(names["model"]).double()
        stock, x = rd.revert(copy.deepcopy(model)), images(2, 3, 12, 10)
        assert type(stock[1]) is names["Block"]
        assert_same(steps(model, x), steps(stock, x))
        assert engine == ["min"]
        kept, stocks = (rd.memory.saved_bytes(lambda: net(x)) for net in (model, stock))
        assert kept <= 0.4 * stocks

    def test_residual_block_and_transition(self, engine, policy):  # noqa: F811
        class Residual(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn, self.conv = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1)

            def forward(self, x):
                return self.conv(torch.relu(self.bn(x))) + x

        class Down(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn, self.conv = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)

            def forward(self, x):
                return nn.functional.avg_pool2d(self.conv(torch.relu(self.bn(x))), 2)

        relu, pool = nn.ReLU(), nn.AvgPool2d(2)
        rd.register_adapter(Residual, lambda block: rd.nn.ResidualModules("pre", ((block.bn, relu, block.conv),)))
        rd.register_adapter(Down, lambda block: rd.nn.PooledModules(block.bn, relu, block.conv, pool))
        stock, x = randomise(nn.Sequential(Residual(), Down())).double(), images(2, 6, 8, 6)
        model = rd.convert(copy.deepcopy(stock), policy)
        assert_same(steps(model, x), steps(stock, x))
        assert engine == [policy] and hasattr(model[1], "pooled_modules")

    def test_subclasses(self):
        names = example()
        block = names["Block"]
        keeps = type("Keeps", (block,), {})(3, 2, 2)
        changes = type("Changes", (block,), {"forward": lambda self, x: x})(3, 2, 2)
        with pytest.warns(UserWarning, match="left alone 1: has a forward of its own"):
            model = rd.convert(nn.Sequential(keeps, changes))
        assert [hasattr(m, "layer_modules") for m in model] == [True, False]
        rd.register_adapter(type(changes), lambda block: [])
        assert hasattr(rd.convert(model)[1], "layer_modules")

    def test_one_that_fails_leaves_the_block_alone(self):
        block = example()["Block"](3, 2, 2)
        rd.register_adapter(type(block), lambda block: block.blocks)
        with pytest.warns(UserWarning, match="left alone Block: is not as its adapter knows it: .* no attribute 'blocks'"):
            rd.convert(block)

    def test_one_that_is_not_registered_where_the_model_is_loaded(self, registrations, engine):  # noqa: F811
        names = example()
        model, x = names["model"], images(2, 3, 12, 10).float()
        del registrations[names["Block"]]
        with pytest.warns(UserWarning, match="a Block runs its stock path: is Block, of which no adapter is registered"):
            model(x)
        assert not engine

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((3, len), "cls: expected a subclass of torch.nn.Module, got 3"),
            ((dict, len), "cls: expected a subclass of torch.nn.Module, got <class 'dict'>"),
            ((nn.Linear, None), "read: expected a function of a module of Linear, got NoneType"),
        ],
    )
    def test_bad_arguments(self, arguments, message):
        with pytest.raises(TypeError, match=re.escape(message)):
            rd.register_adapter(*arguments)

    def test_what_is_read_has_a_type(self):
        model = nn.Sequential(nn.Linear(3, 3), example()["Block"](3, 2, 2))
        rd.register_adapter(nn.Linear, lambda linear: 3)
        with pytest.raises(TypeError, match="adapter of Linear: expected a list of LayerModules, .*, got 3"):
            rd.convert(model)
        assert not blocks_of(model)
