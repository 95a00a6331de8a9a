"""The demo's network, and what it keeps for backward at every depth."""

from __future__ import annotations

import torch

from resdense_ext import memory
from resdense_ext.cli.errors import CommandError
from resdense_ext.cli.progress import progress
from resdense_ext.models import DenseNet

GROWTH_RATE = 12
CURVE_DEPTHS = (22, 52, 82, 112, 142, 172, 202)
CURVE_BATCH = 4
POLICIES = {"stock": None, "fast": "fast", "min": "min"}


def layers_a_block(depth: int) -> int:
    """The n of depth = 6n + 4: three blocks of n layers of two convolutions; stem, two transitions and classifier.

    Raises:
        CommandError: `depth` is not of that form.
    """
    layers, rest = divmod(depth - 4, 6)
    if rest or layers < 1:
        raise CommandError(f"--depth: expected 6n + 4 (10, 16, 22, ...: three blocks of n dense layers), got {depth}")
    return layers


def densenet_bc(depth: int, in_channels: int, num_classes: int, policy: str | None) -> DenseNet:
    """The paper's DenseNet-BC for small images: three equal blocks, growth rate 12, half the channels passed on."""
    return DenseNet(
        GROWTH_RATE,
        (layers_a_block(depth),) * 3,
        2 * GROWTH_RATE,
        num_classes=num_classes,
        in_channels=in_channels,
        small_inputs=True,
        policy=policy,
    )


def saved_by_depth(in_channels: int, size: int, device: torch.device) -> dict[str, list[tuple[int, float]]]:
    """For every policy the pairs (depth, bytes an image that a training forward keeps), without training anything."""
    images = torch.randn(CURVE_BATCH, in_channels, size, size, device=device)
    curves = {name: [] for name in POLICIES}
    for depth in progress(CURVE_DEPTHS, "memory against depth"):
        for name, policy in POLICIES.items():
            network = densenet_bc(depth, in_channels, 10, policy).to(device)
            curves[name].append((depth, memory.saved_bytes(lambda: network(images)) / CURVE_BATCH))
    return curves
