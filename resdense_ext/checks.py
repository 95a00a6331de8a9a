"""What the public functions ask of their arguments: every error names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from resdense_ext.reference import (
    Activation,
    BatchNorm,
    Conv,
    ConvGraph,
    DenseLayer,
    DualPathBlock,
    Pool,
    PooledUnit,
    Resampling,
    ResidualBlock,
    TransposedConv,
    Unit,
)

__all__ = [
    "POLICIES",
    "activation_of",
    "autocasts",
    "check_alone",
    "check_bn_act_conv",
    "check_conv1x1_bn_add_act",
    "check_conv_graph",
    "check_dense_block",
    "check_dual_path_stage",
    "check_each",
    "check_input",
    "check_norm",
    "check_one_group",
    "check_policy",
    "check_pooled_unit",
    "check_probability",
    "check_residual_block",
    "check_residual_stage",
    "check_same",
    "has_autocast",
    "kept_layers",
    "pool_of",
]

POLICIES = ("fast", "min")
_RANKS = (3, 4, 5)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def activation_of(name: str, negative_slope: float, argument: str = "activation") -> Activation:
    if name not in ("relu", "relu6", "leaky_relu", "elu", "silu", "identity"):
        raise ValueError(f"{argument}: expected relu, relu6, leaky_relu, elu, silu or identity, got {name!r}")
    return Activation(name, negative_slope if name == "leaky_relu" else 0.0)


def check_input(x: Tensor, name: str = "x") -> None:
    _check_is_tensor(name, x)
    if x.dim() not in _RANKS:
        raise ValueError(f"{name}: expected 3, 4 or 5 dimensions [N, C, *spatial], got {x.dim()}: {tuple(x.shape)}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {x.dtype}")


def check_same(name: str, tensor: Tensor, x: Tensor) -> None:
    _check_is_tensor(name, tensor)
    if tensor.shape != x.shape:
        raise ValueError(f"{name}: expected shape {tuple(x.shape)}, got {tuple(tensor.shape)}")
    _check_device(name, tensor, x)
    if tensor.dtype != x.dtype:
        raise TypeError(f"{name}: expected dtype {x.dtype}, got {tensor.dtype}")


def has_autocast(device: str) -> bool:
    # torch.compile of torch 2.11 does not trace the question; what it compiles for has autocast.
    return torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)


def autocasts(device: str) -> bool:
    return has_autocast(device) and torch.is_autocast_enabled(device)


def check_probability(name: str, p: float) -> None:
    """Raises ValueError for what is no probability."""
    if not 0 <= p <= 1:
        raise ValueError(f"{name}: expected a probability from 0 to 1, got {p}")


def check_dense_block(x: Tensor, layers: Sequence[DenseLayer]) -> None:
    """Raises what `dense_block` raises for these arguments."""
    check_input(x)
    channels = x.shape[1]
    # Under autocast weights are cast, whatever they are.
    dtype = None if autocasts(x.device.type) else x.dtype
    for index, layer in enumerate(layers):
        if len(layer.units) not in (1, 2):
            raise ValueError(f"layers[{index}].units: expected one or two, got {len(layer.units)}")
        width = channels
        for number, unit in enumerate(layer.units):
            where = f"layers[{index}].units[{number}]"
            check_norm(f"{where}.norm", unit.norm, width, x)
            check_of_batch(**{f"{where}.norm": unit.norm})
            width = _check_conv(f"{where}.conv", unit.conv, width, x, dtype)
            _check_keeps_size(f"{where}.conv", unit.conv)
        if layer.mask is not None:
            _check_mask(f"layers[{index}].mask", layer.mask, width, x)
            if not layer.mask_scale > 0:
                raise ValueError(f"layers[{index}].mask_scale: expected a positive number, got {layer.mask_scale}")
        channels += width
    check_one_group("layers", [unit.norm for layer in layers for unit in layer.units])


def check_behind(x: Tensor, layers: Sequence[DenseLayer], behind: PooledUnit) -> None:
    """Raises what `dense_block` raises for the unit ``behind`` the layers."""
    channels = x.shape[1] + sum(layer.units[-1].conv.weight.shape[0] for layer in layers)
    check_pooled_unit("behind.", behind, channels, x)
    if behind.pool.kind == "maximum":
        raise ValueError("behind.pool: expected average or global, got maximum")
    check_of_batch(**{"behind.norm": behind.norm})
    check_one_group("behind.norm", [behind.norm, *(unit.norm for layer in layers for unit in layer.units)])


def check_one_group(where: str, norms: Sequence[Optional[BatchNorm]]) -> None:
    """Raises ValueError for norms that take the batch's statistics over different ranks, or some of them every sample's."""
    taking = [norm for norm in norms if norm is not None and norm.batch_stats]
    groups = {norm.group for norm in taking}
    if len(groups) > 1:
        raise ValueError(f"{where}: expected norms of one process group, got {sorted(groups)}")
    if len({norm.instance for norm in taking}) > 1:
        raise ValueError(f"{where}: expected norms that take the statistics of the batch, or all of every sample, got both")


def check_policy(policy: str) -> None:
    """Raises ValueError for a name that is no policy's."""
    if policy not in POLICIES:
        raise ValueError(f"policy: expected one of {', '.join(POLICIES)}, got {policy!r}")


