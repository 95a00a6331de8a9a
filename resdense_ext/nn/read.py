"""From modules to what the functional calls take: reads a block's inner modules as they are now, or says why it cannot."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Optional, TypeVar

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from resdense_ext.nn.leaves import (
    NORM_BESIDE,
    Unsupported,
    activation_of,
    apart_of,
    check_keeps_size,
    check_untouched,
    conv_of,
    graphs_conv_of,
    layer_class,
    norm_of,
    own_norm_of,
    pair_of,
    pool_kind,
    pool_of,
    resampling_of,
    slope_of,
)
from resdense_ext.nn.parts import NORMS
from resdense_ext.nn.protocols import (
    Block,
    DualPath,
    DualPathModules,
    EndModules,
    Graph,
    GraphModules,
    LayerModules,
    PooledModules,
    ReadModules,
    Residual,
    ResidualModules,
    Transition,
    UnitModules,
)
from resdense_ext.nn.recall import Reading, recalled
from resdense_ext.ops.conv_graph_plan import widths_of
from resdense_ext.ops.max_pool import DROPPED
from resdense_ext.ops.split_unit import split_norm
from resdense_ext.reference import (
    Activation,
    BatchNorm,
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
    "ReadConvGraph",
    "ReadDualPathBlock",
    "ReadLayers",
    "ReadPooledUnit",
    "ReadResidualBlock",
    "check_one_group",
    "read_conv_graph",
    "read_dual_path_block",
    "read_end",
    "read_layers",
    "read_pool",
    "read_pooled_unit",
    "read_residual_block",
    "read_unit",
    "recall_conv_graph",
    "recall_dual_path_block",
    "recall_layers",
    "recall_residual_block",
    "recall_transition",
]


R = TypeVar("R")


class ReadLayers(NamedTuple):
    """A dense block's modules, and what they were read as."""

    modules: Sequence[LayerModules]
    layers: list[DenseLayer]
    activation: Activation


class ReadResidualBlock(NamedTuple):
    """A residual block's modules, and what they were read as; ``last`` is the activation behind the addition."""

    modules: ResidualModules
    block: ResidualBlock
    activation: Activation
    last: Activation


class ReadDualPathBlock(NamedTuple):
    """A dual path block's modules, and what they were read as."""

    modules: DualPathModules
    block: DualPathBlock
    activation: Activation


class ReadConvGraph(NamedTuple):
    """The modules of a graph of convolutions, and what makes the graph for its sources' numbers of channels."""

    modules: GraphModules
    make: Callable[[Sequence[int]], ConvGraph]


class ReadPooledUnit(NamedTuple):
    """A pooled unit's modules, and what they were read as."""

    modules: PooledModules
    unit: PooledUnit
    activation: Activation


def recall_layers(block: Block) -> Reading[ReadLayers]:
    """`read_layers` of the block's, see `recalled`."""
    return recalled(block, lambda block: _with_modules(ReadLayers, block.layer_modules(), read_layers))


def recall_residual_block(block: Residual) -> Reading[ReadResidualBlock]:
    """`read_residual_block` of the block's, see `recalled`."""
    return recalled(block, lambda block: _with_modules(ReadResidualBlock, block.residual_modules(), read_residual_block))


def recall_dual_path_block(block: DualPath) -> Reading[ReadDualPathBlock]:
    """`read_dual_path_block` of the block's, see `recalled`."""
    return recalled(block, lambda block: _with_modules(ReadDualPathBlock, block.dual_path_modules(), read_dual_path_block))


def recall_conv_graph(graph: Graph) -> Reading[ReadConvGraph]:
    """`read_conv_graph` of the graph's, see `recalled`."""

    def read(graph: Graph) -> ReadConvGraph:
        modules = graph.graph_modules()
        return ReadConvGraph(modules, read_conv_graph(modules))

    return recalled(graph, read)


