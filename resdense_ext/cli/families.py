"""Four families of networks for small images that differ only in how a layer's output meets what came before it.

All have one body: a 3x3 stem, three stages (the positions are quartered between two), batch norm, ReLU, global average pool,
linear.
He et al.: Identity Mappings in Deep Residual Networks (2016), arXiv 1603.05027. Huang et al.: Densely Connected Convolutional
Networks (2017), arXiv 1608.06993. Chen et al.: Dual Path Networks (2017), arXiv 1707.01629.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from resdense_ext.cli.errors import CommandError
from resdense_ext.nn import Chain, DenseBlock, DualPathStage, PreActBlock, Transition

STAGES = 3
EQUAL_DEPTH, EQUAL_PARAMETERS = COMPARISONS = "depth", "parameters"
WIDTH = 8.0
"""Of every family where depths are compared: channels of the first stage, or the growth rate."""
BUDGET_FAMILY = "dense"
"""Whose parameters the others match: the growth rate must be whole, so its steps are the coarsest."""
STEP = 1 / 16
"""The grid of the other families' widths; a stage rounds its own multiple of the width to whole channels."""


class Design(NamedTuple):
    """A network but for its policy, its weights and the images it is for."""

    family: str
    depth: int
    width: float


class PlainBlock(nn.Sequential):
    """Twice batch norm, ReLU, convolution 3x3: a pre-activation residual block without its shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(*_unit(in_channels, out_channels, 3, stride), *_unit(out_channels, out_channels, 3))


class SideBySide(nn.Module):
    """Joins the two halves of a dual path."""

    def forward(self, halves: tuple[Tensor, Tensor]) -> Tensor:
        return torch.cat(halves, 1)


def _plain(depth: int, width: float, policy: str | None) -> tuple[int, list[nn.Module], int]:
    return _blocks_of_two(PlainBlock, depth, width)


def _residual(depth: int, width: float, policy: str | None) -> tuple[int, list[nn.Module], int]:
    return _blocks_of_two(partial(PreActBlock, policy=policy), depth, width)


def _dense(depth: int, width: float, policy: str | None) -> tuple[int, list[nn.Module], int]:
    """DenseNet-BC: growth rate `width`, bottlenecks four times that, transitions that halve the channels."""
    growth = round(width)
    layers = _convolutions_a_stage(depth) // 2
    channels = stem = 2 * growth
    stages = []
    for stage in range(STAGES):
        stages.append(DenseBlock(layers, channels, growth_rate=growth, policy=policy))
        channels += layers * growth
        if stage < STAGES - 1:
            stages.append(Transition(channels, channels // 2, policy=policy))
            channels //= 2
    return stem, stages, channels


def _dual_path(depth: int, width: float, policy: str | None) -> tuple[int, list[nn.Module], int]:
    """Near DPN's proportions: the residual half twice as wide as the bottleneck, the dense half growing by a quarter of it."""
    blocks = _convolutions_a_stage(depth) // 3
    channels = stem = _channels(width, 0)
    stages: list[nn.Module] = []
    for stage in range(STAGES):
        bottleneck = _channels(width, stage)
        residual, growth = 2 * bottleneck, max(1, round(bottleneck / 4))
        stride = 1 if stage == 0 else 2
        stages.append(DualPathStage(blocks, channels, bottleneck, residual, growth, stride=stride, policy=policy))
        channels = residual + (2 + blocks) * growth
    return stem, [nn.Sequential(*stages, SideBySide())], channels


FAMILIES: dict[str, Callable[[int, float, str | None], tuple[int, list[nn.Module], int]]] = {
    "plain": _plain,
    "residual": _residual,
    "dense": _dense,
    "dual path": _dual_path,
}
"""Each gives, for a depth, a width and a policy: the stem's channels, the stages' modules, and the channels these end in."""