def check_each(where: str, items: Sequence[Any], kind: type) -> None:
    """Raises TypeError for what is no sequence of this kind."""
    if isinstance(items, kind) or not isinstance(items, Sequence):
        raise TypeError(f"{where}: expected a sequence of {kind.__name__}, got {type(items).__name__}")
    for i, item in enumerate(items):
        if not isinstance(item, kind):
            raise TypeError(f"{where}[{i}]: expected a {kind.__name__}, got {type(item).__name__}")


def kept_layers(policy: str | Sequence[bool], count: int) -> list[bool]:
    """Whose bottleneck a policy keeps, of ``count`` layers.

    Raises:
        ValueError: another name, or not one value a layer.
    """
    if policy is None or isinstance(policy, str):
        if policy not in POLICIES:
            raise ValueError(f"policy: expected one of {', '.join(POLICIES)}, or a bool a layer, got {policy!r}")
        return [policy == "fast"] * count
    if len(policy) != count:
        raise ValueError(f"policy: expected {count} bools, one a layer, got {len(policy)}")
    return [bool(keep) for keep in policy]


def pool_of(
    kind: str, kernel_size: int | Sequence[int], stride: int | Sequence[int] | None, padding: int | Sequence[int], rank: int
) -> Pool:
    """The pool that these arguments mean for a map of ``rank`` spatial dimensions; `check_pooled_unit` checks its sizes."""
    if kind not in ("average", "maximum", "global"):
        raise ValueError(f"pool: expected average, maximum or global, got {kind!r}")
    if kind == "global":
        return Pool(kind)

    def sizes(name: str, value: int | Sequence[int]) -> tuple[int, ...]:
        values = (value,) * rank if isinstance(value, int) else tuple(value)
        if len(values) != rank:
            raise ValueError(f"{name}: expected a number or {rank}, one a spatial dimension of x, got {value}")
        return values

    stride = kernel_size if stride is None else stride
    return Pool(kind, sizes("kernel_size", kernel_size), sizes("stride", stride), sizes("padding", padding))


def check_pooled_unit(where: str, unit: PooledUnit, channels: int, x: Tensor) -> None:
    """Of a unit that reads a map of ``channels`` channels in the sizes of ``x``; ``where`` is empty or ends with a dot."""
    check_norm(f"{where}norm", unit.norm, channels, x)
    if unit.pool.ceil_mode:
        raise ValueError(f"{where}pool.ceil_mode: expected False behind a norm, got True")
    _check_windows(f"{where}pool", unit.pool, x.shape)
    if unit.conv is not None:
        if any(size != 1 for size in unit.conv.weight.shape[2:]):
            raise ValueError(f"{where}conv.weight: expected a kernel of size 1, got shape {tuple(unit.conv.weight.shape)}")
        _check_conv(f"{where}conv", unit.conv, channels, x, None if autocasts(x.device.type) else x.dtype)
        _check_keeps_size(f"{where}conv", unit.conv)


