"""What people do with a model in training, done with a converted one: as with the stock one, or refused and said so."""

import copy
import threading

import pytest
import torch
from small_nets import assert_same, engine, images, policy, randomise, small_block, steps, torchvision_models  # noqa: F401
from tolerance import assert_within_rule, torch_runs, true_run
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations
from torch.optim import swa_utils

import resdense_ext as rd


def residual_block():
    """The same number of channels in and out."""
    torch.manual_seed(0)
    return randomise(torchvision_models().resnet.Bottleneck(6, 3, downsample=_projection(6, 12))).double()


def _projection(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))


BLOCKS = {"dense": (small_block, "denselayer2.conv1"), "residual": (residual_block, "conv2")}


@pytest.fixture(params=BLOCKS)
def pair(request, policy):
    """A stock network around a block, that network converted, and the path of one of the block's convolutions."""
    make, inner = BLOCKS[request.param]
    block = make()
    width = block(images(2, 6, 5, 4)).shape[1]
    stock = nn.Sequential(block, nn.Conv2d(width, 3, 1).double(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return stock, rd.convert(copy.deepcopy(stock), policy), f"0.{inner}"


X = images(2, 6, 5, 4)


def test_functional_call(pair, policy, engine):  # noqa: F811
    results = []
    for model in pair[:2]:
        state = {name: t.detach() * 1.5 for name, t in model.state_dict().items() if t.is_floating_point()}
        leaves = {name: state[name].requires_grad_() for name, _ in model.named_parameters()}
        output = torch.func.functional_call(model, state, (X,))
        output.square().sum().backward()
        results.append({"output": output} | state | {f"grad {name}": t.grad for name, t in leaves.items()})
    assert_same(*reversed(results))
    assert engine == [policy]


def test_averaged_weights(pair, policy, engine):  # noqa: F811
    results = []
    for model in pair[:2]:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
        for _ in range(3):
            optimizer.zero_grad()
            model(X).square().sum().backward()
            optimizer.step()
            average.update_parameters(model)
        swa_utils.update_bn([X, X.flip(0) * 2], average)
        results.append({"output": average.eval()(X)} | average.state_dict())
    assert_same(*reversed(results))
    assert engine == [policy] * 6


@pytest.mark.parametrize("parametrise", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrised_weights(pair, parametrise, engine):  # noqa: F811
    """Inside a block it runs its stock path; around it nothing changes."""
    stock, model, inner = pair
    for path in ("1", inner):
        calls = len(engine)
        for net in (stock, model):
            torch.manual_seed(1)
            parametrise(net.get_submodule(path))
        if path == inner:
            with pytest.warns(UserWarning, match="is ParametrizedConv2d"):
                assert_same(steps(model, X, count=2), steps(stock, X, count=2))
            assert len(engine) == calls
        else:
            assert_same(steps(model, X, count=2), steps(stock, X, count=2))
            assert len(engine) == calls + 2


def test_autocast_accumulates(pair):
    """Gradients of two micro-batches are the sum of each one's, in the parameters' dtype."""
    model = pair[1].float()
    batches = X.float(), X.flip(0).float() * 2

    def gradients(*xs):
        net = copy.deepcopy(model)
        for x in xs:
            with torch.autocast("cpu", torch.bfloat16):
                loss = net(x).float().square().sum()
            loss.backward()
        return {f"grad {name}": p.grad for name, p in net.named_parameters()}

    each = [gradients(x) for x in batches]
    assert_same(gradients(*batches), {name: each[0][name] + each[1][name] for name in each[0]}, tolerance=0)
    assert all(grad.dtype == torch.float32 for grad in each[0].values())


def scaled_run(module, dtype):
    """A run for `tolerance`: the gradients of a scaled loss under autocast, unscaled."""

    def run(inputs, params):
        net, scaler = copy.deepcopy(module), torch.amp.GradScaler("cpu", init_scale=2.0**8)
        net.load_state_dict(params, assign=True)
        with torch.autocast("cpu", dtype):
            output = net(inputs["x"])
        scaler.scale(output.to(torch.promote_types(output.dtype, torch.float32)).square().sum()).backward()
        scaler.unscale_(torch.optim.SGD(net.parameters()))
        return {"output": output.detach()} | {f"grad {name}": p.grad for name, p in net.named_parameters()}

    return run


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mixed_precision(pair, dtype, policy, engine):  # noqa: F811
    stock, model, _ = pair
    inputs, params = {"x": X.to(dtype)}, stock.float().state_dict()
    run = scaled_run(stock, dtype)
    truth, runs = true_run(run, inputs, params), torch_runs(run, inputs, params)
    assert_within_rule(scaled_run(model, dtype)({"x": inputs["x"].clone()}, copy.deepcopy(params)), truth, runs, dtype)
    assert engine == [policy]


def test_scaled_gradients(pair):
    """A loss scaled by a power of two; a step whose gradients overflow is left out."""
    model = pair[1].float()
    expected = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(net.parameters(), 0.1) for net in (model, expected)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaler.scale(model(X.float()).square().sum()).backward()
    expected(X.float()).square().sum().backward()
    scaler.step(optimizers[0])
    scaler.update()
    optimizers[1].step()
    assert_same(dict(model.named_parameters()), dict(expected.named_parameters()), tolerance=0)
    optimizers[0].zero_grad()
    scaler.scale(model(X.float()).sum() * torch.tensor(3e38)).backward()
    before = [p.clone() for p in model.parameters()]
    scaler.step(optimizers[0])
    scaler.update()
    assert scaler.get_scale() == 2.0**11
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before))


@pytest.mark.filterwarnings("ignore:.*runs its stock path", "ignore:Full backward hook is firing")
@pytest.mark.parametrize("where", ["block", "inner"])
def test_class_activation_map(pair, where, policy, engine):  # noqa: F811
    """A forward hook takes the maps, a backward hook their gradients (Selvaraju et al., Grad-CAM, 2017)."""
    maps = []
    for model in pair[:2]:
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False  # does not go together with backward hooks in torch
        target, seen = model.get_submodule("0" if where == "block" else pair[2]), {}
        target.register_forward_hook(lambda _, inputs, output, seen=seen: seen.update(maps=output.detach().clone()))
        target.register_full_backward_hook(lambda _, into, out, seen=seen: seen.update(grads=out[0].clone()))
        model(X)[:, 1].sum().backward()
        weights = seen["grads"].mean((2, 3), keepdim=True)
        maps.append({"map": (weights * seen["maps"]).sum(1).relu()})
    assert maps[0]["map"].norm() > 0
    assert_same(*reversed(maps))
    assert engine == ([policy] if where == "block" else [])


def replica(model):
    """As `torch.nn.DataParallel` makes them for another device: parameters are plain tensors."""
    made = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, copied in made.items():
        for name, child in module._modules.items():
            setattr(copied, name, None if child is None else made[child])
        for name, parameter in module._parameters.items():
            setattr(copied, name, None if parameter is None else parameter * 1)
    return made[model]


def test_data_parallel(pair, policy, engine):  # noqa: F811
    """Without a GPU it calls the model itself. A replica has no parameters of its own, and runs its stock path."""
    stock, model, _ = pair
    assert_same(steps(nn.DataParallel(model), X), {k.replace("grad ", "grad module.").replace("buffer ", "buffer module.")
                if k != "grad x" else k: v for k, v in steps(stock, X).items()})
    assert engine == [policy]
    with pytest.warns(UserWarning, match="has no registered 'weight'"):
        output = replica(model)(X)
    output.square().sum().backward()
    stock(X).square().sum().backward()
    gradients = [{f"grad {name}": p.grad for name, p in net.named_parameters()} for net in (model, stock)]
    assert_same(*gradients)
    assert engine == [policy]


def test_two_threads(pair):
    """Two models at once, one of them with a backend of its own; what a thread sets is its own."""
    stock, model, _ = pair
    results = {}

    def train(name, net, x):
        with rd.use_backend("reference") if name == "second" else torch.enable_grad():
            results[name] = steps(net, x, count=5)

    inputs = {"first": X, "second": X * 2}
    threads = [threading.Thread(target=train, args=(name, copy.deepcopy(model), x)) for name, x in inputs.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, x in inputs.items():
        assert_same(results[name], steps(stock, x, count=5))


def test_one_block_twice_in_a_forward(pair, policy, engine):  # noqa: F811
    """The second call reads what the first has made; running statistics count both."""

    def call(model, x):
        y = model[0](x)
        return model[0](y[:, :6] + y[:, -6:])

    stock, model, _ = pair
    assert_same(steps(model, X, call=call), steps(stock, X, call=call))
    assert engine == [policy] * 2


def test_a_training_forward_before_an_evaluations_backward_is_named(pair):
    """It changes the running statistics by which that backward normalises; stock takes the new ones, which is wrong."""
    _, model, _ = pair
    output = model.eval()(X)
    model.train()(X)
    with pytest.raises(RuntimeError, match="a running statistic by a training forward behind it, and the backward needs it"):
        output.sum().backward()


def _batched(output, inputs, upstream):
    return torch.autograd.grad(output, inputs, upstream, is_grads_batched=True)


def _mapped(output, inputs, upstream):
    return torch.func.vmap(lambda grad: torch.autograd.grad(output, inputs, grad, retain_graph=True))(upstream)


def _with_tangents(output, inputs, upstream):
    with forward_ad.dual_level():
        grads = torch.autograd.grad(output, inputs, forward_ad.make_dual(*upstream))
        return [part for grad in grads for part in forward_ad.unpack_dual(grad)]


@pytest.mark.parametrize("kind", [_batched, _mapped, _with_tangents])
def test_backward_under_a_transformation(pair, kind, policy, engine):  # noqa: F811
    """Forward runs on the engine, which does not know yet; of the gradients none has a graph."""
    results = []
    for model in pair[:2]:
        x = X.clone().requires_grad_()
        output = model(x)
        found = kind(output, [x, *model.parameters()], torch.stack([torch.ones_like(output), output.detach()]))
        assert not any(t.requires_grad for t in found)
        results.append({f"grad {i}": t for i, t in enumerate(found)})
    assert_same(*reversed(results))
    assert engine == [policy]


@pytest.mark.parametrize("strict", [False, True])
def test_export(pair, strict, engine):  # noqa: F811
    """Of the stock path: the same operators as stock's, of torch alone, which is what exporters to ONNX read."""
    stock, model, _ = pair
    programs = [torch.export.export(net.eval(), (X,), strict=strict) for net in (stock, model)]
    operators = [[str(node.target) for node in p.graph.nodes if node.op == "call_function"] for p in programs]
    assert operators[0] == operators[1] and all(name.startswith("aten.") for name in operators[1])
    assert_same({"output": programs[1].module()(X)}, {"output": stock(X)})
    assert not engine


def test_onnx(pair, tmp_path):
    """Standard operators alone, those of the stock model, and its results."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="of the extra `test`, which is not installed")
    import onnx
    import onnxruntime

    operators, outputs = [], []
    for net in (pair[0].float().eval(), pair[1].float().eval()):
        path = str(tmp_path / "model.onnx")
        torch.onnx.export(net, (X.float(),), path, dynamo=True, verbose=False)
        operators.append([(node.domain, node.op_type) for node in onnx.load(path).graph.node])
        session = onnxruntime.InferenceSession(path)
        outputs.append(torch.from_numpy(session.run(None, {session.get_inputs()[0].name: X.float().numpy()})[0]))
    assert operators[0] == operators[1] and {domain for domain, _ in operators[1]} == {""}
    assert torch.equal(*outputs)
    stock, inputs, params = pair[0], {"x": X.float()}, pair[0].state_dict()

    @torch.no_grad()
    def run(inputs, params):
        return {"output": torch.func.functional_call(stock, params, (inputs["x"],))}

    truth, runs = true_run(run, inputs, params), torch_runs(run, inputs, params)
    assert_within_rule({"output": outputs[1]}, truth, runs, torch.float32)
