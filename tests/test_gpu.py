"""The engine on a GPU: real sizes, autocast, CUDA graphs, streams, no waiting for the device, and running out of memory."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from small_nets import small_densenet
from test_dense_block import POLICIES, random_block, state, stock_of
from test_moments import assert_gram
from test_residual_block import Block
from tolerance import assert_within_rule, module_run, torch_runs, true_run

import resdense_ext as rd
from resdense_ext.nn.leaves import pool_of
from resdense_ext.ops import backend as backends
from resdense_ext.ops import replay, triton
from resdense_ext.ops.max_pool import max_pool

pytestmark = pytest.mark.gpu
BACKENDS = ("triton", "cuda")


@pytest.fixture(params=BACKENDS)
def backend(request):
    refusal = backends.get(request.param).refusal(torch.zeros(1, 1, 1, device="cuda"), torch.float32)
    if refusal:
        pytest.skip(refusal)
    with rd.use_backend(request.param):
        yield request.param


def block_of(channels=64, layers=3, policy="fast", **kwargs):
    return random_block(layers, channels, 32, bn_size=4, policy=policy, **kwargs).cuda().to(memory_format=torch.channels_last)


def maps(shape, dtype=torch.float32, channels_last=True):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).cuda()
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def assert_as_stock(block, x, autocast: torch.dtype | None) -> None:
    params, inputs = state(block), {"x": x}
    ours = module_run(block, autocast)({"x": x.clone()}, copy.deepcopy(params))
    truth = true_run(module_run(stock_of(block)), inputs, params)
    runs = torch_runs(module_run(stock_of(block), autocast), inputs, params)
    assert_within_rule(ours, truth, runs, autocast or torch.float32)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("sizes", [(8, 56, 56), (32, 7, 7), (3, 29, 31)], ids=str)
def test_a_block_of_densenet121(backend, policy, channels_last, autocast, sizes):
    n, *spatial = sizes
    x = maps((n, 64, *spatial), channels_last=channels_last)
    assert_as_stock(block_of(policy=policy), x, torch.bfloat16 if autocast else None)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("channels", [64, 264])
@pytest.mark.parametrize("sizes", [(8, 56, 56), (32, 7, 7), (3, 29, 31)], ids=str)
def test_a_block_on_maps_in_16_bits(backend, policy, channels, sizes):
    """As it stands behind others of a network: only then is its buffer in 16 bits, too."""
    n, *spatial = sizes
    assert_as_stock(block_of(channels, policy=policy), maps((n, channels, *spatial), torch.bfloat16), torch.bfloat16)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("backend", "by_us"), [("triton", True), ("triton", False), ("cuda", False)], indirect=["backend"])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_block_of_resnet50(backend, policy, channels_last, by_us, stride, monkeypatch):
    for limit in ("PRODUCTS", "STRIDED_PRODUCTS"):
        monkeypatch.setattr(triton, limit, float("inf") if by_us else 0)
    block = Block((256, 128, 128, 512), (1, 3, 1), stride=stride, projection="normed", policy=policy).cuda()
    plain = copy.deepcopy(block)
    plain.policy = None
    params, inputs = state(block), {"x": maps((8, 256, 56, 57), channels_last=channels_last)}
    run = module_run(plain, torch.bfloat16)
    ours = module_run(block, torch.bfloat16)({"x": inputs["x"].clone()}, copy.deepcopy(params))
    assert_within_rule(ours, true_run(module_run(plain), inputs, params), torch_runs(run, inputs, params), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(256 * 56**2, 256, 72), (256 * 7**2, 2048, 520), (10007, 70, 40)], ids=str)
def test_products_of_moments_add_up_in_float32(dtype, sizes):
    """The first and the last stage of a ResNet-50, and a prime number of positions."""
    count, *channels = sizes
    assert_gram(*(torch.randn(count, n, device="cuda").to(dtype) for n in channels))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("stride", [1, 2])
def test_a_graph_of_a_residual_block_replays_it_and_the_host_never_waits(backend, policy, stride, monkeypatch):
    """Where a bottleneck's last convolution and its projection go by `resdense_ext.ops.moments`."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    block = Block((256, 128, 128, 512), (1, 3, 1), stride=stride, projection="normed", policy=policy).cuda()
    x = maps((8, 256, 28, 28), torch.bfloat16).requires_grad_()

    def gradients():
        with torch.autocast("cuda", torch.bfloat16):
            y = block(x)
        return torch.autograd.grad(y.float().square().sum(), [x, *block.parameters()])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            expected = gradients()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = gradients()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph.replay()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected))


