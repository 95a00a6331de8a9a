"""`conv1x1_bn_add_act`: against the composition that it stands for, its accuracy where variances are hard, what it keeps."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from small_nets import assert_same
from test_dense_block import BACKENDS
from tolerance import assert_within_rule, module_run, torch_runs, true_run
from torch import nn

import resdense_ext as rd
from resdense_ext import functional, reference
from resdense_ext.functional import Activation, BatchNorm, Conv
from resdense_ext.ops import backend as backends
from resdense_ext.ops import conv1x1_bn_add_act as engine
from resdense_ext.ops.activation import activation_backward
from resdense_ext.ops.conv1x1_bn_add_act import Branch, Carried, Pointwise, kept_for_backward
from resdense_ext.ops.conv1x1_bn_add_act_function import Conv1x1BNAddActConfig, _flat_tensors
from resdense_ext.ops.operands import Pending, Stats
from resdense_ext.ops.reference_backend import ReferenceBackend
from resdense_ext.ops.units import GRADS, UNIT

ACTIVATIONS = ("relu", "relu6", "leaky_relu", "silu", "elu", "identity")
KEEPS = ("z", "gram", "nothing")
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@pytest.fixture(params=BACKENDS)
def backend(request):
    with rd.use_backend(request.param):
        yield request.param


@pytest.fixture(params=KEEPS)
def keep(request, monkeypatch):
    """Whatever the sizes say."""
    monkeypatch.setattr(engine, "kept_for_backward", lambda *sizes: request.param)
    return request.param


class Case:
    """Random operands: ``N = 3, C = 6, K = 8``, and the call in either form."""

    def __init__(
        self,
        sizes=(5, 7),
        stride=1,
        padding=0,
        groups=1,
        bias=False,
        channels_last=False,
        input_norm=True,
        projection=False,
        frozen=False,
        dtype=torch.float64,
    ):
        rank = len(sizes)
        each = lambda n: (n,) * rank  # noqa: E731
        normal = lambda *shape: torch.randn(*shape, dtype=dtype)  # noqa: E731
        self.geometry = (each(padding), each(1), groups, each(stride))
        x, weight = normal(3, 6, *sizes), normal(8, 6 // groups, *each(1))
        identity = normal(3, 8, *self.conv(weight).outputs(sizes))
        if channels_last:
            x, identity = (t.contiguous(memory_format=FORMATS[t.dim()]) for t in (x, identity))
        self.leaves = {"x": x, "weight": weight, "identity": identity, "bias": normal(8) if bias else None}
        self.norms, self.running = {}, {}
        for name, channels, wanted in (("input_norm", 6, input_norm), ("norm", 8, True), ("identity_norm", 8, projection)):
            if wanted:
                self.leaves[f"{name} gamma"], self.leaves[f"{name} beta"] = normal(channels), normal(channels)
                self.norms[name] = (normal(channels), normal(channels).square() + 0.5)
        self.leaves = {name: None if t is None else t.requires_grad_() for name, t in self.leaves.items()}
        self.frozen = frozen

    def conv(self, weight, bias=None):
        return Conv(weight, bias, *self.geometry)

    def arguments(self, leaves, running=None):
        def norm(name):
            if name not in self.norms:
                return None
            mean, var = (running or self.norms)[name]
            momentum = 0.1 if running else None
            return BatchNorm(leaves[f"{name} gamma"], leaves[f"{name} beta"], mean, var, not self.frozen, momentum)

        conv = self.conv(leaves["weight"], leaves["bias"])
        return leaves["x"], conv, norm("norm"), leaves["identity"], norm("identity_norm"), norm("input_norm")

    def ours(self, leaves=None, activation="relu", slope=0.2, running=None, **options):
        *arguments, input_norm = self.arguments(leaves or self.leaves, running)
        return functional.conv1x1_bn_add_act(
            *arguments, input_norm=input_norm, activation=activation, negative_slope=slope, **options
        )

    def truth(self, activation="relu", slope=0.2):
        *arguments, input_norm = self.arguments(self.leaves)
        act = Activation(activation, slope if activation == "leaky_relu" else 0.0)
        return reference.conv1x1_bn_add_act(*arguments, act, input_norm, Activation("relu"))

    def gradients(self, y, grad):
        wanted = {name: t for name, t in self.leaves.items() if t is not None and t.requires_grad}
        return dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), grad)))


def agree(case, tolerance=1e-12, **options):
    """Output and every gradient. A gradient of zero, such as a bias's before a norm, is the rounding of the others."""
    y, truth = case.ours(**options), case.truth(**options)
    assert (y - truth).norm() <= tolerance * truth.norm()
    assert y.is_contiguous(memory_format=torch.contiguous_format if case.leaves["x"].is_contiguous() else FORMATS[y.dim()])
    grad = torch.randn_like(y)
    assert_gradients(case.gradients(y, grad), case.gradients(truth, grad), tolerance)


