"""What blocks offer to run on the engine: their modules, by kind, and the forward that the engine stands in for."""

from __future__ import annotations

from typing import NamedTuple, Optional, Protocol

import torch
from torch import Tensor, nn

from resdense_ext.nn.leaves import pool_rank

__all__ = [
    "READ_FROM_MODULES",
    "AnyBlock",
    "BNActConv",
    "Block",
    "DualPath",
    "DualPathModules",
    "End",
    "EndModules",
    "Graph",
    "GraphModules",
    "Halves",
    "LayerModules",
    "OnEngine",
    "PieceModules",
    "Policy",
    "PooledModules",
    "ReadModules",
    "Residual",
    "ResidualModules",
    "SideBySide",
    "Transition",
    "UnitModules",
    "whole",
]

Policy = str | tuple[bool, ...]
"""What a block keeps: a name, or of a dense block a bool a layer, and of a graph of convolutions a bool a step."""

Halves = tuple[Tensor, Tensor]
"""The residual half, ``[N, R, *spatial]``, and the dense half, ``[N, D, *spatial]``, of a dual path."""


class SideBySide(NamedTuple):
    """The halves of what its network has as one tensor, which is made of them where a module is to be called with it."""

    residual: Tensor
    dense: Tensor


def whole(x: Tensor | Halves | SideBySide) -> Tensor | Halves:
    """What modules are called with and give: of halves that lie side by side one tensor."""
    return torch.cat(x, 1) if isinstance(x, SideBySide) else x


class LayerModules(NamedTuple):
    """The modules of one dense layer: ``(norm, activation, convolution)`` once or twice, and its dropout.

    ``module`` is the layer itself, or its dropout: its ``training`` decides about the dropout and its hooks count.
    ``drop_rate`` is the dropout's probability, 0 for none, and ``drop_channels`` says that it drops whole feature maps.
    """

    module: nn.Module
    units: tuple[tuple[nn.Module, nn.Module, nn.Module], ...]
    drop_rate: float = 0.0
    drop_channels: bool = False


UnitModules = tuple[nn.Module, nn.Module, nn.Module]
"""``(norm, activation, convolution)``, one after another."""


class EndModules(NamedTuple):
    """``activation(norm(x) + identity_norm(identity))``, without the norms that are None; only behind a norm is there another."""

    norm: Optional[nn.Module]
    identity_norm: Optional[nn.Module]
    activation: nn.Module


class PooledModules(NamedTuple):
    """The modules of a stem's end, a transition (with its convolution) or a head."""

    norm: nn.Module
    activation: nn.Module
    conv: Optional[nn.Module]
    pool: nn.Module

    @property
    def dims(self) -> int:
        """Dimensions of the maps that the pool takes."""
        return 2 + pool_rank(self.pool)


class ResidualModules(NamedTuple):
    """The modules of one residual block, in one of two forms.

    "post": the units are ``(convolution, norm, activation)``, the last without an activation (None);
    ``activation(units(x) + shortcut(x))``, and the shortcut ``(convolution, norm)``, with an average pool in front or without
    one, or, for x itself, empty.
    "pre": the units are ``(norm, activation, convolution)``; ``units(x) + shortcut``, and the shortcut ``(convolution,)`` of
    what the first unit has activated or, for x itself, empty. There is no activation behind the addition.
    """

    form: str
    units: tuple[tuple[Optional[nn.Module], ...], ...]
    shortcut: tuple[nn.Module, ...] = ()
    activation: Optional[nn.Module] = None


class DualPathModules(NamedTuple):
    """The modules of one dual path layer, whose input is ``(residual, dense)``, the channels of the two side by side.

    The units are ``(norm, activation, convolution)``. The last one's first ``residual_channels`` channels are added to the
    residual half, the others are appended to the dense half, and it may have a pair of convolutions, one for either; where there
    is a projection (a unit as well), the two halves are its output, split likewise.

    ``side_by_side`` says that between modules the two halves are one tensor, which they are concatenated to.
    """

    units: tuple[tuple[nn.Module, nn.Module, nn.Module | tuple[nn.Module, nn.Module]], ...]
    projection: Optional[tuple[nn.Module, nn.Module, nn.Module]]
    residual_channels: int
    side_by_side: bool = False


