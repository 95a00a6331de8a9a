"""`torch.compile` of converted models: one graph, for all batch sizes; the same numbers, and the same bytes kept."""

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
from small_nets import Joined, assert_same, images, randomise, small_block, small_densenet, torchvision_models
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.nn.parallel import DistributedDataParallel

import resdense_ext as rd

POLICIES = ("fast", "min")


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()


def dense():
    """A stem, and a block with the head behind it."""
    return small_densenet(block_config=(2,), growth_rate=4, num_init_features=8)


def residual():
    """A projection with a stride, and one with a pool."""
    resnet = torchvision_models().resnet
    torch.manual_seed(0)
    strided = nn.Sequential(nn.Conv2d(3, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    pooled = nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True), nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16))
    return randomise(nn.Sequential(resnet.Bottleneck(3, 4, 2, strided), resnet.Bottleneck(16, 4, 2, pooled))).double()


def found(model, call, x):
    """Output, gradients and buffers of one training step."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch._dynamo.mark_dynamic(x, 0)
    output = call(x)
    output.square().sum().backward()
    gradients = {f"grad {name}": p.grad.clone() for name, p in model.named_parameters()}
    return {"output": output.detach(), "grad x": x.grad, **gradients, **{n: b.clone() for n, b in model.named_buffers()}}


def dual_path():
    torch.manual_seed(0)
    stage = randomise(rd.nn.DualPathStage(2, 3, 4, 6, 3, groups=1)).double()
    return nn.Sequential(rd.revert(stage), Joined())


@pytest.mark.parametrize("formats", list(itertools.product((torch.contiguous_format, torch.channels_last), repeat=2)), ids=str)
@pytest.mark.parametrize("network", [dense, residual, dual_path])
@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_have_the_layouts_of_their_parameters(network, policy, formats):
    """As the fake kernels promise; the compiler checks them where it uses them."""
    of_weights, of_input = formats
    model = rd.convert(network().float().to(memory_format=of_weights), policy)
    parameters = [p for name, p in model.named_parameters() if "conv0" not in name]  # the stem's convolution is PyTorch's
    x = images(2, 3, 32, 32).float().contiguous(memory_format=of_input)
    for p, grad in zip(parameters, torch.autograd.grad(model(x).square().sum(), parameters)):
        steps = [[stride for size, stride in zip(t.shape, t.stride()) if size > 1] for t in (torch.empty_like(p), grad)]
        assert steps[0] == steps[1]


CASES = [
    (network, policy, backend)
    for network in (dense, residual)
    for policy in POLICIES
    for backend in ("aot_eager", "inductor")
]
# The quick tests see either network and either policy once, and the other two of the four in smaller networks.
QUICK = [(dense, "min", "aot_eager"), (residual, "fast", "aot_eager")]


@pytest.mark.parametrize(
    ("network", "policy", "backend"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES],
)
def test_training(network, policy, backend):
    stock = network()
    model = rd.convert(copy.deepcopy(stock), policy)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for batch, stance in ((2, "default"), (3, "fail_on_recompile"), (5, "fail_on_recompile")):
        x = images(batch, 3, 32, 32, seed=batch)
        with torch.compiler.set_stance(stance):
            assert_same(found(model, compiled, x), found(stock, stock, x))
    if backend == "aot_eager":  # the other one keeps weights in layouts of its own choice
        x.requires_grad_()
        with torch.compiler.set_stance("fail_on_recompile"):
            kept = [rd.memory.saved_bytes(lambda call=call: call(x)) for call in (compiled, model, stock)]
        assert kept[0] == kept[1] < 0.8 * kept[2]


def test_a_residual_block_that_computes_again():
    stock = residual()[:1]
    model = rd.convert(copy.deepcopy(stock), "min")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch, stance in ((2, "default"), (3, "fail_on_recompile")):
        x = images(batch, 3, 8, 8, seed=batch)
        with torch.compiler.set_stance(stance):
            assert_same(found(model, compiled, x), found(stock, stock, x))


def test_maxima(monkeypatch):
    """Of a number of images and sizes of them that are not known; less is kept than with torch's pools."""

    def network(policy):
        torch.manual_seed(0)
        return rd.models.FCDenseNet(3, (1, 2), 2, (2, 1), 6, 0.0, 5, policy=policy).double()

    stock, model = network(None), network("fast")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for sizes, stance in (((2, 3, 16, 13), "default"), ((3, 3, 20, 17), "fail_on_recompile")):
        x = images(*sizes)
        with torch.compiler.set_stance(stance):
            assert_same(found(model, compiled, x), found(stock, stock, x))
    x.requires_grad_()
    kept = rd.memory.saved_bytes(lambda: compiled(x))
    monkeypatch.setattr("resdense_ext.models.fc_densenet.run_pool", lambda pool, x, dropout: pool(dropout(x)))
    torch.compiler.reset()
    with_torchs = torch.compile(network("fast"), fullgraph=True, backend="aot_eager", dynamic=True)
    assert kept < rd.memory.saved_bytes(lambda: with_torchs(x))


