"""From modules to what the functional calls take: reads a block's inner modules as they are now, or says why it cannot."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Optional

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from resdense_ext.ops.split_unit import split_norm
from resdense_ext.reference import (
    Activation,
    BatchNorm,
    Conv,
    ConvGraph,
    DenseLayer,
    DualPathBlock,
    Piece,
    Pool,
    PooledUnit,
    ResidualBlock,
    Shortcut,
    Unit,
)

__all__ = [
    "DualPathModules",
    "EndModules",
    "GraphModules",
    "LayerModules",
    "PieceModules",
    "PooledModules",
    "ReadModules",
    "ResidualModules",
    "UnitModules",
    "Unsupported",
    "check_forward",
    "check_one_group",
    "check_untouched",
    "is_frozen_norm",
    "is_wrapper",
    "own_activation",
    "pool_kind",
    "read_children",
    "read_conv_graph",
    "read_dual_path_block",
    "read_end",
    "read_layers",
    "read_pooled_unit",
    "read_projection",
    "read_residual_block",
    "read_unit",
]

_NORM_BESIDE = {nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d}
_NORMS = tuple(_NORM_BESIDE.values())
_POOLS = {
    "average": (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    "maximum": (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    "global": (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
}
_ORDINARY = {"divisor_override": None, "dilation": 1, "return_indices": False}
"""The pools' options that the engine knows, by the one value that it knows."""
_PARAMETERS = "weight", "bias"
_BUFFERS = "running_mean", "running_var", "num_batches_tracked"
_FROZEN = "weight", "bias", "running_mean", "running_var"


class Unsupported(Exception):
    """Why a block runs its stock path: what ``module``, one of its own, is or does. Never seen by a user as an exception.

    Raised as ``Unsupported(reason, module)``, or without a module. (``torch.compile`` traces no constructor of an exception's.)
    """

    @property
    def reason(self) -> str:
        return self.args[0]

    @property
    def module(self) -> Optional[nn.Module]:
        return self.args[1] if len(self.args) > 1 else None

    def within(self, block: nn.Module) -> str:
        """The reason as a sentence, with the module's path in the block."""
        subject = next((path for path, module in block.named_modules() if module is self.module), "")
        return f"{subject} {self.reason}".lstrip()


class LayerModules(NamedTuple):
    """The modules of one dense layer: ``(norm, activation, convolution)`` once or twice, and its dropout.

    ``module`` is the layer itself, or its dropout: its ``training`` decides about the dropout and its hooks count.
    ``drop_rate`` is the dropout's probability, 0 for none, and ``drop_channels`` says that it drops whole feature maps.
    """

    module: nn.Module
    units: tuple[tuple[nn.Module, nn.Module, nn.Module], ...]
    drop_rate: float = 0.0
    drop_channels: bool = False


UnitModules = tuple[nn.Module, nn.Module, nn.Module]
"""``(norm, activation, convolution)``, one after another."""


class EndModules(NamedTuple):
    """``activation(norm(x) + identity_norm(identity))``, without the norms that are None; only behind a norm is there another."""

    norm: Optional[nn.Module]
    identity_norm: Optional[nn.Module]
    activation: nn.Module


class PooledModules(NamedTuple):
    """The modules of a stem's end, a transition (with its convolution) or a head."""

    norm: nn.Module
    activation: nn.Module
    conv: Optional[nn.Module]
    pool: nn.Module

    @property
    def dims(self) -> int:
        """Dimensions of the maps that the pool takes."""
        return 3 + _POOLS[pool_kind(self.pool)].index(type(self.pool))


class ResidualModules(NamedTuple):
    """The modules of one residual block, in one of two forms.

    "post": the units are ``(convolution, norm, activation)``, the last without an activation (None);
    ``activation(units(x) + shortcut(x))``, and the shortcut ``(convolution, norm)``, with an average pool in front or without
    one, or, for x itself, empty.
    "pre": the units are ``(norm, activation, convolution)``; ``units(x) + shortcut``, and the shortcut ``(convolution,)`` of
    what the first unit has activated or, for x itself, empty. There is no activation behind the addition.
    """

    form: str
    units: tuple[tuple[Optional[nn.Module], ...], ...]
    shortcut: tuple[nn.Module, ...] = ()
    activation: Optional[nn.Module] = None


