"""Residual blocks, post-activation with torchvision's attribute names, so that its ``state_dict`` fits, and pre-activation.

He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition (CVPR 2016), arXiv 1512.03385; the same: Identity Mappings in
Deep Residual Networks (ECCV 2016), arXiv 1603.05027.
"""

from typing import ClassVar, Optional

from torch import Tensor, nn

from resdense_ext.nn.engine import run_residual_block
from resdense_ext.nn.leaves import read_projection
from resdense_ext.nn.parts import CONVS, NORMS, activation_module, check_policy, check_spatial_dims
from resdense_ext.nn.protocols import OnEngine, Policy, ResidualModules

__all__ = ["BasicBlock", "Bottleneck", "PreActBlock", "PreActBottleneck"]


_Unit = tuple[Optional[nn.Module], ...]


def _conv3x3(
    inputs: int, outputs: int, stride: int = 1, groups: int = 1, dilation: int = 1, *, spatial_dims: int
) -> nn.Module:
    options = dict(stride=stride, padding=dilation, dilation=dilation, groups=groups, bias=False)
    return CONVS[spatial_dims](inputs, outputs, kernel_size=3, **options)


def _conv1x1(inputs: int, outputs: int, stride: int = 1, *, spatial_dims: int) -> nn.Module:
    return CONVS[spatial_dims](inputs, outputs, kernel_size=1, stride=stride, bias=False)


class _ResidualBlock(OnEngine, nn.Module):
    """What all four have: a policy, an activation, and the number of output channels for every one of ``planes``."""

    expansion: ClassVar[int]
    units: tuple[_Unit, ...]

    def __init__(self, spatial_dims: int, policy: Optional[Policy]) -> None:
        super().__init__()
        check_spatial_dims(spatial_dims)
        check_policy(policy)
        self.policy = policy

    def forward(self, x: Tensor) -> Tensor:
        check_policy(self.policy)
        return run_residual_block(self, x)

    def extra_repr(self) -> str:
        return f"policy={self.policy!r}"


class _PostActivation(_ResidualBlock):
    """Its units are ``(convolution, norm, activation)``; the last unit's activation is None, it comes behind the addition."""

    downsample: Optional[nn.Module]

    def _set_shortcut(self, inplanes: int, planes: int, stride: int, downsample: Optional[nn.Module]) -> None:
        outplanes = planes * self.expansion
        if downsample is None and (stride != 1 or inplanes != outplanes):
            raise ValueError(
                f"downsample: expected a module from {inplanes} to {outplanes} channels with stride {stride}, got None"
            )
        self.downsample, self.stride = downsample, stride

    def residual_modules(self) -> ResidualModules:
        """Raises Unsupported where the shortcut is something else than a convolution and a norm, or a pool in front of them."""
        return ResidualModules("post", self.units, read_projection(self.downsample), self.relu)

    def stock_forward(self, x: Tensor) -> Tensor:
        """The block in plain PyTorch."""
        y = x
        for conv, norm, activation in self.units:
            y = norm(conv(y))
            y = y if activation is None else activation(y)
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class BasicBlock(_PostActivation):
    """Two 3x3 convolutions and a shortcut: the residual block of ResNet-18 and ResNet-34.

    Equivalent to::

        y = relu(bn1(conv1(x)))
        y = relu(bn2(conv2(y)) + (x if downsample is None else downsample(x)))

    Args:
        inplanes: channels of the input.
        planes: channels of the output.
        stride: of ``conv1``.
        downsample: the shortcut where input and output differ in shape, as a rule ``Sequential(conv 1x1, norm)``, in a ResNet-D
            with an average pool in front of these (He et al., 2018, arXiv 1812.01187); else None.
        groups, base_width: 1 and 64: that torchvision's arguments fit.
        dilation: of both convolutions.
        spatial_dims: 1, 2 or 3.
        activation: relu, relu6, leaky_relu, elu, silu or identity; all are called ``relu``, as in torchvision's block.
        policy: what is kept for backward, "fast" or "min", or None for the stock path: the code above.

    Shape: ``[N, inplanes, *spatial]`` to ``[N, planes, *spatial / stride]``, rounded up.

    Raises:
        ValueError: an argument that is none of these, or no ``downsample`` where the shapes differ.
    """

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: Optional[nn.Module] = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        *,
        spatial_dims: int = 2,
        activation: str = "relu",
        policy: Optional[Policy] = "fast",
    ) -> None:
        super().__init__(spatial_dims, policy)
        if (groups, base_width) != (1, 64):
            message = f"expected 1 and 64 in a block without bottleneck, got {groups} and {base_width}"
            raise ValueError(f"groups, base_width: {message}")
        norm = NORMS[spatial_dims]
        self.conv1 = _conv3x3(inplanes, planes, stride, dilation=dilation, spatial_dims=spatial_dims)
        self.bn1 = norm(planes)
        self.relu = activation_module(activation)
        self.conv2 = _conv3x3(planes, planes, dilation=dilation, spatial_dims=spatial_dims)
        self.bn2 = norm(planes)
        self._set_shortcut(inplanes, planes, stride, downsample)

    @property
    def units(self) -> tuple[_Unit, ...]:
        return (self.conv1, self.bn1, self.relu), (self.conv2, self.bn2, None)


