"""The end of a residual block: an addition and an activation, behind norms or without them.

He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition (CVPR 2016), arXiv 1512.03385.
"""

from typing import Optional

from torch import Tensor, nn

from resdense_ext.nn.engine import run_end
from resdense_ext.nn.parts import NORMS, activation_module, check_policy, check_spatial_dims
from resdense_ext.nn.protocols import EndModules, OnEngine, Policy

__all__ = ["AddAct", "BNAddAct"]


class _End(OnEngine, nn.Module):
    """What both have: a policy, and two maps to add up."""

    norm: Optional[nn.Module]
    identity_norm: Optional[nn.Module]

    def __init__(self, activation: str, policy: Optional[Policy]) -> None:
        super().__init__()
        check_policy(policy)
        self.policy = policy
        self.act = activation_module(activation)

    def forward(self, x: Tensor, identity: Tensor) -> Tensor:
        check_policy(self.policy)
        return run_end(self, (x, identity))

    def end_modules(self) -> EndModules:
        return EndModules(self.norm, self.identity_norm, self.act)

    def stock_forward(self, maps: tuple[Tensor, Tensor]) -> Tensor:
        """The end in plain PyTorch, of both maps."""
        x, identity = maps
        x = x if self.norm is None else self.norm(x)
        return self.act(x + (identity if self.identity_norm is None else self.identity_norm(identity)))

    def extra_repr(self) -> str:
        return f"policy={self.policy!r}"


class AddAct(_End):
    """``act(x + identity)``: see `resdense_ext.functional.add_act`.

    Args:
        activation: relu, relu6, leaky_relu, elu, silu or identity.
        policy: None for plain PyTorch; "fast" and "min" are alike here.

    Shape: two maps ``[N, C, *spatial]`` to one.

    Raises:
        ValueError: ``activation`` or ``policy`` is none of these.
    """

    def __init__(self, activation: str = "relu", *, policy: Optional[Policy] = "fast") -> None:
        super().__init__(activation, policy)
        self.norm = self.identity_norm = None


class BNAddAct(_End):
    """``act(norm(x) + identity)``, or with ``projection`` ``act(norm(x) + identity_norm(identity))``: see
    `resdense_ext.functional.bn_add_act`.

    Args:
        num_features: channels.
        projection: whether the shortcut is normalised, too, as a convolution's output is.
        spatial_dims: 1, 2 or 3.
        activation: relu, relu6, leaky_relu, elu, silu or identity.
        eps, momentum: of the norms.
        policy: None for plain PyTorch; "fast" and "min" are alike here.

    Shape: two maps ``[N, num_features, *spatial]`` to one.

    Raises:
        ValueError: ``spatial_dims``, ``activation`` or ``policy`` is none of these.
    """

    def __init__(
        self,
        num_features: int,
        projection: bool = False,
        *,
        spatial_dims: int = 2,
        activation: str = "relu",
        eps: float = 1e-5,
        momentum: Optional[float] = 0.1,
        policy: Optional[Policy] = "fast",
    ) -> None:
        check_spatial_dims(spatial_dims)
        super().__init__(activation, policy)
        self.norm = NORMS[spatial_dims](num_features, eps, momentum)
        self.identity_norm = NORMS[spatial_dims](num_features, eps, momentum) if projection else None