def assert_gradients(ours, expected, tolerance=1e-12):
    largest = max(t.norm() for t in expected.values())
    for name, t in expected.items():
        assert (ours[name] - t).norm() <= tolerance * (t.norm() + largest), name


class TestAgreement:
    @pytest.mark.parametrize("channels_last", [False, True])
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize(
        ("stride", "padding", "groups"), [(1, 0, 1), (2, 0, 1), (1, 1, 1), (2, 1, 1), (3, 2, 2), (1, 0, 2)]
    )
    def test_geometry(self, backend, keep, stride, padding, groups, bias, channels_last):
        agree(Case(stride=stride, padding=padding, groups=groups, bias=bias, channels_last=channels_last))

    @pytest.mark.parametrize("channels_last", [False, True])
    @pytest.mark.parametrize("frozen", [False, True])
    @pytest.mark.parametrize("input_norm", [False, True])
    @pytest.mark.parametrize("projection", [False, True])
    def test_norms(self, backend, keep, projection, input_norm, frozen, channels_last):
        agree(Case(channels_last=channels_last, projection=projection, input_norm=input_norm, frozen=frozen, bias=frozen))

    @pytest.mark.parametrize("slope", [0.2, -0.2])
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_activations(self, backend, keep, activation, slope):
        agree(Case(projection=True), activation=activation, slope=slope)

    @pytest.mark.parametrize("channels_last", [False, True])
    @pytest.mark.parametrize("sizes", [(11,), (3, 4, 5), (1, 1), (1, 6)], ids=str)
    def test_sizes(self, backend, keep, sizes, channels_last):
        agree(Case(sizes, stride=2, channels_last=channels_last and len(sizes) > 1))

    def test_an_input_that_strides_alone_can_say(self, backend, keep):
        case = Case(channels_last=True)
        with torch.no_grad():
            case.leaves["x"] = torch.randn(3, 9, 7, 5).double().transpose(2, 3)[:, 2:8].requires_grad_()
        y = case.ours()
        grad = torch.randn(1).double().expand_as(y)
        assert_gradients(case.gradients(y, grad), case.gradients(case.truth(), grad))

    @pytest.mark.parametrize("channels_last", [False, True])
    @pytest.mark.parametrize("projection", [False, True])
    def test_slices(self, backend, keep, projection, channels_last):
        case = Case(channels_last=channels_last, projection=projection)
        for name in ("x", "identity"):
            whole = torch.cat([case.leaves[name]] * 2, 1).detach()
            case.leaves[name] = whole[:, : whole.shape[1] // 2].requires_grad_()
        y, truth = case.ours(), case.truth()
        grad = torch.randn_like(y)
        assert_same({"output": y.detach()}, {"output": truth.detach()})
        assert_gradients(case.gradients(y, grad), case.gradients(truth, grad))

    def test_chunks_of_samples(self, keep, monkeypatch):
        """What is activated at a time is what the backend says, and in several chunks comes the same."""
        seen, plain = [], ReferenceBackend.bn_act
        monkeypatch.setattr(
            ReferenceBackend, "bn_act", lambda self, x, affine: seen.append(x.shape[0]) or plain(self, x, affine)
        )
        monkeypatch.setattr(
            ReferenceBackend, "chunks", lambda self, x, conv=None: [slice(n, n + 2) for n in range(0, x.shape[0], 2)]
        )
        with rd.use_backend("reference"):
            agree(Case(stride=2, bias=True))
        assert set(seen) <= {1, 2}

    @pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
    @pytest.mark.parametrize("projection", [False, True])
    def test_only_some_gradients(self, keep, projection, needs):
        case = Case(projection=projection)
        for name, need in zip(("x", "weight", "identity"), needs):
            case.leaves[name].requires_grad_(need)
        y, truth = case.ours(), case.truth()
        grad = torch.randn_like(y)
        assert_gradients(case.gradients(y, grad), case.gradients(truth, grad))


class Stock(nn.Module):
    """The end of a bottleneck: norm, activation, convolution, norm, and the input as shortcut."""

    def __init__(self, channels=16, bias=False):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 1, bias=bias)
        for norm in (self.bn1, self.bn2):
            nn.init.normal_(norm.weight, 1, 0.3), nn.init.normal_(norm.bias, 0, 0.3)

    def forward(self, x):
        return F.relu(self.bn2(self.conv(F.relu(self.bn1(x)))) + x)