class Bottleneck(_PostActivation):
    """A 3x3 convolution between two 1x1, and a shortcut: the block of ResNet-50 and deeper, of ResNeXt and wide ResNets.

    Equivalent to::

        y = relu(bn1(conv1(x)))
        y = relu(bn2(conv2(y)))
        y = relu(bn3(conv3(y)) + (x if downsample is None else downsample(x)))

    Args:
        inplanes: channels of the input.
        planes: a quarter of the output's channels (``expansion`` is 4).
        stride: of ``conv2``.
        downsample: the shortcut where input and output differ in shape, as a rule ``Sequential(conv 1x1, norm)``, in a ResNet-D
            with an average pool in front of these (He et al., 2018, arXiv 1812.01187); else None.
        groups: of ``conv2`` (ResNeXt: Xie et al., 2017, arXiv 1611.05431).
        base_width: channels of ``conv2`` a group, for every 64 planes: 64 is a ResNet, 128 a wide one (Zagoruyko and
            Komodakis, 2016, arXiv 1605.07146).
        dilation: of ``conv2``.
        spatial_dims: 1, 2 or 3.
        activation: relu, relu6, leaky_relu, elu, silu or identity; all are called ``relu``, as in torchvision's block.
        policy: what is kept for backward, "fast" or "min", or None for the stock path: the code above.

    Shape: ``[N, inplanes, *spatial]`` to ``[N, 4 * planes, *spatial / stride]``, rounded up.

    Raises:
        ValueError: an argument that is none of these, or no ``downsample`` where the shapes differ.
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: Optional[nn.Module] = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        *,
        spatial_dims: int = 2,
        activation: str = "relu",
        policy: Optional[Policy] = "fast",
    ) -> None:
        super().__init__(spatial_dims, policy)
        norm, width = NORMS[spatial_dims], int(planes * (base_width / 64)) * groups
        self.conv1 = _conv1x1(inplanes, width, spatial_dims=spatial_dims)
        self.bn1 = norm(width)
        self.conv2 = _conv3x3(width, width, stride, groups, dilation, spatial_dims=spatial_dims)
        self.bn2 = norm(width)
        self.conv3 = _conv1x1(width, planes * self.expansion, spatial_dims=spatial_dims)
        self.bn3 = norm(planes * self.expansion)
        self.relu = activation_module(activation)
        self._set_shortcut(inplanes, planes, stride, downsample)

    @property
    def units(self) -> tuple[_Unit, ...]:
        return (self.conv1, self.bn1, self.relu), (self.conv2, self.bn2, self.relu), (self.conv3, self.bn3, None)


class _PreActivation(_ResidualBlock):
    """Its units are ``(norm, activation, convolution)``."""

    downsample: Optional[nn.Module]

    def _set_shortcut(self, inplanes: int, planes: int, stride: int, spatial_dims: int) -> None:
        outplanes = planes * self.expansion
        same = stride == 1 and inplanes == outplanes
        self.downsample = None if same else _conv1x1(inplanes, outplanes, stride, spatial_dims=spatial_dims)

    def residual_modules(self) -> ResidualModules:
        return ResidualModules("pre", self.units, () if self.downsample is None else (self.downsample,))

    def stock_forward(self, x: Tensor) -> Tensor:
        """The block in plain PyTorch."""
        (norm, activation, conv), *units = self.units
        y = activation(norm(x))
        shortcut = x if self.downsample is None else self.downsample(y)
        y = conv(y)
        for norm, activation, conv in units:
            y = conv(activation(norm(y)))
        y += shortcut
        return y


class PreActBlock(_PreActivation):
    """Two 3x3 convolutions, each behind its batch norm and activation, and an identity shortcut.

    Equivalent to::

        a = relu(bn1(x))
        y = conv2(relu(bn2(conv1(a)))) + (x if downsample is None else downsample(a))

    where ``downsample``, a 1x1 convolution, stands where input and output differ in shape.

    Args:
        inplanes: channels of the input.
        planes: channels of the output.
        stride: of ``conv1`` and ``downsample``.
        dilation: of both 3x3 convolutions.
        spatial_dims: 1, 2 or 3.
        activation: relu, relu6, leaky_relu, elu, silu or identity; all are called ``relu``.
        policy: what is kept for backward, "fast" or "min", or None for the stock path: the code above.

    Shape: ``[N, inplanes, *spatial]`` to ``[N, planes, *spatial / stride]``, rounded up.

    Raises:
        ValueError: ``spatial_dims``, ``activation`` or ``policy`` is none of these.
    """

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        dilation: int = 1,
        *,
        spatial_dims: int = 2,
        activation: str = "relu",
        policy: Optional[Policy] = "fast",
    ) -> None:
        super().__init__(spatial_dims, policy)
        norm = NORMS[spatial_dims]
        self.bn1 = norm(inplanes)
        self.relu = activation_module(activation)
        self.conv1 = _conv3x3(inplanes, planes, stride, dilation=dilation, spatial_dims=spatial_dims)
        self.bn2 = norm(planes)
        self.conv2 = _conv3x3(planes, planes, dilation=dilation, spatial_dims=spatial_dims)
        self._set_shortcut(inplanes, planes, stride, spatial_dims)

    @property
    def units(self) -> tuple[_Unit, ...]:
        return (self.bn1, self.relu, self.conv1), (self.bn2, self.relu, self.conv2)


class PreActBottleneck(_PreActivation):
    """A 3x3 convolution between two 1x1, each behind its batch norm and activation, and an identity shortcut: the block of
    networks of 100 to 1000 layers.

    Equivalent to::

        a = relu(bn1(x))
        y = conv3(relu(bn3(conv2(relu(bn2(conv1(a))))))) + (x if downsample is None else downsample(a))

    where ``downsample``, a 1x1 convolution, stands where input and output differ in shape.

    Args:
        inplanes: channels of the input.
        planes: a quarter of the output's channels (``expansion`` is 4).
        stride: of ``conv2`` and ``downsample``.
        groups: of ``conv2``.
        dilation: of ``conv2``.
        spatial_dims: 1, 2 or 3.
        activation: relu, relu6, leaky_relu, elu, silu or identity; all are called ``relu``.
        policy: what is kept for backward, "fast" or "min", or None for the stock path: the code above.

    Shape: ``[N, inplanes, *spatial]`` to ``[N, 4 * planes, *spatial / stride]``, rounded up.

    Raises:
        ValueError: an argument that is none of these.
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        groups: int = 1,
        dilation: int = 1,
        *,
        spatial_dims: int = 2,
        activation: str = "relu",
        policy: Optional[Policy] = "fast",
    ) -> None:
        super().__init__(spatial_dims, policy)
        norm = NORMS[spatial_dims]
        self.bn1 = norm(inplanes)
        self.relu = activation_module(activation)
        self.conv1 = _conv1x1(inplanes, planes, spatial_dims=spatial_dims)
        self.bn2 = norm(planes)
        self.conv2 = _conv3x3(planes, planes, stride, groups, dilation, spatial_dims=spatial_dims)
        self.bn3 = norm(planes)
        self.conv3 = _conv1x1(planes, planes * self.expansion, spatial_dims=spatial_dims)
        self._set_shortcut(inplanes, planes, stride, spatial_dims)

    @property
    def units(self) -> tuple[_Unit, ...]:
        return (self.bn1, self.relu, self.conv1), (self.bn2, self.relu, self.conv2), (self.bn3, self.relu, self.conv3)