class DualPathModules(NamedTuple):
    """The modules of one dual path layer, whose input is ``(residual, dense)``, the channels of the two side by side.

    The units are ``(norm, activation, convolution)``. The last one's first ``residual_channels`` channels are added to the
    residual half, the others are appended to the dense half, and it may have a pair of convolutions, one for either; where there
    is a projection (a unit as well), the two halves are its output, split likewise.

    ``side_by_side`` says that between modules the two halves are one tensor, which they are concatenated to.
    """

    units: tuple[tuple[nn.Module, nn.Module, nn.Module | tuple[nn.Module, nn.Module]], ...]
    projection: Optional[tuple[nn.Module, nn.Module, nn.Module]]
    residual_channels: int
    side_by_side: bool = False


class PieceModules(NamedTuple):
    """``activation(norm(map))``, either of them or none: the number of the map as in `resdense_ext.reference.ConvGraph`."""

    map: int
    norm: Optional[nn.Module] = None
    activation: Optional[nn.Module] = None


class ReadModules(NamedTuple):
    """``activation(norm(cat(pieces)))``; where there is a norm or an activation, the pieces have none."""

    pieces: tuple[PieceModules, ...]
    norm: Optional[nn.Module] = None
    activation: Optional[nn.Module] = None


class GraphModules(NamedTuple):
    """Convolutions in their order with what each reads, and the concatenations that are read elsewhere."""

    convs: tuple[tuple[nn.Module, ReadModules], ...]
    outputs: tuple[ReadModules, ...]


def read_layers(layers: Sequence[LayerModules]) -> tuple[list[DenseLayer], Activation]:
    """The layers as the functional call takes them, without masks.

    Raises:
        Unsupported: an inner module that the engine cannot stand in for, or one with hooks.
    """
    if _has_any_global_hook():
        raise Unsupported("global module hooks are set")
    read, norms, activations = [], set(), set()
    for layer in layers:
        check_untouched(layer.module)
        units = []
        for norm, activation, conv in layer.units:
            # The convolution first: it says which norm belongs beside it.
            read_conv = _read_conv(conv)
            _check_keeps_size(conv, read_conv)
            _check_alone(norm, norms)
            units.append(Unit(_read_norm(norm, _NORM_BESIDE[type(conv)], activation), read_conv))
            activations.add(_read_activation(activation))
        read.append(DenseLayer(tuple(units)))
    if len(activations) > 1:
        raise Unsupported(f"the layers' activations differ: {sorted(a.name for a in activations)}")
    check_one_group(unit.norm for layer in read for unit in layer.units)
    return read, activations.pop() if activations else Activation()


def read_residual_block(modules: ResidualModules) -> tuple[ResidualBlock, Activation, Activation]:
    """The block as the functional call takes it, its inner activation, and that behind the addition.

    Raises:
        Unsupported: an inner module that the engine cannot stand in for, or one with hooks.
    """
    if _has_any_global_hook():
        raise Unsupported("global module hooks are set")
    post = modules.form == "post"
    units, activations, seen = [], set(), set()
    for unit in modules.units:
        conv, norm, activation = unit if post else (unit[2], *unit[:2])
        _check_alone(norm, seen)
        read_conv = _read_conv(conv)
        units.append((_read_norm(norm, _NORM_BESIDE[type(conv)], activation), read_conv))
        if activation is not None:
            activations.add(_read_activation(activation))
    if len(activations) > 1:
        raise Unsupported(f"the units' activations differ: {sorted(a.name for a in activations)}")
    norms, convs = map(list, zip(*units))
    end = norms[-1] if post else None
    shortcut = _read_shortcut(modules.shortcut, not post, seen) if modules.shortcut else None
    check_one_group([*norms, None if shortcut is None else shortcut.norm])
    block = ResidualBlock(tuple(map(Unit, [None, *norms[:-1]] if post else norms, convs)), end, shortcut)
    activation = activations.pop() if activations else Activation()
    last = Activation("identity") if modules.activation is None else _read_activation(modules.activation)
    if activation.name == last.name and activation != last:
        raise Unsupported(f"has slope {last.slope}, and the units' activation {activation.slope}", modules.activation)
    return block, activation, last