def step(net, x, target, optimizer):
    optimizer.zero_grad(set_to_none=False)
    with torch.autocast("cuda", torch.bfloat16):
        loss = F.cross_entropy(net(x).float(), target)
    loss.backward()
    optimizer.step()
    return loss


def training(policy):
    torch.manual_seed(0)
    net = rd.convert(small_densenet(torch.float32), policy).cuda().to(memory_format=torch.channels_last)
    return net, maps((8, 3, 32, 32)), torch.arange(8, device="cuda") % 3, torch.optim.SGD(net.parameters(), 0.01)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_graph_of_a_training_step_replays_it(backend, policy, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # the stem's convolution is the vendor's
    eager, x, target, optimizer = training(policy)
    for _ in range(3 + 4):
        expected = step(eager, x, target, optimizer)

    net, x, target, optimizer = training(policy)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(net, x, target, optimizer)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(net, x, target, optimizer)
    for _ in range(4):
        graph.replay()
    assert torch.equal(loss, expected)
    for ours, theirs in zip(net.state_dict().values(), eager.state_dict().values()):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_network_as_graphed_callables(backend, policy, monkeypatch):
    """Forward and backward as a graph each, and the rest of a step as it is written."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    net, x, target, _ = training(policy)

    def gradients():
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            loss = F.cross_entropy(net(x).float(), target)
        return torch.autograd.grad(loss, list(net.parameters()))

    expected = gradients()
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        torch.cuda.make_graphed_callables(net, (x.clone(),))
    for _ in range(2):
        assert all(torch.equal(ours, eager) for ours, eager in zip(gradients(), expected))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_compiled_network_computes_the_same(policy, monkeypatch):
    """In one graph, in which the backend is chosen as well."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    net, x, target, _ = training(policy)
    torch.compiler.reset()

    def gradients(call):
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(call(x).float(), target)
        return torch.autograd.grad(loss, list(net.parameters()))

    compiled = gradients(torch.compile(net, backend="aot_eager", fullgraph=True))
    assert all(torch.equal(ours, eager) for ours, eager in zip(compiled, gradients(net)))


@pytest.mark.parametrize("policy", POLICIES)
def test_the_host_never_waits(backend, policy):
    net, x, target, optimizer = training(policy)
    step(net, x, target, optimizer)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):  # as it is, recorded, and replayed
            step(net, x, target, optimizer)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_side_stream_is_respected(backend):
    block, x = block_of(), maps((8, 64, 28, 28))
    expected = block(x)
    side = torch.cuda.Stream()
    for _ in range(5):
        late = torch.empty_like(x)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(10_000_000)  # so that a launch on another stream would read what is not there yet
            late.copy_(x)
            got = block(late)
        torch.cuda.current_stream().wait_stream(side)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
@pytest.mark.parametrize("size", [7, 112])
def test_kernels_wait_for_those_before_them(backend, size):
    """A chain of operators, of which each reads all that the one before has written, beside the same with pauses."""
    ops, x = torch.ops.resdense, maps((16, 64, size, size), torch.bfloat16)

    def chain(pause) -> torch.Tensor:
        y = x.clone()
        for _ in range(30):
            mean, m2 = ops.channel_stats(y)
            pause()
            scale, shift, _ = ops.bn_fold(mean, m2, y.numel() / 64, 1e-5, mean.cos(), mean.sin())
            pause()
            out = torch.empty_like(y)
            ops.bn_act(y, scale, shift, 0.5, out)
            pause()
            y = ops.add_act(out, y, 0.5)
            pause()
        return y

    expected = chain(torch.cuda.synchronize)
    assert torch.equal(chain(lambda: None), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(lambda: None)
    for _ in range(3):
        graph.replay()
        assert torch.equal(captured, expected)


def test_gradients_repeat_bitwise(backend, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    block, x = block_of(), maps((16, 64, 28, 28)).requires_grad_()
    results = []
    for _ in range(3):
        results.append(torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()]))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["dense", "residual", "stride"])
