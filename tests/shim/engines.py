"""Blocks and a network on the CUDA operators of the shim library named on the command line: engine, choice of operators and kernels together."""

import copy
import sys
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
from test_dense_block import maps, random_block, state, stock_of
from test_resampling import network as resampling_network
from test_residual_block import Block
from tolerance import assert_within_rule, module_run, torch_runs, true_run

import resdense_ext as rd
from resdense_ext.ops.compiled import CompiledBackend
from resdense_ext.ops.cuda import CudaBackend
from resdense_ext.ops.reference_backend import ReferenceBackend

torch.set_num_threads(1)
torch.ops.load_library(sys.argv[1])
LIBRARY, called = torch.library.Library("resdense", "IMPL"), set()


def put_on_cpu(name: str) -> None:
    """The shim's operator in place of the CPU's."""
    operator = getattr(torch.ops.resdense_shim, name)

    def call(*arguments):
        called.add(name)
        return operator(*arguments)

    LIBRARY.impl(name, call, "CPU", allow_override=True)


for operator in torch._C._dispatch_get_all_op_names():
    space, _, name = operator.partition("::")
    if space == "resdense_shim" and name not in ("configure", "launches"):
        put_on_cpu(name)
# Tensors on the CPU pass for a GPU's.
CudaBackend.refusal = CompiledBackend.refusal
CudaBackend.fuses = lambda self, x: True
for name in ("deviations", "moments_terms"):  # Triton's kernels, which take none from the CPU
    setattr(CudaBackend, name, getattr(ReferenceBackend, name))


def check(block: torch.nn.Module, stock: torch.nn.Module, x: torch.Tensor) -> None:
    params, inputs, dtype = state(block), {"x": x}, torch.bfloat16
    with rd.use_backend("cuda"):
        ours = module_run(block, dtype)({"x": x.clone()}, copy.deepcopy(params))
    assert_within_rule(ours, true_run(module_run(stock), inputs, params), torch_runs(module_run(stock, dtype), inputs, params), dtype)


def dense(*sizes: int, **options) -> None:
    block = random_block(2, sizes[1], **options).to(memory_format=torch.channels_last)
    check(block, stock_of(block), maps(sizes, True).bfloat16())


def residual(*sizes: int, **options) -> None:
    block = Block(**options).to(memory_format=torch.channels_last)
    stock = copy.deepcopy(block)
    stock.policy = None
    check(block, stock, maps(sizes, True).bfloat16())


def network(*sizes: int, policy: str, **options) -> None:
    net = rd.models.DenseNet(**options).to(memory_format=torch.channels_last)
    check(rd.convert(net, policy), stock_of(net), maps(sizes, True))


def graph(*sizes: int, **options) -> None:
    net = resampling_network(torch.float32, **options).to(memory_format=torch.channels_last)
    check(rd.convert(copy.deepcopy(net)), net, maps(sizes, True))


def launches_of(layers: int, policy: str, training: bool = True) -> list[int]:
    """A block's launches, forward and backward."""
    block = random_block(layers, 16, growth=8, bn_size=2, policy=policy).train(training).to(memory_format=torch.channels_last)
    x = maps((2, 16, 5, 4), True).bfloat16().requires_grad_()
    counts = [torch.ops.resdense_shim.launches()]
    with rd.use_backend("cuda"), torch.autocast("cpu", torch.bfloat16):
        y = block(x)
        counts.append(torch.ops.resdense_shim.launches())
        y.backward(torch.ones_like(y))
        counts.append(torch.ops.resdense_shim.launches())
    return [after - before for before, after in zip(counts, counts[1:])]


for policy, training in (("fast", True), ("min", True), ("fast", False)):
    two, three = (launches_of(layers, policy, training) for layers in (2, 3))
    print("launches:", policy, "training" if training else "eval", *(b - a for a, b in zip(two, three)), flush=True)
for run, sizes, options in (
    (dense, (3, 40, 9, 5), dict(growth=32, bn_size=2, policy="fast")),
    (dense, (2, 16, 7, 7), dict(growth=16, bn_size=4, policy="min")),
    (dense, (2, 24, 6, 5), dict(growth=8, bn_size=0, policy="fast")),  # the 3x3 alone, which adds to the buffer's gradient
    (dense, (2, 16, 6, 5), dict(growth=8, bn_size=2, policy="min", activation="silu")),  # activated by a pass, not by the products
    (residual, (2, 16, 7, 6), dict(widths=(16, 8, 8, 16), kernels=(1, 3, 1), policy="fast")),
    (residual, (2, 8, 7, 7), dict(widths=(8, 16, 16), kernels=(3, 3), stride=2, projection="normed", policy="min")),
    (residual, (2, 16, 5, 6), dict(widths=(16, 8, 16), kernels=(1, 3), activation="elu", policy="fast")),
    (graph, (2, 4, 8, 12), dict(norm="groups")),
    (network, (2, 3, 32, 32), dict(growth_rate=16, block_config=(2, 2), num_init_features=16, num_classes=5, policy="min")),
):
    torch.manual_seed(0)
    torch.ops.resdense_shim.configure(2, 4)
    run(*sizes, **options)
    print(run.__name__, sizes, "agrees", flush=True)
print("called:", *sorted(called))