def recall_transition(transition: Transition) -> Reading[ReadPooledUnit]:
    """`read_pooled_unit` of the transition's, see `recalled`."""
    return recalled(transition, lambda unit: _with_modules(ReadPooledUnit, unit.pooled_modules(), read_pooled_unit))


def _with_modules(kind: type[R], modules: Any, read: Callable[[Any], tuple]) -> R:
    return kind(modules, *read(modules))


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
            read_conv = conv_of(conv)
            check_keeps_size(conv, read_conv)
            _check_alone(norm, norms)
            units.append(Unit(_of_batch(norm, norm_of(norm, NORM_BESIDE[layer_class(conv)], activation)), read_conv))
            activations.add(activation_of(activation))
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
        read_conv = conv_of(conv)
        units.append((norm_of(norm, NORM_BESIDE[layer_class(conv)], activation), read_conv))
        if activation is not None:
            activations.add(activation_of(activation))
    if len(activations) > 1:
        raise Unsupported(f"the units' activations differ: {sorted(a.name for a in activations)}")
    norms, convs = map(list, zip(*units))
    end = norms[-1] if post else None
    shortcut = _read_shortcut(modules.shortcut, not post, seen) if modules.shortcut else None
    check_one_group([*norms, None if shortcut is None else shortcut.norm])
    block = ResidualBlock(tuple(map(Unit, [None, *norms[:-1]] if post else norms, convs)), end, shortcut)
    activation = activations.pop() if activations else Activation()
    last = Activation("identity") if modules.activation is None else activation_of(modules.activation)
    if activation.name == last.name and activation != last:
        raise Unsupported(f"has slope {last.slope}, and the units' activation {activation.slope}", modules.activation)
    return block, activation, last


def _read_shortcut(modules: Sequence[nn.Module], activated: bool, seen: set[nn.Module]) -> Shortcut:
    pooled = len(modules) > 2 or pool_kind(modules[0]) is not None
    conv, *norm = modules[1:] if pooled else modules
    if pooled and pool_kind(modules[0]) != "average":
        raise Unsupported(f"is {type(modules[0]).__name__}, and not torch's average pool", modules[0])
    read_conv, read_norm, pool = conv_of(conv), None, None
    for of_projection in norm:
        _check_alone(of_projection, seen)
        read_norm = norm_of(of_projection, NORM_BESIDE[layer_class(conv)])
    if pooled:
        pool, rank = pool_of(modules[0])
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
        read_conv = pair_of(*pair, modules.residual_channels) if pair else conv_of(conv)
        _check_alone(norm, seen)
        read_norm = _of_batch(norm, own_norm_of(norm, NORM_BESIDE[layer_class(pair[0] if pair else conv)], activation))
        units.append(Unit(read_norm, read_conv))
        activations.add(activation_of(activation))
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
    (first, _), *others = modules.convs
    convs = [graphs_conv_of(first)]
    rank = convs[0].weight.dim() - 2
    for module, _ in others:
        is_conv = isinstance(module, nn.modules.conv._ConvNd)
        convs.append(graphs_conv_of(module) if is_conv else resampling_of(module, rank))
    beside = NORMS[rank]
    reads = [*(read for _, read in modules.convs), *modules.outputs]
    pairs = [(of.norm, of.activation) for read in reads for of in (read, *read.pieces)]
    activations, slopes = {None: Activation("identity")}, []
    for activation in {activation: None for _, activation in pairs if activation is not None}:
        activations[activation] = read = apart_of(activation)
        if read.name == "prelu":
            activations[activation] = Activation("prelu", len(slopes))
            slopes.append(slope_of(activation))
    norms = {norm: own_norm_of(norm, beside, activation) for norm, activation in pairs if norm is not None}
    check_one_group(norms.values())

    def graph(widths: Sequence[int]) -> ConvGraph:
        widths = widths_of(widths, convs, [read.pieces for _, read in modules.convs])
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
        return ConvGraph(tuple(convs), found[: len(convs)], tuple(split), found[len(convs) :], tuple(slopes))

    return graph