def test_programs_do_the_same(backend, kind, policy, monkeypatch):
    """Gradients of a block step after step: as it is, recorded, and replayed; all of the CUDA backend's can be recorded."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    blocks = {
        "dense": lambda: block_of(256, policy=policy),
        "residual": lambda: Block((256, 64, 64, 256), (1, 3, 1), policy=policy).cuda(),
        "stride": lambda: Block((256, 128, 128, 512), (1, 3, 1), stride=2, projection="normed", policy=policy).cuda(),
    }
    block, x, results = blocks[kind](), maps((8, 256, 28, 28)).requires_grad_(), []
    for _ in range(4):
        with torch.autocast("cuda", torch.bfloat16):
            y = block(x)
        results.append(torch.autograd.grad(y.float().square().sum(), [x, *block.parameters()]))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    recorded = [memory.program is not None for memory in replay._memories.values()]
    assert recorded == ([True, True] if backend == "cuda" else [])


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("options", [dict(kernel_size=1), dict(kernel_size=3, padding=1), dict(kernel_size=3, stride=2, groups=4)], ids=str)
def test_a_unit(backend, options, channels_last):
    torch.manual_seed(0)
    unit = rd.nn.BNActConv2d(64, 96, **options).cuda()
    assert_as_stock(unit, maps((8, 64, 29, 31), torch.bfloat16, channels_last), torch.bfloat16)


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x[:, :, ::2, ::2], lambda x: x[:1, :1, :1, :1].expand(x.shape)])
def test_a_residual_end_takes_any_layout(backend, view):
    x, identity = (view(maps((4, 64, 14, 14))).requires_grad_() for _ in range(2))
    y = rd.functional.add_act(x, identity)
    assert torch.equal(y, F.relu(x + identity))
    for grad in (torch.ones_like(y[0, 0, 0, 0]).expand(y.shape), torch.randn_like(y.mT).mT):
        for ours in torch.autograd.grad(y, (x, identity), grad, retain_graph=True):
            assert torch.equal(ours, grad * (y > 0))


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("options", [dict(kernel_size=2), dict(kernel_size=3, stride=2, padding=1, ceil_mode=True)], ids=str)
def test_maxima(options, channels_last):
    """Behind a dropout or not, to the bit: gradients are small numbers, whose sums are exact in any order."""
    x, pool = maps((4, 24, 33, 30), torch.bfloat16, channels_last), torch.nn.MaxPool2d(**options)

    def drawn(f):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(1)
        y = f(leaf)
        return y, *torch.autograd.grad(y, leaf, torch.randint(-3, 4, y.shape, device="cuda").to(y.dtype))

    for p in (0.0, 0.5):
        ours = drawn(lambda x: max_pool(x, pool_of(pool)[0], p))
        assert all(map(torch.equal, ours, drawn(lambda x: pool(F.dropout(x, p)))))


def test_grad_scaler(backend):
    net, x, target, optimizer = training("fast")
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = F.cross_entropy(net(x).float(), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_out_of_memory_changes_nothing(backend):
    block = block_of()
    before = state(block)
    gc.collect()
    torch.cuda.empty_cache()  # of what earlier tests have left in it the block would be made
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + 600 * 2**20) / total))
    try:
        with pytest.raises(torch.OutOfMemoryError):
            block(maps((64, 64, 112, 112)))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert all(torch.equal(before[name], t) for name, t in block.state_dict().items())
    block(maps((2, 64, 8, 8))).sum().backward()


def test_past_two_to_the_31_elements(backend):
    """The last samples of a huge batch are what they are in a small one, with frozen statistics."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free memory")
    block = block_of(64, 1).eval().to(torch.bfloat16)
    x = maps((2, 64, 112, 112), torch.bfloat16)
    with torch.no_grad():
        huge = x.repeat(1100, 1, 1, 1).contiguous(memory_format=torch.channels_last)
        assert huge.shape[0] * 96 * 112 * 112 > 2**31
        assert torch.equal(block(huge)[-2:], block(x))
