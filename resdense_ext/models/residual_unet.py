"""A residual U-Net: pre-activation blocks on the way down and up again, for the class of every position of a volume.

Ronneberger, Fischer, Brox: U-Net (MICCAI 2015), arXiv 1505.04597; with residual blocks: Zhang, Liu, Wang: Road Extraction by Deep
Residual U-Net (GRSL 2018), arXiv 1711.10684.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from resdense_ext.models.parts import check_maps, crop_like
from resdense_ext.nn import BNActConv1d, BNActConv2d, BNActConv3d, PreActBlock
from resdense_ext.nn.parts import CONVS, TRANSPOSED_CONVS, check_policy, check_spatial_dims
from resdense_ext.nn.protocols import OnEngine

__all__ = ["ResidualUNet", "residual_unet_2d", "residual_unet_3d"]


_HEADS = {1: BNActConv1d, 2: BNActConv2d, 3: BNActConv3d}


class ResidualUNet(OnEngine, nn.Module):
    """A residual U-Net for 1D, 2D or 3D inputs of any size.

    Every level but the first starts with a block of stride 2; on the way up a transposed convolution of stride 2 restores the
    size of the level above, whose output is put beside it::

        skips_i = x = down_i(x)
        x = up_i(cat([crop(upsample_i(x)), skips_i]))

    Args:
        num_classes: classes of a position.
        widths: channels of every level, from the full resolution down.
        num_blocks: pre-activation blocks of every level on the way down; on the way up there is one.
        in_channels: channels of the input.
        spatial_dims: 1, 2 or 3 spatial dimensions.
        policy: what the blocks and the head keep for backward: "fast", "min", or None for a network in plain PyTorch.

    Shapes: input `(N, in_channels, *spatial)`, output `(N, num_classes, *spatial)`.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        num_classes: int = 2,
        widths: Sequence[int] = (32, 64, 128, 256),
        num_blocks: int = 2,
        *,
        in_channels: int = 1,
        spatial_dims: int = 3,
        policy: str | None = "fast",
    ) -> None:
        super().__init__()
        check_spatial_dims(spatial_dims)
        check_policy(policy)
        if not widths or min(widths) < 1:
            raise ValueError(f"widths: expected at least one level of at least one channel, got {widths!r}")
        if num_blocks < 1:
            raise ValueError(f"num_blocks: expected at least 1, got {num_blocks!r}")
        self.in_channels, self.spatial_dims, self.policy = in_channels, spatial_dims, policy
        options = dict(spatial_dims=spatial_dims, policy=policy)

        conv, transposed = CONVS[spatial_dims], TRANSPOSED_CONVS[spatial_dims]
        self.conv0 = conv(in_channels, widths[0], kernel_size=3, padding=1, bias=False)
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            first = PreActBlock(widths[max(level - 1, 0)], width, stride=2 if level else 1, **options)
            self.down.append(nn.Sequential(first, *(PreActBlock(width, width, **options) for _ in range(1, num_blocks))))
        self.upsample, self.up = nn.ModuleList(), nn.ModuleList()
        for below, width in zip(widths[:0:-1], widths[-2::-1]):
            self.upsample.append(transposed(below, width, kernel_size=2, stride=2, bias=False))
            self.up.append(PreActBlock(2 * width, width, **options))
        self.head = _HEADS[spatial_dims](widths[0], num_classes, kernel_size=1, policy=policy)

        for module in self.modules():
            if isinstance(module, (conv, transposed)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(self.head.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        check_maps(x, self.in_channels, self.spatial_dims)
        x, skips = self.conv0(x), []
        for level in self.down:
            x = level(x)
            skips.append(x)
        skips.pop()
        for upsample, block in zip(self.upsample, self.up):
            skip = skips.pop()
            x = block(torch.cat([crop_like(upsample(x), skip), skip], 1))
        return self.head(x)


def residual_unet_2d(**options) -> ResidualUNet:
    """A residual U-Net for images of one channel; `options` go to `ResidualUNet`."""
    return ResidualUNet(spatial_dims=2, **options)


def residual_unet_3d(**options) -> ResidualUNet:
    """A residual U-Net for volumes of one channel; `options` go to `ResidualUNet`."""
    return ResidualUNet(spatial_dims=3, **options)
