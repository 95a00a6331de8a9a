"""Dual path blocks and stages: residual and dense connections side by side, with timm's attribute names.

Chen, Li, Xiao, Jin, Yan, Feng: Dual Path Networks (NIPS 2017), arXiv 1707.01629.
"""

from typing import Optional

import torch
from torch import Tensor, nn

from resdense_ext.nn.dense import Chain
from resdense_ext.nn.engine import run_dual_path_block
from resdense_ext.nn.leaves import check_forward, check_untouched, read_children
from resdense_ext.nn.parts import CONVS, NORMS, activation_module, check_policy, check_spatial_dims
from resdense_ext.nn.protocols import DualPathModules, Halves, OnEngine, Policy

__all__ = ["EPS", "DualPathBlock", "DualPathStage", "side_by_side"]

EPS = 1e-3
"""Of every batch norm, as the authors trained their networks."""


def side_by_side(x: Tensor | Halves) -> Tensor:
    """One tensor of both halves; a tensor stays itself."""
    return torch.cat(x, 1) if isinstance(x, tuple) else x


class DualPathBlock(OnEngine, nn.Module):
    """One dual path layer: a grouped bottleneck whose output is added to the residual half and appended to the dense half.

    Equivalent to::

        r, d = x if no projection else split(projection(cat(x)))
        f = c1x1_c(c3x3_b(c1x1_a(cat(x))))                     # each batch norm, relu, convolution
        return r + f[:, :residual_channels], cat([d, f[:, residual_channels:]])

    Args:
        in_channels: channels of the input, of both halves together.
        width: channels of the bottleneck.
        residual_channels: channels of the residual half of the output.
        growth_rate: channels that the dense half gains; a projection makes one of ``2 * growth_rate`` to begin with.
        groups: of the 3x3 convolution.
        stride: of the 3x3 convolution and of the projection; 1 or 2.
        projection: whether the halves are made anew from the input, which may then be a tensor.
        spatial_dims: 1, 2 or 3.
        activation: relu, relu6, leaky_relu, elu, silu or identity.
        policy: what is kept for backward, "fast" or "min" (see `resdense_ext.functional.dual_path_stage`), or None for the stock
            path: the code above. Alone, a block copies the dense half; in a `Chain` blocks share one buffer.

    Shape: ``([N, residual_channels, *spatial], [N, D, *spatial])`` to ``([N, residual_channels, *spatial],
    [N, D + growth_rate, *spatial])``, where a projection starts with ``D = 2 * growth_rate`` and ``spatial / stride``.

    Raises:
        ValueError: an argument that is none of these; a stride without projection.
        TypeError: the input is a tensor, and there is no projection.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        residual_channels: int,
        growth_rate: int,
        groups: int = 1,
        stride: int = 1,
        projection: bool = False,
        *,
        spatial_dims: int = 2,
        activation: str = "relu",
        policy: Optional[Policy] = "fast",
    ) -> None:
        super().__init__()
        check_spatial_dims(spatial_dims)
        check_policy(policy)
        if stride not in (1, 2) or (stride == 2 and not projection):
            raise ValueError(f"stride: expected 1, or 2 with a projection, got {stride!r} with projection={projection!r}")
        self.residual_channels, self.policy = residual_channels, policy

        def unit(inputs: int, outputs: int, kernel_size: int, **options) -> nn.Sequential:
            layers = nn.Sequential()
            layers.bn = NORMS[spatial_dims](inputs, eps=EPS)
            layers.relu = activation_module(activation)
            layers.conv = CONVS[spatial_dims](inputs, outputs, kernel_size, bias=False, **options)
            return layers

        # timm's name of a projection tells its stride.
        self._projection = f"c1x1_w_s{stride}" if projection else None
        if projection:
            self.add_module(self._projection, unit(in_channels, residual_channels + 2 * growth_rate, 1, stride=stride))
        self.c1x1_a = unit(in_channels, width, 1)
        self.c3x3_b = unit(width, width, 3, stride=stride, padding=1, groups=groups)
        self.c1x1_c = unit(width, residual_channels + growth_rate, 1)

    @property
    def projection(self) -> Optional[nn.Sequential]:
        return None if self._projection is None else getattr(self, self._projection)

    def forward(self, x: Tensor | Halves) -> Halves:
        check_policy(self.policy)
        return run_dual_path_block(self, x)

    def dual_path_modules(self) -> DualPathModules:
        """Raises Unsupported where a unit is not what the stock forward would find."""
        units = tuple(_read_unit(unit) for unit in (self.c1x1_a, self.c3x3_b, self.c1x1_c))
        projection = None if self.projection is None else _read_unit(self.projection)
        return DualPathModules(units, projection, self.residual_channels)

    def stock_forward(self, x: Tensor | Halves) -> Halves:
        """The block in plain PyTorch: two concatenations."""
        joined = side_by_side(x)
        if self.projection is not None:
            x = self._split(self.projection(joined))
        elif not isinstance(x, tuple):
            raise TypeError(f"x: expected (residual, dense) in a block without projection, got {type(x).__name__}")
        residual, dense = x
        added, appended = self._split(self.c1x1_c(self.c3x3_b(self.c1x1_a(joined))))
        return residual + added, torch.cat([dense, appended], 1)

    def _split(self, y: Tensor) -> Halves:
        return y[:, : self.residual_channels], y[:, self.residual_channels :]

    def extra_repr(self) -> str:
        return f"policy={self.policy!r}"


class DualPathStage(Chain):
    """A chain of dual path blocks: the first makes the two halves, with a projection, the others go on with them.

    In one node (see `resdense_ext.functional.dual_path_stage`) as far as no block carries hooks.

    Equivalent to::

        for block in stage:
            x = block(x)

    Args:
        num_layers: L, at least 1.
        in_channels, width, residual_channels, growth_rate, groups, spatial_dims, activation, policy: as `DualPathBlock`
            takes them.
        stride: of the first block.

    Shape: ``[N, in_channels, *spatial]``, or a tuple of two that have as many channels together, to the tuple
    ``([N, residual_channels, *spatial / stride], [N, (2 + L) * growth_rate, *spatial / stride])``.

    Raises:
        ValueError: an argument that is none of these.
    """

    def __init__(
        self,
        num_layers: int,
        in_channels: int,
        width: int,
        residual_channels: int,
        growth_rate: int,
        groups: int = 1,
        stride: int = 1,
        *,
        spatial_dims: int = 2,
        activation: str = "relu",
        policy: Optional[Policy] = "fast",
    ) -> None:
        super().__init__(policy=policy)
        if num_layers < 1:
            raise ValueError(f"num_layers: expected at least 1, got {num_layers}")
        shared = dict(spatial_dims=spatial_dims, activation=activation, policy=policy)
        for i in range(num_layers):
            first = i == 0
            inputs = in_channels if first else residual_channels + (2 + i) * growth_rate
            shape = (inputs, width, residual_channels, growth_rate, groups)
            self.append(DualPathBlock(*shape, stride if first else 1, projection=first, **shared))


def _read_unit(unit: nn.Module) -> tuple[nn.Module, ...]:
    check_forward(unit, nn.Sequential)
    check_untouched(unit)
    return tuple(read_children(unit, "bn", "relu", "conv"))
