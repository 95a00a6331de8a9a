"""Dual path networks: residual and dense connections side by side.

Chen, Li, Xiao, Jin, Yan, Feng: Dual Path Networks (NIPS 2017), arXiv 1707.01629.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from resdense_ext.nn import Chain, DualPathStage
from resdense_ext.nn.chain import run_chain
from resdense_ext.nn.dual_path import EPS, side_by_side
from resdense_ext.nn.leaves import check_untouched
from resdense_ext.nn.parts import CONVS, GLOBAL_POOLS, MAX_POOLS, NORMS, check_policy, check_spatial_dims
from resdense_ext.nn.protocols import Halves, OnEngine

__all__ = ["DPN", "dpn68", "dpn92", "dpn98"]


class DPN(OnEngine, nn.Module):
    """A dual path network for 1D, 2D or 3D inputs.

    Equivalent to: timm's `DPN`. Parameter names, shapes and order are timm's, so a `state_dict` goes either way.

    Args:
        layers: the number of blocks of each stage.
        growth_rates: channels that a block of each stage adds to the dense half.
        residual_channels: of the first stage's residual half; they double from stage to stage, and so does the width.
        width: channels of the first stage's bottlenecks.
        groups: of the 3x3 convolutions.
        num_init_features: channels of the first convolution.
        stem_size: kernel size of the first convolution, which has stride 2.
        num_classes: outputs of the classifier.
        in_channels: channels of the input.
        spatial_dims: 1, 2 or 3 spatial dimensions.
        small_inputs: the first convolution is 3x3, at full resolution (CIFAR, digits), and no max pool follows.
        policy: "fast", "min" or None, as `resdense_ext.nn.DualPathBlock` takes it.

    Shapes: input `(N, in_channels, *spatial)`, output `(N, num_classes)`.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        layers: Sequence[int] = (3, 4, 20, 3),
        growth_rates: Sequence[int] = (16, 32, 24, 128),
        residual_channels: int = 256,
        width: int = 96,
        groups: int = 32,
        num_init_features: int = 64,
        stem_size: int = 7,
        num_classes: int = 1000,
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
        if len(growth_rates) != len(layers):
            raise ValueError(f"growth_rates: expected one for each of {len(layers)} stages, got {growth_rates!r}")
        self.policy = policy

        conv, norm, channels = CONVS[spatial_dims], NORMS[spatial_dims], num_init_features
        stem = nn.Sequential()
        if small_inputs:
            stem.conv = conv(in_channels, channels, 3, padding=1, bias=False)
        else:
            stem.conv = conv(in_channels, channels, stem_size, stride=2, padding=stem_size // 2, bias=False)
        stem.bn = norm(channels, eps=EPS)
        stem.relu = nn.ReLU(inplace=True)
        self.features = Chain(policy=policy)
        self.features.conv1_1 = stem
        self.features.conv1_pool = nn.Identity() if small_inputs else MAX_POOLS[spatial_dims](3, stride=2, padding=1)
        for index, (depth, growth_rate) in enumerate(zip(layers, growth_rates)):
            shape = (depth, channels, width << index, residual_channels << index, growth_rate, groups)
            stage = DualPathStage(*shape, stride=2 if index else 1, spatial_dims=spatial_dims, policy=policy)
            for at, block in enumerate(stage, start=1):
                self.features.add_module(f"conv{index + 2}_{at}", block)
            channels = (residual_channels << index) + (2 + depth) * growth_rate
        # The name is timm's, whatever the number of stages.
        self.features.conv5_bn_ac = _JoinedNorm(norm(channels, eps=EPS))
        self.pool = GLOBAL_POOLS[spatial_dims](1)
        self.classifier = conv(channels, num_classes, kernel_size=1)

        for module in self.modules():
            if isinstance(module, conv):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.policy is None:
            return self.classifier(self.pool(self.features(x))).flatten(1)
        return self.classifier(run_chain([self.features, self.pool], x)).flatten(1)


class _JoinedNorm(nn.Module):
    """``relu(batch_norm(both halves, side by side))``."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.bn = norm
        self.relu = nn.ReLU(inplace=True)

    def joined_modules(self) -> tuple[nn.Module, nn.Module]:
        """What the engine runs together with the pool behind it, on either half; raises Unsupported where it carries hooks."""
        check_untouched(self)
        return self.bn, self.relu

    def forward(self, x: Tensor | Halves) -> Tensor:
        return self.relu(self.bn(side_by_side(x)))


def dpn68(**options) -> DPN:
    """DPN-68, the small one; `options` go to `DPN`."""
    return DPN((3, 4, 12, 3), (16, 32, 32, 64), 64, 128, 32, 10, 3, **options)


def dpn92(**options) -> DPN:
    """DPN-92; `options` go to `DPN`."""
    return DPN((3, 4, 20, 3), (16, 32, 24, 128), 256, 96, 32, 64, **options)


def dpn98(**options) -> DPN:
    """DPN-98; `options` go to `DPN`."""
    return DPN((3, 6, 20, 3), (16, 32, 32, 128), 256, 160, 40, 96, **options)
