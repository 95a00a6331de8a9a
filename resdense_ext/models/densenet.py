"""DenseNet-BC: dense blocks with bottlenecks, compressed by the transitions between them.

Huang, Liu, van der Maaten, Weinberger: Densely Connected Convolutional Networks (CVPR 2017), arXiv 1608.06993.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from resdense_ext.nn import Chain, DenseBlock, Transition
from resdense_ext.nn.chain import run_features
from resdense_ext.nn.dispatch import is_transformed
from resdense_ext.nn.parts import CONVS, MAX_POOLS, NORMS, check_spatial_dims
from resdense_ext.nn.protocols import OnEngine

__all__ = [
    "DenseNet",
    "densenet121",
    "densenet121_3d",
    "densenet161",
    "densenet169",
    "densenet201",
    "densenet264",
    "densenet_bc40",
    "densenet_bc100",
]

_GLOBAL_POOL = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


class DenseNet(OnEngine, nn.Module):
    """A DenseNet for 1D, 2D or 3D inputs whose dense blocks keep little more than their feature maps for backward.

    Equivalent to: `torchvision.models.DenseNet` with the same arguments, where torchvision has them. Parameter names,
    shapes and order are torchvision's, and the same random seed gives the same initial weights, so a `state_dict` goes
    either way. Nothing is downloaded here; pretrained weights come through torchvision::

        pretrained = torchvision.models.densenet121(weights="IMAGENET1K_V1")
        model = resdense_ext.models.densenet121()
        model.load_state_dict(pretrained.state_dict())

    torchvision's `memory_efficient` has no counterpart: `policy` says what is kept.

    Args:
        growth_rate: channels that each dense layer adds (`k` in the paper).
        block_config: the number of dense layers of each block; a transition stands between two blocks.
        num_init_features: channels after the first convolution.
        bn_size: the bottleneck's width in multiples of `growth_rate`; 0 leaves the bottlenecks out.
        drop_rate: dropout probability of each dense layer's output.
        num_classes: outputs of the classifier.
        in_channels: channels of the input.
        spatial_dims: 1, 2 or 3 spatial dimensions.
        small_inputs: start with one 3x3 convolution at full resolution (CIFAR, digits) instead of the strided 7x7
            convolution, batch norm, ReLU and max pool.
        reduction: a transition passes on this share of its channels, rounded down (`theta` in the paper); 1 keeps all.
        policy: what the dense blocks keep for backward: "fast", "min", or None for a network in plain PyTorch.

    Shapes: input `(N, in_channels, *spatial)`, output `(N, num_classes)`.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: Sequence[int] = (6, 12, 24, 16),
        num_init_features: int = 64,
        bn_size: int = 4,
        drop_rate: float = 0.0,
        num_classes: int = 1000,
        *,
        in_channels: int = 3,
        spatial_dims: int = 2,
        small_inputs: bool = False,
        reduction: float = 0.5,
        policy: str | None = "fast",
    ) -> None:
        super().__init__()
        check_spatial_dims(spatial_dims)
        if not block_config or min(block_config) < 1:
            raise ValueError(f"block_config: expected at least one block of at least one layer, got {block_config!r}")
        if not 0 < reduction <= 1:
            raise ValueError(f"reduction: expected a share in (0, 1], got {reduction!r}")
        self.spatial_dims, self.policy = spatial_dims, policy

        conv, norm = CONVS[spatial_dims], NORMS[spatial_dims]
        self.features = Chain(policy=policy)
        if small_inputs:
            self.features.add_module("conv0", conv(in_channels, num_init_features, 3, padding=1, bias=False))
        else:
            self.features.add_module("conv0", conv(in_channels, num_init_features, 7, stride=2, padding=3, bias=False))
            self.features.add_module("norm0", norm(num_init_features))
            self.features.add_module("relu0", nn.ReLU(inplace=True))
            self.features.add_module("pool0", MAX_POOLS[spatial_dims](3, stride=2, padding=1))

        channels = num_init_features
        for index, num_layers in enumerate(block_config, start=1):
            block = DenseBlock(
                num_layers, channels, bn_size, growth_rate, drop_rate, spatial_dims=spatial_dims, policy=policy
            )
            self.features.add_module(f"denseblock{index}", block)
            channels += num_layers * growth_rate
            if index < len(block_config):
                compressed = int(channels * reduction)
                transition = Transition(channels, compressed, spatial_dims=spatial_dims, policy=policy)
                self.features.add_module(f"transition{index}", transition)
                channels = compressed

        # The name is torchvision's, whatever the number of blocks.
        self.features.add_module("norm5", norm(channels))
        self.classifier = nn.Linear(channels, num_classes)

        for module in self.modules():
            if isinstance(module, conv):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        # Global hooks see modules, of which the last activation and the pool are none of this network's.
        plain = self.policy is None or is_transformed(x) or _has_any_global_hook()
        if type(self.features) is Chain and not plain:
            return self.classifier(run_features(self.features, x))
        features = F.relu(self.features(x), inplace=True)
        return self.classifier(_GLOBAL_POOL[self.spatial_dims](features, 1).flatten(1))


def densenet121(**options) -> DenseNet:
    """DenseNet-121 (growth rate 32, blocks of 6, 12, 24 and 16 layers); `options` go to `DenseNet`."""
    return DenseNet(32, (6, 12, 24, 16), 64, **options)


def densenet121_3d(**options) -> DenseNet:
    """DenseNet-121 for volumes, of one channel if `in_channels` says nothing else; `options` go to `DenseNet`."""
    return densenet121(**{"in_channels": 1} | options, spatial_dims=3)


def densenet161(**options) -> DenseNet:
    """DenseNet-161 (growth rate 48, blocks of 6, 12, 36 and 24 layers); `options` go to `DenseNet`."""
    return DenseNet(48, (6, 12, 36, 24), 96, **options)


def densenet169(**options) -> DenseNet:
    """DenseNet-169 (growth rate 32, blocks of 6, 12, 32 and 32 layers); `options` go to `DenseNet`."""
    return DenseNet(32, (6, 12, 32, 32), 64, **options)


def densenet201(**options) -> DenseNet:
    """DenseNet-201 (growth rate 32, blocks of 6, 12, 48 and 32 layers); `options` go to `DenseNet`."""
    return DenseNet(32, (6, 12, 48, 32), 64, **options)


def densenet264(**options) -> DenseNet:
    """DenseNet-264 (growth rate 32, blocks of 6, 12, 64 and 48 layers); `options` go to `DenseNet`."""
    return DenseNet(32, (6, 12, 64, 48), 64, **options)


def densenet_bc40(**options) -> DenseNet:
    """DenseNet-BC of 40 layers for small images (growth rate 12, three blocks of 6 layers); `options` go to `DenseNet`."""
    return DenseNet(12, (6, 6, 6), 24, **{"small_inputs": True, **options})


def densenet_bc100(**options) -> DenseNet:
    """DenseNet-BC of 100 layers for small images (growth rate 12, three blocks of 16 layers); `options` go to `DenseNet`."""
    return DenseNet(12, (16, 16, 16), 24, **{"small_inputs": True, **options})