def norm_of(module):
    return BatchNorm(
        module.weight, module.bias, module.running_mean, module.running_var, module.training, module.momentum, module.eps,
        module.num_batches_tracked,
    )  # fmt: skip


class Ours(Stock):
    def forward(self, x):
        conv = Conv(self.conv.weight, self.conv.bias)
        return functional.conv1x1_bn_add_act(x, conv, norm_of(self.bn2), x, input_norm=norm_of(self.bn1))


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("channels_last", [False, True])
    def test_rule(self, backend, keep, dtype, channels_last):
        stock, ours = Stock(), Ours()
        ours.load_state_dict(stock.state_dict())
        stock, ours = stock.to(dtype), ours.to(dtype)
        x = torch.randn(4, 16, 9, 7).to(dtype)
        inputs, params = {"x": x.contiguous(memory_format=torch.channels_last) if channels_last else x}, dict(stock.state_dict())
        truth = true_run(module_run(stock), inputs, params)
        runs = torch_runs(module_run(stock), inputs, params)
        assert_within_rule(module_run(ours)({"x": inputs["x"].clone()}, copy.deepcopy(params)), truth, runs, dtype)

    def test_autocast(self, keep):
        stock, ours = Stock(bias=True), Ours(bias=True)
        ours.load_state_dict(stock.state_dict())
        inputs, params = {"x": torch.randn(4, 16, 9, 7)}, dict(stock.state_dict())
        truth = true_run(module_run(stock), inputs, params)
        run = module_run(ours, autocast=torch.bfloat16)
        found = run({"x": inputs["x"].clone()}, copy.deepcopy(params))
        stocks = torch_runs(module_run(stock, autocast=torch.bfloat16), inputs, params)
        assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in stocks[0].items()}
        assert_within_rule(found, truth, stocks, torch.bfloat16)

    @pytest.mark.parametrize("plain", [False, True])
    def test_a_mean_of_1000_deviations(self, backend, plain):
        """Of the convolution's input: the variance is as good as that of centred inputs, to the rounding of sums."""
        a = torch.randn(4, 16, 15, 14) + 1000
        weight = torch.randn(8, 16, 1, 1)
        source = pointwise(a, weight, None if plain else fold_of(a, torch.ones(16), torch.full((16,), 1000.0)))
        read = source.activated(slice(None)).double()
        var = F.conv2d(read, weight.double()).var((0, 2, 3), unbiased=False)
        stats = engine.output_statistics(source, engine.moments(source))
        assert ((stats.m2 / source.count - var) / var).abs().max() < 2e-6
        uncentred = torch.einsum("nchw,ndhw->cd", read.float(), read.float()) / source.count
        matrix = weight.flatten(1)
        naive = ((matrix @ uncentred) * matrix).sum(1) - (matrix @ read.float().mean((0, 2, 3))) ** 2
        assert ((naive - var) / var).abs().max() > 1e-2, "easy enough for anyone"

    def test_nearly_orthogonal_weights(self, backend):
        """Strongly correlated inputs, and weights orthogonal to what they have in common: R loses what the variance is made of.

        R is known to some units in the last place of its elements, so var to as many of ``(sum_i |w_i| deviation_i)^2``, of which
        one is enough here. That is far more than eps of var itself, and the error shows it.
        """
        direction = F.normalize(torch.rand(16, dtype=torch.float64) + 0.5, dim=0)
        common = torch.randn(8, 1, 16, 16, dtype=torch.float64) * 300 * direction.view(1, -1, 1, 1)
        a = (common + torch.randn(8, 16, 16, 16)).float()
        weight = torch.randn(32, 16, dtype=torch.float64)
        weight = (weight - (weight @ direction)[:, None] * direction).float()[..., None, None]
        source = pointwise(a, weight)
        var = F.conv2d(a.double(), weight.double()).var((0, 2, 3), unbiased=False)
        found = engine.output_statistics(source, engine.moments(source)).m2.double() / source.count
        eps = torch.finfo(torch.float32).eps
        magnitude = (weight.double().flatten(1).abs() @ a.double().std((0, 2, 3))) ** 2
        error = (found - var).abs()
        assert (error <= eps * magnitude).all()
        assert (eps * magnitude > 1e3 * eps * var).all() and (error > 10 * eps * var).any(), "well-conditioned"

    def test_the_variance_is_never_negative(self):
        """Weights that cancel the input altogether, up to rounding."""
        a = torch.randn(2, 1, 9, 9).expand(2, 2, 9, 9) * 1000
        source = pointwise(a, torch.tensor([[1.0, -1.0]])[..., None, None])
        stats = engine.output_statistics(source, engine.moments(source))
        assert stats.m2.item() >= 0
        y = functional.conv1x1_bn_add_act(a, source.conv, BatchNorm(), torch.zeros(2, 1, 9, 9))
        assert y.isfinite().all()


