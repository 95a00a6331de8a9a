"""The layers that blocks are built of, by spatial dimension, and the checks that their constructors share."""

from __future__ import annotations

from typing import Optional

from torch import nn

from resdense_ext.checks import POLICIES
from resdense_ext.nn.protocols import Policy

__all__ = [
    "AVG_POOLS",
    "CONVS",
    "GLOBAL_POOLS",
    "MAX_POOLS",
    "NORMS",
    "TRANSPOSED_CONVS",
    "activation_module",
    "check_policy",
    "check_spatial_dims",
]

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED_CONVS = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
AVG_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
MAX_POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
GLOBAL_POOLS = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}

_ACTIVATIONS = {
    "relu": lambda: nn.ReLU(inplace=True),
    "relu6": lambda: nn.ReLU6(inplace=True),
    "leaky_relu": lambda: nn.LeakyReLU(inplace=True),
    "elu": lambda: nn.ELU(inplace=True),
    "silu": lambda: nn.SiLU(inplace=True),
    "identity": nn.Identity,
}


def activation_module(name: str) -> nn.Module:
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(_ACTIVATIONS)}, got {name!r}")
    return _ACTIVATIONS[name]()


def check_spatial_dims(spatial_dims: int) -> None:
    if spatial_dims not in CONVS:
        raise ValueError(f"spatial_dims: expected 1, 2 or 3, got {spatial_dims!r}")


def check_policy(policy: Optional[Policy], *, a_layer: bool = False) -> None:
    """Raises ValueError for what is no policy; ``a_layer`` says that a bool a layer is one."""
    if policy is not None and not (a_layer and isinstance(policy, tuple)) and policy not in POLICIES:
        raise ValueError(f"policy: expected one of {', '.join(POLICIES)}, or None for the stock path, got {policy!r}")
