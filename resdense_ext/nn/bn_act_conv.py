"""Batch norm, an activation and a convolution in a row: the unit that pre-activation and dense networks are made of.

He, Zhang, Ren, Sun: Identity Mappings in Deep Residual Networks (ECCV 2016), arXiv 1603.05027.
"""

from collections.abc import Sequence
from typing import ClassVar, Optional

from torch import Tensor, nn

from resdense_ext.nn.engine import run_bn_act_conv
from resdense_ext.nn.leaves import read_children
from resdense_ext.nn.parts import CONVS, NORMS, activation_module, check_policy
from resdense_ext.nn.protocols import OnEngine, Policy, UnitModules

__all__ = ["BNActConv1d", "BNActConv2d", "BNActConv3d"]


class _BNActConv(OnEngine, nn.Sequential):
    """``norm, act, conv``; of what the engine keeps for backward see `resdense_ext.functional.bn_act_conv`.

    Equivalent to::

        torch.nn.Sequential(BatchNorm(in_channels), ReLU(), Conv(in_channels, out_channels, kernel_size, ...))

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as torch's convolution takes them.
        activation: relu, relu6, leaky_relu, elu, silu or identity.
        eps, momentum: of the norm.
        policy: None for plain PyTorch; "fast" and "min" are alike here.

    Shape: ``[N, in_channels, *spatial]`` to ``[N, out_channels, *spatial of the convolution's output]``.

    Raises:
        ValueError: ``activation`` or ``policy`` is none of these. Torch's layers raise for the other arguments.
    """

    spatial_dims: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        activation: str = "relu",
        eps: float = 1e-5,
        momentum: Optional[float] = 0.1,
        policy: Optional[Policy] = "fast",
    ) -> None:
        super().__init__()
        check_policy(policy)
        self.policy = policy
        self.norm = NORMS[self.spatial_dims](in_channels, eps, momentum)
        self.act = activation_module(activation)
        conv = CONVS[self.spatial_dims]
        self.conv = conv(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)

    def forward(self, x: Tensor) -> Tensor:
        check_policy(self.policy)
        return run_bn_act_conv(self, x)

    def unit_modules(self) -> UnitModules:
        return tuple(read_children(self, "norm", "act", "conv"))

    def stock_forward(self, x: Tensor) -> Tensor:
        """The unit in plain PyTorch."""
        return super().forward(x)


class BNActConv1d(_BNActConv):
    __doc__ = _BNActConv.__doc__
    spatial_dims = 1


class BNActConv2d(_BNActConv):
    __doc__ = _BNActConv.__doc__
    spatial_dims = 2


class BNActConv3d(_BNActConv):
    __doc__ = _BNActConv.__doc__
    spatial_dims = 3