def build(design: Design, policy: str | None = None, in_channels: int = 1, num_classes: int = 10) -> Chain:
    """The network with new weights: convolutions as He et al. (2015) draw them, `num_classes` outputs.

    Args:
        policy: what the engine keeps, in those modules that run on it; None for plain PyTorch throughout.

    Shape: `(N, in_channels, H, W)` to `(N, num_classes)`.
    """
    stem, stages, channels = FAMILIES[design.family](design.depth, design.width, policy)
    modules = [
        ("stem", nn.Conv2d(in_channels, stem, 3, padding=1, bias=False)),
        *((f"stage{index}", module) for index, module in enumerate(stages, start=1)),
        ("norm", nn.BatchNorm2d(channels)),
        ("relu", nn.ReLU(inplace=True)),
        ("pool", nn.AdaptiveAvgPool2d(1)),
        ("flatten", nn.Flatten()),
        ("classifier", nn.Linear(channels, num_classes)),
    ]
    network = Chain(OrderedDict(modules), policy=policy)
    for convolution in convolutions(network):
        nn.init.kaiming_normal_(convolution.weight)
    nn.init.zeros_(network.classifier.bias)
    # In the default memory format: channels last is faster here, but oneDNN's weight gradient of a strided 1x1 convolution on
    # fewer input channels than its block then writes past its workspace (uxlfoundation/oneDNN#6035).
    return network


def convolutions(network: nn.Module) -> list[nn.Conv2d]:
    """From the stem to the last layer of the last stage."""
    return [module for module in network.modules() if isinstance(module, nn.Conv2d)]


def weightless(design: Design, in_channels: int = 1, num_classes: int = 10) -> Chain:
    """The network on the meta device, in plain PyTorch; the random state stays as it is."""
    # Drawing weights and dropping them is faster than drawing them on the meta device.
    with torch.random.fork_rng(devices=()):
        return build(design, None, in_channels, num_classes).to("meta")


@lru_cache(maxsize=None)
def parameters(design: Design) -> int:
    """The number of parameters of the network for one channel and ten classes."""
    return sum(parameter.numel() for parameter in weightless(design).parameters())


def matching(family: str, depth: int, budget: int) -> Design:
    """The network of `family` and `depth` whose number of parameters is nearest to `budget`, its width found by bisection."""
    low, high = 1, 2
    while parameters(Design(family, depth, high * STEP)) < budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if parameters(Design(family, depth, middle * STEP)) < budget:
            low = middle
        else:
            high = middle
    candidates = (Design(family, depth, steps * STEP) for steps in (low, high))
    return min(candidates, key=lambda design: abs(parameters(design) - budget))


def designs(comparison: str, depth: int) -> dict[str, Design]:
    """The network of every family at `depth`: of equal width, or of as many parameters as the dense network of that width."""
    if comparison == EQUAL_DEPTH:
        return {family: Design(family, depth, WIDTH) for family in FAMILIES}
    dense = Design(BUDGET_FAMILY, depth, WIDTH)
    budget = parameters(dense)
    return {family: dense if family == BUDGET_FAMILY else matching(family, depth, budget) for family in FAMILIES}


def check_depths(depths: Sequence[int]) -> None:
    """Raises `CommandError` unless every depth is one that all families can have: stages of layers of two and of three."""
    for depth in depths:
        if depth < 20 or (depth - 2) % (6 * STAGES):
            raise CommandError(
                f"--depths: expected 18n + 2 (20, 38, 56, ..., 110, ..., 200), so that stages of two and of three convolutions "
                f"a layer come out even, got {depth}"
            )
    if len(set(depths)) < len(depths):
        raise CommandError(f"--depths: expected different ones, got {' '.join(map(str, depths))}")


def _blocks_of_two(block: Callable[[int, int, int], nn.Module], depth: int, width: float) -> tuple[int, list[nn.Module], int]:
    blocks = _convolutions_a_stage(depth) // 2
    channels = stem = _channels(width, 0)
    layers = []
    for stage in range(STAGES):
        for index in range(blocks):
            layers.append(block(channels, _channels(width, stage), 2 if stage and not index else 1))
            channels = _channels(width, stage)
    return stem, layers, channels


def _convolutions_a_stage(depth: int) -> int:
    """Depth counts the stem, the layers' convolutions and the classifier; 1x1 convolutions where a stage begins come on top."""
    return (depth - 2) // STAGES


def _channels(width: float, stage: int) -> int:
    return max(1, round(width * 2**stage))


def _unit(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> tuple[nn.Module, nn.Module, nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)
    return nn.BatchNorm2d(in_channels), nn.ReLU(inplace=True), conv