def fold_of(x, gamma, beta):
    backend = backends.choose(x, x.dtype)
    stats = Stats(*backend.channel_stats(x))
    return backend.fold(BatchNorm(gamma, beta), stats, x.numel() // x.shape[1], Activation())


def pointwise(x, weight, fold=None, **geometry):
    conv = Conv(weight, None, geometry.get("padding", (0, 0)), stride=geometry.get("stride", ()))
    return Pointwise(x, fold, conv, backends.choose(x, x.dtype))


class TestPieces:
    """The functions as a whole block's node calls them."""

    @pytest.mark.parametrize("channels_last", [False, True])
    def test_projection_without_either_output(self, backend, channels_last):
        """``relu(bn(W a) + bn_d(W_d x))``, where x is what the block reads, at a stride, and has a gradient already."""
        formatted = FORMATS[4] if channels_last else torch.contiguous_format
        h = torch.randn(2, 4, 3, 3, dtype=torch.float64).contiguous(memory_format=formatted).requires_grad_()
        x = torch.randn(2, 6, 5, 5, dtype=torch.float64).contiguous(memory_format=formatted).requires_grad_()
        gamma, beta = (torch.randn(4, dtype=torch.float64).requires_grad_() for _ in range(2))
        weights = [torch.randn(8, c, 1, 1, dtype=torch.float64).requires_grad_() for c in (4, 6)]
        norms = [BatchNorm(*torch.randn(2, 8, dtype=torch.float64).unbind()) for _ in weights]
        before = torch.randn_like(x)

        a = reference.apply_pending(h, *reference.fold_batch_norm(BatchNorm(gamma, beta), *_mean_var(h))[:2])
        z, z_d = F.conv2d(a, weights[0]), F.conv2d(x, weights[1], stride=2)
        expected = reference.bn_add_act(z, norms[0], z_d, norms[1])
        grad = torch.randn_like(expected)
        truth = torch.autograd.grad(expected, [h, gamma, beta, *weights, x], grad)

        with torch.no_grad():
            sources = [pointwise(h, weights[0], fold_of(h, gamma, beta)), pointwise(x, weights[1], stride=(2, 2))]
            moments = [engine.moments(s) for s in sources]
            branches = [
                Branch(s, s.backend.fold(norm, engine.output_statistics(s, m), s.count, Activation("identity")))
                for s, m, norm in zip(sources, moments, norms)
            ]
            backend = sources[0].backend
            out, kept = engine.forward(*branches, Activation(), backend)
            g = activation_backward(grad, out, Activation())
            main = engine.backward(branches[0], moments[0], g)
            into = Pending.of(before.clone(memory_format=torch.preserve_format), x)
            shortcut = engine.backward(branches[1], moments[1], g, into)
            dh = backend.pending_grad_(main.conv.input)
        assert kept is None and shortcut.conv.input.dy is into.dy
        found = (dh, main.conv.norm_weight, main.conv.norm_bias, main.conv.weight, shortcut.conv.weight, into.dy - before)
        for ours, t in zip((out, *found), (expected, *truth)):
            assert (ours - t).norm() <= 1e-12 * t.norm() + 1e-13

    def test_a_pending_gradient_is_added_to(self, backend):
        x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
        fold = fold_of(x, *torch.randn(2, 4, dtype=torch.float64))
        source = pointwise(x, torch.randn(8, 4, 1, 1, dtype=torch.float64), fold)
        moments = engine.moments(source)
        fold = source.backend.fold(BatchNorm(), engine.output_statistics(source, moments), source.count, Activation("identity"))
        branch, g, before = Branch(source, fold), torch.randn(2, 8, 5, 5, dtype=torch.float64), torch.randn_like(x)
        alone = source.backend.pending_grad_(engine.backward(branch, moments, g).conv.input)
        into = Pending.of(before.clone(), x)
        added = source.backend.pending_grad_(engine.backward(branch, moments, g, into).conv.input)
        assert_same({"added": added}, {"added": alone + before})

    def test_a_shortcut_that_is_carried_raw(self, backend):
        z, identity = torch.randn(2, 3, 8, 5, 5, dtype=torch.float64).unbind()[0], torch.randn(3, 8, 5, 5, dtype=torch.float64)
        fold = fold_of(z, torch.randn(8).double(), torch.randn(8).double())
        chosen = backends.choose(z, z.dtype)
        out, before = engine.forward(Carried(z, fold), Carried(identity), Activation("silu"), chosen)
        y = reference.apply_pending(z, *fold.affine[:2], Activation("identity")) + identity
        assert_same({"before": before, "output": out}, {"before": y, "output": F.silu(y)})


def _mean_var(x):
    mean, m2 = reference.channel_stats(x)
    return mean, m2 / (x.numel() // x.shape[1])


class TestMemory:
    def kept(self, shape, outputs, policy, norm=None, activation="relu", **options):
        x = torch.randn(shape, requires_grad=True)
        weight = torch.randn(outputs, shape[1], 1, 1, requires_grad=True)
        identity = torch.randn(shape[0], outputs, *shape[2:], requires_grad=True)
        call = lambda: functional.conv1x1_bn_add_act(  # noqa: E731
            x, Conv(weight), norm or BatchNorm(), identity, policy=policy, activation=activation, **options
        )
        parameters = 4 * (x.numel() + weight.numel())
        return rd.memory.saved_bytes(call) - parameters

    @pytest.mark.unpoisoned
    def test_the_smaller_is_kept(self, backend):
        """Beside x and the weight: the output, the norm's statistics, and the convolution's output or R and the mean."""
        C, K = 16, 64
        for spatial, difference in ((8, 4 * C * C + 8 * C), (1, 4 * 3 * K)):
            out, statistics = 4 * 3 * spatial**2 * K, 2 * 4 * K
            assert self.kept((3, C, spatial, spatial), K, "fast") == out + statistics + difference
            assert self.kept((3, C, spatial, spatial), K, "min") == out + statistics

    @pytest.mark.unpoisoned
    def test_what_activations_ask_for(self):
        shape, out = (3, 16, 8, 8), 4 * 3 * 64 * 64
        plain = self.kept(shape, 64, "min")
        assert self.kept(shape, 64, "min", activation="silu") == plain, "its input in the output's stead"
        assert self.kept(shape, 64, "min", activation="identity") == plain - out

    @pytest.mark.unpoisoned
    def test_running_statistics_need_nothing(self):
        mean, var = torch.zeros(64), torch.ones(64)
        frozen = BatchNorm(None, None, mean, var, batch_stats=False)
        assert self.kept((3, 16, 8, 8), 64, "fast", frozen) == 4 * 3 * 64 * 64 + 2 * 4 * 64, "the output, mean and variance"

    @pytest.mark.unpoisoned
    def test_nothing_without_gradients(self):
        x, identity = torch.randn(3, 16, 8, 8), torch.randn(3, 64, 8, 8)
        conv = Conv(torch.randn(64, 16, 1, 1))
        assert rd.memory.saved_bytes(lambda: functional.conv1x1_bn_add_act(x, conv, BatchNorm(), identity)) == 0

    @pytest.mark.unpoisoned
    @pytest.mark.parametrize("channels_last", [False, True])
    def test_slices_are_not_copied(self, channels_last):
        formatted = dict(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        slices = [torch.randn(2, 2 * C, 24, 20).contiguous(**formatted)[:, :C].requires_grad_() for C in (16, 32)]
        wholes = [t.detach().contiguous(**formatted).requires_grad_() for t in slices]
        weight = torch.randn(32, 16, 1, 1, requires_grad=True)

        def step(x, identity):
            y = functional.conv1x1_bn_add_act(x, Conv(weight), BatchNorm(), identity, BatchNorm(), input_norm=BatchNorm())
            torch.autograd.grad(y.square().sum(), (x, identity, weight))

        ours, expected = (rd.memory.peak_bytes(lambda: step(*given), warmup=0) for given in (slices, wholes))
        assert ours <= expected

    def test_choice(self):
        """Stage by stage of a ResNet-50 at a batch of 4 and 8, where z has four times as many channels as a."""
        stages = [(56, 64), (28, 128), (14, 256), (7, 512)]
        choices = {n: [kept_for_backward(n * side**2, c, 4 * c) for side, c in stages] for n in (4, 8, 256)}
        assert choices == {4: ["gram"] * 3 + ["z"], 8: ["gram"] * 3 + ["z"], 256: ["gram"] * 4}
        assert kept_for_backward(100, 64, 64, policy="min") == "nothing"
        assert kept_for_backward(10000, 64, 127) == "z" and kept_for_backward(10000, 64, 128) == "gram"
        assert kept_for_backward(63, 64, 1000) == "z" and kept_for_backward(63, 64, 1000, groups=2) == "gram"


class TestAutograd:
    @pytest.mark.unpoisoned
    @pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
    @pytest.mark.parametrize("frozen", [False, True])
    @pytest.mark.parametrize("projection", [False, True])
    @pytest.mark.parametrize("activation", ["leaky_relu", "silu", "elu", "identity"])
    def test_gradcheck(self, monkeypatch, activation, projection, frozen, check):
        monkeypatch.setattr(engine, "kept_for_backward", lambda *sizes: "gram")
        case = Case((2, 3), projection=projection, frozen=frozen, bias=True)
        names = [name for name, t in case.leaves.items() if t is not None]

        def run(*tensors):
            leaves = dict(case.leaves, **dict(zip(names, tensors)))
            return case.ours(leaves, activation, input_activation="silu")

        assert check(run, tuple(case.leaves[name] for name in names), fast_mode=True)

    @pytest.mark.parametrize("frozen", [False, True])
    @pytest.mark.parametrize("activation", ["relu", "silu", "identity"])
    def test_opcheck(self, backend, keep, activation, frozen):
        projection = activation != "relu"
        case = Case(projection=projection, frozen=frozen, stride=2, bias=True, dtype=torch.float32)
        leaves = {name: None if t is None else t.detach() for name, t in case.leaves.items()}
        x, conv, norm, identity, identity_norm, input_norm = case.arguments(leaves)
        norms = (input_norm, norm, identity_norm)
        config = Conv1x1BNAddActConfig.of(conv, norms, Activation(), Activation(activation), keep, backend)
        tensors = _flat_tensors(conv, norms)
        utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
        op = torch.ops.resdense.conv1x1_bn_add_act
        torch.library.opcheck(op.default, (x, identity, tensors, *config), test_utils=utilities)
        out, before, stats, kept = op(x, identity, tensors, *config)
        mark = None if activation == "identity" else out if before.numel() == 0 else before
        for needs in ([True] * 14, [False] * 14):
            targets = [x, identity, *(tensors[UNIT * i + position] for i in range(3) for position in GRADS)]
            needs = [need and t is not None for need, t in zip(needs, targets)]
            arguments = (torch.randn_like(out), mark, x, identity if projection else None, tensors, *config, stats, kept, needs)
            torch.library.opcheck(torch.ops.resdense.conv1x1_bn_add_act_backward.default, arguments, test_utils=utilities)

    def test_running_statistics_once(self, backend, keep):
        case = Case(projection=True, bias=True)
        copies = [{name: tuple(t.clone() for t in pair) for name, pair in case.norms.items()} for _ in range(2)]
        y = case.ours(running=copies[0])
        y.sum().backward()
        leaves = case.leaves
        a = F.relu(_batch_norm(leaves["x"], "input_norm", leaves, copies[1]))
        z = F.conv2d(a, leaves["weight"], leaves["bias"])
        _batch_norm(z, "norm", leaves, copies[1]), _batch_norm(leaves["identity"], "identity_norm", leaves, copies[1])
        for name in case.norms:
            assert_same(*({"mean": mean, "var": var} for mean, var in (copy[name] for copy in copies)))

    def test_gradients_are_not_written_to(self, keep):
        for activation in ("relu", "identity"):
            case = Case(projection=True)
            y = case.ours(activation=activation)
            grad = torch.randn_like(y)
            same = grad.clone()
            case.gradients(y, grad)
            assert torch.equal(grad, same)

    def test_a_changed_output_raises(self, keep):
        y = Case().ours()
        with torch.no_grad():
            y.add_(1)
        with pytest.raises(RuntimeError, match="conv1x1_bn_add_act: its output, or a parameter of it, was changed in place"):
            y.sum().backward()


def _batch_norm(x, name, leaves, running):
    return F.batch_norm(x, *running[name], leaves[f"{name} gamma"], leaves[f"{name} beta"], True, 0.1)


class TestArguments:
    def test_an_empty_batch(self):
        x, identity = torch.randn(0, 6, 5, 7, requires_grad=True), torch.randn(0, 8, 5, 7)
        weight = torch.randn(8, 6, 1, 1, requires_grad=True)
        norm = BatchNorm(None, None, torch.zeros(8), torch.ones(8), batch_stats=False)
        y = functional.conv1x1_bn_add_act(x, Conv(weight), norm, identity)
        assert y.shape == (0, 8, 5, 7)
        y.sum().backward()
        assert torch.equal(weight.grad, torch.zeros_like(weight)) and x.grad.shape == x.shape

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (dict(conv=Conv(torch.zeros(8, 6, 3, 3))), ValueError, r"conv.weight: expected a kernel of size 1, got shape \(8, 6, 3, 3\)"),
            (dict(conv=Conv(torch.zeros(8, 5, 1, 1))), ValueError, r"conv.weight: expected \[K, 6 / groups"),
            (dict(conv=Conv(torch.zeros(8, 6, 1, 1).double())), TypeError, "conv.weight: expected dtype torch.float32, got torch.float64"),
            (dict(conv=Conv(torch.zeros(8, 6, 1, 1), stride=(2, 2))), ValueError, r"identity: expected shape \(3, 8, 3, 4\), .* got \(3, 8, 5, 7\)"),
            (dict(identity=torch.zeros(3, 8, 5, 7).double()), TypeError, "identity: expected dtype torch.float32, got torch.float64"),
            (dict(norm=BatchNorm(torch.ones(7))), ValueError, r"norm.weight: expected shape \(8,\), one value a channel, got \(7,\)"),
            (dict(identity_norm=BatchNorm(torch.ones(7))), ValueError, "identity_norm.weight: expected shape"),
            (dict(input_norm=BatchNorm(torch.ones(8))), ValueError, r"input_norm.weight: expected shape \(6,\)"),
            (dict(activation="gelu"), ValueError, "activation: expected relu"),
            (dict(policy="auto"), ValueError, "policy: expected one of fast, min, got 'auto'"),
            (dict(x=torch.zeros(3, 6)), ValueError, "x: expected 3, 4 or 5 dimensions"),
        ],
    )  # fmt: skip
    def test_errors_change_nothing(self, change, error, message):
        counter = torch.tensor(0)
        norm = BatchNorm(None, None, torch.zeros(8), torch.ones(8), True, 0.1, num_batches_tracked=counter)
        arguments = dict(x=torch.randn(3, 6, 5, 7), conv=Conv(torch.randn(8, 6, 1, 1)), norm=norm, identity=torch.randn(3, 8, 5, 7))
        with pytest.raises(error, match=message):
            functional.conv1x1_bn_add_act(**{**arguments, **change})
        assert counter == 0 and norm.running_mean.eq(0).all()

    def test_one_value_a_channel(self):
        x, identity = torch.randn(1, 6, 2, 2), torch.randn(1, 8, 1, 1)
        conv = Conv(torch.randn(8, 6, 1, 1), stride=(2, 2))
        with pytest.raises(ValueError, match=r"expected more than 1 value per channel when training, got input size \(1, 8, 1, 1\)"):
            functional.conv1x1_bn_add_act(x, conv, BatchNorm(), identity)