def read_pooled_unit(modules: PooledModules) -> tuple[PooledUnit, Activation]:
    """The unit as the functional calls take it.

    Raises:
        Unsupported: a module that the engine cannot stand in for, or one with hooks.
    """
    if _has_any_global_hook():
        raise Unsupported("global module hooks are set")
    pool, rank = pool_of(modules.pool)
    if pool.ceil_mode:
        raise Unsupported(f"is {modules.pool}", modules.pool)
    conv = None
    if modules.conv is not None:
        conv = conv_of(modules.conv)
        check_keeps_size(modules.conv, conv)
        if conv.weight.dim() != rank + 2 or any(size != 1 for size in conv.weight.shape[2:]):
            raise Unsupported(f"has kernel {tuple(conv.weight.shape[2:])}", modules.conv)
        if pool.kind != "average" or any(pool.padding):
            raise Unsupported(f"does not commute with the convolution: {modules.pool}", modules.pool)
    unit = PooledUnit(norm_of(modules.norm, NORMS[rank], modules.activation), pool, conv)
    return unit, activation_of(modules.activation)


def read_unit(modules: UnitModules) -> tuple[Unit, Activation]:
    """The unit as the functional call takes it, and its activation.

    Raises:
        Unsupported: a module that the engine cannot stand in for, or one with hooks.
    """
    if _has_any_global_hook():
        raise Unsupported("global module hooks are set")
    norm, activation, conv = modules
    read_conv = conv_of(conv)
    return Unit(own_norm_of(norm, NORM_BESIDE[layer_class(conv)], activation), read_conv), activation_of(activation)


def read_pool(pool: nn.Module, dropout: Optional[nn.Module] = None) -> tuple[Pool, float]:
    """The pool, of averages or maxima, and the probability to drop a value of the map in front of it, if it is of maxima.

    Raises:
        Unsupported: other modules, maxima of too many positions, or hooks.
    """
    if _has_any_global_hook():
        raise Unsupported("global module hooks are set")
    p = 0.0
    if dropout is not None:
        check_untouched(dropout)
        if type(dropout) is not nn.Dropout or dropout.inplace:
            raise Unsupported(f"is {dropout}", dropout)
        p = dropout.p if dropout.training else 0.0
    read, _ = pool_of(pool)
    of_maxima = read.kind == "maximum" and math.prod(read.kernel_size) < DROPPED
    if not of_maxima and (read.kind != "average" or dropout is not None):
        raise Unsupported(f"is {pool}", pool)
    return read, p


def read_end(modules: EndModules) -> tuple[list[Optional[BatchNorm]], Activation]:
    """The two norms as the functional call takes them, and the activation.

    Raises:
        Unsupported: as `read_unit`.
    """
    if _has_any_global_hook():
        raise Unsupported("global module hooks are set")
    norms = modules.norm, modules.identity_norm
    kind = next((layer_class(norm) for norm in norms if layer_class(norm) in NORM_BESIDE.values()), nn.BatchNorm2d)
    read = [None if norm is None else _of_batch(norm, own_norm_of(norm, kind)) for norm in norms]
    return read, activation_of(modules.activation)


def _of_batch(norm: nn.Module, read: BatchNorm) -> BatchNorm:
    if read.instance:
        raise Unsupported(f"is {type(norm).__name__}", norm)
    return read


def _check_alone(norm: nn.Module, seen: set[nn.Module]) -> None:
    if norm in seen:
        raise Unsupported("serves twice, so its running statistics change in between", norm)
    seen.add(norm)


def check_one_group(norms: Iterable[Optional[BatchNorm]]) -> None:
    """Raises Unsupported for norms that take the batch's statistics over different ranks, or some of them every sample's."""
    taking = [norm for norm in norms if norm is not None and norm.batch_stats]
    if len({norm.group for norm in taking}) > 1:
        raise Unsupported("not all of its norms take statistics over the same ranks")
    if len({norm.instance for norm in taking}) > 1:
        raise Unsupported("some of its norms take the statistics of the batch, and some every sample's")
