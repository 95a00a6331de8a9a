"""What two processes do together over gloo, for `test_distributed`: every case once, its results in a file a rank."""

import copy
import gc
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from small_nets import images, randomise, small_block, small_densenet, torchvision_models
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import resdense_ext as rd
from resdense_ext import functional

POLICIES = ("fast", "min")
BATCHES = (2, 3)
"""The samples of each rank; of two micro-batches each."""


def dense():
    """torchvision's: stem, a block with a transition, a block with a head."""
    return small_densenet()


def residual():
    """torchvision's two kinds of blocks, with projections and without, and a pre-activation block of ours."""
    resnet = torchvision_models().resnet
    torch.manual_seed(0)

    def projection(inputs, outputs, stride):
        return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    return randomise(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            resnet.BasicBlock(8, 12, 2, projection(8, 12, 2)),
            resnet.Bottleneck(12, 4, 2, projection(12, 16, 2)),
            resnet.Bottleneck(16, 4),
            rd.nn.PreActBlock(16, 8, 2, policy=None),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
    ).double()


NETWORKS = {"dense": dense, "residual": residual}


def batch(rank, micro=0):
    return images(BATCHES[rank], 3, 32, 32, seed=10 * micro + rank)


def weights(outputs, rank, micro=0):
    """Those of a loss that is a sum over samples."""
    return images(BATCHES[rank], outputs, seed=100 + 10 * micro + rank)


def found(model, output=None, x=None):
    """Gradients and buffers by name, and those of the input."""
    model = getattr(model, "module", model)
    tensors = {f"grad {name}": p.grad for name, p in model.named_parameters()}
    tensors |= {f"buffer {name}": b for name, b in model.named_buffers()}
    return tensors if output is None else tensors | {"output": output.detach(), "grad x": x.grad}


def step(model, rank, micro=0):
    x = batch(rank, micro).requires_grad_()
    output = model(x)
    (output * weights(output.shape[1], rank, micro)).sum().backward()
    return output, x


def synchronised(network, policy, order):
    """Batch statistics over both ranks."""
    model = NETWORKS[network]()
    for change in order:
        model = rd.convert(model, policy) if change == "convert" else nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return found(model, *step(model, dist.get_rank()))


def parallel(network, policy, norms):
    """Under DistributedDataParallel, whose gradients are means over ranks; the first micro-batch is not yet reduced."""
    # A group of its own, which the reducer keeps with gloo's threads: those of the others are joined before the process ends.
    model = DistributedDataParallel(frozen(rd.convert(NETWORKS[network](), policy)), process_group=dist.new_group())
    if norms == "synchronised":
        # Only now: for a CPU DistributedDataParallel refuses networks that have such norms already.
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model).train()
    with model.no_sync():
        step(model, dist.get_rank(), micro=0)
    step(model, dist.get_rank(), micro=1)
    return found(model)


def frozen(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def sharded(network, policy):
    """Under FSDP2, every block and the rest by itself; gradients are means over ranks. With it, the calls of the engines."""
    model = frozen(rd.convert(NETWORKS[network](), policy))
    for module in list(model.modules()):
        if hasattr(module, "layer_modules") or hasattr(module, "residual_modules"):
            fully_shard([module])  # a container with a forward by itself is refused by torch 2.11
    fully_shard(model)
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        for name, note in (("checked_dense_block", calls.append), ("checked_residual_stage", calls.extend)):
            call = getattr(functional, name)
            patch.setattr(functional, name, lambda *a, call=call, note=note, **o: note(o["policy"]) or call(*a, **o))
        output, x = step(model, dist.get_rank())
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in found(model, output, x).items()}
    return whole | {"calls": calls}


def compiled(policy):
    """A block with synchronised norms, eager and compiled; gradients and buffers of both."""
    block = nn.SyncBatchNorm.convert_sync_batchnorm(rd.convert(small_block(), policy))
    x, results = images(BATCHES[dist.get_rank()], 6, 5, 6, seed=dist.get_rank()), []
    for compile in (False, True):
        model = copy.deepcopy(block)
        y = x.clone().requires_grad_()
        output = (torch.compile(model, fullgraph=True, backend="aot_eager") if compile else model)(y)
        output.square().sum().backward()
        results.append(found(model, output, y))
    return results


def bottleneck():
    """With a projection."""
    torch.manual_seed(0)
    projection = nn.Sequential(nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8))
    return randomise(torchvision_models().resnet.Bottleneck(6, 2, downsample=projection)).double()


BLOCKS = {"dense": small_block, "residual": bottleneck}


def reductions(network, policy):
    """How many, forward and backward, a block takes."""
    block = nn.SyncBatchNorm.convert_sync_batchnorm(rd.convert(BLOCKS[network](), policy))
    x = images(2, 6, 5, 6).requires_grad_()
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather", "all_reduce"):
            patch.setattr(dist, name, lambda *a, f=getattr(dist, name), n=name, **o: calls.append(n) or f(*a, **o))
        block(x).sum().backward()
    return {"forward": calls.count("all_gather"), "backward": calls.count("all_reduce")}


CASES = [(reductions, network, policy) for network in BLOCKS for policy in POLICIES]
CASES += [(sharded, network, policy) for network in NETWORKS for policy in POLICIES]
CASES += [
    (synchronised, network, policy, order)
    for network in NETWORKS
    for policy in POLICIES
    for order in (("convert", "sync"), ("sync", "convert"))
]
CASES += [
    (parallel, network, policy, norms)
    for network in NETWORKS
    for policy in POLICIES
    for norms in ("frozen", "synchronised")
]


def name_of(case):
    return " ".join(getattr(part, "__name__", str(part)) for part in case)


COMPILED = [(compiled, "fast")]


def work(rank, folder, cases):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {name_of(case): copy.deepcopy(case[0](*case[1:])) for case in cases}
    torch.save(results, os.path.join(folder, f"{rank}.pt"))
    gc.collect()
    dist.destroy_process_group()


def run(folder, cases=CASES):
    """Every case's results, of either rank."""
    torch.multiprocessing.spawn(work, (str(folder), cases), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]
