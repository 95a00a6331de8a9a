"""The public functions. Each states its contract as the plain PyTorch that it is equivalent to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

from resdense_ext import reference
from resdense_ext.checks import (
    activation_of,
    autocasts,
    check_alone,
    check_behind,
    check_bn_act_conv,
    check_conv1x1_bn_add_act,
    check_dense_block,
    check_dual_path_stage,
    check_each,
    check_input,
    check_norm,
    check_of_batch,
    check_policy,
    check_pooled_unit,
    check_probability,
    check_residual_block,
    check_residual_stage,
    check_same,
    kept_layers,
    pool_of,
)
from resdense_ext.ops import add_act as _add_act
from resdense_ext.ops import backend as backends
from resdense_ext.ops import bn_act_conv as _bn_act_conv
from resdense_ext.ops import bn_add_act as _bn_add_act
from resdense_ext.ops import conv1x1_bn_add_act_function as _conv1x1_bn_add_act
from resdense_ext.ops import dense_block_function as _dense_block
from resdense_ext.ops import dual_path_stage_function as _dual_path_stage
from resdense_ext.ops import pooled_unit_function as _pooled_unit
from resdense_ext.ops import residual_stage_function as _residual_stage
from resdense_ext.ops.cast import cast_convolution, cast_convolutions, cast_dual_path_blocks, cast_residual_blocks
from resdense_ext.ops.layout import empty_map
from resdense_ext.reference import (
    Activation,
    BatchNorm,
    Conv,
    DenseLayer,
    DualPathBlock,
    Pool,
    PooledUnit,
    ResidualBlock,
    Shortcut,
    Unit,
)

__all__ = [
    "Activation",
    "BatchNorm",
    "Conv",
    "DenseLayer",
    "DualPathBlock",
    "Pool",
    "PooledUnit",
    "ResidualBlock",
    "Shortcut",
    "Unit",
    "add_act",
    "bn_act_conv",
    "bn_act_pool",
    "bn_add_act",
    "channel_stats",
    "conv1x1_bn_add_act",
    "dense_block",
    "dropout_mask",
    "dual_path_stage",
    "residual_block",
    "residual_stage",
    "transition",
]


def dense_block(
    x: Tensor,
    layers: Sequence[DenseLayer],
    *,
    activation: str = "relu",
    negative_slope: float = 0.01,
    policy: str | Sequence[bool] = "fast",
    behind: Optional[PooledUnit] = None,
) -> Tensor:
    """A whole dense block in the memory of its feature maps, alone or with the transition or head behind it.

    Equivalent to::

        for layer in layers:
            new = x
            for norm, conv in layer.units:
                new = convolution(act(batch_norm(new, norm)), conv)      # stride 1, same size
            x = torch.cat([x, new * layer.mask * layer.mask_scale], 1)
        return x                                                         # or conv(pool(act(batch_norm(x)))) of `behind`

    In training mode running statistics are updated once, as `torch.nn.functional.batch_norm` does it, and
    ``num_batches_tracked`` is increased by one. Norms of a process ``group`` (one for all) take the statistics of all its
    ranks, as `torch.nn.SyncBatchNorm` does it, with one reduction a feature map and direction; then every rank has to call.

    Args:
        x: ``[N, C, *spatial]`` with one to three spatial dimensions; float32, float64, bfloat16 or float16; contiguous,
            channels-last, or anything else that strides can say (it is copied once, into the block's buffer).
        layers: every layer's one or two `Unit` (the second after a 1x1 bottleneck), with its parameters and buffers. A
            convolution weight has the dtype of ``x`` (under autocast it is cast); norm vectors may be float32 beside a
            lower precision.
        activation: relu, relu6, leaky_relu, elu, silu or identity.
        negative_slope: of leaky_relu.
        policy: "fast" keeps the feature maps and the bottlenecks' pre-activations for backward, ``C + L * (1 + bn_size) *
            k`` channels; "min" only the feature maps, ``C + L * k`` channels, and computes the 1x1 convolutions again; a bool a
            layer says whose bottleneck is kept.
        behind: the unit that reads the block's output, with an average or global pool; its activation is the block's. In one
            node with the block it costs neither a copy of its input's gradient nor statistics of its own.

    Returns:
        ``[N, C + sum of the layers' new channels, *spatial]`` in the memory format of ``x``. It is the buffer that backward
        reads: changing it in place, or a view of it, makes the backward raise. With ``behind``, that unit's output.

    Raises:
        ValueError: a shape, an option or a state that does not fit; one value a channel where batch statistics are asked for; an
            instance or group norm.
        TypeError: dtypes that do not fit; ``layers`` that are no sequence of `DenseLayer`.
        Nothing is changed before an error is raised.

    Source: Huang et al., Densely Connected Convolutional Networks (2017); Pleiss et al., Memory-Efficient Implementation of
    DenseNets (2017).
    """
    act = activation_of(activation, negative_slope)
    check_each("layers", layers, DenseLayer)
    check_dense_block(x, layers)
    if behind is not None:
        check_behind(x, layers, behind)
    return checked_dense_block(x, layers, act, policy=policy, behind=behind)


def checked_dense_block(
    x: Tensor, layers: Sequence[DenseLayer], act: Activation, *, policy: str | Sequence[bool], behind: Optional[PooledUnit]
) -> Tensor:
    """`dense_block` of arguments that have been checked."""
    keep = kept_layers(policy, len(layers))
    if autocasts(x.device.type):
        # Convolutions follow autocast; statistics stay in float32.
        dtype = torch.get_autocast_dtype(x.device.type)
        layers, behind = cast_convolutions(layers, dtype), _cast(behind, dtype)
    if not layers or x.numel() == 0:
        y = reference.dense_block(x, layers, act)
        return y if behind is None else _bn_act_pool(y, behind, act)
    compute = layers[0].units[0].conv.weight.dtype
    return _dense_block.dense_block(x, layers, act, keep, backends.choose(x, compute), behind, act)


def residual_block(
    x: Tensor,
    block: ResidualBlock,
    *,
    activation: str = "relu",
    final_activation: Optional[str] = None,
    negative_slope: float = 0.01,
    policy: str = "fast",
) -> Tensor:
    """A whole residual block in one node, which keeps no activation that is not the block's output.

    Equivalent to::

        y = x
        for norm, conv in block.units:
            y = convolution(y if norm is None else act(batch_norm(y, norm)), conv)
        y = y if block.norm is None else batch_norm(y, block.norm)
        return final_act(y + shortcut)          # x, or the projection: a convolution of x, with or without batch norm

    A projection that is ``activated`` reads what the first unit's convolution reads, one with a ``pool`` that average pool of x, of
    which nothing is kept. In training mode running statistics are updated once, as `torch.nn.functional.batch_norm` does it, and
    ``num_batches_tracked`` is increased by one.

    Args:
        x: ``[N, C, *spatial]`` with one to three spatial dimensions; float32, float64, bfloat16 or float16.
        block: its units, the norm at its end and its shortcut, with parameters and buffers. All norms take the batch's statistics,
            or all of them every sample's, or the running ones, which go with either. Convolutions may have strides,
            dilation, groups and biases; their weights have the dtype of ``x`` (under autocast they are cast); norm vectors may
            be float32 beside a lower precision. The shapes of both sides of the addition are the same.
        activation: relu, relu6, leaky_relu, elu, silu or identity, between norms and convolutions.
        final_activation: that behind the addition. None for ``activation`` where the block ends with a norm, and for the
            identity where it does not, as in a pre-activation block.
        negative_slope: of leaky_relu.
        policy: "fast" keeps the input, the output and the raw outputs of the convolutions; "min" the input and output alone,
            and computes the convolutions again. Norms that are frozen altogether need nothing of what they read.

    Returns:
        ``[N, K, *spatial]``, channels-last where ``x`` or a convolution's weight is, as PyTorch's convolutions give it; an ``x``
        of another layout is copied, and the copy kept. Backward reads the output: changing it in place makes the backward raise.

    Raises:
        ValueError: a shape, an option or a state that does not fit; one value a channel where batch statistics are asked for.
        TypeError: dtypes that do not fit.
        Nothing is changed before an error is raised.

    Source: He et al., Deep Residual Learning for Image Recognition, and Identity Mappings in Deep Residual Networks (2016).
    """
    activations = _activations_of([block], activation, final_activation, negative_slope)
    check_policy(policy)
    check_residual_block(x, block)
    return checked_residual_stage(x, [block], *activations, policy=[policy])


def residual_stage(
    x: Tensor,
    blocks: Sequence[ResidualBlock],
    *,
    activation: str = "relu",
    final_activation: Optional[str] = None,
    negative_slope: float = 0.01,
    policy: str | Sequence[str] = "fast",
) -> Tensor:
    """Residual blocks one after another in one node: a step of Python and of autograd for all of them.

    Equivalent to::

        for block in blocks:
            x = residual_block(x, block)

    What is kept is the same; it is let go once the backward of all blocks is done, not block by block.

    Args:
        x, activation, final_activation, negative_slope: as in `residual_block`.
        blocks: one or more.
        policy: of all blocks, or a sequence of one a block.

    Returns:
        ``[N, K, *spatial]``, as `residual_block`.

    Raises:
        ValueError: a shape, an option or a state that does not fit; one value a channel where batch statistics are asked for.
        TypeError: dtypes that do not fit; ``blocks`` that are no sequence of `ResidualBlock`.
        Nothing is changed before an error is raised.

    Source: He et al., Deep Residual Learning for Image Recognition, and Identity Mappings in Deep Residual Networks (2016).
    """
    check_each("blocks", blocks, ResidualBlock)
    activations = _activations_of(blocks, activation, final_activation, negative_slope)
    policies = [policy] * len(blocks) if policy is None or isinstance(policy, str) else list(policy)
    if len(policies) != len(blocks):
        raise ValueError(f"policy: expected {len(blocks)} names, one a block, got {len(policies)}")
    for name in policies:
        check_policy(name)
    check_residual_stage(x, blocks)
    return checked_residual_stage(x, blocks, *activations, policy=policies)


def _activations_of(
    blocks: Sequence[ResidualBlock], activation: str, final_activation: Optional[str], negative_slope: float
) -> tuple[Activation, list[Activation]]:
    """That between norms and convolutions, and those behind the blocks' additions."""
    act = activation_of(activation, negative_slope)
    finals = [final_activation or (activation if block.norm is not None else "identity") for block in blocks]
    return act, [activation_of(final, negative_slope, "final_activation") for final in finals]


def checked_residual_stage(
    x: Tensor,
    blocks: Sequence[ResidualBlock],
    act: Activation,
    lasts: Sequence[Activation],
    *,
    policy: Sequence[str],
    remember: _residual_stage.Remember = _residual_stage.afresh,
) -> Tensor:
    """`residual_stage` of arguments that have been checked; ``lasts`` are the activations behind the blocks' additions."""
    if autocasts(x.device.type):
        # Convolutions follow autocast; statistics stay in float32.
        blocks = cast_residual_blocks(blocks, torch.get_autocast_dtype(x.device.type))
    return _residual_stage.residual_stage(x, blocks, act, lasts, policy, remember)


def dual_path_stage(
    x: Tensor | tuple[Tensor, Tensor],
    blocks: Sequence[DualPathBlock],
    *,
    activation: str = "relu",
    negative_slope: float = 0.01,
    policy: str | Sequence[bool] = "fast",
) -> tuple[Tensor, Tensor]:
    """A chain of dual path blocks in one node: residual halves are new a block, the dense half grows in one buffer.

    Equivalent to::

        for block in blocks:                                             # R is block.residual_channels
            new = joined = torch.cat(x, 1)                               # or x itself, where it is a tensor
            for norm, conv in block.units:
                new = convolution(act(batch_norm(new, norm)), conv)
            if block.projection is not None:                             # in the first block only
                norm, conv = block.projection
                x = convolution(act(batch_norm(joined, norm)), conv).tensor_split([R], 1)
            x = x[0] + new[:, :R], torch.cat([x[1], new[:, R:]], 1)
        return x

    In training mode running statistics are updated once, as `torch.nn.functional.batch_norm` does it, and
    ``num_batches_tracked`` is increased by one.

    Args:
        x: ``(residual, dense)``, maps ``[N, R, *spatial]`` and ``[N, D, *spatial]`` of one dtype with one to three spatial
            dimensions; float32, float64, bfloat16 or float16. In front of a projection also a single map, and R any number.
        blocks: one or more, with their parameters and buffers. Every unit has a norm, its convolution's weight has the dtype of
            ``x`` (under autocast it is cast); norm vectors may be float32 beside a lower precision. The convolutions of the first
            unit, the last one and a projection have one group; those between may have any, and a projection's block a stride.
        activation: relu, relu6, leaky_relu, elu, silu or identity.
        negative_slope: of leaky_relu.
        policy: "fast" keeps the inputs, the residual half behind every block, the dense half, and the raw outputs of all
            convolutions but the blocks' last; "min" does not keep the latter and computes them again; a bool a block says whose
            are kept.

    Returns:
        residual: ``[N, R, *spatial]``, and dense: ``[N, D + the blocks' new channels, *spatial]``, in the memory format of ``x``.
        The dense half is the buffer that backward reads: changing it in place, or a view of it, makes the backward raise.

    Raises:
        ValueError: a shape, an option or a state that does not fit; one value a channel where batch statistics are asked for; an
            instance or group norm.
        TypeError: dtypes that do not fit; an ``x`` that is no such tensor or tuple; ``blocks`` that are no sequence of
            `DualPathBlock`.
        Nothing is changed before an error is raised.

    Source: Chen et al., Dual Path Networks (2017).
    """
    act = activation_of(activation, negative_slope)
    check_each("blocks", blocks, DualPathBlock)
    keep = kept_layers(policy, len(blocks))
    check_dual_path_stage(x, blocks)
    xs = x if isinstance(x, tuple) else (x,)
    if autocasts(xs[0].device.type):
        # Convolutions follow autocast; statistics stay in float32.
        blocks = cast_dual_path_blocks(blocks, torch.get_autocast_dtype(xs[0].device.type))
    if any(part.numel() == 0 for part in xs):
        return reference.dual_path_stage(x, blocks, act)
    backend = backends.choose(xs[0], blocks[0].units[0].conv.weight.dtype)
    return _dual_path_stage.dual_path_stage(xs, blocks, act, keep, backend)


def bn_act_conv(
    x: Tensor, norm: BatchNorm, conv: Conv, *, activation: str = "relu", negative_slope: float = 0.01
) -> Tensor:
    """A convolution of what batch norm and activation make of the input, of which nothing is kept: a pre-activation unit.

    Equivalent to::

        convolution(act(batch_norm(x, norm)), conv)

    In training mode running statistics are updated once, as `torch.nn.functional.batch_norm` does it.

    Args:
        x: ``[N, C, *spatial]`` with one to three spatial dimensions; float32, float64, bfloat16 or float16.
        norm: its parameters and state; vectors of ``C``, which may be float32 beside a lower precision.
        conv: ``[K, C / groups, *kernel]``, in the dtype of ``x`` (under autocast it is cast), with any stride, padding, dilation,
            groups, and a bias or none.
        activation: relu, relu6, leaky_relu, elu, silu or identity.
        negative_slope: of leaky_relu.

    Returns:
        ``[N, K, *spatial of the convolution's output]``, channels-last where ``x`` or the weight is. Backward keeps ``x``,
        or its copy where it is of another layout, and its statistics, and computes what the convolution reads again.

    Raises:
        ValueError: a shape, an option or a state that does not fit; one value a channel where batch statistics are asked for; a
            norm that shares them with other ranks.
        TypeError: dtypes that do not fit.
        Nothing is changed before an error is raised.

    Source: He et al., Identity Mappings in Deep Residual Networks (2016); Huang et al., Densely Connected Convolutional Networks
    (2017).
    """
    act = activation_of(activation, negative_slope)
    check_bn_act_conv(x, norm, conv)
    if autocasts(x.device.type):
        conv = cast_convolution(conv, torch.get_autocast_dtype(x.device.type))
    return _bn_act_conv.bn_act_conv(x, norm, conv, act)


def bn_act_pool(
    x: Tensor,
    norm: BatchNorm,
    pool: str = "average",
    kernel_size: int | Sequence[int] = 2,
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    *,
    activation: str = "relu",
    negative_slope: float = 0.01,
) -> Tensor:
    """A pool of what batch norm and activation make of the input, which is never stored: a stem's end, or a head.

    Equivalent to::

        avg_pool(act(batch_norm(x)), kernel_size, stride, padding)     # or max_pool, or the mean over all positions

    In training mode running statistics are updated as `torch.nn.functional.batch_norm` does it.

    Args:
        x: ``[N, C, *spatial]`` with one to three spatial dimensions; float32, float64, bfloat16 or float16.
        norm: its parameters and state; vectors of ``C``.
        pool: average (padding counts as zeros), maximum, or global: the mean over all positions, without the sizes below.
        kernel_size, stride, padding: one number or one a spatial dimension; stride is kernel_size where it is None; padding
            is at most half of a window. Positions behind the last whole window are dropped.
        activation: relu, relu6, leaky_relu, elu, silu or identity.
        negative_slope: of leaky_relu.

    Returns:
        ``[N, C, *pooled sizes]``, sizes of 1 for global, in the dtype and memory format of ``x``. Backward keeps ``x`` and, of
        maxima, one byte an output (windows of more than 255 positions: nothing, they are looked up again).

    Raises:
        ValueError, TypeError: as `dense_block`; windows that do not fit. Nothing is changed before.

    Source: He et al., Deep Residual Learning for Image Recognition (2016), for the stem; Huang et al. (2017) for the rest.
    """
    act = activation_of(activation, negative_slope)
    check_input(x)
    unit = PooledUnit(norm, pool_of(pool, kernel_size, stride, padding, x.dim() - 2))
    check_pooled_unit("", unit, x.shape[1], x)
    return _bn_act_pool(x, unit, act)


def transition(
    x: Tensor,
    unit: Unit,
    kernel_size: int | Sequence[int] = 2,
    stride: int | Sequence[int] | None = None,
    *,
    activation: str = "relu",
    negative_slope: float = 0.01,
) -> Tensor:
    """What stands between two dense blocks. It pools first, since an average pool and a 1x1 convolution commute.

    Equivalent to::

        avg_pool(convolution(act(batch_norm(x, unit.norm)), unit.conv), kernel_size, stride)

    Args:
        x: ``[N, C, *spatial]`` with one to three spatial dimensions; float32, float64, bfloat16 or float16.
        unit: the norm and the 1x1 convolution.
        kernel_size, stride: of the pool, one number or one a spatial dimension; stride is kernel_size where it is None.
        activation: relu, relu6, leaky_relu, elu, silu or identity.
        negative_slope: of leaky_relu.

    Returns:
        ``[N, K, *pooled sizes]`` in the memory format of ``x``. Backward keeps ``x``.

    Raises:
        ValueError, TypeError: as `bn_act_pool`; a convolution of another kernel size.

    Source: Huang et al., Densely Connected Convolutional Networks (2017).
    """
    act = activation_of(activation, negative_slope)
    check_input(x)
    pooled = PooledUnit(unit.norm, pool_of("average", kernel_size, stride, 0, x.dim() - 2), unit.conv)
    check_pooled_unit("unit.", pooled, x.shape[1], x)
    if autocasts(x.device.type):
        pooled = _cast(pooled, torch.get_autocast_dtype(x.device.type))
    return _bn_act_pool(x, pooled, act)


def _bn_act_pool(x: Tensor, unit: PooledUnit, activation: Activation) -> Tensor:
    if x.numel() == 0:
        return reference.bn_act_pool(x, unit, activation)
    in_a_byte = unit.pool.kind != "maximum" or math.prod(unit.pool.kernel_size) <= 255
    backend = backends.choose(x, x.dtype) if in_a_byte else backends.get("reference")
    return _pooled_unit.bn_act_pool(x, unit, activation, backend)


def _cast(unit: Optional[PooledUnit], dtype: torch.dtype) -> Optional[PooledUnit]:
    return unit if unit is None or unit.conv is None else unit._replace(conv=cast_convolution(unit.conv, dtype))


def channel_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations of every channel, without a squared mean in float32.

    Equivalent to::

        mean = x.float().mean([0, 2, 3]);  m2 = (x.float() - mean[:, None, None]).square().sum([0, 2, 3])

    Args:
        x: ``[N, C, *spatial]``, not empty; float32, float64, bfloat16 or float16; may be a slice of a buffer's channels.

    Returns:
        mean, m2: ``[C]`` each, float64 for float64, else float32. Not differentiable on the compiled backends: asked for a
        gradient, the plain PyTorch above is run.

    Raises:
        ValueError: a wrong number of dimensions or an empty input.
        TypeError: an input that is no Tensor, or not of these dtypes.

    Source: Chan, Golub, LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances (1983).
    """
    check_input(x)
    if x.numel() == 0:
        raise ValueError(f"x: expected at least one value a channel, got shape {tuple(x.shape)}")
    if torch.is_grad_enabled() and x.requires_grad:
        return reference.channel_stats(x)
    return backends.choose(x, x.dtype).channel_stats(x)


def add_act(x: Tensor, identity: Tensor, *, activation: str = "relu", negative_slope: float = 0.01) -> Tensor:
    """The end of a residual block without batch norm.

    Equivalent to::

        act(x + identity)

    Args:
        x, identity: maps ``[N, C, *spatial]`` of one shape, dtype and device.
        activation: relu, relu6, leaky_relu, elu, silu or identity.
        negative_slope: of leaky_relu.

    Returns:
        A map in the shape, dtype and memory format of ``x``. On CUDA the output is all that backward keeps.

    Raises:
        ValueError: shapes or devices that differ, a wrong number of dimensions, another activation.
        TypeError: dtypes that differ or are none of float32, float64, bfloat16 and float16; what is no Tensor.

    Source: He et al., Deep Residual Learning for Image Recognition (2016).
    """
    act = activation_of(activation, negative_slope)
    check_input(x)
    check_same("identity", identity, x)
    return _add_act.add_act(x, identity, act)


def bn_add_act(
    z: Tensor,
    norm: BatchNorm,
    identity: Tensor,
    identity_norm: Optional[BatchNorm] = None,
    *,
    activation: str = "relu",
    negative_slope: float = 0.01,
) -> Tensor:
    """The end of a residual block, with the shortcut as it is or normalised, too (a projection shortcut).

    Equivalent to::

        act(batch_norm(z, norm) + identity)
        act(batch_norm(z, norm) + batch_norm(identity, identity_norm))

    Args:
        z, identity: maps ``[N, C, *spatial]`` of one shape, dtype and device.
        norm, identity_norm: parameters and state; running statistics are updated where batch statistics are used.
        activation: relu, relu6, leaky_relu, elu, silu or identity.
        negative_slope: of leaky_relu.

    Returns:
        A map in the shape, dtype and memory format of ``z``.

    Raises:
        ValueError, TypeError: as `add_act` and, for the norms, `dense_block`. Nothing is changed before.

    Source: He et al., Deep Residual Learning for Image Recognition (2016).
    """
    act = activation_of(activation, negative_slope)
    check_input(z, "z")
    check_same("identity", identity, z)
    check_norm("norm", norm, z.shape[1], z)
    if identity_norm is not None:
        check_norm("identity_norm", identity_norm, z.shape[1], z)
    check_alone(norm=norm, identity_norm=identity_norm)
    check_of_batch(norm=norm, identity_norm=identity_norm)
    return _bn_add_act.bn_add_act(z, norm, identity, identity_norm, act)


def conv1x1_bn_add_act(
    x: Tensor,
    conv: Conv,
    norm: BatchNorm,
    identity: Tensor,
    identity_norm: Optional[BatchNorm] = None,
    *,
    activation: str = "relu",
    negative_slope: float = 0.01,
    input_norm: Optional[BatchNorm] = None,
    input_activation: str = "relu",
    policy: str = "fast",
) -> Tensor:
    """The end of a residual bottleneck block from its last convolution on, whose output need not be kept.

    Equivalent to::

        a = act_in(batch_norm(x, input_norm))                       # or x
        act(batch_norm(convolution(a), norm) + identity)            # or + batch_norm(identity, identity_norm)

    With the batch's statistics, mean and variance of the convolution's output follow from the mean of ``a`` and the matrix
    ``R = (a - mean)^T (a - mean)``, and so does the backward of the norm. In training mode running statistics are updated
    once, as `torch.nn.functional.batch_norm` does it.

    Args:
        x: ``[N, C, *spatial]`` with one to three spatial dimensions; float32, float64, bfloat16 or float16; contiguous or
            channels-last (anything else is copied).
        conv: of kernel size 1, ``[K, C / groups, 1, ...]``, in the dtype of ``x`` (under autocast it is cast), with any stride,
            padding, groups, and a bias or none.
        norm: of the convolution's output: parameters and state, vectors of ``K``.
        identity: the shortcut ``[N, K, *spatial of the convolution's output]``, in the dtype of ``x``.
        identity_norm: of the shortcut, as ``norm``.
        activation: relu, relu6, leaky_relu, silu, elu or identity, behind the addition.
        negative_slope: of leaky_relu, here and there.
        input_norm: of ``x``, vectors of ``C``.
        input_activation: behind ``input_norm``; without that there is none.
        policy: "fast" keeps, beside ``x``, the convolution's output, or R (``C^2 / groups`` values) where there are at least as many
            positions as channels and twice as many outputs; "min" keeps neither and makes R again in backward. With running
            statistics in ``norm`` neither is needed.

    Returns:
        ``[N, K, *spatial]`` in the memory format of ``x``. Backward reads it, except behind silu (and a leaky_relu of negative
        slope), whose input is kept instead: changing it in place makes the backward raise.

    Raises:
        ValueError: a shape, an option or a state that does not fit; one value a channel where batch statistics are asked for; an
            instance or group norm.
        TypeError: dtypes that do not fit.
        Nothing is changed before an error is raised.

    Source: He et al., Deep Residual Learning for Image Recognition (2016); the algebra is this library's, see
    `resdense_ext.ops.conv1x1_bn_add_act`.
    """
    act, act_in = activation_of(activation, negative_slope), activation_of(input_activation, negative_slope)
    check_conv1x1_bn_add_act(x, conv, norm, identity, identity_norm, input_norm, policy)
    if autocasts(x.device.type):
        conv = cast_convolution(conv, torch.get_autocast_dtype(x.device.type))
    if x.numel() == 0 or identity.numel() == 0:
        return reference.conv1x1_bn_add_act(x, conv, norm, identity, identity_norm, act, input_norm, act_in)
    backend = backends.choose(x, conv.weight.dtype)
    return _conv1x1_bn_add_act.conv1x1_bn_add_act(
        x, conv, norm, identity, identity_norm, act, input_norm, act_in, policy, backend
    )


def dropout_mask(like: Tensor, channels: int, p: float, *, per_channel: bool = False) -> tuple[Tensor, float]:
    """Draws the mask that `torch.nn.functional.dropout` would draw for a feature map, and the scale of what it keeps.

    Equivalent to::

        mask = F.dropout(torch.ones([N, channels, *spatial]), p) != 0;  scale = 1 / (1 - p)

    Args:
        like: a map ``[N, C, *spatial]`` that gives sizes, dtype, device and memory format.
        channels: of the feature map to mask.
        p: the probability of a value to be dropped, 0 to 1.
        per_channel: drop whole channels of a sample, as `torch.nn.functional.dropout2d` does.

    Returns:
        mask: bool, ``[N, channels, *spatial]``, or ``[N, channels, 1, ...]``; one byte an element is what backward keeps.
        scale: ``1 / (1 - p)``; 1 for p = 1, where the mask is empty.

    Raises:
        ValueError: p outside 0 to 1.
    """
    check_probability("p", p)
    with torch.no_grad():
        noise = empty_map(like, channels, like.dtype)
        if per_channel:
            noise = noise.new_empty((like.shape[0], channels, *[1] * (like.dim() - 2)))
        if p == 1:
            return torch.zeros_like(noise, dtype=torch.bool), 1.0
        if noise.is_cuda and not per_channel:
            # There the framework draws the mask in a kernel of its own.
            return torch.native_dropout(noise.fill_(1), p, True)[1], 1 / (1 - p)
        return noise.bernoulli_(1 - p).bool(), 1 / (1 - p)
