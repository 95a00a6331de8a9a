"""The truth: every operation of the library in plain PyTorch.

Each function here is the specification of the operation that carries its name. It works in any floating dtype, on any
device, in one to three spatial dimensions, and is differentiable (twice, too). Evaluated in float64 it is what every
backend is tested against. This module imports nothing but torch.

Shapes: a *map* is ``[N, C, *spatial]`` with one, two or three spatial dimensions; ``M`` is its number of positions,
``N`` times the spatial sizes; vectors of a map are ``[C]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Activation",
    "BatchNorm",
    "Conv",
    "ConvGraph",
    "DenseLayer",
    "DualPathBlock",
    "Piece",
    "Pool",
    "PooledUnit",
    "Resampling",
    "ResidualBlock",
    "Resize",
    "Shortcut",
    "TransposedConv",
    "Unit",
    "accumulation_dtype",
    "activate",
    "activation_slope",
    "add_act",
    "apply_pending",
    "bn_act_conv",
    "bn_act_pool",
    "bn_add_act",
    "channel_stats",
    "conv1x1_bn_add_act",
    "conv_graph",
    "convolution",
    "dense_block",
    "dense_layer",
    "determined",
    "dual_path_block",
    "dual_path_stage",
    "fold_batch_norm",
    "marked_slope",
    "pending_grad",
    "per_channel",
    "pool",
    "resampled",
    "residual_block",
]


class Activation(NamedTuple):
    """``name`` is one of relu, relu6, leaky_relu, elu, silu, identity; ``slope`` is the leaky_relu's negative slope.

    In graphs of convolutions it may also be hardswish, mish, gelu, gelu_tanh (the gelu's approximation) or prelu, whose ``slope``
    is the number of its weight in the graph; for `activate` it is the weight itself.
    """

    name: str = "relu"
    slope: float | Tensor = 0.0


class BatchNorm(NamedTuple):
    """The state of one batch normalisation. Vectors are ``[C]`` or None.

    ``batch_stats`` says which statistics normalise: those of the batch (training) or the running ones. Where they are the
    batch's, ``momentum`` is the weight of the new value in the running statistics (None leaves them alone) and
    ``num_batches_tracked`` counts one up. The functions of this module read running statistics and never write them.
    ``group`` names the process group over all of whose ranks the batch's statistics are taken, as SyncBatchNorm does it; empty
    for this process alone. The functions of this module never communicate.

    An ``instance`` norm takes the statistics of every sample by itself (Ulyanov et al., Instance Normalization, 2016), also
    outside of training: ``batch_stats`` is True, and there are no running ones. In one of so many ``groups`` the neighbouring
    channels of each share them (Wu and He, Group Normalization, 2018); 0 leaves every channel by itself.
    """

    weight: Optional[Tensor] = None
    bias: Optional[Tensor] = None
    running_mean: Optional[Tensor] = None
    running_var: Optional[Tensor] = None
    batch_stats: bool = True
    momentum: Optional[float] = None
    eps: float = 1e-5
    num_batches_tracked: Optional[Tensor] = None
    group: str = ""
    instance: bool = False
    groups: int = 0

    @property
    def centers(self) -> bool:
        """Whether it takes from every channel its own mean, so that what is added to the channel makes no difference."""
        return self.batch_stats and not self.groups


class Conv(NamedTuple):
    """A convolution. ``weight`` is ``[K, C / groups, *kernel]``; an empty ``stride`` is 1 in every dimension."""

    weight: Tensor
    bias: Optional[Tensor] = None
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1
    stride: tuple[int, ...] = ()

    @property
    def steps(self) -> tuple[int, ...]:
        """The stride, one number a spatial dimension."""
        return self.stride or (1,) * (self.weight.dim() - 2)

    @property
    def channels(self) -> int:
        """Of the new map."""
        return self.weight.shape[0]

    @property
    def keeps_size(self) -> bool:
        """Whether every position stays in its place."""
        for kernel, padding, dilation, step in zip(self.weight.shape[2:], self.padding, self.dilation, self.steps):
            if step != 1 or 2 * padding != dilation * (kernel - 1):
                return False
        return True

    def outputs(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """The spatial sizes of the new map."""
        windows = zip(sizes, self.weight.shape[2:], self.steps, self.padding, self.dilation)
        return tuple(
            (size + 2 * padding - dilation * (kernel - 1) - 1) // step + 1
            for size, kernel, step, padding, dilation in windows
        )


class TransposedConv(NamedTuple):
    """As `Conv`, the gradient of one: ``weight`` is ``[C, K / groups, *kernel]``. Only graphs of convolutions have such ones."""

    weight: Tensor
    bias: Optional[Tensor] = None
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1
    stride: tuple[int, ...] = (1, 1)
    output_padding: tuple[int, ...] = (0, 0)

    @property
    def steps(self) -> tuple[int, ...]:
        """The stride."""
        return self.stride

    @property
    def channels(self) -> int:
        """Of the new map."""
        return self.groups * self.weight.shape[1]

    def outputs(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """The spatial sizes of the new map."""
        windows = zip(sizes, self.weight.shape[2:], self.steps, self.padding, self.dilation, self.output_padding)
        return tuple(
            (size - 1) * step - 2 * padding + dilation * (kernel - 1) + more + 1
            for size, kernel, step, padding, dilation, more in windows
        )


class Unit(NamedTuple):
    """Batch norm, activation, convolution: the pre-activation unit. Without a norm the convolution reads its input as it is."""

    norm: Optional[BatchNorm]
    conv: Conv


class Shortcut(NamedTuple):
    """A residual block's projection, with or without a norm behind it.

    ``activated`` says that it reads what the block's first convolution reads: the input behind the first unit's norm and
    activation (He et al., Identity Mappings in Deep Residual Networks, 2016), not the input. ``pool``, an average, stands in
    front of the convolution, which then needs no stride (ResNet-D: He et al., Bag of Tricks, 2018, arXiv 1812.01187); of what
    is activated there is none.
    """

    conv: Conv
    norm: Optional[BatchNorm] = None
    activated: bool = False
    pool: Optional[Pool] = None

    def outputs(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """The spatial sizes of the new map."""
        return self.conv.outputs(sizes if self.pool is None else self.pool.outputs(sizes))


class ResidualBlock(NamedTuple):
    """The units in their order, the norm behind the last convolution, and the shortcut, which is the input where it is None.

    With a norm at the end and none in the first unit this is the residual block of He et al., Deep Residual Learning for Image
    Recognition (2016); with a norm in every unit and none at the end, its pre-activation form.
    """

    units: tuple[Unit, ...]
    norm: Optional[BatchNorm] = None
    shortcut: Optional[Shortcut] = None


class DenseLayer(NamedTuple):
    """One layer of a dense block: one unit (DenseNet) or two (DenseNet-BC, the first of them the 1x1 bottleneck).

    ``mask``, where given, is the dropout mask of the layer's output, broadcastable to it, and ``mask_scale`` what the
    kept values are multiplied by (``1 / (1 - p)``).
    """

    units: tuple[Unit, ...]
    mask: Optional[Tensor] = None
    mask_scale: float = 1.0


class DualPathBlock(NamedTuple):
    """One dual path layer (Chen et al., 2017): units in their order, two or more, every one with a norm.

    The first unit reads the residual and the dense half side by side. Of what the last one writes, the first
    ``residual_channels`` channels are added to the residual half and the others are appended to the dense half. With a
    ``projection`` the two halves are its output, split likewise, and the input may be a single map.
    """

    units: tuple[Unit, ...]
    residual_channels: int
    projection: Optional[Unit] = None


class Piece(NamedTuple):
    """What a reader makes of a map, ``act(batch_norm(map))``: the numbers of the map and of the norm, None for no norm."""

    map: int
    norm: Optional[int] = None
    activation: Activation = Activation("identity")


class ConvGraph(NamedTuple):
    """Convolutions of concatenations.

    Its maps are its sources, and behind these what the convolutions make, in their order. Every convolution reads the pieces that
    ``reads`` has for it side by side, all of maps before its own; every output is a concatenation of such pieces. A norm
    normalises one map, for whoever reads it so. ``slopes`` are the weights of PReLUs, a value for all channels or one for each.

    Among the ``convs``, the first of which is one, may be pools and resizes, which read one piece each, of a map that is no source.
    """

    convs: tuple[Conv | TransposedConv | Resampling, ...]
    reads: tuple[tuple[Piece, ...], ...]
    norms: tuple[BatchNorm, ...]
    outputs: tuple[tuple[Piece, ...], ...]
    slopes: tuple[Tensor, ...] = ()

    def activation(self, piece: Piece) -> Activation:
        """With the weight itself, where the piece's is a PReLU."""
        name, slope = piece.activation
        return Activation(name, self.slopes[slope]) if name == "prelu" else piece.activation


class Pool(NamedTuple):
    """A pooling layer: ``kind`` is average (padding counts as zeros), maximum, or global (the mean over all positions, where
    the sizes stay empty). One size a spatial dimension; padding is at most half of a window.

    Positions behind the last whole window are dropped; with ``ceil_mode`` they are a window of their own, which a residual
    block's shortcut alone takes. Nothing counts that is behind the padding.
    """

    kind: str
    kernel_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    ceil_mode: bool = False

    @property
    def windows(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Kernel sizes, strides and padding."""
        return self.kernel_size, self.stride, self.padding

    def outputs(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """The spatial sizes of the pooled map."""
        if self.kind == "global":
            return (1,) * len(sizes)
        return tuple(self._output(*window) for window in zip(sizes, *self.windows))

    def _output(self, size: int, kernel: int, stride: int, padding: int) -> int:
        span = size + 2 * padding - kernel
        whole = span // stride + 1
        # A window of the rest begins in the map, or in front of it.
        rest = self.ceil_mode and span % stride != 0 and whole * stride < size + padding
        return whole + 1 if rest else whole


class Resize(NamedTuple):
    """`torch.nn.functional.interpolate` to the sizes that ``size`` or, where it is empty, ``scale`` says, one number a spatial
    dimension. Only graphs of convolutions have such ones."""

    mode: str
    size: tuple[int, ...] = ()
    scale: tuple[float, ...] = ()
    align_corners: Optional[bool] = None

    def outputs(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """The spatial sizes of the new map."""
        return self.size or tuple(math.floor(size * scale) for size, scale in zip(sizes, self.scale))


Resampling = Pool | Resize
"""Makes a map of as many channels, without a weight."""


class PooledUnit(NamedTuple):
    """Batch norm, activation, pool and, in a transition, a convolution of the pooled map: what stands around dense blocks.

    A transition's 1x1 convolution comes before its average pool in most models. Behind it, it is the same in exact arithmetic,
    on fewer positions: both are linear, one over channels, the other over positions.
    """

    norm: BatchNorm
    pool: Pool
    conv: Optional[Conv] = None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Means, variances, sums and accumulators: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_channel(vector: Tensor, x: Tensor) -> Tensor:
    """A vector ``[C]``, or one a sample, ``[N, C]``, shaped so that it broadcasts over the map ``x``."""
    return vector.view(*vector.shape, *[1] * (x.dim() - 2))


def activate(y: Tensor, activation: Activation = Activation()) -> Tensor:
    name, slope = activation
    if name == "relu":
        return F.relu(y)
    if name == "relu6":
        return F.relu6(y)
    if name == "leaky_relu":
        return F.leaky_relu(y, slope)
    if name == "elu":
        return F.elu(y)
    if name == "silu":
        return F.silu(y)
    if name == "identity":
        return y
    if name == "hardswish":
        return F.hardswish(y)
    if name == "mish":
        return F.mish(y)
    if name in ("gelu", "gelu_tanh"):
        return F.gelu(y, approximate="none" if name == "gelu" else "tanh")
    if name == "prelu":
        return F.prelu(y, slope.to(y.dtype))
    raise ValueError(f"activation: expected relu, relu6, leaky_relu, elu, silu or identity, got {name!r}")


def activation_slope(y: Tensor, activation: Activation = Activation()) -> Tensor:
    """The derivative of the activation at its input ``y``."""
    name, slope = activation
    if name == "relu":
        return (~(y <= 0)).to(y.dtype)
    if name == "relu6":
        return (~((y <= 0) | (y >= 6))).to(y.dtype)
    if name == "leaky_relu":
        return torch.where(y > 0, torch.ones_like(y), torch.full_like(y, slope))
    if name == "elu":
        return torch.where(y > 0, torch.ones_like(y), y.exp())
    if name == "silu":
        gate = torch.sigmoid(y)
        return gate * (1 + y * (1 - gate))
    return torch.ones_like(y)


def marked_slope(mark: Tensor, activation: Activation = Activation()) -> Tensor:
    """The derivative of the activation as its output tells it, or where that does not determine it, its input."""
    if activation.name == "elu":
        return torch.where(mark > 0, torch.ones_like(mark), mark + 1)
    return activation_slope(mark, activation)


def determined(activation: Activation) -> bool:
    """Whether the activation's output determines its derivative."""
    name, slope = activation
    return name in ("relu", "relu6", "elu", "identity") or (name == "leaky_relu" and slope >= 0)


def channel_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations of every channel.

    ``mean_c = sum_m x_mc / M``, ``m2_c = sum_m (x_mc - mean_c)^2``. Two such pairs merge exactly (Chan et al., 1983).
    """
    x = x.to(accumulation_dtype(x.dtype))
    reduced = [d for d in range(x.dim()) if d != 1]
    mean = x.mean(reduced)
    return mean, (x - per_channel(mean, x)).square().sum(reduced)


def group_stats(mean: Tensor, m2: Tensor, count: int, groups: int) -> tuple[Tensor, Tensor, int]:
    """From every channel's mean and sum of squared deviations over ``count`` positions, ``[..., C]``, those of its group, in the
    place of its own; and over how many values. They merge as in `channel_stats`."""
    of_groups = *mean.shape[:-1], groups, -1
    own_mean, own_m2 = mean.view(of_groups), m2.view(of_groups)
    size = own_mean.shape[-1]
    mean = own_mean.mean(-1)
    m2 = (own_m2 + count * (own_mean - mean[..., None]).square()).sum(-1)
    return mean.repeat_interleave(size, -1), m2.repeat_interleave(size, -1), count * size


def fold_batch_norm(norm: BatchNorm, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``scale = weight * rstd``, ``shift = bias - mean * scale``, and ``rstd = (var + eps)^-1/2``; all ``[C]``."""
    rstd = (var + norm.eps).rsqrt()
    scale = rstd if norm.weight is None else norm.weight.to(rstd.dtype) * rstd
    shift = -mean * scale
    return scale, shift if norm.bias is None else norm.bias.to(rstd.dtype) + shift, rstd


def apply_pending(x: Tensor, scale: Tensor, shift: Tensor, activation: Activation = Activation()) -> Tensor:
    """``act(scale_c * x + shift_c)`` in the dtype of ``x``."""
    y = per_channel(scale, x) * x.to(scale.dtype) + per_channel(shift, x)
    return activate(y, activation).to(x.dtype)


def pending_grad(dy: Tensor, z: Tensor, alpha: Tensor, beta: Tensor, delta: Tensor) -> Tensor:
    """``alpha_c * dy + beta_c * z + delta_c`` in the dtype of ``dy``: every batch-norm backward has this form."""
    wide = per_channel(alpha, dy) * dy.to(alpha.dtype) + per_channel(beta, z) * z.to(beta.dtype)
    return (wide + per_channel(delta, dy)).to(dy.dtype)


def convolution(x: Tensor, conv: Conv | TransposedConv) -> Tensor:
    if isinstance(conv, TransposedConv):
        function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[x.dim() - 3]
        return function(x, conv.weight, conv.bias, conv.steps, conv.padding, conv.output_padding, conv.groups, conv.dilation)
    function = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
    return function(x, conv.weight, conv.bias, conv.steps, conv.padding, conv.dilation, conv.groups)


def _statistics(x: Tensor, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    if not norm.batch_stats:
        dtype = accumulation_dtype(x.dtype)
        return norm.running_mean.to(dtype), norm.running_var.to(dtype)
    count = x.numel() // x.shape[1]
    if norm.instance:
        count = math.prod(x.shape[2:])
        mean, m2 = map(torch.stack, zip(*map(channel_stats, x.split(1))))
    else:
        mean, m2 = channel_stats(x)
    if norm.groups:
        mean, m2, count = group_stats(mean, m2, count, norm.groups)
    return mean, m2 / count


def bn_act_conv(x: Tensor, unit: Unit, activation: Activation = Activation()) -> Tensor:
    """``conv(act(batch_norm(x)))``; running statistics are read where asked for and never written."""
    if unit.norm is None:
        return convolution(x.to(unit.conv.weight.dtype), unit.conv)
    scale, shift, _ = fold_batch_norm(unit.norm, *_statistics(x, unit.norm))
    return convolution(apply_pending(x, scale, shift, activation).to(unit.conv.weight.dtype), unit.conv)


def dense_layer(x: Tensor, layer: DenseLayer, activation: Activation = Activation()) -> Tensor:
    """The new feature map of one dense layer, ``[N, growth_rate, *spatial]`` (Huang et al., 2017)."""
    for unit in layer.units:
        x = bn_act_conv(x, unit, activation)
    return x if layer.mask is None else x * layer.mask * layer.mask_scale


def dense_block(x: Tensor, layers: Sequence[DenseLayer], activation: Activation = Activation()) -> Tensor:
    """``[x, f_1, f_2, ...]`` along the channels, every ``f_l`` computed from all that stand before it."""
    for layer in layers:
        x = torch.cat([x, dense_layer(x, layer, activation)], 1)
    return x


def dual_path_block(
    x: Tensor | tuple[Tensor, Tensor], block: DualPathBlock, activation: Activation = Activation()
) -> tuple[Tensor, Tensor]:
    """``r + f[:, :R], [d, f[:, R:]]`` with f what the units make of ``[r, d]``; see `DualPathBlock`."""
    joined = torch.cat(x, 1) if isinstance(x, tuple) else x
    at = [block.residual_channels]
    halves = x if block.projection is None else bn_act_conv(joined, block.projection, activation).tensor_split(at, 1)
    y = joined
    for unit in block.units:
        y = bn_act_conv(y, unit, activation)
    added, appended = y.tensor_split(at, 1)
    residual, dense = halves
    return residual + added, torch.cat([dense, appended], 1)


def dual_path_stage(
    x: Tensor | tuple[Tensor, Tensor], blocks: Sequence[DualPathBlock], activation: Activation = Activation()
) -> tuple[Tensor, Tensor]:
    """The blocks one after another: the residual half, ``[N, R, *spatial]``, and the dense half, which every block widens."""
    for block in blocks:
        x = dual_path_block(x, block, activation)
    return x


def conv_graph(sources: Sequence[Tensor], graph: ConvGraph) -> tuple[Tensor, ...]:
    """The outputs of a graph of convolutions; see `ConvGraph`."""
    maps = list(sources)

    def gather(pieces: Sequence[Piece]) -> Tensor:
        return torch.cat([_piece(maps[piece.map], piece, graph) for piece in pieces], 1)

    for conv, pieces in zip(graph.convs, graph.reads):
        x = gather(pieces)
        maps.append(resampled(x, conv) if isinstance(conv, Resampling) else convolution(x.to(conv.weight.dtype), conv))
    return tuple(gather(pieces) for pieces in graph.outputs)


def _piece(x: Tensor, piece: Piece, graph: ConvGraph) -> Tensor:
    activation = graph.activation(piece)
    if piece.norm is None:
        return activate(x, activation)
    norm = graph.norms[piece.norm]
    scale, shift, _ = fold_batch_norm(norm, *_statistics(x, norm))
    return apply_pending(x, scale, shift, activation)


def add_act(x: Tensor, identity: Tensor, activation: Activation = Activation()) -> Tensor:
    """``act(x + identity)``."""
    return activate(x + identity, activation)


def bn_add_act(
    z: Tensor,
    norm: BatchNorm,
    identity: Tensor,
    identity_norm: Optional[BatchNorm] = None,
    activation: Activation = Activation(),
) -> Tensor:
    """``act(bn(z) + identity)``, or ``act(bn(z) + bn_d(identity))`` for a projection shortcut (He et al., 2016)."""
    scale, shift, _ = fold_batch_norm(norm, *_statistics(z, norm))
    linear = Activation("identity")
    if identity_norm is not None:
        fold = fold_batch_norm(identity_norm, *_statistics(identity, identity_norm))
        identity = apply_pending(identity, fold[0], fold[1], linear)
    return activate(apply_pending(z, scale, shift, linear) + identity, activation)


def residual_block(
    x: Tensor, block: ResidualBlock, activation: Activation = Activation(), last: Activation = Activation()
) -> Tensor:
    """``last(bn_n(conv_n(... act(bn_1(conv_1(x))))) + shortcut)``, with whichever norms there are; see `ResidualBlock`."""
    y = x
    for unit in block.units:
        y = bn_act_conv(y, unit, activation)
    identity, identity_norm = x, None
    if block.shortcut is not None:
        conv, identity_norm, activated, before = block.shortcut
        pooled = x if before is None else pool(x, before)
        identity = bn_act_conv(pooled, Unit(block.units[0].norm if activated else None, conv), activation)
    if block.norm is not None:
        return bn_add_act(y, block.norm, identity, identity_norm, last)
    if identity_norm is not None:
        return bn_add_act(identity, identity_norm, y, None, last)
    return add_act(y, identity, last)


def conv1x1_bn_add_act(
    x: Tensor,
    conv: Conv,
    norm: BatchNorm,
    identity: Tensor,
    identity_norm: Optional[BatchNorm] = None,
    activation: Activation = Activation(),
    input_norm: Optional[BatchNorm] = None,
    input_activation: Activation = Activation(),
) -> Tensor:
    """``act(bn(conv(a)) + identity)`` with ``a = act_in(bn_in(x))``, or x itself: the end of a residual bottleneck block, whose
    shortcut may have a norm (He et al., 2016)."""
    z = bn_act_conv(x, Unit(input_norm, conv), input_activation)
    return bn_add_act(z, norm, identity, identity_norm, activation)


def pool(y: Tensor, pool: Pool) -> Tensor:
    rank = y.dim() - 2
    if pool.kind == "global":
        return y.mean(list(range(2, y.dim())), keepdim=True)
    functions = {
        "average": (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
        "maximum": (F.max_pool1d, F.max_pool2d, F.max_pool3d),
    }
    # On a CPU torch has no average of volumes in half precision.
    wide = y.float() if pool.kind == "average" and rank == 3 and y.is_cpu and y.element_size() == 2 else y
    return functions[pool.kind][rank - 1](wide, *pool.windows, ceil_mode=pool.ceil_mode).to(y.dtype)


def resampled(y: Tensor, by: Resampling) -> Tensor:
    if isinstance(by, Pool):
        return pool(y, by)
    size, scale = (tuple(numbers) or None for numbers in (by.size, by.scale))
    return F.interpolate(y, size, scale, by.mode, by.align_corners)


def bn_act_pool(x: Tensor, unit: PooledUnit, activation: Activation = Activation()) -> Tensor:
    """``conv(pool(act(batch_norm(x))))``, or without the convolution: a transition (Huang et al., 2017), a stem, a head."""
    scale, shift, _ = fold_batch_norm(unit.norm, *_statistics(x, unit.norm))
    y = pool(apply_pending(x, scale, shift, activation), unit.pool)
    return y if unit.conv is None else convolution(y.to(unit.conv.weight.dtype), unit.conv)
