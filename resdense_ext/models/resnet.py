"""ResNet, ResNeXt and wide ResNet: residual blocks in stages that halve the resolution and double the width.

He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition (CVPR 2016), arXiv 1512.03385; Xie et al.: Aggregated Residual
Transformations (CVPR 2017), arXiv 1611.05431; Zagoruyko, Komodakis: Wide Residual Networks (BMVC 2016), arXiv 1605.07146.
"""

from collections.abc import Sequence
from typing import Optional

from torch import Tensor, nn

from resdense_ext.nn import BasicBlock, Bottleneck
from resdense_ext.nn.chain import run_chain
from resdense_ext.nn.parts import CONVS, GLOBAL_POOLS, MAX_POOLS, NORMS, check_policy, check_spatial_dims
from resdense_ext.nn.protocols import OnEngine

__all__ = [
    "ResNet",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "wide_resnet50_2",
]


class ResNet(OnEngine, nn.Module):
    """A ResNet for 1D, 2D or 3D inputs.

    Equivalent to: `torchvision.models.ResNet` with the same arguments, where torchvision has them. Parameter names, shapes and
    order are torchvision's, and the same random seed gives the same initial weights, so a `state_dict` goes either way.

    Args:
        block: `resdense_ext.nn.BasicBlock` or `resdense_ext.nn.Bottleneck`.
        layers: the number of blocks of each stage; torchvision's have four.
        num_classes: outputs of the classifier.
        zero_init_residual: the last batch norm of every block starts at zero, so that every block starts as its shortcut.
        groups: of the 3x3 convolutions of bottlenecks (ResNeXt).
        width_per_group: channels of a group, in the first stage; 128 in one group is a wide ResNet.
        replace_stride_with_dilation: for every stage but the first, whether it dilates its convolutions instead of halving the
            resolution (dense prediction); None for no stage.
        in_channels: channels of the input.
        spatial_dims: 1, 2 or 3 spatial dimensions.
        small_inputs: start with one 3x3 convolution at full resolution (CIFAR, digits) and without the max pool.
        policy: what the blocks keep for backward: "fast", "min", or None for a network in plain PyTorch.

    Shapes: input `(N, in_channels, *spatial)`, output `(N, num_classes)`.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Optional[Sequence[bool]] = None,
        *,
        in_channels: int = 3,
        spatial_dims: int = 2,
        small_inputs: bool = False,
        policy: str | None = "fast",
    ) -> None:
        super().__init__()
        check_spatial_dims(spatial_dims)
        check_policy(policy)
        if not layers or min(layers) < 1:
            raise ValueError(f"layers: expected at least one stage of at least one block, got {layers!r}")
        dilate = [False] * (len(layers) - 1) if replace_stride_with_dilation is None else replace_stride_with_dilation
        if len(dilate) != len(layers) - 1:
            raise ValueError(f"replace_stride_with_dilation: expected None or {len(layers) - 1} bools, got {dilate!r}")
        self.policy = policy

        conv, norm, channels = CONVS[spatial_dims], NORMS[spatial_dims], 64
        if small_inputs:
            self.conv1 = conv(in_channels, channels, kernel_size=3, padding=1, bias=False)
        else:
            self.conv1 = conv(in_channels, channels, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = norm(channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small_inputs else MAX_POOLS[spatial_dims](kernel_size=3, stride=2, padding=1)

        self.stages = tuple(f"layer{i}" for i in range(1, len(layers) + 1))
        width = dict(groups=groups, base_width=width_per_group)
        options = dict(spatial_dims=spatial_dims, policy=policy)
        planes, stride, dilation = 64, 1, 1
        for name, depth, dilated in zip(self.stages, layers, [False, *dilate]):
            # The first block of a dilated stage still reads neighbours as far apart as those of the stage before.
            dilations = [dilation] + [dilation * stride if dilated else dilation] * (depth - 1)
            if dilated:
                dilation, stride = dilation * stride, 1
            outputs, downsample = planes * block.expansion, None
            if stride != 1 or channels != outputs:
                downsample = nn.Sequential(conv(channels, outputs, 1, stride=stride, bias=False), norm(outputs))
            stage = nn.Sequential(block(channels, planes, stride, downsample, dilation=dilations[0], **width, **options))
            for spacing in dilations[1:]:
                stage.append(block(outputs, planes, dilation=spacing, **width, **options))
            self.add_module(name, stage)
            channels, planes, stride = outputs, 2 * planes, 2

        self.avgpool = GLOBAL_POOLS[spatial_dims](1)
        self.fc = nn.Linear(channels, num_classes)

        for module in self.modules():
            if isinstance(module, conv):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, block) and zero_init_residual:
                _, last_norm, _ = module.units[-1]
                nn.init.zeros_(last_norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        stem, stages = [self.bn1, self.relu, self.maxpool], [getattr(self, name) for name in self.stages]
        if self.policy is None:
            for module in [*stem, *stages]:
                x = module(x)
        else:
            x = run_chain([*stem, *stages], x)
        return self.fc(self.avgpool(x).flatten(1))


def resnet18(**options) -> ResNet:
    """ResNet-18; `options` go to `ResNet`."""
    return ResNet(BasicBlock, (2, 2, 2, 2), **options)


def resnet34(**options) -> ResNet:
    """ResNet-34; `options` go to `ResNet`."""
    return ResNet(BasicBlock, (3, 4, 6, 3), **options)


def resnet50(**options) -> ResNet:
    """ResNet-50; `options` go to `ResNet`."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **options)


def resnet101(**options) -> ResNet:
    """ResNet-101; `options` go to `ResNet`."""
    return ResNet(Bottleneck, (3, 4, 23, 3), **options)


def resnet152(**options) -> ResNet:
    """ResNet-152; `options` go to `ResNet`."""
    return ResNet(Bottleneck, (3, 8, 36, 3), **options)


def resnext50_32x4d(**options) -> ResNet:
    """ResNeXt-50 of 32 groups of 4 channels; `options` go to `ResNet`."""
    return ResNet(Bottleneck, (3, 4, 6, 3), groups=32, width_per_group=4, **options)


def resnext101_32x8d(**options) -> ResNet:
    """ResNeXt-101 of 32 groups of 8 channels; `options` go to `ResNet`."""
    return ResNet(Bottleneck, (3, 4, 23, 3), groups=32, width_per_group=8, **options)


def wide_resnet50_2(**options) -> ResNet:
    """ResNet-50 whose 3x3 convolutions are twice as wide; `options` go to `ResNet`."""
    return ResNet(Bottleneck, (3, 4, 6, 3), width_per_group=128, **options)
