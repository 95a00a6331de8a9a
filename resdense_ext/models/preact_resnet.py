"""Pre-activation ResNets for small images, of 100 to 1000 layers.

He, Zhang, Ren, Sun: Identity Mappings in Deep Residual Networks (ECCV 2016), arXiv 1603.05027.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from resdense_ext.nn import Chain, PreActBlock, PreActBottleneck
from resdense_ext.nn.parts import CONVS, GLOBAL_POOLS, NORMS, check_policy, check_spatial_dims
from resdense_ext.nn.protocols import OnEngine

__all__ = ["PreActResNet", "preact_resnet110", "preact_resnet164", "preact_resnet1001"]


class PreActResNet(OnEngine, nn.Module):
    """A 3x3 convolution, stages of pre-activation blocks of which every one but the first halves the resolution, and a
    classifier behind a last batch norm, ReLU and global average pool.

    Args:
        block: `resdense_ext.nn.PreActBlock` or `resdense_ext.nn.PreActBottleneck`.
        layers: the number of blocks of each stage.
        planes: the ``planes`` of the first stage's blocks, and the channels before them; they double from stage to stage.
        num_classes: outputs of the classifier.
        in_channels: channels of the input.
        spatial_dims: 1, 2 or 3 spatial dimensions.
        policy: what the blocks keep for backward: "fast", "min", or None for a network in plain PyTorch.

    Shapes: input `(N, in_channels, *spatial)`, output `(N, num_classes)`.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        block: type[PreActBlock] | type[PreActBottleneck],
        layers: Sequence[int],
        planes: int = 16,
        num_classes: int = 10,
        *,
        in_channels: int = 3,
        spatial_dims: int = 2,
        policy: str | None = "fast",
    ) -> None:
        super().__init__()
        check_spatial_dims(spatial_dims)
        check_policy(policy)
        if not layers or min(layers) < 1:
            raise ValueError(f"layers: expected at least one stage of at least one block, got {layers!r}")
        self.policy = policy

        conv, channels = CONVS[spatial_dims], planes
        self.features = Chain(policy=policy)
        self.features.add_module("conv1", conv(in_channels, channels, kernel_size=3, padding=1, bias=False))
        for index, depth in enumerate(layers):
            stage = nn.Sequential()
            for at in range(depth):
                stride = 2 if index > 0 and at == 0 else 1
                stage.append(block(channels, planes << index, stride, spatial_dims=spatial_dims, policy=policy))
                channels = (planes << index) * block.expansion
            self.features.add_module(f"layer{index + 1}", stage)
        self.features.add_module("bn", NORMS[spatial_dims](channels))
        self.features.add_module("relu", nn.ReLU(inplace=True))
        self.features.add_module("avgpool", GLOBAL_POOLS[spatial_dims](1))
        self.fc = nn.Linear(channels, num_classes)

        for module in self.modules():
            if isinstance(module, conv):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).flatten(1))


def preact_resnet110(**options) -> PreActResNet:
    """The paper's ResNet-110 for CIFAR: three stages of 18 blocks of two 3x3 convolutions; `options` go to `PreActResNet`."""
    return PreActResNet(PreActBlock, (18, 18, 18), **options)


def preact_resnet164(**options) -> PreActResNet:
    """The paper's ResNet-164 for CIFAR: three stages of 18 bottlenecks; `options` go to `PreActResNet`."""
    return PreActResNet(PreActBottleneck, (18, 18, 18), **options)


def preact_resnet1001(**options) -> PreActResNet:
    """The paper's ResNet-1001 for CIFAR: three stages of 111 bottlenecks; `options` go to `PreActResNet`."""
    return PreActResNet(PreActBottleneck, (111, 111, 111), **options)