def _read_shortcut(modules: Sequence[nn.Module], activated: bool, seen: set[nn.Module]) -> Shortcut:
    pooled = len(modules) > 2 or pool_kind(modules[0]) is not None
    conv, *norm = modules[1:] if pooled else modules
    if pooled and pool_kind(modules[0]) != "average":
        raise Unsupported(f"is {type(modules[0]).__name__}, and not torch's average pool", modules[0])
    read_conv, read_norm, pool = _read_conv(conv), None, None
    for of_projection in norm:
        _check_alone(of_projection, seen)
        read_norm = _read_norm(of_projection, _NORM_BESIDE[type(conv)])
    if pooled:
        pool, rank = _read_pool(modules[0])
        if activated or rank != read_conv.weight.dim() - 2:
            raise Unsupported(f"is {modules[0]}", modules[0])
    return Shortcut(read_conv, read_norm, activated, pool)


def read_dual_path_block(modules: DualPathModules) -> tuple[DualPathBlock, Activation]:
    """The block as the functional call takes it.

    Raises:
        Unsupported: an inner module that the engine cannot stand in for, or one with hooks.
    """
    if _has_any_global_hook():
        raise Unsupported("global module hooks are set")
    named = [*modules.units, *([] if modules.projection is None else [modules.projection])]
    units, activations, seen = [], set(), set()
    for norm, activation, conv in named:
        pair = conv if isinstance(conv, tuple) else ()
        read_conv = _read_pair(*pair, modules.residual_channels) if pair else _read_conv(conv)
        _check_alone(norm, seen)
        read_norm = _read_own_norm(norm, _NORM_BESIDE[type(pair[0] if pair else conv)], activation)
        units.append(Unit(read_norm, read_conv))
        activations.add(_read_activation(activation))
    # The last of the units splits, and a projection does.
    for index in {0, len(modules.units) - 1, len(named) - 1}:
        if units[index].conv.groups != 1:
            raise Unsupported(f"has {units[index].conv.groups} groups", named[index][2])
    if len(activations) > 1:
        raise Unsupported(f"the units' activations differ: {sorted(a.name for a in activations)}")
    projection = None if modules.projection is None else units.pop()
    return DualPathBlock(tuple(units), modules.residual_channels, projection), activations.pop()


def read_conv_graph(modules: GraphModules) -> Callable[[Sequence[int]], ConvGraph]:
    """What makes the graph, as the functional call takes it, for sources of given numbers of channels.

    Raises:
        Unsupported: an inner module that the engine cannot stand in for, or one with hooks.
    """
    if _has_any_global_hook():
        raise Unsupported("global module hooks are set")
    convs = tuple(_read_conv(conv) for conv, _ in modules.convs)
    beside = _NORM_BESIDE[type(modules.convs[0][0])]
    reads = [*(read for _, read in modules.convs), *modules.outputs]
    pairs = [(of.norm, of.activation) for read in reads for of in (read, *read.pieces)]
    activations = {activation: _read_activation(activation) for _, activation in pairs if activation is not None}
    activations[None] = Activation("identity")
    norms = {norm: _read_own_norm(norm, beside, activation) for norm, activation in pairs if norm is not None}

    def graph(widths: Sequence[int]) -> ConvGraph:
        widths = [*widths, *(conv.weight.shape[0] for conv in convs)]
        split: list[BatchNorm] = []
        shared: dict[nn.Module, int] = {}

        def pieces(read: ReadModules) -> tuple[Piece, ...]:
            if read.norm is not None:
                first, activation = len(split), activations[read.activation]
                split.extend(split_norm(norms[read.norm], [widths[piece.map] for piece in read.pieces]))
                return tuple(Piece(piece.map, at, activation) for at, piece in enumerate(read.pieces, first))
            return tuple(
                Piece(piece.map, number(piece.norm), activations[piece.activation or read.activation]) for piece in read.pieces
            )

        def number(norm: Optional[nn.Module]) -> Optional[int]:
            if norm is not None and norm not in shared:
                shared[norm] = len(split)
                split.append(norms[norm])
            return shared.get(norm)

        found = tuple(map(pieces, reads))
        return ConvGraph(convs, found[: len(convs)], tuple(split), found[len(convs) :])

    return graph


