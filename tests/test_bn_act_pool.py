"""Batch norm, activation and pool in one node (stems, heads) and with a convolution behind (transitions)."""

import copy
import itertools

import pytest
import torch
from test_dense_block import BACKENDS, _format, maps, same, state
from tolerance import assert_within_rule, module_run, torch_runs, true_run
from torch import nn

import resdense_ext as rd
from resdense_ext import functional, reference
from resdense_ext.functional import Activation, BatchNorm, Conv, Pool, PooledUnit, Unit
from resdense_ext.ops import pooled_unit as op
from resdense_ext.ops.units import flat_tensors

KINDS = ("average", "maximum", "global", "transition")
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
POOLS = {
    "average": (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    "maximum": (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    "global": (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
}


@pytest.fixture(params=BACKENDS)
def backend(request):
    with rd.use_backend(request.param):
        yield request.param


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def chain(kind, rank=2, channels=6, activation=None, windows=None):
    """Norm, activation, pool, or a transition, with random state."""
    torch.manual_seed(0)
    activation = activation or nn.ReLU()
    if kind == "transition":
        made = rd.nn.Chain(rd.nn.Transition(channels, 4, spatial_dims=rank))
        made[0].relu = activation
    else:
        sizes = {"average": (2, 2), "maximum": (3, 2, 1), "global": (1,)}[kind] if windows is None else windows
        made = rd.nn.Chain(NORMS[rank - 1](channels), activation, POOLS[kind][rank - 1](*sizes))
    norm = next(m for m in made.modules() if isinstance(m, NORMS))
    nn.init.normal_(norm.weight, 1.0, 0.3)
    nn.init.normal_(norm.bias, 0.0, 0.3)
    nn.init.normal_(norm.running_mean, 0.0, 0.3)
    nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return made


def agree(module, x, tolerance=1e-12):
    """Output, gradients and buffers in float64, with plain PyTorch's."""
    params, inputs = state(module.double()), {"x": x.double()}
    stock = module_run(rd.revert(copy.deepcopy(module)))({"x": inputs["x"].clone()}, copy.deepcopy(params))
    ours = module_run(module)({"x": inputs["x"].clone()}, copy.deepcopy(params))
    assert ours.keys() == stock.keys()
    same(list(ours.values()), list(stock.values()), tolerance)


@pytest.fixture
def engine(monkeypatch):
    """What the functional calls were given."""
    calls = []
    for name in ("bn_act_pool", "transition"):
        call = getattr(functional, name)
        monkeypatch.setattr(functional, name, lambda *args, call=call, name=name, **more: (calls.append(name), call(*args, **more))[1])
    return calls


class TestAgreement:
    @pytest.mark.parametrize("channels_last", [False, True])
    @pytest.mark.parametrize("shape", [(2, 6, 9, 7), (3, 6, 4, 6), (1, 6, 2, 3), (2, 6, 9), (2, 6, 5, 4, 6)], ids=str)
    def test_shapes(self, backend, kind, shape, channels_last, engine):
        if channels_last and len(shape) == 3:
            pytest.skip("one spatial dimension has one memory format")
        module = chain(kind, len(shape) - 2)
        agree(module, maps(shape, channels_last))
        assert engine == ["transition" if kind == "transition" else "bn_act_pool"]

    @pytest.mark.parametrize("windows", [(3, 1, 1), (3, 3), (2, 1), (2, 3), ((3, 2), (1, 2), (1, 0))], ids=str)
    @pytest.mark.parametrize("kind", ["average", "maximum"])
    def test_windows(self, backend, kind, windows):
        agree(chain(kind, windows=windows), maps((2, 6, 9, 7)))

    @pytest.mark.parametrize("activation", [nn.LeakyReLU(0.2), nn.ELU(), nn.SiLU(), nn.Identity()], ids=str)
    def test_activations(self, kind, activation):
        agree(chain(kind, activation=activation), maps((2, 6, 9, 7)))

    def test_eval(self, backend, kind):
        agree(chain(kind).eval(), maps((2, 6, 9, 7)))

    @pytest.mark.parametrize(
        "options", [dict(affine=False), dict(track_running_stats=False), dict(momentum=None), dict(eps=0.3, momentum=0.5)], ids=str
    )
    @pytest.mark.parametrize("training", [True, False])
    def test_norm_options(self, kind, options, training):
        module = chain(kind)
        holder, name = (module[0], "norm") if kind == "transition" else (module, "0")
        setattr(holder, name, nn.BatchNorm2d(6, **options))
        agree(module.train(training), maps((2, 6, 9, 7)))

    def test_bias_and_groups_of_a_transition(self, backend):
        module = chain("transition")
        module[0].conv = nn.Conv2d(6, 4, 1, groups=2)
        agree(module, maps((2, 6, 9, 7)))

    @pytest.mark.parametrize("which", list(itertools.product([True, False], repeat=3)), ids=str)
    def test_only_some_gradients(self, backend, which):
        x_needs, norm_needs, conv_needs = which
        results = []
        for stock in (False, True):
            module = chain("transition").double()
            module[0].norm.requires_grad_(norm_needs)
            module[0].conv.requires_grad_(conv_needs)
            x = maps((2, 6, 9, 7)).double().requires_grad_(x_needs)
            y = (rd.revert(module) if stock else module)(x)
            if any(which):
                y.square().sum().backward()
            results.append([x.grad, *(p.grad for p in module.parameters())])
        if any(which):
            same(*results)

    @pytest.mark.parametrize("channels_last", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_lower_precision(self, backend, kind, dtype, channels_last):
        module = chain(kind, channels=24)
        params = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state(module).items()}
        inputs = {"x": maps((3, 24, 9, 7)).to(dtype)}
        run = module_run(rd.revert(copy.deepcopy(module)))
        ours = module_run(module)({"x": inputs["x"].contiguous(memory_format=_format(channels_last))}, copy.deepcopy(params))
        assert_within_rule(ours, true_run(run, inputs, params), torch_runs(run, inputs, params), dtype)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_autocast(self, kind, dtype):
        module = chain(kind, channels=24)
        params, inputs = state(module), {"x": maps((3, 24, 9, 7)).to(dtype)}
        run = module_run(rd.revert(copy.deepcopy(module)), torch.bfloat16)
        ours = module_run(module, torch.bfloat16)({"x": inputs["x"].clone()}, copy.deepcopy(params))
        truth = true_run(module_run(rd.revert(copy.deepcopy(module))), inputs, params)
        assert_within_rule(ours, truth, torch_runs(run, inputs, params), torch.bfloat16)
        stock = run({"x": inputs["x"].clone()}, copy.deepcopy(params))
        assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in stock.items()}

    def test_a_mean_of_a_thousand_deviations(self, backend, kind):
        module = chain(kind)
        params = state(module)
        inputs = {"x": maps((3, 6, 9, 7)) + 1000 * torch.arange(1.0, 7).view(1, 6, 1, 1)}
        run = module_run(rd.revert(copy.deepcopy(module)))
        ours = module_run(module)({"x": inputs["x"].clone()}, copy.deepcopy(params))
        assert_within_rule(ours, true_run(run, inputs, params), torch_runs(run, inputs, params), torch.float32)

    def test_strided_input_and_expanded_gradient(self, backend, kind):
        wide = maps((3, 12, 14, 6)).double()
        for view in (wide[:, ::2, ::2], wide[:, 6:, 7:].transpose(2, 3), wide[:1, :6].expand(3, 6, 14, 6)):
            results = []
            for stock in (False, True):
                module = chain(kind).double()
                x = view.detach().requires_grad_()
                y = (rd.revert(module) if stock else module)(x)
                y.backward(torch.ones((), dtype=y.dtype).expand(y.shape))
                results.append((y.detach(), x.grad))
            same(*results)

    def test_the_layout_is_the_inputs(self, kind):
        for channels_last in (False, True):
            y = chain(kind)(maps((2, 6, 9, 7), channels_last))
            assert y.is_contiguous(memory_format=_format(channels_last))

    def test_empty_batch(self, kind):
        y = chain(kind)(torch.empty(0, 6, 9, 7))
        assert y.shape == rd.revert(chain(kind))(torch.empty(0, 6, 9, 7)).shape

    def test_more_places_than_a_byte_counts(self, engine):
        agree(chain("maximum", windows=(17, 1, 8)), maps((2, 6, 18, 19)))
        assert engine == ["bn_act_pool"]


class TestStockPath:
    """Pools that the engine does not know."""

    @pytest.mark.parametrize(
        "pool",
        [
            nn.AvgPool2d(2, ceil_mode=True),
            nn.AvgPool2d(3, padding=1, count_include_pad=False),
            nn.AvgPool2d(2, divisor_override=3),
            nn.MaxPool2d(2, dilation=2),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            nn.AdaptiveAvgPool2d(2),
            nn.LPPool2d(2, 2),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("of", ["chain", "transition"])
    def test_other_pools(self, pool, of, engine, recwarn):
        module = chain("average" if of == "chain" else "transition")
        if of == "chain":
            module[2] = pool
        else:
            module[0].pool = pool
        agree(module, maps((2, 6, 9, 7)))
        assert not engine
        assert [f"a {of.title()} runs its stock path: pool " in str(w.message) for w in recwarn] == [True] * (of == "transition")

    @pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.AvgPool2d(3, 2, 1)], ids=str)
    def test_pools_that_do_not_commute_with_the_convolution(self, pool, engine):
        module = chain("transition")
        module[0].pool = pool
        with pytest.warns(UserWarning, match="does not commute"):
            agree(module, maps((2, 6, 9, 7)))
        assert not engine

    def test_hooks_and_other_modules(self, engine):
        x, seen = maps((2, 6, 9, 7)), []
        for index in range(3):
            module = chain("maximum")
            module[index].register_forward_hook(lambda *_: seen.append(1))
            agree(module, x)
        assert seen and not engine
        module = chain("transition")
        module[0].append(nn.Dropout(0.0))
        with pytest.warns(UserWarning, match="holds norm, relu, conv, pool, 4, and not norm, relu, conv, pool"):
            agree(module, x)
        assert not engine

    def test_dimensions_that_do_not_fit(self):
        with pytest.raises(ValueError, match="4D"):
            chain("maximum")(maps((2, 6, 9)))


class TestAutograd:
    @pytest.mark.unpoisoned
    @pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
    def test_gradcheck(self, backend, kind, check):
        activation = "silu" if backend == "reference" else "leaky_relu"
        torch.manual_seed(0)
        x = maps((2, 3, 5, 4)).double().requires_grad_()
        vectors = [(torch.randn(3, dtype=torch.float64) + 1).requires_grad_() for _ in range(2)]
        conv = [torch.randn(2, 3, 1, 1, dtype=torch.float64).requires_grad_(), torch.randn(2, dtype=torch.float64).requires_grad_()]

        def unit(x, weight, bias, *conv):
            norm = BatchNorm(weight, bias)
            if conv:
                return functional.transition(x, Unit(norm, Conv(*conv)), activation=activation)
            return functional.bn_act_pool(x, norm, kind, 2, activation=activation)

        assert check(unit, (x, *vectors, *(conv if kind == "transition" else ())), fast_mode=True)

    def test_what_backward_keeps(self, kind):
        """The input and, of maxima, a byte each."""
        module, x = chain(kind, channels=32), maps((2, 32, 17, 16)).requires_grad_()
        maxima = 2 * 32 * 9 * 8 if kind == "maximum" else 0
        assert 0 <= rd.memory.saved_bytes(lambda: module(x)) - 4 * x.numel() - maxima <= 1024

    def test_the_input_may_not_change_before_backward(self, kind):
        x = maps((2, 6, 9, 7)).requires_grad_()
        source = x * 1
        y = chain(kind)(source)
        with torch.no_grad():
            source.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    def test_the_gradient_that_comes_in_is_not_changed(self, backend, kind):
        y = chain(kind)(maps((2, 6, 9, 7)).requires_grad_())
        grad = torch.randn_like(y)
        before = grad.clone()
        y.backward(grad)
        assert torch.equal(grad, before)

    @pytest.mark.parametrize("batch_stats", [True, False])
    def test_opcheck(self, backend, kind, batch_stats):
        x = maps((2, 6, 9, 7))
        running = (torch.randn(6), torch.rand(6) + 0.5)
        pool = {"global": Pool("global"), "maximum": Pool("maximum", (3, 3), (2, 2), (1, 1))}.get(
            kind, Pool("average", (2, 2), (2, 2), (0, 0))
        )
        conv = Conv(torch.randn(4, 6, 1, 1), torch.randn(4)) if kind == "transition" else None
        unit = PooledUnit(BatchNorm(torch.randn(6), torch.randn(6), *running, batch_stats), pool, conv)
        arguments = (x, flat_tensors([(unit.norm, unit.conv)]), *op.PooledUnitConfig.of(unit, Activation(), backend))
        utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(torch.ops.resdense.bn_act_pool.default, arguments, test_utils=utilities)
        out, *kept = torch.ops.resdense.bn_act_pool(*arguments)
        for needs in ([True] * 5, [False] * 5, [False, True, True, False, False]):
            needs = [need and (i < 3 or conv is not None) for i, need in enumerate(needs)]
            backward = (torch.randn_like(out), *arguments, *kept, needs)
            torch.library.opcheck(torch.ops.resdense.bn_act_pool_backward.default, backward, test_utils=utilities)


NORM, X = BatchNorm(torch.ones(3), torch.zeros(3)), torch.zeros(2, 3, 4, 6)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "pool: expected average, maximum or global, got 'mean'", lambda: functional.bn_act_pool(X, NORM, "mean")),
        (ValueError, r"kernel_size: expected a number or 2, .* got \(2,\)", lambda: functional.bn_act_pool(X, NORM, kernel_size=(2,))),
        (ValueError, r"windows within the padded x of shape \(2, 3, 4, 6\)", lambda: functional.bn_act_pool(X, NORM, kernel_size=5)),
        (ValueError, "padding of at most half a window", lambda: functional.bn_act_pool(X, NORM, kernel_size=2, padding=2)),
        (ValueError, "strides of 1 or more", lambda: functional.bn_act_pool(X, NORM, stride=0)),
        (ValueError, "x: expected 3, 4 or 5 dimensions", lambda: functional.bn_act_pool(X[0, 0], NORM)),
        (TypeError, "x: expected float32, float64, bfloat16 or float16", lambda: functional.bn_act_pool(X.int(), NORM)),
        (TypeError, "x: expected a Tensor, got NoneType", lambda: functional.bn_act_pool(None, NORM)),
        (ValueError, r"norm.weight: expected shape \(2,\)", lambda: functional.bn_act_pool(X[:, :2], NORM)),
        (ValueError, "activation: expected relu", lambda: functional.bn_act_pool(X, NORM, activation="tanh")),
        (ValueError, "unit.conv.weight: expected a kernel of size 1", lambda: functional.transition(X, Unit(NORM, Conv(torch.zeros(2, 3, 3, 3))))),
        (ValueError, r"unit.conv.weight: expected \[K, 3 / groups", lambda: functional.transition(X, Unit(NORM, Conv(torch.zeros(2, 4, 1, 1))))),
        (TypeError, "unit.conv.weight: expected dtype torch.float32", lambda: functional.transition(X, Unit(NORM, Conv(torch.zeros(2, 3, 1, 1).double())))),
        (ValueError, "behind.pool: expected average or global, got maximum",
         lambda: functional.dense_block(X, [], behind=PooledUnit(NORM, Pool("maximum", (2, 2), (2, 2), (0, 0))))),
        (ValueError, "behind.pool.ceil_mode: expected False behind a norm, got True",
         lambda: functional.dense_block(X, [], behind=PooledUnit(NORM, Pool("average", (2, 2), (2, 2), (0, 0), True)))),
    ],
)  # fmt: skip
def test_errors(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_the_reference_is_plain_pytorch():
    for kind in KINDS:
        module, x = chain(kind).double(), maps((2, 6, 9, 7)).double()
        modules = list(module[0] if kind == "transition" else module)
        norm = BatchNorm(modules[0].weight, modules[0].bias)
        conv = Conv(modules[2].weight) if kind == "transition" else None
        sizes = {"maximum": ((3, 3), (2, 2), (1, 1)), "global": ()}.get(kind, ((2, 2), (2, 2), (0, 0)))
        unit = PooledUnit(norm, Pool("average" if kind == "transition" else kind, *sizes), conv)
        same([reference.bn_act_pool(x, unit)], [rd.revert(module)(x)])
