"""FC-DenseNet (Tiramisu): dense blocks on the way down and up again, for the class of every position.

Jegou, Drozdzal, Vazquez, Romero, Bengio: The One Hundred Layers Tiramisu: Fully Convolutional DenseNets for Semantic Segmentation
(CVPR Workshops 2017), arXiv 1611.09326.

The paper's numbers of parameters count running statistics too: 9.4 M and 3.5 M with 103 and 67 layers, as here. For 56 layers it
gives 1.5 M, and what it describes has 1.4 M.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from resdense_ext.models.parts import check_maps, crop_like
from resdense_ext.nn import DenseBlock
from resdense_ext.nn.engine import run_bn_act_conv, run_pool
from resdense_ext.nn.leaves import read_children
from resdense_ext.nn.parts import CONVS, MAX_POOLS, NORMS, TRANSPOSED_CONVS, check_policy, check_spatial_dims
from resdense_ext.nn.protocols import OnEngine, UnitModules

__all__ = ["FCDenseNet", "fc_densenet56", "fc_densenet67", "fc_densenet103"]


class _TransitionDown(OnEngine, nn.Sequential):
    """Norm, ReLU and 1x1 convolution, of which the engine keeps the input alone, then dropout and a maximum of two positions a side,
    of which it keeps a byte."""

    def __init__(self, channels: int, drop_rate: float, spatial_dims: int, policy: str | None) -> None:
        super().__init__()
        self.policy = policy
        self.norm = NORMS[spatial_dims](channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv = CONVS[spatial_dims](channels, channels, kernel_size=1, bias=False)
        self.dropout = nn.Dropout(drop_rate)
        self.pool = MAX_POOLS[spatial_dims](kernel_size=2)

    def forward(self, x: Tensor) -> Tensor:
        x = run_bn_act_conv(self, x)
        return self.pool(self.dropout(x)) if self.policy is None else run_pool(self.pool, x, self.dropout)

    def unit_modules(self) -> UnitModules:
        return tuple(read_children(self, "norm", "relu", "conv", "dropout", "pool")[:3])

    def stock_forward(self, x: Tensor) -> Tensor:
        """Up to the convolution, in plain PyTorch."""
        return self.conv(self.relu(self.norm(x)))


class FCDenseNet(OnEngine, nn.Module):
    """A fully convolutional DenseNet for 1D, 2D or 3D inputs of any size.

    On the way down every dense block's output goes on, halved, and across to the way up. There only a block's new feature maps
    are upsampled, by a transposed convolution, and put before what came across; the last block's whole output is classified::

        skip = down_i(x);  x = transition_i(skip)
        new = bottleneck(x) without x
        x = cat([crop(upsample_i(new)), skip]);  new = up_i(x) without x

    Args:
        growth_rate: channels that each dense layer adds (`k` in the paper).
        down_layers: the number of layers of each dense block on the way down.
        bottleneck_layers: of the block in the middle.
        up_layers: of each dense block on the way up; as many blocks as on the way down.
        num_init_features: channels of the first convolution.
        drop_rate: dropout probability of each layer's output and of the transitions down.
        num_classes: classes of a position.
        in_channels: channels of the input.
        spatial_dims: 1, 2 or 3 spatial dimensions.
        policy: what the dense blocks and the transitions keep for backward: "fast", "min", or None for a network in plain PyTorch.

    Shapes: input `(N, in_channels, *spatial)`, output `(N, num_classes, *spatial)`; at least 2 to the number of blocks down
    along every spatial dimension.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        growth_rate: int = 16,
        down_layers: Sequence[int] = (4, 5, 7, 10, 12),
        bottleneck_layers: int = 15,
        up_layers: Sequence[int] = (12, 10, 7, 5, 4),
        num_init_features: int = 48,
        drop_rate: float = 0.2,
        num_classes: int = 12,
        *,
        in_channels: int = 3,
        spatial_dims: int = 2,
        policy: str | None = "fast",
    ) -> None:
        super().__init__()
        check_spatial_dims(spatial_dims)
        check_policy(policy)
        if len(up_layers) != len(down_layers):
            raise ValueError(f"up_layers: expected {len(down_layers)} blocks, as on the way down, got {up_layers!r}")
        if min((*down_layers, bottleneck_layers, *up_layers), default=0) < 1:
            layers = f"{down_layers!r}, {bottleneck_layers!r}, {up_layers!r}"
            raise ValueError(f"down_layers, bottleneck_layers, up_layers: expected at least one layer a block, got {layers}")
        self.in_channels, self.spatial_dims, self.policy = in_channels, spatial_dims, policy
        options = dict(bn_size=0, growth_rate=growth_rate, drop_rate=drop_rate, spatial_dims=spatial_dims, policy=policy)

        channels, skips = num_init_features, []
        self.conv0 = CONVS[spatial_dims](in_channels, channels, kernel_size=3, padding=1, bias=False)
        self.down, self.transitions = nn.ModuleList(), nn.ModuleList()
        for layers in down_layers:
            self.down.append(DenseBlock(layers, channels, **options))
            channels += layers * growth_rate
            skips.append(channels)
            self.transitions.append(_TransitionDown(channels, drop_rate, spatial_dims, policy))
        self.bottleneck = DenseBlock(bottleneck_layers, channels, **options)

        self.upsample, self.up = nn.ModuleList(), nn.ModuleList()
        for below, layers, skip in zip((bottleneck_layers, *up_layers), up_layers, reversed(skips)):
            new = below * growth_rate
            self.upsample.append(TRANSPOSED_CONVS[spatial_dims](new, new, kernel_size=3, stride=2, bias=False))
            channels = new + skip
            self.up.append(DenseBlock(layers, channels, **options))
        self.classifier = CONVS[spatial_dims](channels + up_layers[-1] * growth_rate, num_classes, kernel_size=1)

        for module in self.modules():
            if isinstance(module, (CONVS[spatial_dims], TRANSPOSED_CONVS[spatial_dims])):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        check_maps(x, self.in_channels, self.spatial_dims, 2 ** len(self.down))
        x, skips = self.conv0(x), []
        for block, transition in zip(self.down, self.transitions):
            skips.append(block(x))
            x = transition(skips[-1])
        inputs, x = x, self.bottleneck(x)
        for upsample, block in zip(self.upsample, self.up):
            skip, new = skips.pop(), x[:, inputs.shape[1] :]
            inputs = torch.cat([crop_like(upsample(new), skip), skip], 1)
            x = block(inputs)
        return self.classifier(x)


def fc_densenet56(**options) -> FCDenseNet:
    """FC-DenseNet56 (growth rate 12, 4 layers a block); `options` go to `FCDenseNet`."""
    return FCDenseNet(12, (4,) * 5, 4, (4,) * 5, **options)


def fc_densenet67(**options) -> FCDenseNet:
    """FC-DenseNet67 (growth rate 16, 5 layers a block); `options` go to `FCDenseNet`."""
    return FCDenseNet(16, (5,) * 5, 5, (5,) * 5, **options)


def fc_densenet103(**options) -> FCDenseNet:
    """FC-DenseNet103 (growth rate 16, 4 to 15 layers a block); `options` go to `FCDenseNet`."""
    return FCDenseNet(16, (4, 5, 7, 10, 12), 15, (12, 10, 7, 5, 4), **options)