def _check_alone(norm: nn.Module, seen: set[nn.Module]) -> None:
    if norm in seen:
        raise Unsupported("serves twice, so its running statistics change in between", norm)
    seen.add(norm)


def read_pooled_unit(modules: PooledModules) -> tuple[PooledUnit, Activation]:
    """The unit as the functional calls take it.

    Raises:
        Unsupported: a module that the engine cannot stand in for, or one with hooks.
    """
    if _has_any_global_hook():
        raise Unsupported("global module hooks are set")
    pool, rank = _read_pool(modules.pool)
    if pool.ceil_mode:
        raise Unsupported(f"is {modules.pool}", modules.pool)
    conv = None
    if modules.conv is not None:
        conv = _read_conv(modules.conv)
        _check_keeps_size(modules.conv, conv)
        if conv.weight.dim() != rank + 2 or any(size != 1 for size in conv.weight.shape[2:]):
            raise Unsupported(f"has kernel {tuple(conv.weight.shape[2:])}", modules.conv)
        if pool.kind != "average" or any(pool.padding):
            raise Unsupported(f"does not commute with the convolution: {modules.pool}", modules.pool)
    unit = PooledUnit(_read_norm(modules.norm, _NORMS[rank - 1], modules.activation), pool, conv)
    return unit, _read_activation(modules.activation)


def read_unit(modules: UnitModules) -> tuple[Unit, Activation]:
    """The unit as the functional call takes it, and its activation.

    Raises:
        Unsupported: a module that the engine cannot stand in for, or one with hooks.
    """
    if _has_any_global_hook():
        raise Unsupported("global module hooks are set")
    norm, activation, conv = modules
    read_conv = _read_conv(conv)
    return Unit(_read_own_norm(norm, _NORM_BESIDE[type(conv)], activation), read_conv), _read_activation(activation)


def read_end(modules: EndModules) -> tuple[list[Optional[BatchNorm]], Activation]:
    """The two norms as the functional call takes them, and the activation.

    Raises:
        Unsupported: as `read_unit`.
    """
    if _has_any_global_hook():
        raise Unsupported("global module hooks are set")
    norms = modules.norm, modules.identity_norm
    kind = next((type(norm) for norm in norms if type(norm) in _NORMS), nn.BatchNorm2d)
    return [None if norm is None else _read_own_norm(norm, kind) for norm in norms], _read_activation(modules.activation)


def check_forward(module: nn.Module, owner: type[nn.Module], *methods: str) -> None:
    """Raises Unsupported unless ``module`` is an ``owner`` that runs the owner's ``forward`` and other ``methods``."""
    if not isinstance(module, owner):
        raise Unsupported(f"is {type(module).__name__}", module)
    for method in ("forward", *methods):
        if getattr(type(module), method) is not getattr(owner, method) or method in module.__dict__:
            raise Unsupported(f"has a {method} of its own", module)


def read_children(module: nn.Sequential, *names: str) -> list[nn.Module]:
    """The modules of a Sequential that has these and no others, in this order; raises Unsupported for any other."""
    if tuple(module._modules) != names:
        raise Unsupported(f"holds {', '.join(module._modules)}, and not {', '.join(names)}", module)
    return list(module)


def read_projection(downsample: Optional[nn.Module]) -> tuple[nn.Module, ...]:
    """The convolution and the norm of a projection shortcut, with a pool in front or without one; nothing for the identity."""
    if downsample is None:
        return ()
    check_forward(downsample, nn.Sequential)
    check_untouched(downsample)
    modules = read_children(downsample, *"012"[: max(len(downsample), 2)])
    if len(modules) < 3 or type(modules[0]) is not nn.Identity:
        return tuple(modules)
    check_untouched(modules[0])
    return tuple(modules[1:])


