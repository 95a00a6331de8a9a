"""Modules on the engine: the forwards of dense, residual and dual path blocks, pooled units, and what stands between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor, nn

from resdense_ext import checks, functional
from resdense_ext.nn.calls import (
    call_conv_graph,
    call_dense_block,
    call_dual_path_stage,
    call_pooled_unit,
    call_residual_stage,
    last_norm,
    options_of,
    widened,
)
from resdense_ext.nn.dispatch import Run, run_or_stock, takes
from resdense_ext.nn.leaves import Unsupported
from resdense_ext.nn.protocols import AnyBlock, BNActConv, Block, DualPath, End, Graph, Halves, Residual, Transition, whole
from resdense_ext.nn.read import (
    read_conv_graph,
    read_dual_path_block,
    read_end,
    read_layers,
    read_pool,
    read_pooled_unit,
    read_residual_block,
    read_unit,
    recall_conv_graph,
    recall_dual_path_block,
    recall_layers,
    recall_residual_block,
    recall_transition,
)
from resdense_ext.nn.recall import check_once
from resdense_ext.ops.avg_pool import avg_pool
from resdense_ext.ops.max_pool import max_pool
from resdense_ext.ops.resample import is_repeatable
from resdense_ext.ops.residual_maps import shape_behind
from resdense_ext.reference import ResidualBlock

__all__ = [
    "broadcasts",
    "run_bn_act_conv",
    "run_conv_graph",
    "run_dense_block",
    "run_dual_path_block",
    "run_end",
    "run_pool",
    "run_residual_block",
    "run_transition",
    "why_stock",
]


def run_dense_block(block: Block, x: Tensor) -> Tensor:
    """The block's forward, see `run_or_stock`."""

    def read() -> Run:
        reading = recall_layers(block)
        return lambda x: call_dense_block(x, reading, block.engine_policy)

    return run_or_stock(block, x, read)


def run_transition(transition: Transition, x: Tensor) -> Tensor:
    """The transition's forward, see `run_or_stock`."""

    def read() -> Run:
        modules, unit, activation = recall_transition(transition).value

        def run(x: Tensor) -> Optional[Tensor]:
            return widened(call_pooled_unit(x, unit, activation), *last_norm(modules)) if x.dim() == modules.dims else None

        return run

    return run_or_stock(transition, x, read)


def run_residual_block(block: Residual, x: Tensor) -> Tensor:
    """The block's forward, see `run_or_stock`."""

    def read() -> Run:
        reading = recall_residual_block(block)
        modules, described, _, _ = reading.value

        def run(x: Tensor) -> Optional[Tensor]:
            if broadcasts(x.shape, [described]):
                return None
            y = call_residual_stage(x, [reading], [block.engine_policy])
            return widened(y, modules.units[-1][1]) if modules.form == "post" else y

        return run

    return run_or_stock(block, x, read)


def broadcasts(shape: Sequence[int], blocks: Sequence[ResidualBlock]) -> bool:
    """Whether one of the blocks, the first of which has an input of this shape, adds maps of which one has a single position
    left: stock broadcasts it."""
    for block in blocks:
        made, added = shape_behind(shape, block), tuple(shape[2:] if block.shortcut is None else block.shortcut.outputs(shape[2:]))
        if made[2:] != added and len(made[2:]) == len(added) and all(m == a or 1 in (m, a) for m, a in zip(made[2:], added)):
            return True
        shape = made
    return False


def run_dual_path_block(block: DualPath, x: Tensor | Halves) -> Halves:
    """The block's forward, see `run_or_stock`."""

    def read() -> Run:
        modules, described, activation = recall_dual_path_block(block).value
        return lambda x: whole(call_dual_path_stage(x, [described], activation, [block.engine_policy], modules.side_by_side))

    return run_or_stock(block, x, read)


def run_bn_act_conv(unit: BNActConv, x: Tensor) -> Tensor:
    """The unit's forward, see `run_or_stock`."""

    def read() -> Run:
        (norm, conv), activation = read_unit(unit.unit_modules())
        return lambda x: functional.bn_act_conv(x, norm, conv, **options_of(activation))

    return run_or_stock(unit, x, read)


def run_pool(pool: nn.Module, x: Tensor, dropout: Optional[nn.Module] = None) -> Tensor:
    """``pool(dropout(x))``, in one node where there is something to keep and they are what they seem, else without a word."""
    if takes(x) and torch.is_grad_enabled() and x.requires_grad:
        try:
            read, p = read_pool(pool, dropout)
        except Unsupported:
            pass
        else:
            if x.dim() == len(read.kernel_size) + 2:
                return max_pool(x, read, p) if read.kind == "maximum" else avg_pool(x, read)
    return pool(x if dropout is None else dropout(x))


def run_end(end: End, maps: tuple[Tensor, Tensor]) -> Tensor:
    """The forward of a residual block's end, see `run_or_stock`; maps that are not alike are left to the stock path."""

    def read() -> Run:
        (norm, identity_norm), activation = read_end(end.end_modules())

        def run(maps: tuple[Tensor, Tensor]) -> Optional[Tensor]:
            x, identity = maps
            if (x.shape, x.dtype, x.device) != (identity.shape, identity.dtype, identity.device):
                return None
            if norm is None:
                return functional.add_act(x, identity, **options_of(activation))
            return functional.bn_add_act(x, norm, identity, identity_norm, **options_of(activation))

        return run

    return run_or_stock(end, maps, read)


def run_conv_graph(graph: Graph, sources: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The graph's forward, see `run_or_stock`; what does not fit together is left to the stock path, and to its errors, and so is
    what would not repeat where it has to."""

    def read() -> Run:
        reading = recall_conv_graph(graph)
        modules, make = reading.value

        def run(sources: tuple[Tensor, ...]) -> Optional[tuple[Tensor, ...]]:
            try:
                # Not remembered: of a norm over several pieces these have views, in which autograd's mode stays.
                described = make([x.shape[1] for x in sources])
                check_once([reading], sources, lambda: checks.check_conv_graph(sources, described))
            except (ValueError, TypeError):
                return None
            has_to_repeat = sources[0].is_cuda and torch.are_deterministic_algorithms_enabled()
            if has_to_repeat and not all(map(is_repeatable, described.convs)):
                return None
            norms = ((read.norm, *(piece.norm for piece in read.pieces)) for read in modules.outputs)
            return tuple(widened(y, *beside) for y, beside in zip(call_conv_graph(sources, described, graph.engine_policy), norms))

        return run

    return run_or_stock(graph, sources, read)


def why_stock(module: AnyBlock) -> Optional[str]:
    """Why the modules in it, as they are now, make it run its stock path; None where they do not."""
    try:
        if hasattr(module, "layer_modules"):
            read_layers(module.layer_modules())
        elif hasattr(module, "residual_modules"):
            read_residual_block(module.residual_modules())
        elif hasattr(module, "dual_path_modules"):
            read_dual_path_block(module.dual_path_modules())
        elif hasattr(module, "graph_modules"):
            read_conv_graph(module.graph_modules())
        elif hasattr(module, "unit_modules"):
            read_unit(module.unit_modules())
        elif hasattr(module, "end_modules"):
            read_end(module.end_modules())
        else:
            read_pooled_unit(module.pooled_modules())
    except Unsupported as unsupported:
        return unsupported.within(module)
    return None
