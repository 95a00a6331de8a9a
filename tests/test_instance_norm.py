"""Instance and group norms: each sample by its own statistics, some samples at a time, against torch's modules."""

import copy
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from small_nets import assert_same, assert_second_derivatives, engine, images, library, policy, torchvision_models  # noqa: F401
from test_dense_block import built
from tolerance import assert_within_noise, assert_within_rule, module_run, rounding_noise, torch_runs, true_run
from torch import nn

import resdense_ext as rd
from resdense_ext import functional, reference
from resdense_ext.functional import BatchNorm, Conv, DenseLayer, ResidualBlock, Shortcut, Unit
from resdense_ext.ops import conv_graph_function, instances, residual_stage_function
from resdense_ext.ops.cpu import CpuBackend

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
INSTANCE = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
SIZES = {1: (17,), 2: (9, 7), 3: (5, 6, 7)}


class Units(nn.Module):
    """The layers of every network here: the names of convolutions and norms by their numbers. Norms of groups have as many channels
    in each; else they are instance norms."""

    def __init__(self, rank=2, affine=True, group=0):
        super().__init__()
        self.rank, self.affine, self.group = rank, affine, group
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        self.act = nn.LeakyReLU(0.1, inplace=True)

    def conv(self, *args, **options):
        self.convs.append(CONVS[self.rank](*args, **options))

    def norm(self, channels):
        if self.group:
            self.norms.append(nn.GroupNorm(channels // self.group, channels, affine=self.affine))
        else:
            self.norms.append(INSTANCE[self.rank](channels, affine=self.affine))


class Chain(Units):
    """As the stacks of nnU-Net: convolution, instance norm and leaky ReLU, again and again, with strides and biases."""

    def __init__(self, **options):
        super().__init__(**options)
        for inputs, outputs, stride in ((4, 6, 1), (6, 8, 2), (8, 8, 1)):
            self.conv(inputs, outputs, 3, stride, 1)
            self.norm(outputs)

    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms):
            x = self.act(norm(conv(x)))
        return x


class Concatenation(Units):
    """As a U-Net's decoder: a convolution reads two maps side by side, of which one has a norm and an activation."""

    def __init__(self, **options):
        super().__init__(**options)
        for inputs in (4, 10, 6):
            self.conv(inputs, 6, 3, padding=1, bias=False)
            self.norm(6)

    def forward(self, x):
        skip = self.act(self.norms[0](self.convs[0](x)))
        y = self.act(self.norms[1](self.convs[1](torch.cat([skip, x], 1))))
        return self.act(self.norms[2](self.convs[2](y)))


class Residual(Units):
    """As the residual encoder of nnU-Net: with a projection behind a pool of averages, then without one."""

    def __init__(self, **options):
        super().__init__(**options)
        for sizes in ((4, 8, 3, 2, 1), (8, 8, 3, 1, 1), (4, 8, 1), (8, 8, 3, 1, 1), (8, 8, 3, 1, 1)):
            self.conv(*sizes, bias=False)
            self.norm(8)
        self.pool = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}[self.rank](2, 2, ceil_mode=True)

    def forward(self, x):
        c, n = self.convs, self.norms
        y = n[1](c[1](self.act(n[0](c[0](x)))))
        x = self.act(y + n[2](c[2](self.pool(x))))
        y = n[4](c[4](self.act(n[3](c[3](x)))))
        return self.act(y + x)


class PreActivation(Units):
    """Norm and activation in front, and a pool of maxima behind such a pair at the end."""

    def __init__(self, **options):
        super().__init__(**options)
        for _ in range(2):
            self.norm(4)
            self.conv(4, 4, 3, padding=1)
        self.norm(4)
        self.pool = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}[self.rank](2)

    def forward(self, x):
        y = x
        for norm, conv in zip(self.norms, self.convs):
            y = conv(F.relu(norm(y)))
        return self.pool(F.relu(self.norms[2](x + y)))


class Dense(Units):
    """Layers that read all before them: no dense block, of which the norms would be batch norms."""

    def __init__(self, **options):
        super().__init__(**options)
        for inputs in (4, 8, 12):
            self.norm(inputs)
            self.conv(inputs, 4, 3, padding=1, bias=False)

    def forward(self, x):
        for norm, conv in zip(self.norms, self.convs):
            x = torch.cat([x, conv(F.relu(norm(x)))], 1)
        return x


NETS = Chain, Concatenation, Residual, PreActivation, Dense