def _registered(module: nn.Module, tensors: dict[str, Optional[Tensor]], names: tuple[str, ...]) -> tuple[Optional[Tensor], ...]:
    """From ``module._parameters`` or ``_buffers``: as attributes tensors cost five times as much, and there are hundreds."""
    try:
        found = tuple([tensors[name] for name in names])
    except KeyError as name:
        raise Unsupported(f"has no registered {name}", module) from None
    for tensor in found:
        if is_wrapper(tensor):
            raise Unsupported(f"holds {type(tensor).__name__}", module)
    return found


def is_wrapper(tensor: Optional[Tensor]) -> bool:
    """DTensor and its like; a subclass that only adds attributes or names is none."""
    return type(tensor) not in (nn.Parameter, Tensor) and tensor is not None and is_traceable_wrapper_subclass(tensor)


def check_untouched(module: nn.Module) -> None:
    """Raises Unsupported where calling the module does more, or something else, than its class says."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        raise Unsupported("carries hooks", module)
    if "forward" in module.__dict__:
        raise Unsupported("has a forward of its own", module)


def _read_norm(norm: nn.Module, expected: type[nn.Module], activation: Optional[nn.Module] = None) -> BatchNorm:
    """As `torch.nn.modules.batchnorm._BatchNorm.forward` calls `torch.nn.functional.batch_norm`; SyncBatchNorm likewise.
    ``activation`` stands behind."""
    if expected is nn.BatchNorm2d and is_frozen_norm(norm):
        check_untouched(norm)
        return BatchNorm(*_registered(norm, norm._buffers, _FROZEN), batch_stats=False, eps=norm.eps)
    held = own_activation(norm)
    holds_it = held is not None and (held is activation or type(held) is nn.Identity) and isinstance(norm, expected)
    if type(norm) not in (expected, nn.SyncBatchNorm) and not holds_it:
        raise Unsupported(f"is {type(norm).__name__}", norm)
    for module in (norm, *norm._modules.values()):
        check_untouched(module)
    weight, bias = _registered(norm, norm._parameters, _PARAMETERS)
    mean, var, count = _registered(norm, norm._buffers, _BUFFERS)
    batch_stats = norm.training or (mean is None and var is None)
    if not norm.training:
        return BatchNorm(weight, bias, mean, var, batch_stats, norm.momentum, norm.eps)
    group = _group_of(norm) if type(norm) is nn.SyncBatchNorm else ""
    if not norm.track_running_stats:
        return BatchNorm(weight, bias, None, None, batch_stats, None, norm.eps, group=group)
    momentum = norm.momentum
    if momentum is None:
        momentum = 0.0 if count is None else 1.0 / (float(count) + 1.0)
    return BatchNorm(weight, bias, mean, var, batch_stats, momentum, norm.eps, count, group)


def _read_own_norm(norm: nn.Module, expected: type[nn.Module], activation: Optional[nn.Module] = None) -> BatchNorm:
    """`_read_norm` of one that takes its statistics alone."""
    read = _read_norm(norm, expected, activation)
    if read.batch_stats and read.group:
        raise Unsupported("takes statistics over several ranks", norm)
    return read


def _group_of(norm: nn.SyncBatchNorm) -> str:
    """The process group over whose ranks a training norm takes statistics; none where it is a batch norm like any other."""
    if not (dist.is_available() and dist.is_initialized()):
        return ""
    group = norm.process_group or dist.group.WORLD
    return group.group_name if dist.get_world_size(group) > 1 else ""


def check_one_group(norms: Iterable[Optional[BatchNorm]]) -> None:
    """Raises Unsupported for norms that take the batch's statistics over different ranks."""
    if len({norm.group for norm in norms if norm is not None and norm.batch_stats}) > 1:
        raise Unsupported("not all of its norms take statistics over the same ranks")


def is_frozen_norm(norm: nn.Module) -> bool:
    """Whether it is torchvision's FrozenBatchNorm2d, a batch norm of buffers alone, which detection models have."""
    library = sys.modules.get("torchvision.ops.misc")
    return library is not None and type(norm) is library.FrozenBatchNorm2d


