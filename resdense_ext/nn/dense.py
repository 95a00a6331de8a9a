"""Dense layers, blocks, transitions and chains of them, with torchvision's attribute names, so that its ``state_dict`` fits."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resdense_ext.nn.chain import run_chain
from resdense_ext.nn.engine import run_dense_block, run_transition
from resdense_ext.nn.leaves import Unsupported, check_forward, read_children
from resdense_ext.nn.parts import AVG_POOLS, CONVS, NORMS, activation_module, check_policy, check_spatial_dims
from resdense_ext.nn.protocols import LayerModules, OnEngine, Policy, PooledModules

__all__ = ["Chain", "DenseBlock", "DenseLayer", "Transition"]


class DenseLayer(nn.Module):
    """One pre-activation dense layer: ``norm1, relu1, conv1, norm2, relu2, conv2``, or without the second three.

    Called by itself it is the stock path; inside a `DenseBlock` its modules are read by the engine.

    Args:
        num_input_features: channels of the input.
        growth_rate: channels of the new feature map.
        bn_size: the bottleneck has ``bn_size * growth_rate`` channels; 0 for none (a single 3x3).
        drop_rate: probability of the dropout of the new feature map, 0 for none.
        spatial_dims: 1, 2 or 3.
        activation: relu, relu6, leaky_relu, elu, silu or identity.

    Raises:
        ValueError: ``drop_rate``, ``spatial_dims`` or ``activation`` is none of these.
    """

    def __init__(
        self,
        num_input_features: int,
        growth_rate: int,
        bn_size: int = 4,
        drop_rate: float = 0.0,
        *,
        spatial_dims: int = 2,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        check_spatial_dims(spatial_dims)
        if not 0 <= drop_rate <= 1:
            raise ValueError(f"drop_rate: expected a probability from 0 to 1, got {drop_rate}")
        norm, conv = NORMS[spatial_dims], CONVS[spatial_dims]
        self.norm1 = norm(num_input_features)
        self.relu1 = activation_module(activation)
        if bn_size:
            width = bn_size * growth_rate
            self.conv1 = conv(num_input_features, width, kernel_size=1, bias=False)
            self.norm2 = norm(width)
            self.relu2 = activation_module(activation)
            self.conv2 = conv(width, growth_rate, kernel_size=3, padding=1, bias=False)
        else:
            self.conv1 = conv(num_input_features, growth_rate, kernel_size=3, padding=1, bias=False)
        self.drop_rate = float(drop_rate)

    @property
    def units(self) -> tuple[tuple[nn.Module, nn.Module, nn.Module], ...]:
        first = (self.norm1, self.relu1, self.conv1)
        return (first, (self.norm2, self.relu2, self.conv2)) if hasattr(self, "conv2") else (first,)

    def forward(self, x: Tensor) -> Tensor:
        for norm, activation, conv in self.units:
            x = conv(activation(norm(x)))
        return F.dropout(x, self.drop_rate, self.training) if self.drop_rate > 0 else x


class DenseBlock(OnEngine, nn.ModuleDict):
    """A dense block, ``denselayer1`` to ``denselayerL``, that keeps little more than its feature maps for backward.

    Equivalent to::

        for layer in block.values():
            x = torch.cat([x, layer(x)], 1)

    Args:
        num_layers: L.
        num_input_features: C, the channels of the input.
        bn_size, growth_rate, drop_rate, spatial_dims, activation: as `DenseLayer` takes them.
        policy: "fast", "min" or a bool a layer (see `resdense_ext.functional.dense_block`), or None for the stock path: the
            code above.

    Shape: ``[N, C, *spatial]`` to ``[N, C + L * growth_rate, *spatial]``, in the memory format of the input.

    Raises:
        ValueError, TypeError: another policy; in the constructor as `DenseLayer`, in the forward as the functional call.
    """

    def __init__(
        self,
        num_layers: int,
        num_input_features: int,
        bn_size: int = 4,
        growth_rate: int = 32,
        drop_rate: float = 0.0,
        *,
        spatial_dims: int = 2,
        activation: str = "relu",
        policy: Optional[Policy] = "fast",
    ) -> None:
        super().__init__()
        check_policy(policy, a_layer=True)
        self.policy = policy
        for i in range(num_layers):
            channels = num_input_features + i * growth_rate
            layer = DenseLayer(
                channels, growth_rate, bn_size, drop_rate, spatial_dims=spatial_dims, activation=activation
            )
            self.add_module(f"denselayer{i + 1}", layer)

    def forward(self, x: Tensor) -> Tensor:
        check_policy(self.policy, a_layer=True)
        return run_dense_block(self, x)

    def layer_modules(self) -> list[LayerModules]:
        for layer in self.values():
            check_forward(layer, DenseLayer)
        return [LayerModules(layer, layer.units, layer.drop_rate) for layer in self.values()]

    def stock_forward(self, x: Tensor) -> Tensor:
        """The block in plain PyTorch: a concatenation, its normalisation and its activation a layer, all kept."""
        for layer in self.values():
            x = torch.cat([x, layer(x)], 1)
        return x

    def extra_repr(self) -> str:
        return f"policy={self.policy!r}"


class Transition(OnEngine, nn.Sequential):
    """``norm, relu, conv, pool``: halves the positions (average pooling by 2) between two dense blocks.

    On the engine it pools first, which is the same (see `resdense_ext.functional.transition`), and keeps its input alone.

    Args:
        num_input_features, num_output_features: channels.
        spatial_dims: 1, 2 or 3.
        policy: None for the stock path; "fast" and "min" are alike here.

    Shape: ``[N, num_input_features, *spatial]`` to ``[N, num_output_features, *spatial // 2]``.

    Raises:
        ValueError: ``spatial_dims`` or ``policy`` is none of these.
    """

    def __init__(
        self,
        num_input_features: int,
        num_output_features: int,
        *,
        spatial_dims: int = 2,
        policy: Optional[Policy] = "fast",
    ) -> None:
        super().__init__()
        check_spatial_dims(spatial_dims)
        check_policy(policy)
        self.policy = policy
        self.norm = NORMS[spatial_dims](num_input_features)
        self.relu = nn.ReLU(inplace=True)
        self.conv = CONVS[spatial_dims](num_input_features, num_output_features, kernel_size=1, bias=False)
        self.pool = AVG_POOLS[spatial_dims](kernel_size=2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return run_transition(self, x)

    def pooled_modules(self) -> PooledModules:
        return PooledModules(*read_children(self, "norm", "relu", "conv", "pool"))

    def stock_forward(self, x: Tensor) -> Tensor:
        """The transition in plain PyTorch."""
        return super().forward(x)


class Chain(OnEngine, nn.Sequential):
    """A `torch.nn.Sequential` in which neighbours share a node: a dense block and the transition or head behind it; a batch
    norm, an activation and a pool; residual or dual path blocks of one stage.

    Equivalent to ``torch.nn.Sequential(*modules)``. A module that carries hooks, or that the engine does not know, is called by
    itself.

    Args:
        modules: as `torch.nn.Sequential` takes them.
        policy: None for plain PyTorch; "fast" and "min" are alike here.

    Raises:
        ValueError: another policy.
    """

    def __init__(self, *modules, policy: Optional[Policy] = "fast") -> None:
        super().__init__(*modules)
        check_policy(policy)
        self.policy = policy

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.policy is None else run_chain(list(self), x)

    def chain_modules(self) -> list[nn.Module]:
        """The modules that it calls, for a chain around it; raises Unsupported where its own forward has to do that."""
        check_forward(self, Chain)
        if self.policy is None:
            raise Unsupported("runs in plain PyTorch", self)
        return list(self)
