"""Residual networks in depth: another block costs one block output, and a network of 1001 layers trains."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn as torch_nn

import resdense_ext as rd
from resdense_ext import models, nn
from resdense_ext.ops import operator

FLOAT = 4


def one_stage(kind, depth, policy):
    if kind in (nn.PreActBlock, nn.PreActBottleneck):
        return models.PreActResNet(kind, (depth,), policy=policy)
    return models.ResNet(kind, (depth,), small_inputs=True, policy=policy)


def block_bytes(block, output, raw_maps=0.0):
    """What a block of ``output`` bytes keeps: that, raw maps in the same unit, and two statistics of all that its norms read."""
    norms = [m for m in block.modules() if isinstance(m, torch_nn.BatchNorm2d)]
    return output * (1 + raw_maps) + sum(2 * FLOAT * norm.num_features for norm in norms)


@pytest.mark.unpoisoned  # which would only fill the memory that is counted
@pytest.mark.parametrize("replayed", [True, False])
@pytest.mark.parametrize("policy", ["fast", "min"])
@pytest.mark.parametrize(
    ("kind", "channels", "raw_maps"),
    [(nn.PreActBlock, 16, 1), (nn.PreActBottleneck, 64, 0.5), (nn.BasicBlock, 64, 2), (nn.Bottleneck, 256, 0.5)],
)
def test_another_block_costs_its_output(kind, channels, raw_maps, policy, replayed, monkeypatch):
    """To the byte, kept and at the peak; "fast" keeps what convolutions write for norms that no moments serve, and its blocks, which
    share a node, hand on the gradients of their parameters together."""
    if not replayed:
        monkeypatch.setattr(operator, "may_replay", lambda names: False)
    x, saved, peaks, depths = torch.randn(2, 3, 32, 32), [], [], (3, 4, 6)
    for depth in depths:
        net = one_stage(kind, depth, policy)

        def step():
            net.zero_grad(set_to_none=True)
            net(x).square().mean().backward()

        saved.append(rd.memory.saved_bytes(lambda: net(x)))
        peaks.append(rd.memory.peak_bytes(step, warmup=2))
    block = [m for m in net.modules() if isinstance(m, kind)][-1]
    one = block_bytes(block, x[:, :1].nbytes * channels, raw_maps if policy == "fast" else 0)
    gradients = sum(p.nbytes for p in block.parameters()) if policy == "fast" else 0
    for of, added in ((saved, one), (peaks, one + gradients)):
        assert [b - a for a, b in zip(of, of[1:])] == [added * (b - a) for a, b in zip(depths, depths[1:])]


@pytest.mark.unpoisoned
def test_a_thousand_layers_train():
    """In the bytes of the block outputs, which are halved twice, and of what is before and behind the blocks."""
    net, x, target = models.preact_resnet1001(policy="min"), torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
    optimizer, losses = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9), []
    for _ in range(3):
        optimizer.zero_grad()
        with rd.memory.track_saved() as saved:
            loss = F.cross_entropy(net(x), target)
        kept = saved.bytes()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2] > 0
    stages = [getattr(net.features, f"layer{i}") for i in (1, 2, 3)]
    blocks = sum(block_bytes(block, x[:, :1].nbytes * 64 >> i) for i, stage in enumerate(stages) for block in stage)
    assert blocks < kept < 1.005 * blocks