def own_activation(norm: nn.Module) -> Optional[nn.Module]:
    """The activation that timm's BatchNormAct2d, a batch norm, applies by itself; None for another norm, or one that drops."""
    library = sys.modules.get("timm.layers.norm_act")
    if library is None or type(norm) is not getattr(library, "BatchNormAct2d", None):
        return None
    return norm.act if type(norm.drop) is nn.Identity else None


def _read_conv(conv: nn.Module) -> Conv:
    if type(conv) not in _NORM_BESIDE:
        raise Unsupported(f"is {type(conv).__name__}", conv)
    check_untouched(conv)
    weight, bias = _registered(conv, conv._parameters, _PARAMETERS)
    rank = weight.dim() - 2
    stride, dilation = _sizes(conv.stride, rank), _sizes(conv.dilation, rank)
    padding = conv.padding
    if padding == "same":
        extent = tuple(d * (k - 1) for d, k in zip(dilation, weight.shape[2:]))
        if any(e % 2 for e in extent):
            raise Unsupported(f"pads one side more than the other: {conv}", conv)
        padding = tuple(e // 2 for e in extent)
    padding = _sizes(0 if padding == "valid" else padding, rank)
    if any(padding) and conv.padding_mode != "zeros":
        raise Unsupported(f"pads with {conv.padding_mode!r}", conv)
    return Conv(weight, bias, padding, dilation, conv.groups, stride)


def _read_pair(first: nn.Module, second: nn.Module, channels: int) -> Conv:
    """Two convolutions of one map as the one that writes what they write, side by side; of the first ``channels`` channels. Its
    weight is a copy, which autograd keeps."""
    convs = _read_conv(first), _read_conv(second)
    weights, biases, *geometry = zip(*convs)
    like = [(weight.shape[2:], bias is None) for weight, bias in zip(weights, biases)]
    if any(a != b for a, b in (like, *geometry)):
        raise Unsupported(f"is not of the kind of the convolution beside it: {second}", second)
    if weights[0].shape[0] != channels:
        raise Unsupported(f"has {weights[0].shape[0]} outputs, and the residual half {channels} channels", first)
    bias = None if biases[0] is None else torch.cat(biases)
    return convs[0]._replace(weight=torch.cat(weights), bias=bias)


def _check_keeps_size(module: nn.Module, conv: Conv) -> None:
    if not conv.keeps_size:
        kernel = tuple(conv.weight.shape[2:])
        geometry = f"kernel {kernel}, stride {conv.steps}, padding {module.padding!r}, dilation {conv.dilation}"
        raise Unsupported(f"does not keep every position in its place: {geometry}", module)


def pool_kind(pool: nn.Module) -> Optional[str]:
    """average, maximum or global; None for a module that is no such pool."""
    return next((kind for kind, classes in _POOLS.items() if type(pool) in classes), None)


def _read_pool(pool: nn.Module) -> tuple[Pool, int]:
    """The pool and its number of spatial dimensions."""
    kind = pool_kind(pool)
    if kind is None:
        raise Unsupported(f"is {type(pool).__name__}", pool)
    check_untouched(pool)
    rank = 1 + _POOLS[kind].index(type(pool))
    if kind == "global":
        if any(size != 1 for size in _sizes(pool.output_size, rank)):
            raise Unsupported(f"is {pool}", pool)
        return Pool(kind), rank
    windows = (_sizes(size, rank) for size in (pool.kernel_size, pool.stride, pool.padding))
    read = Pool(kind, *windows, pool.ceil_mode)
    known = all(getattr(pool, name, value) in (value, (value,) * rank) for name, value in _ORDINARY.items())
    if not known or (any(read.padding) and not getattr(pool, "count_include_pad", True)):
        raise Unsupported(f"is {pool}", pool)
    return read, rank


def _sizes(value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    return (value,) * rank if isinstance(value, int) else tuple(value)


def _read_activation(activation: nn.Module) -> Activation:
    check_untouched(activation)
    kind = type(activation)
    if kind is nn.LeakyReLU:
        return Activation("leaky_relu", activation.negative_slope)
    if kind is nn.ELU and activation.alpha == 1:
        return Activation("elu")
    names = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Identity: "identity"}
    if kind not in names:
        raise Unsupported(f"is {activation}", activation)
    return Activation(names[kind])