class PieceModules(NamedTuple):
    """``activation(norm(map))``, either of them or none: the number of the map as in `resdense_ext.reference.ConvGraph`."""

    map: int
    norm: Optional[nn.Module] = None
    activation: Optional[nn.Module] = None


class ReadModules(NamedTuple):
    """``activation(norm(cat(pieces)))``; where there is a norm or an activation, the pieces have none."""

    pieces: tuple[PieceModules, ...]
    norm: Optional[nn.Module] = None
    activation: Optional[nn.Module] = None


class GraphModules(NamedTuple):
    """Convolutions in their order, and pools and resizes among them, with what each reads, and the concatenations that are read
    elsewhere. The first is a convolution."""

    convs: tuple[tuple[nn.Module, ReadModules], ...]
    outputs: tuple[ReadModules, ...]


class OnEngine:
    """A module of this library that runs on the engine; where its ``policy`` is None, it is plain PyTorch."""

    policy: Optional[Policy]

    @property
    def engine_policy(self) -> Optional[Policy]:
        return self.policy


class Block(Protocol):
    """What a dense block offers to run on the engine; ``engine_policy`` is None where it is not to.

    ``front`` is the module that its forward calls before it comes to the layers; a block that has none may lack it.
    """

    engine_policy: Optional[Policy]
    front: Optional[nn.Module]

    def layer_modules(self) -> list[LayerModules]:
        """Raises Unsupported where a layer is not what the block's stock forward would find."""

    def stock_forward(self, x: Tensor) -> Tensor:
        """The forward that the engine stands in for."""


class Residual(Protocol):
    """What a residual block offers."""

    engine_policy: Optional[Policy]

    def residual_modules(self) -> ResidualModules:
        """Raises Unsupported where the modules are not what the block's stock forward would find."""

    def stock_forward(self, x: Tensor) -> Tensor:
        """The forward that the engine stands in for."""


class DualPath(Protocol):
    """What a dual path block offers. One whose modules are ``side_by_side`` takes and gives one tensor."""

    engine_policy: Optional[Policy]

    def dual_path_modules(self) -> DualPathModules:
        """Raises Unsupported where the modules are not what the block's stock forward would find."""

    def stock_forward(self, x: Tensor | Halves) -> Halves:
        """The forward that the engine stands in for."""


class Graph(Protocol):
    """What a graph of convolutions offers."""

    engine_policy: Optional[Policy]

    def graph_modules(self) -> GraphModules:
        """Raises Unsupported where the modules are not what the stock forward would find."""

    def stock_forward(self, sources: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The forward that the engine stands in for."""


class BNActConv(Protocol):
    """What a norm, an activation and a convolution in a row offer."""

    engine_policy: Optional[Policy]

    def unit_modules(self) -> UnitModules:
        """Raises Unsupported where the modules are not what the stock forward would find."""

    def stock_forward(self, x: Tensor) -> Tensor:
        """The forward that the engine stands in for."""


class End(Protocol):
    """What the end of a residual block offers, of two maps."""

    engine_policy: Optional[Policy]

    def end_modules(self) -> EndModules:
        """Raises Unsupported where the modules are not what the stock forward would find."""

    def stock_forward(self, maps: tuple[Tensor, Tensor]) -> Tensor:
        """The forward that the engine stands in for."""


class Transition(Protocol):
    """What a transition offers."""

    engine_policy: Optional[Policy]

    def pooled_modules(self) -> PooledModules:
        """Raises Unsupported where the modules are not what the transition's stock forward would find."""

    def stock_forward(self, x: Tensor) -> Tensor:
        """The forward that the engine stands in for."""


READ_FROM_MODULES = ("layer_modules", "residual_modules", "dual_path_modules", "pooled_modules", "unit_modules", "end_modules")
"""By what a module shows that an engine reads the modules in it."""
AnyBlock = Block | Transition | Residual | DualPath | Graph | BNActConv | End