def test_no_gradient_is_made_of_a_buffer_that_only_the_block_reads():
    """It would be zeros, as large as the buffer."""
    graphs = []

    def backward(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph)

    model, x = rd.convert(dense()), images(2, 3, 32, 32)
    compiler = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph), bw_compiler=backward)
    torch.compile(model, fullgraph=True, backend=compiler)(x).square().sum().backward()
    op = torch.ops.resdense.dense_stage_backward.default
    assert [node.args[1] for graph in graphs for node in graph.graph.nodes if node.target is op] == [None]


def test_evaluation():
    stock, x = small_densenet(block_config=(1,)).eval(), images(2, 3, 32, 32)
    compiled = torch.compile(rd.convert(copy.deepcopy(stock)), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_same({"output": compiled(x)}, {"output": stock(x)})


def test_autocast_and_dropout():
    """Of a dense block that keeps its bottlenecks."""
    model, x = rd.convert(small_block(torch.float32, num_layers=1, drop_rate=0.5)), images(2, 6, 5, 6).float()

    def step(call):
        model.zero_grad()
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16):
            output = call(x)
        output.square().sum().backward()
        return {"output": output.detach()} | {f"grad {name}": p.grad.clone() for name, p in model.named_parameters()}

    compiled = step(torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert compiled["output"].dtype == model(x).dtype
    assert_same(compiled, step(model))


def test_what_the_engine_does_not_know_is_traced_as_stock():
    stock, x = small_block(num_layers=1), images(2, 6, 5, 6)
    stock.denselayer1.relu1 = nn.GELU()
    model = rd.convert(copy.deepcopy(stock))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(found(model, compiled, x), found(stock, stock, x))


@pytest.mark.parametrize("part", ["0", "0.1", "1", "2"])
def test_a_part_that_is_compiled_by_itself(part):
    """In a chain that is not: a plain sequence, a block in it, one of another kind, and what stands behind that."""
    torch.manual_seed(0)
    blocks = nn.Sequential(*(rd.nn.BasicBlock(4, 4) for _ in range(3)))
    chain, graphs = rd.nn.Chain(blocks, rd.nn.DenseBlock(2, 4, 2, 2), rd.nn.Transition(8, 4)).double(), []
    uncompiled, x = copy.deepcopy(chain), images(2, 4, 6, 5)
    chain.get_submodule(part).compile(fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph)
    assert_same(found(chain, chain, x), found(uncompiled, uncompiled, x))
    assert len(graphs) == 1


def test_distributed_data_parallel_cuts_between_stages(monkeypatch):
    """Where the parameters that a graph's operations are called with fill its buckets."""
    torch.manual_seed(0)
    projection = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))
    blocks = [rd.nn.BasicBlock(8, 8, downsample=projection if i == 2 else None) for i in range(4)]
    model, x = rd.nn.Chain(*blocks).double(), images(2, 8, 6, 5)
    uncompiled = copy.deepcopy(model)
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1)  # of 1 MB, which no other bucket may be below
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        compiled = torch.compile(DistributedDataParallel(model, bucket_cap_mb=0.005), backend="aot_eager")
        ours = found(model, compiled, x)
    finally:
        dist.destroy_process_group()
    assert_same(ours, found(uncompiled, uncompiled, x))


def test_a_report_of_a_compiled_model_is_the_models():
    model, x = rd.convert(small_block(num_layers=1), "min"), images(2, 6, 5, 6)
    expected = rd.report(model, x)
    model.compile(fullgraph=True, backend="aot_eager")
    model(x)
    assert rd.report(model, x) == expected
    assert expected.saved_bytes < expected.stock_saved_bytes


def test_dual_path_blocks():
    torch.manual_seed(0)
    stage = randomise(rd.nn.DualPathStage(2, 3, 4, 6, 3, groups=2, policy="min")).double()
    stock = rd.revert(copy.deepcopy(stage))
    compiled = torch.compile(stage, fullgraph=True, backend="aot_eager")
    x = images(2, 3, 8, 8)
    assert_same(
        found(stage, lambda x: torch.cat(compiled(x), 1), x),
        found(stock, lambda x: torch.cat(stock(x), 1), x),
    )