@pytest.fixture(params=NETS, ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


def network(kind, dtype=torch.float64, **options):
    torch.manual_seed(0)
    net = kind(**options).to(dtype)
    for norm in net.norms:
        if norm.affine:
            nn.init.normal_(norm.weight, 1.0, 0.3), nn.init.normal_(norm.bias, 0.0, 0.3)
    return net


def converted(stock, *options, **more):
    return rd.convert(copy.deepcopy(stock), *options, **more)


@pytest.fixture(params=[0, 2], ids=["instance", "groups"])
def group(request):
    return request.param


@pytest.fixture(autouse=True)
def silent():
    """Nothing runs its stock path."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.fixture(params=["reference", *(pytest.param(name, marks=built) for name in ("cpu", "in parts", "one by one"))])
def way(request, monkeypatch):
    """The backend, and how many samples an engine is given, and of these a convolution: all; two and one; all, of which a
    convolution reads one."""
    if request.param == "in parts":
        for module in (conv_graph_function, residual_stage_function):
            monkeypatch.setattr(module, "sizes_of_parts", lambda x, largest: [2, 1])
    elif request.param == "one by one":
        monkeypatch.setattr(CpuBackend, "chunks", lambda self, x, conv=None: [slice(n, n + 1) for n in range(len(x))])
    with rd.use_backend("reference" if request.param == "reference" else "cpu"):
        yield


@pytest.mark.parametrize("samples, largest, sizes", [(7, 6, [4, 3]), (6, 30, [1] * 6), (4, 5, [4]), (4, 0, [4]), (0, 5, [0])])
def test_sizes_of_parts(monkeypatch, samples, largest, sizes):
    monkeypatch.setitem(instances._TOGETHER, "cpu", 24)
    assert instances.sizes_of_parts(torch.empty(samples, 1), largest) == sizes


class TestNumbers:
    @pytest.mark.parametrize("rank, samples, affine", [(1, 3, False), (2, 1, True), (2, 3, True), (2, 3, False), (3, 3, True)])
    def test_in_float64(self, kind, rank, samples, affine, group, policy):
        stock, x = network(kind, rank=rank, affine=affine, group=group), images(samples, 4, *SIZES[rank])
        model, state = converted(stock, policy), stock.state_dict()
        run = module_run(stock)
        expected, noise = run({"x": x.clone()}, state), rounding_noise(run, {"x": x}, state)
        for training in (True, False):  # the statistics are a sample's in evaluation, too
            assert_within_noise(module_run(model.train(training))({"x": x.clone()}, state), expected, noise)
            with torch.no_grad():
                assert_within_noise({"output": model(x)}, {"output": expected["output"]}, noise)

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_every_way(self, kind, memory_format, group, policy, way):
        """In channels-last layout no sample's channels lie behind those of another."""
        stock, x = network(kind, group=group), images(3, 4, 9, 7).to(memory_format=memory_format)
        model, state, run = converted(stock, policy), stock.state_dict(), module_run(stock)
        ours = module_run(model)({"x": x.clone()}, state)
        assert_within_noise(ours, run({"x": x.clone()}, state), rounding_noise(run, {"x": x}, state))

    @pytest.mark.parametrize("rank, group", [(1, 0), (2, 0), (3, 0), (2, 2), (3, 2)])
    @pytest.mark.parametrize("autocast", [None, torch.bfloat16])
    def test_in_working_precision(self, kind, rank, autocast, group, policy):
        stock = network(kind, torch.float32, rank=rank, group=group)
        x = images(3, 4, *SIZES[rank]).to(autocast or torch.float32)
        for conv in stock.convs:
            conv.to(x.dtype)  # autocast would round away a change in its last place
        inputs, params = {"x": x}, stock.state_dict()
        run = module_run(stock, autocast)
        truth, runs = true_run(run, inputs, params), torch_runs(run, inputs, params)
        model = converted(stock, policy)
        for memory_format in (torch.contiguous_format, {3: torch.channels_last_3d}.get(rank, torch.channels_last)):
            if rank > 1:
                x = x.to(memory_format=memory_format)
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                assert model(x).dtype == stock(x).dtype
            ours = module_run(model, autocast)({"x": x.clone()}, copy.deepcopy(params))
            assert_within_rule(ours, truth, runs, autocast or torch.float32)


def test_again_and_again_by_its_programs(kind, group, policy):
    """Samples of one size share what was recorded, and steps with other numbers of samples and other sizes come in between."""
    stock = network(kind, group=group)
    model, state, run = converted(stock, policy), stock.state_dict(), module_run(stock)
    for step in range(4):
        for samples, sizes in ((2, (9, 7)), (3, (9, 7)), (1, (6, 8))):
            x = images(samples, 4, *sizes, seed=step)
            ours = module_run(model)({"x": x.clone()}, state)
            assert_within_noise(ours, run({"x": x.clone()}, state), rounding_noise(run, {"x": x}, state))


KEPT = {
    # In values of a sample of 9 x 7 positions; the channels that have two statistics each; and values that are kept where norms
    # are of groups: there are no moments for them, so that the map of a convolution of kernel size 1 is kept.
    Chain: (4 * 63 + 6 * 63 + 2 * 8 * 20, 22, 0),
    Concatenation: (4 * 63 + 3 * 6 * 63, 18, 0),
    Residual: (4 * 63 + 2 * 8 * 20 + 3 * 8 * 20 + 8 * 20, 40, 8 * 20),
}


@pytest.mark.parametrize("kind", KEPT, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("samples", [1, 2, 3])
def test_keeps_every_map_once(kind, group, samples):
    stock, x = network(kind, group=group), images(samples, 4, 9, 7).requires_grad_()
    values, normed, of_groups = KEPT[kind]
    values += of_groups if group else 0
    assert rd.memory.saved_bytes(lambda: converted(stock)(x)) == 8 * samples * (values + 2 * normed)


def test_min_keeps_less(kind, group):
    stock, x = network(kind, group=group), images(3, 4, 9, 7).requires_grad_()
    kept = [rd.memory.saved_bytes(lambda: net(x)) for net in (stock, converted(stock), converted(stock, "min"))]
    assert kept[2] < 0.75 * kept[0] and kept[2] <= kept[1] < kept[0]


def test_a_budget_offers_what_it_costs(kind, group):
    stock, x = network(kind, group=group), images(3, 4, 9, 7)
    least, most = (rd.report(converted(stock, name), x).saved_bytes for name in ("min", "fast"))
    for budget in {least, (least + most) // 2, most}:
        report = rd.report(converted(stock, memory_budget=budget, example_input=x), x)
        assert report.plan.predicted_bytes == report.saved_bytes <= budget


@pytest.mark.parametrize("kind", [Chain, Residual], ids=lambda kind: kind.__name__)
def test_second_derivative(kind, group):
    stock, x = network(kind, group=group), images(2, 4, 5, 4).requires_grad_()
    assert_second_derivatives(converted(stock), x, ("convs.0.weight", "norms.1.weight", "norms.1.bias"))


@pytest.mark.parametrize("kind, dynamic", [(Chain, False), (Residual, False), (Residual, True)])
def test_torch_compile(kind, dynamic, group):
    stock, x = network(kind, group=group), images(2, 4, 9, 7)
    torch.compiler.reset()
    compiled = torch.compile(converted(stock), backend="aot_eager", dynamic=dynamic)
    state, run = stock.state_dict(), module_run(stock)
    y = compiled(x.clone().requires_grad_())
    assert_within_noise({"output": y.detach()}, {"output": stock(x)}, rounding_noise(run, {"x": x}, state))
    y.sum().backward()


def test_torchvisions_resnet_with_instance_norms(policy, engine):
    stock = torchvision_models().resnet18(norm_layer=partial(nn.InstanceNorm2d, affine=True)).double()
    x, state, run = images(2, 3, 64, 64), stock.state_dict(), module_run(stock)
    model = converted(stock, policy)
    noise = rounding_noise(run, {"x": x}, state)
    assert_within_noise(module_run(model)({"x": x.clone()}, state), run({"x": x.clone()}, state), noise)
    assert engine == [policy] * 8


def block(instance=True, batch=None, channels=4):
    """A residual block with a projection, as the functional calls take it; ``batch`` is its last norm."""

    def normal(*shape):
        return images(*shape, seed=sum(shape)).requires_grad_()

    def norm():
        return BatchNorm(normal(channels), normal(channels), instance=instance)

    conv = partial(Conv, padding=(1, 1))
    units = Unit(None, conv(normal(channels, channels, 3, 3))), Unit(norm(), conv(normal(channels, channels, 3, 3)))
    return ResidualBlock(units, batch or norm(), Shortcut(Conv(normal(channels, channels, 1, 1)), norm()))


class TestFunctional:
    def test_the_reference_is_what_torch_computes(self):
        x, norm = images(3, 4, 5, 6), BatchNorm(images(4), images(4, seed=1), eps=1e-3, instance=True)
        ours = reference.bn_add_act(x, norm, torch.zeros_like(x), None, reference.Activation("identity"))
        theirs = F.instance_norm(x, weight=norm.weight, bias=norm.bias, eps=1e-3)
        assert_same({"output": ours}, {"output": theirs})

    @pytest.mark.parametrize("groups", [1, 2, 4])
    def test_the_reference_of_groups_is_what_torch_computes(self, groups):
        x, norm = images(3, 4, 5, 6), BatchNorm(images(4), images(4, seed=1), eps=1e-3, instance=True, groups=groups)
        ours = reference.bn_add_act(x, norm, torch.zeros_like(x), None, reference.Activation("identity"))
        assert_same({"output": ours}, {"output": F.group_norm(x, groups, norm.weight, norm.bias, norm.eps)})

    def test_one_sample_is_a_batch(self, policy):
        x = images(1, 4, 6, 5)
        assert torch.equal(*(functional.residual_block(x, block(instance), policy=policy) for instance in (True, False)))

    def test_samples_do_not_see_each_other(self):
        x, other = images(3, 4, 6, 5), images(3, 4, 6, 5)
        other[1] += 1000
        ours, theirs = (functional.residual_block(of_three, block()) for of_three in (x, other))
        assert torch.equal(ours[::2], theirs[::2]) and not torch.equal(ours[1], theirs[1])

    def test_beside_running_statistics(self):
        """These are the same for all samples."""
        frozen = BatchNorm(None, None, images(4), 1 + images(4) ** 2, batch_stats=False)
        x = images(3, 4, 6, 5)
        ours, truth = functional.residual_block(x, block(batch=frozen)), reference.residual_block(x, block(batch=frozen))
        assert_same({"output": ours}, {"output": truth})

    def test_no_samples(self):
        x = images(0, 4, 6, 5).requires_grad_()
        y = functional.residual_block(x, block())
        y.sum().backward()
        assert y.shape == x.shape == x.grad.shape

    @pytest.mark.parametrize("groups", [0, 1, 2])
    @pytest.mark.parametrize("pool", ["average", "maximum", "global"])
    def test_a_pool(self, pool, groups):
        x, norm = images(3, 4, 6, 5), BatchNorm(images(4), images(4, seed=1), instance=True, groups=groups)
        ours = functional.bn_act_pool(x, norm, pool)
        unit = functional.PooledUnit(norm, functional.Pool(pool, *[] if pool == "global" else [(2, 2), (2, 2), (0, 0)]))
        truth = reference.bn_act_pool(x, unit)
        assert_same({"output": ours}, {"output": truth})

    def test_errors(self):
        x, ordinary = images(2, 4, 6, 5), BatchNorm(None, None)
        instance, conv = ordinary._replace(instance=True), Conv(images(4, 4, 1, 1))
        with pytest.raises(ValueError, match="^block: expected norms that take the statistics of the batch, or all of every sample"):
            functional.residual_block(x, block(batch=ordinary))
        with pytest.raises(ValueError, match="^x: expected more than 1 value per channel"):
            functional.residual_block(images(3, 4, 1, 1), block())
        with pytest.raises(ValueError, match="^norm: expected batch_stats, no running statistics and no group beside instance"):
            functional.bn_act_conv(x, instance._replace(running_mean=images(4), running_var=images(4)), conv)
        with pytest.raises(ValueError, match="^norm.groups: expected 0, or of an instance norm a divisor of 4, the channels, got 3"):
            functional.bn_act_conv(x, instance._replace(groups=3), conv)
        with pytest.raises(ValueError, match="^norm.groups: expected 0, or of an instance norm a divisor"):
            functional.bn_act_conv(x, ordinary._replace(groups=2), conv)
        taken = "instance: expected False, got True"
        with pytest.raises(ValueError, match=rf"^layers\[0\].units\[0\].norm.{taken}"):
            functional.dense_block(x, [DenseLayer((Unit(instance, conv),))])
        with pytest.raises(ValueError, match=f"^behind.norm.{taken}"):
            layers = [DenseLayer((Unit(ordinary, conv),))]
            functional.dense_block(x, layers, behind=functional.PooledUnit(instance, functional.Pool("global")))
        with pytest.raises(ValueError, match=f"^norm.{taken}"):
            functional.bn_add_act(x, instance, x)
        with pytest.raises(ValueError, match=f"^norm.{taken}"):
            functional.conv1x1_bn_add_act(x, conv, instance, x)
        with pytest.raises(ValueError, match=rf"^blocks\[0\].units\[0\].norm.{taken}"):
            units = (Unit(instance, Conv(images(4, 4, 1, 1))), Unit(ordinary, Conv(images(4, 4, 1, 1))))
            functional.dual_path_stage((x[:, :2], x[:, 2:]), [functional.DualPathBlock(units, 2)])


class Mixed(Chain):
    """A batch norm among them."""

    def __init__(self, **options):
        super().__init__(**options)
        self.norms[1] = nn.BatchNorm2d(8)


class Tracking(Chain):
    """With running statistics, which are averages of the samples'."""

    def __init__(self, **options):
        super().__init__(**options)
        self.norms[0] = nn.InstanceNorm2d(6, affine=True, track_running_stats=True)


@pytest.mark.parametrize(
    "kind, reason",
    [
        (Mixed, "some of its norms take the statistics of the batch, and some every sample's"),
        (Tracking, "norms.0 is an instance norm with running statistics"),
    ],
    ids=["mixed", "tracking"],
)
def test_what_stays_stock_is_named(kind, reason):
    stock, x = network(kind), images(2, 4, 9, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = rd.convert(copy.deepcopy(stock))
        assert any(reason in line for line in rd.report(model, x).left)
        state = stock.state_dict()
        assert torch.equal(module_run(model)({"x": x.clone()}, state)["output"], module_run(stock)({"x": x.clone()}, state)["output"])


@pytest.mark.parametrize("channels, groups, stock_runs", [(4, 4, False), (6, 2, True)])
def test_a_group_norm_over_a_concatenation(channels, groups, stock_runs):
    """Split between the maps, unless a group is of both: then stock runs."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = nn.Conv2d(4, channels, 3, padding=1), nn.GroupNorm(groups, channels + 4)
            self.second = nn.Conv2d(channels + 4, 4, 3, padding=1)

        def forward(self, x):
            return self.second(F.relu(self.norm(torch.cat([self.first(x), x], 1))))

    torch.manual_seed(0)
    stock, x = Net().double(), images(2, 4, 9, 7)
    model, state, run = converted(stock), stock.state_dict(), module_run(stock)
    assert_within_noise(module_run(model)({"x": x.clone()}, state), run({"x": x.clone()}, state), rounding_noise(run, {"x": x}, state))
    kept = [rd.memory.saved_bytes(lambda: net(x.clone().requires_grad_())) for net in (stock, model)]
    assert (kept[0] == kept[1]) == stock_runs


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [0, 2])
def test_dtypes_under_autocast_on_a_gpu(kind, groups):
    """There torch normalises groups in float32."""
    stock, x = network(kind, torch.float32, group=groups).cuda(), images(2, 4, 9, 7).float().cuda()
    model = converted(stock)
    with torch.autocast("cuda", torch.bfloat16):
        assert model(x).dtype == stock(x).dtype


def assert_volumes_converted(stock, policy, share):
    """All of a network for volumes: the same numbers, and at most such a share of what stock keeps."""
    stock = stock.double()
    model, x = converted(stock, policy), images(2, 1, 8, 12, 8)
    state, run = stock.state_dict(), module_run(stock)
    ours, noise = module_run(model)({"x": x.clone()}, state), rounding_noise(run, {"x": x}, state)
    assert_within_noise(ours, run({"x": x.clone()}, state), noise)
    report = rd.report(model, x)
    assert not report.left and report.saved_bytes <= share * report.stock_saved_bytes


def test_monais_segmentation_network(policy):
    """Of residual blocks with group norms."""
    monai = library("monai.networks.nets")
    torch.manual_seed(0)
    stock = monai.SegResNet(init_filters=8, in_channels=1, out_channels=2, blocks_down=(1, 2), blocks_up=(1,))
    assert_volumes_converted(stock, policy, {"fast": 0.6, "min": 0.45}[policy])


@pytest.mark.parametrize("res_block", [False, True], ids=["chains", "residual"])
def test_monais_u_net(res_block, policy):
    """As nnU-Net's: of instance norms, leaky ReLUs and strides, in three dimensions."""
    monai = library("monai.networks.nets")
    torch.manual_seed(0)
    sizes = dict(kernel_size=[3, 3, 3], strides=[1, 2, 2], upsample_kernel_size=[2, 2], filters=[4, 8, 8])
    stock = monai.DynUNet(3, 1, 2, **sizes, res_block=res_block)
    assert_volumes_converted(stock, policy, {"fast": 0.75, "min": 0.5}[policy])