def _check_windows(where: str, pool: Pool, shape: Sequence[int]) -> None:
    kernel_size, stride, padding = pool.windows
    for window, step, around in zip(*pool.windows):
        if window < 1 or step < 1 or not 0 <= around <= window // 2:
            raise ValueError(
                f"{where}: expected windows and strides of 1 or more and padding of at most half a window, "
                f"got kernel_size {kernel_size}, stride {stride}, padding {padding}"
            )
    if any(size < 1 for size in pool.outputs(shape[2:])) and math.prod(shape):
        raise ValueError(
            f"{where}: expected windows within the padded x of shape {tuple(shape)}, "
            f"got kernel_size {kernel_size}, padding {padding}"
        )


def _check_shortcut_pool(where: str, pool: Pool, activated: bool, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what it makes of a map of this shape."""
    rank = len(shape) - 2
    if activated:
        raise ValueError(f"{where}: expected None in a shortcut that is activated, got {pool}")
    if pool.kind != "average" or any(len(sizes) != rank for sizes in pool.windows):
        raise ValueError(f"{where}: expected an average with {rank} numbers of each kind, got {pool}")
    _check_windows(where, pool, shape)
    return (*shape[:2], *pool.outputs(shape[2:]))


def check_residual_block(x: Tensor, block: ResidualBlock) -> None:
    """Raises what `residual_block` raises for these arguments."""
    check_input(x)
    _check_residual_block("block", block, tuple(x.shape), x)


def check_residual_stage(x: Tensor, blocks: Sequence[ResidualBlock]) -> None:
    """Raises what `residual_stage` raises for these arguments."""
    check_input(x)
    if not blocks:
        raise ValueError("blocks: expected one or more, got 0")
    shape: tuple[int, ...] = tuple(x.shape)
    for i, block in enumerate(blocks):
        shape = _check_residual_block(f"blocks[{i}]", block, shape, x)


def _check_residual_block(where: str, block: ResidualBlock, shape: tuple[int, ...], x: Tensor) -> tuple[int, ...]:
    """Of one that reads a map of this shape; the shape of what it writes."""
    if not block.units:
        raise ValueError(f"{where}.units: expected one or more, got 0")
    dtype = None if autocasts(x.device.type) else x.dtype
    added, shortcut = shape, f"{where}.shortcut"
    for i, unit in enumerate(block.units):
        shape = _check_unit(f"{where}.units[{i}].", unit, shape, x, dtype)
    if block.norm is not None:
        check_norm(f"{where}.norm", block.norm, shape[1], x, shape)
    if block.shortcut is not None:
        conv, norm, activated, pool = block.shortcut
        if pool is not None:
            added = _check_shortcut_pool(f"{shortcut}.pool", pool, activated, added)
        added = _check_unit(f"{shortcut}.", Unit(None, conv), added, x, dtype)
        if norm is not None:
            check_norm(f"{shortcut}.norm", norm, added[1], x, added)
    if added != shape:
        named = shortcut if block.shortcut is None else f"{shortcut}.conv"
        raise ValueError(f"{named}: expected an output of shape {shape}, as the units', got {added}")
    norms = [unit.norm for unit in block.units]
    check_one_group(where, [*norms, block.norm, None if block.shortcut is None else block.shortcut.norm])
    return shape


def check_dual_path_stage(x: Tensor | tuple[Tensor, Tensor], blocks: Sequence[DualPathBlock]) -> None:
    """Raises what `dual_path_stage` raises for these arguments."""
    if not blocks:
        raise ValueError("blocks: expected one or more, got 0")
    first, halves = blocks[0], isinstance(x, tuple)
    if halves and not (len(x) == 2 and all(isinstance(half, Tensor) for half in x)):
        raise TypeError(f"x: expected (residual, dense), got ({', '.join(type(part).__name__ for part in x)})")
    if not halves and (first.projection is None or not isinstance(x, Tensor)):
        projection = "" if first.projection is None else "a Tensor or "
        without = " in front of a block without projection" if first.projection is None else ""
        raise TypeError(f"x: expected {projection}(residual, dense){without}, got {type(x).__name__}")
    if halves:
        _check_halves(*x)
    else:
        check_input(x)
    like, channels = (x[0], x[0].shape[1] + x[1].shape[1]) if halves else (x, x.shape[1])
    shape = (like.shape[0], channels, *like.shape[2:])
    for i, block in enumerate(blocks):
        if i and block.projection is not None:
            raise ValueError(f"blocks[{i}].projection: expected None in a block that is not the first, got a unit")
        residual = blocks[i - 1].residual_channels if i else block.residual_channels
        if not i and block.projection is None:
            residual = like.shape[1]
        if block.residual_channels != residual:
            raise ValueError(
                f"blocks[{i}].residual_channels: expected {residual}, those of the residual half, got {block.residual_channels}"
            )
        shape = _check_dual_path_block(f"blocks[{i}]", block, shape, like)
        for k, unit in enumerate([*block.units, *([] if block.projection is None else [block.projection])]):
            check_alone(**{f"blocks[{i}].units[{k}].norm": unit.norm})
            check_of_batch(**{f"blocks[{i}].units[{k}].norm": unit.norm})


def _check_halves(residual: Tensor, dense: Tensor) -> None:
    check_input(residual, "x[0]")
    check_input(dense, "x[1]")
    if dense.shape[:1] + dense.shape[2:] != residual.shape[:1] + residual.shape[2:]:
        raise ValueError(
            f"x[1]: expected the samples and the spatial sizes of x[0], of shape {tuple(residual.shape)}, "
            f"got shape {tuple(dense.shape)}"
        )
    _check_device("x[1]", dense, residual)
    if dense.dtype != residual.dtype:
        raise TypeError(f"x[1]: expected dtype {residual.dtype}, that of x[0], got {dense.dtype}")


def _check_dual_path_block(where: str, block: DualPathBlock, shape: tuple[int, ...], x: Tensor) -> tuple[int, ...]:
    """Of one that reads both halves together in this shape; the shape of what it makes of them."""
    dtype = None if autocasts(x.device.type) else x.dtype
    if len(block.units) < 2:
        raise ValueError(f"{where}.units: expected two or more, got {len(block.units)}")
    named = [(f"{where}.units[{i}]", unit) for i, unit in enumerate(block.units)]
    split = [named[0], named[-1]]
    if block.projection is not None:
        split.append((f"{where}.projection", block.projection))
    for name, unit in named + split[2:]:
        if unit.norm is None:
            raise ValueError(f"{name}.norm: expected a batch norm, got None")
    for name, unit in split:
        if unit.conv.groups != 1:
            raise ValueError(f"{name}.conv.groups: expected 1 between maps side by side, got {unit.conv.groups}")
    written = shape
    for name, unit in named:
        written = _check_unit(f"{name}.", unit, written, x, dtype)
    halves = shape
    if block.projection is not None:
        halves = _check_unit(f"{where}.projection.", block.projection, shape, x, dtype)
    for (name, _), (_, channels, *_) in zip(split[1:], (written, halves)):
        if not 0 < block.residual_channels < channels:
            raise ValueError(
                f"{name}.conv.weight: expected more output channels than residual_channels = {block.residual_channels}, "
                f"which are at least 1, got {channels}"
            )
    if written[2:] != halves[2:]:
        raise ValueError(f"{split[1][0]}.conv: expected an output of the halves' sizes {halves[2:]}, got {written[2:]}")
    return (shape[0], halves[1] + written[1] - block.residual_channels, *halves[2:])


def check_conv1x1_bn_add_act(
    x: Tensor,
    conv: Conv,
    norm: BatchNorm,
    identity: Tensor,
    identity_norm: Optional[BatchNorm],
    input_norm: Optional[BatchNorm],
    policy: str,
) -> None:
    """Raises what `conv1x1_bn_add_act` raises for these arguments."""
    check_input(x)
    check_policy(policy)
    dtype = None if autocasts(x.device.type) else x.dtype
    if any(size != 1 for size in conv.weight.shape[2:]):
        raise ValueError(f"conv.weight: expected a kernel of size 1, got shape {tuple(conv.weight.shape)}")
    if input_norm is not None:
        check_norm("input_norm", input_norm, x.shape[1], x)
    shape = (x.shape[0], _check_conv("conv", conv, x.shape[1], x, dtype), *conv.outputs(x.shape[2:]))
    check_norm("norm", norm, shape[1], x, shape)
    _check_is_tensor("identity", identity)
    if identity.shape != shape:
        raise ValueError(f"identity: expected shape {shape}, that of the convolution's output, got {tuple(identity.shape)}")
    _check_device("identity", identity, x)
    if identity.dtype != dtype if dtype is not None else not identity.is_floating_point():
        raise TypeError(f"identity: expected dtype {dtype or 'of floating numbers'}, got {identity.dtype}")
    if identity_norm is not None:
        check_norm("identity_norm", identity_norm, shape[1], x, shape)
    norms = {"input_norm": input_norm, "norm": norm, "identity_norm": identity_norm}
    check_alone(**norms)
    check_of_batch(**norms)


def check_conv_graph(sources: Sequence[Tensor], graph: ConvGraph) -> None:
    """Raises ValueError or TypeError for what the engine of these graphs does not take."""
    first = sources[0]
    dtype = None if autocasts(first.device.type) else first.dtype
    for i, x in enumerate(sources):
        check_input(x, f"sources[{i}]")
        _check_device(f"sources[{i}]", x, first)
        if dtype not in (None, x.dtype):
            raise TypeError(f"sources[{i}]: expected dtype {dtype}, that of sources[0], got {x.dtype}")
    shapes = [tuple(x.shape) for x in sources]
    for i, pieces in enumerate((*graph.reads, *graph.outputs)):
        where, (like, *others) = f"reads[{i}]", [shapes[piece.map] for piece in pieces]
        if any(shape[:1] + shape[2:] != like[:1] + like[2:] for shape in others):
            raise ValueError(f"{where}: expected maps of the same samples and sizes, got shapes {[like, *others]}")
        for piece in pieces:
            if piece.norm is not None:
                check_norm(f"norms[{piece.norm}]", graph.norms[piece.norm], shapes[piece.map][1], first, shapes[piece.map])
            if piece.activation.name == "prelu":
                _check_slope(f"slopes[{piece.activation.slope}]", graph.activation(piece).slope, shapes[piece.map][1], first)
        if i < len(graph.convs):
            shape, conv = (like[0], like[1] + sum(other[1] for other in others), *like[2:]), graph.convs[i]
            if isinstance(conv, Resampling):
                of_source = pieces[0].map < len(sources)
                if others or of_source:
                    what = "one that is a source's" if of_source else len(pieces)
                    raise ValueError(f"{where}: expected one piece of a new map for a pool or a resize, got {what}")
                shapes.append(_check_resampling(f"convs[{i}]", conv, shape))
            else:
                shapes.append(_check_unit(f"{where}.", Unit(None, conv), shape, first, dtype))
    if len({conv.weight.dtype for conv in graph.convs if not isinstance(conv, Resampling)}) > 1:
        raise TypeError("convs: expected weights of one dtype")
    check_one_group("norms", graph.norms)
    if any(norm.instance for norm in graph.norms) and len({len(x) for x in sources}) > 1:
        raise ValueError(f"sources: expected maps of as many samples beside instance norms, got shapes {shapes[:len(sources)]}")


def _check_resampling(where: str, by: Resampling, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the new map."""
    rank = len(shape) - 2
    numbers = by.windows if isinstance(by, Pool) else [by.size or by.scale]
    if any(len(of) != rank for of in numbers) or (isinstance(by, Pool) and by.ceil_mode):
        raise ValueError(f"{where}: expected a pool without ceil_mode, or a resize, with {rank} numbers of each kind, got {by}")
    if isinstance(by, Pool):
        _check_windows(where, by, shape)
    elif any(size < 1 for size in by.outputs(shape[2:])):
        raise ValueError(f"{where}: expected to leave a position of a map of shape {shape}, got {by}")
    return (*shape[:2], *by.outputs(shape[2:]))


def _check_slope(where: str, slope: Tensor, channels: int, x: Tensor) -> None:
    if slope.shape not in ((1,), (channels,)):
        raise ValueError(f"{where}: expected shape (1,) or ({channels},), one value a channel, got {tuple(slope.shape)}")
    _check_device(where, slope, x)


def check_alone(**norms: Optional[BatchNorm]) -> None:
    """Raises ValueError for a norm that shares the batch's statistics with other ranks."""
    for name, norm in norms.items():
        if norm is not None and norm.batch_stats and norm.group:
            raise ValueError(f"{name}.group: expected none, of this process alone, got {norm.group!r}")


def check_of_batch(**norms: Optional[BatchNorm]) -> None:
    """Raises ValueError for an instance norm, of groups or not."""
    for name, norm in norms.items():
        if norm is not None and norm.instance:
            raise ValueError(f"{name}.instance: expected False, got True: an instance norm has no place here")


def check_bn_act_conv(x: Tensor, norm: BatchNorm, conv: Conv) -> None:
    """Raises what `bn_act_conv` raises for these arguments."""
    check_input(x)
    _check_unit("", Unit(norm, conv), tuple(x.shape), x, None if autocasts(x.device.type) else x.dtype)
    check_alone(norm=norm)


def _check_unit(
    prefix: str, unit: Unit, shape: tuple[int, ...], x: Tensor, dtype: Optional[torch.dtype]
) -> tuple[int, ...]:
    """Of one that reads a map of this shape; the shape of what it writes."""
    if unit.norm is not None:
        check_norm(f"{prefix}norm", unit.norm, shape[1], x, shape)
    width = _check_conv(f"{prefix}conv", unit.conv, shape[1], x, dtype)
    sizes = unit.conv.outputs(shape[2:])
    if any(size < 1 for size in sizes):
        raise ValueError(
            f"{prefix}conv: expected windows within the padded map of shape {shape}, got kernel "
            f"{tuple(unit.conv.weight.shape[2:])}, padding {unit.conv.padding}, dilation {unit.conv.dilation}"
        )
    return (shape[0], width, *sizes)


def check_norm(
    where: str, norm: BatchNorm, channels: int, x: Tensor, shape: Optional[Sequence[int]] = None
) -> None:
    """Of one whose map has this ``shape``, that of x where it is None."""
    shape = x.shape if shape is None else shape
    if norm.eps < 0 or (norm.batch_stats and norm.eps == 0):
        raise ValueError(f"{where}.eps: expected a positive number, got {norm.eps}")
    if norm.instance and (not norm.batch_stats or norm.group or (norm.running_mean, norm.running_var) != (None, None)):
        raise ValueError(f"{where}: expected batch_stats, no running statistics and no group beside instance, got {norm[4:]}")
    if norm.groups and (not norm.instance or norm.groups < 0 or channels % norm.groups):
        raise ValueError(
            f"{where}.groups: expected 0, or of an instance norm a divisor of {channels}, the channels, got {norm.groups}"
        )
    for name, vector in zip(("weight", "bias", "running_mean", "running_var"), norm):
        if vector is None:
            continue
        _check_is_tensor(f"{where}.{name}", vector)
        if vector.shape != (channels,):
            raise ValueError(f"{where}.{name}: expected shape ({channels},), one value a channel, got {tuple(vector.shape)}")
        _check_device(f"{where}.{name}", vector, x)
        if not vector.is_floating_point():
            raise TypeError(f"{where}.{name}: expected a floating dtype, got {vector.dtype}")
    if norm.batch_stats:
        if norm.group and not math.prod(shape):
            raise ValueError(f"x: expected values on every rank that shares batch statistics, got input size {tuple(shape)}")
        shared = channels // norm.groups if norm.groups else 1
        values = shared * math.prod(shape[2:]) * (1 if norm.instance and not norm.groups else shape[0])
        if not norm.group and values == 1:
            raise ValueError(f"x: expected more than 1 value per channel when training, got input size {tuple(shape)}")
        if norm.momentum is not None and (norm.running_mean is None) != (norm.running_var is None):
            raise ValueError(f"{where}: expected running_mean and running_var both or neither, got one of them")
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            buffer = getattr(norm, name)
            if buffer is not None and norm.momentum is not None:
                _check_writable(f"{where}.{name}", buffer)
    elif norm.running_mean is None or norm.running_var is None:
        raise ValueError(f"{where}: expected running_mean and running_var where batch_stats is False, got None")


def _check_writable(where: str, buffer: Tensor) -> None:
    # Inference mode cannot be traced.
    if not torch.compiler.is_compiling() and buffer.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{where}: expected a buffer that training can update, got one made in inference mode")
    if buffer.requires_grad:
        raise ValueError(f"{where}: expected a buffer that training can update, got one that requires grad")
    if not buffer.is_contiguous() and any(stride == 0 and size > 1 for size, stride in zip(buffer.shape, buffer.stride())):
        raise ValueError(f"{where}: expected a buffer that training can update, got an expanded one (stride 0)")


def _check_conv(where: str, conv: Conv | TransposedConv, channels: int, x: Tensor, dtype: Optional[torch.dtype]) -> int:
    weight, rank = conv.weight, x.dim() - 2
    _check_is_tensor(f"{where}.weight", weight)
    if weight.dim() != x.dim():
        raise ValueError(f"{where}.weight: expected {x.dim()} dimensions as x has, got {weight.dim()}: {tuple(weight.shape)}")
    transposed = isinstance(conv, TransposedConv)
    if (weight.shape[0] if transposed else weight.shape[1] * conv.groups) != channels or weight.shape[0] % conv.groups:
        expected = f"[{channels}, K / groups, *kernel]" if transposed else f"[K, {channels} / groups, *kernel] with K"
        raise ValueError(f"{where}.weight: expected {expected} a multiple of groups = {conv.groups}, got {tuple(weight.shape)}")
    if len(conv.padding) != rank or len(conv.dilation) != rank or len(conv.steps) != rank:
        raise ValueError(
            f"{where}: expected padding and dilation of {rank} numbers each, and as many of the stride or none, "
            f"got {conv.padding}, {conv.dilation} and {conv.stride}"
        )
    if any(n < 0 for n in conv.padding) or any(n < 1 for n in (*conv.dilation, *conv.steps)):
        raise ValueError(
            f"{where}: expected padding of 0 or more, dilation and stride of 1 or more, "
            f"got {conv.padding}, {conv.dilation} and {conv.steps}"
        )
    if conv.bias is not None and conv.bias.shape != (conv.channels,):
        raise ValueError(f"{where}.bias: expected shape ({conv.channels},), got {tuple(conv.bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", conv.bias)):
        if tensor is not None:
            _check_device(f"{where}.{name}", tensor, x)
            if dtype is not None and tensor.dtype != dtype:
                raise TypeError(f"{where}.{name}: expected dtype {dtype}, got {tensor.dtype}")
    return conv.channels


def _check_keeps_size(where: str, conv: Conv) -> None:
    if not conv.keeps_size:
        raise ValueError(
            f"{where}: expected a convolution that keeps the spatial size (stride 1, 2 * padding == dilation * (kernel - 1)), "
            f"got kernel {tuple(conv.weight.shape[2:])}, padding {conv.padding}, dilation {conv.dilation}, stride {conv.steps}"
        )


def _check_mask(where: str, mask: Tensor, channels: int, x: Tensor) -> None:
    full = (x.shape[0], channels, *x.shape[2:])
    if mask.dim() != x.dim() or any(m not in (1, f) for m, f in zip(mask.shape, full)) or mask.shape[0] != full[0]:
        raise ValueError(f"{where}: expected a shape that broadcasts to {full}, got {tuple(mask.shape)}")
    _check_device(where, mask, x)


def _check_is_tensor(where: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{where}: expected a Tensor, got {type(value).__name__}")


def _check_device(where: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{where}: expected device {x.device} (that of x), got {tensor.device}")
