"""The public functions. Each states its contract as the plain PyTorch that it is equivalent to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

from resdense_ext import reference
from resdense_ext.ops import backend as backends
from resdense_ext.ops import add_act as _add_act
from resdense_ext.ops import bn_add_act as _bn_add_act
from resdense_ext.ops import dense_block_function as _dense_block
from resdense_ext.ops.cast import cast_convolutions
from resdense_ext.ops.layout import empty_map
from resdense_ext.reference import Activation, BatchNorm, Conv, DenseLayer, Unit

__all__ = [
    "Activation",
    "BatchNorm",
    "Conv",
    "DenseLayer",
    "Unit",
    "add_act",
    "bn_add_act",
    "channel_stats",
    "check_dense_block",
    "check_probability",
    "dense_block",
    "dropout_mask",
]

POLICIES = ("fast", "min")
_RANKS = (3, 4, 5)


def dense_block(
    x: Tensor,
    layers: Sequence[DenseLayer],
    *,
    activation: str = "relu",
    negative_slope: float = 0.01,
    policy: str = "fast",
) -> Tensor:
    """A whole dense block in the memory of its feature maps.

    Equivalent to::

        for layer in layers:
            new = x
            for norm, conv in layer.units:
                new = convolution(act(batch_norm(new, norm)), conv)      # stride 1, same size
            x = torch.cat([x, new * layer.mask * layer.mask_scale], 1)
        return x

    In training mode running statistics are updated once, as `torch.nn.functional.batch_norm` does it, and
    ``num_batches_tracked`` is increased by one.

    Args:
        x: ``[N, C, *spatial]`` with one to three spatial dimensions; float32, float64, bfloat16 or float16; contiguous,
            channels-last, or anything else that strides can say (it is copied once, into the block's buffer).
        layers: every layer's one or two `Unit` (the second after a 1x1 bottleneck), with its parameters and buffers. A
            convolution weight has the dtype of ``x`` (under autocast it is cast); norm vectors may be float32 beside a
            lower precision.
        activation: relu, leaky_relu, elu, silu or identity.
        negative_slope: of leaky_relu.
        policy: "fast" keeps the feature maps and the bottlenecks' pre-activations for backward, ``C + L * (1 + bn_size) *
            k`` channels; "min" only the feature maps, ``C + L * k`` channels, and computes the 1x1 convolutions again.

    Returns:
        ``[N, C + sum of the layers' new channels, *spatial]`` in the memory format of ``x``. It is the buffer that backward
        reads: changing it in place, or a view of it, makes the backward raise.

    Raises:
        ValueError: a shape, an option or a state that does not fit; one value a channel where batch statistics are asked for.
        TypeError: dtypes that do not fit.
        Nothing is changed before an error is raised.

    Source: Huang et al., Densely Connected Convolutional Networks (2017); Pleiss et al., Memory-Efficient Implementation of
    DenseNets (2017).
    """
    act = _activation(activation, negative_slope)
    if policy not in POLICIES:
        raise ValueError(f"policy: expected one of {', '.join(POLICIES)}, got {policy!r}")
    check_dense_block(x, layers)
    if _autocasts(x.device.type):
        # Convolutions follow autocast; statistics stay in float32.
        layers = cast_convolutions(layers, torch.get_autocast_dtype(x.device.type))
    if not layers or x.numel() == 0:
        return reference.dense_block(x, layers, act)
    compute = layers[0].units[0].conv.weight.dtype
    return _dense_block.dense_block(x, layers, act, policy, backends.choose(x, compute, act))


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
        TypeError: an input that is not floating.

    Source: Chan, Golub, LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances (1983).
    """
    _check_input(x)
    if x.numel() == 0:
        raise ValueError(f"x: expected at least one value a channel, got shape {tuple(x.shape)}")
    if torch.is_grad_enabled() and x.requires_grad:
        return reference.channel_stats(x)
    return backends.choose(x, x.dtype, Activation()).channel_stats(x)


def add_act(x: Tensor, identity: Tensor, *, activation: str = "relu", negative_slope: float = 0.01) -> Tensor:
    """The end of a residual block without batch norm.

    Equivalent to::

        act(x + identity)

    Args:
        x, identity: maps ``[N, C, *spatial]`` of one shape, dtype and device.
        activation: relu, leaky_relu, elu, silu or identity.
        negative_slope: of leaky_relu.

    Returns:
        A map in the shape, dtype and memory format of ``x``. On CUDA the output is all that backward keeps.

    Raises:
        ValueError: shapes or devices that differ, a wrong number of dimensions, another activation.
        TypeError: dtypes that differ or are not floating.

    Source: He et al., Deep Residual Learning for Image Recognition (2016).
    """
    act = _activation(activation, negative_slope)
    _check_input(x)
    _check_same("identity", identity, x)
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
        activation: relu, leaky_relu, elu, silu or identity.
        negative_slope: of leaky_relu.

    Returns:
        A map in the shape, dtype and memory format of ``z``.

    Raises:
        ValueError, TypeError: as `add_act` and, for the norms, `dense_block`. Nothing is changed before.

    Source: He et al., Deep Residual Learning for Image Recognition (2016).
    """
    act = _activation(activation, negative_slope)
    _check_input(z)
    _check_same("identity", identity, z)
    _check_norm("norm", norm, z.shape[1], z)
    if identity_norm is not None:
        _check_norm("identity_norm", identity_norm, z.shape[1], z)
    return _bn_add_act.bn_add_act(z, norm, identity, identity_norm, act)


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


def _activation(name: str, negative_slope: float) -> Activation:
    if name not in ("relu", "leaky_relu", "elu", "silu", "identity"):
        raise ValueError(f"activation: expected relu, leaky_relu, elu, silu or identity, got {name!r}")
    return Activation(name, negative_slope if name == "leaky_relu" else 0.0)


def _check_input(x: Tensor) -> None:
    if x.dim() not in _RANKS:
        raise ValueError(f"x: expected 3, 4 or 5 dimensions [N, C, *spatial], got {x.dim()}: {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating dtype, got {x.dtype}")


def _check_same(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.shape != x.shape:
        raise ValueError(f"{name}: expected shape {tuple(x.shape)}, got {tuple(tensor.shape)}")
    _check_device(name, tensor, x)
    if tensor.dtype != x.dtype:
        raise TypeError(f"{name}: expected dtype {x.dtype}, got {tensor.dtype}")


def _autocasts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def check_probability(name: str, p: float) -> None:
    """Raises ValueError for what is no probability."""
    if not 0 <= p <= 1:
        raise ValueError(f"{name}: expected a probability from 0 to 1, got {p}")


def check_dense_block(x: Tensor, layers: Sequence[DenseLayer]) -> None:
    """Raises what `dense_block` raises for these arguments."""
    _check_input(x)
    channels = x.shape[1]
    # Under autocast weights are cast, whatever they are.
    dtype = None if _autocasts(x.device.type) else x.dtype
    for index, layer in enumerate(layers):
        if len(layer.units) not in (1, 2):
            raise ValueError(f"layers[{index}].units: expected one or two, got {len(layer.units)}")
        width = channels
        for number, unit in enumerate(layer.units):
            where = f"layers[{index}].units[{number}]"
            _check_norm(f"{where}.norm", unit.norm, width, x)
            width = _check_conv(f"{where}.conv", unit.conv, width, x, dtype)
        if layer.mask is not None:
            _check_mask(f"layers[{index}].mask", layer.mask, width, x)
            if not layer.mask_scale > 0:
                raise ValueError(f"layers[{index}].mask_scale: expected a positive number, got {layer.mask_scale}")
        channels += width


def _check_norm(where: str, norm: BatchNorm, channels: int, x: Tensor) -> None:
    if norm.eps < 0 or (norm.batch_stats and norm.eps == 0):
        raise ValueError(f"{where}.eps: expected a positive number, got {norm.eps}")
    vectors = norm._asdict()
    for name in ("weight", "bias", "running_mean", "running_var"):
        vector: Optional[Tensor] = vectors[name]
        if vector is None:
            continue
        if vector.shape != (channels,):
            raise ValueError(f"{where}.{name}: expected shape ({channels},), one value a channel, got {tuple(vector.shape)}")
        _check_device(f"{where}.{name}", vector, x)
        if not vector.is_floating_point():
            raise TypeError(f"{where}.{name}: expected a floating dtype, got {vector.dtype}")
    if norm.batch_stats:
        if x.numel() == x.shape[1]:
            raise ValueError(f"x: expected more than 1 value per channel when training, got input size {tuple(x.shape)}")
        if norm.momentum is not None and (norm.running_mean is None) != (norm.running_var is None):
            raise ValueError(f"{where}: expected running_mean and running_var both or neither, got one of them")
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            buffer = vectors[name]
            if buffer is not None and norm.momentum is not None:
                _check_writable(f"{where}.{name}", buffer)
    elif norm.running_mean is None or norm.running_var is None:
        raise ValueError(f"{where}: expected running_mean and running_var where batch_stats is False, got None")


def _check_writable(where: str, buffer: Tensor) -> None:
    if buffer.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{where}: expected a buffer that training can update, got one made in inference mode")
    if buffer.requires_grad:
        raise ValueError(f"{where}: expected a buffer that training can update, got one that requires grad")
    if any(stride == 0 and size > 1 for size, stride in zip(buffer.shape, buffer.stride())):
        raise ValueError(f"{where}: expected a buffer that training can update, got an expanded one (stride 0)")


def _check_conv(where: str, conv: Conv, channels: int, x: Tensor, dtype: Optional[torch.dtype]) -> int:
    weight, rank = conv.weight, x.dim() - 2
    if weight.dim() != x.dim():
        raise ValueError(f"{where}.weight: expected {x.dim()} dimensions as x has, got {weight.dim()}: {tuple(weight.shape)}")
    if weight.shape[1] * conv.groups != channels or weight.shape[0] % conv.groups:
        raise ValueError(
            f"{where}.weight: expected [K, {channels} / groups, *kernel] with K a multiple of groups = {conv.groups}, "
            f"got {tuple(weight.shape)}"
        )
    if len(conv.padding) != rank or len(conv.dilation) != rank:
        raise ValueError(
            f"{where}: expected padding and dilation of {rank} numbers each, got {conv.padding} and {conv.dilation}"
        )
    for size, padding, dilation in zip(weight.shape[2:], conv.padding, conv.dilation):
        if 2 * padding != dilation * (size - 1):
            raise ValueError(
                f"{where}: expected a convolution that keeps the spatial size (2 * padding == dilation * (kernel - 1)), got "
                f"kernel {tuple(weight.shape[2:])}, padding {conv.padding}, dilation {conv.dilation}"
            )
    if conv.bias is not None and conv.bias.shape != weight.shape[:1]:
        raise ValueError(f"{where}.bias: expected shape ({weight.shape[0]},), got {tuple(conv.bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", conv.bias)):
        if tensor is not None:
            _check_device(f"{where}.{name}", tensor, x)
            if dtype is not None and tensor.dtype != dtype:
                raise TypeError(f"{where}.{name}: expected dtype {dtype}, got {tensor.dtype}")
    return weight.shape[0]


def _check_mask(where: str, mask: Tensor, channels: int, x: Tensor) -> None:
    full = (x.shape[0], channels, *x.shape[2:])
    if mask.dim() != x.dim() or any(m not in (1, f) for m, f in zip(mask.shape, full)) or mask.shape[0] != full[0]:
        raise ValueError(f"{where}: expected a shape that broadcasts to {full}, got {tuple(mask.shape)}")
    _check_device(where, mask, x)


def _check_device(where: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{where}: expected device {x.device} (that of x), got {tensor.device}")
