"""Sequences of modules, in which neighbours that can share a node do."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple, Optional

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from resdense_ext.nn.calls import (
    call_dense_block,
    call_dual_path_stage,
    call_pooled_unit,
    call_residual_stage,
    last_norm,
    widened,
)
from resdense_ext.nn.dispatch import Run, check_plain, is_watched, running, takes
from resdense_ext.nn.engine import broadcasts, run_dense_block
from resdense_ext.nn.leaves import Unsupported, check_untouched, is_norm, own_activation, pool_kind
from resdense_ext.nn.protocols import (
    Block,
    DualPath,
    Halves,
    OnEngine,
    PooledModules,
    Residual,
    SideBySide,
    Transition,
    whole,
)
from resdense_ext.nn.read import (
    ReadPooledUnit,
    ReadResidualBlock,
    check_one_group,
    read_pooled_unit,
    recall_dual_path_block,
    recall_layers,
    recall_residual_block,
    recall_transition,
)
from resdense_ext.nn.recall import Reading
from resdense_ext.ops.split_unit import split_norm
from resdense_ext.reference import Activation, DualPathBlock

__all__ = [
    "run_chain",
    "run_features",
]


class _Layers(NamedTuple):
    """The layers of a block whose front is a link of its own."""

    block: Block

    def __call__(self, x: Tensor) -> Tensor:
        return run_dense_block(self.block, x)


_Link = nn.Module | _Layers


def run_chain(modules: Sequence[nn.Module], x: Tensor | Halves) -> Tensor | Halves:
    """Calls modules one after another; in one node run a dense block and the transition or head behind it, a norm, an activation
    and a pool in a row, and residual or dual path blocks up to the next that has a projection, where none of them carries hooks.
    Chains and plain sequences among the modules are a part of this one."""
    links = [link for module in modules for link in _links(module)] if takes(x) else modules
    at = 0
    while at < len(links):
        run, used = _match(links, at, x) if takes(x) else (None, 1)
        y = run(x) if run is not None else None
        x, at = (links[at](whole(x)), at + 1) if y is None else (y, at + used)
    return whole(x)


def run_features(features: nn.Sequential, x: Tensor) -> Tensor:
    """``global_average_pool(relu(features(x)))``, flat: how a DenseNet goes on behind its features, as a chain with them."""
    return run_chain([features, _RELU, _HEAD[x.dim()]], x).flatten(1)


def _links(module: nn.Module) -> list[_Link]:
    """What a call of the module comes to: the links of a chain, a block's front and its layers, or the module itself."""
    front = getattr(module, "front", None) if _offers(module, "layer_modules") else None
    plain = type(module) is nn.Sequential
    if front is None and not plain and not _offers(module, "chain_modules"):
        return [module]
    try:
        _check_link(module)
        chain = [] if front is not None else list(module) if plain else module.chain_modules()
    except Unsupported:
        return [module]
    if _has_any_global_hook():
        return [module]
    if front is not None:
        return [*_links(front), _Layers(module)]
    return [link for inner in chain for link in _links(inner)]


def _offers(link: _Link, method: str) -> bool:
    """Whether its class does: a wrapper of a block's, such as FSDP's or a checkpoint's, has the attributes of what is in it."""
    return hasattr(type(link), method)


def _check_link(module: nn.Module) -> None:
    """Raises Unsupported where calling the module does more than the engine, which reads what is in it, would do in its place."""
    check_untouched(module)
    if isinstance(module, OnEngine) and not type(module).forward.__module__.startswith("resdense_ext."):
        raise Unsupported("has a forward of its own", module)


_MOST_BYTES = 16 * 2**20
"""Weights of the residual blocks in a node: their gradients are there all at once when they are handed on."""
_HEAD = {4: nn.AdaptiveAvgPool2d(1), 3: nn.AdaptiveAvgPool1d(1), 5: nn.AdaptiveAvgPool3d(1)}
_RELU = nn.ReLU(inplace=True)


def _match(links: Sequence[_Link], at: int, x: Tensor | Halves) -> tuple[Optional[Run], int]:
    """What runs the links from ``at`` on, with ``x`` to begin with, in one node, and how many these are. It answers None where it
    turns out that it cannot: each link by itself then says why."""
    if _offers(links[at], "dual_path_modules"):
        return _match_dual_path(links, at)
    if _offers(links[at], "residual_modules"):
        return _match_residual(links, at)
    if isinstance(x, tuple):
        return _match_joined(links, at, x)
    block = _block(links[at])
    if block is None:
        unit, used = _pooled(links, at)
        return (None, 1) if unit is None else (lambda x: _run_pooled(unit, x), used)
    if block.engine_policy is not None and at + 1 < len(links):
        transition = links[at + 1]
        if _offers(transition, "pooled_modules"):
            return (lambda x: _run_stage(block, transition, None, x)), 2
        unit, used = _pooled(links, at + 1)
        if unit is not None:
            return (lambda x: _run_stage(block, None, unit, x)), 1 + used
    return None, 1


def _match_residual(links: Sequence[_Link], at: int) -> tuple[Optional[Run], int]:
    """The residual blocks from ``at`` on of which only the first has a projection, as far as the engine takes them.

    One whose policy is "min" is a node of its own in training: what a node has kept is held until its backward is done.
    """
    if is_watched():
        return None, 1  # whoever watches hears of every block
    policies = ("fast",) if torch.is_grad_enabled() else ("fast", "min")
    blocks: list[Residual] = []
    readings: list[Reading[ReadResidualBlock]] = []
    kinds: set[tuple[Activation, Activation]] = set()
    norms: list[nn.Module] = []
    nbytes = 0
    try:
        for block in links[at:]:
            if not _offers(block, "residual_modules") or block.engine_policy not in policies:
                break
            _check_link(block)
            reading = recall_residual_block(block)
            modules, read, *kind = reading.value
            own = [*(unit[modules.form == "post"] for unit in modules.units), *modules.shortcut]
            if blocks and (modules.shortcut or not set(norms).isdisjoint(own)):
                break
            weights = [unit.conv.weight for unit in read.units]
            nbytes += sum(w.numel() * w.dtype.itemsize for w in weights)  # `nbytes` would be an operation in compiled graphs
            if blocks and (tuple(kind) not in kinds or nbytes > _MOST_BYTES):
                break
            blocks.append(block)
            readings.append(reading)
            kinds.add(tuple(kind))
            norms += own
    except Unsupported:
        pass  # called by itself, the block says why
    if len(blocks) < 2:
        return None, 1
    return (lambda x: _run_residual_blocks(blocks, readings, x)), len(blocks)


def _run_residual_blocks(
    blocks: Sequence[Residual], readings: Sequence[Reading[ReadResidualBlock]], x: Tensor
) -> Optional[Tensor]:
    try:
        check_plain(x)
    except Unsupported:
        return None
    if broadcasts(x.shape, [reading.value.block for reading in readings]):
        return None
    y = call_residual_stage(x, readings, [block.engine_policy for block in blocks])
    modules, described, _, _ = readings[-1].value
    return y if described.norm is None else widened(y, modules.units[-1][1])


def _match_dual_path(links: Sequence[_Link], at: int) -> tuple[Optional[Run], int]:
    """The dual path blocks from ``at`` on of which only the first has a projection, as far as the engine takes them."""
    blocks: list[DualPath] = []
    described: list[DualPathBlock] = []
    kinds: set[tuple[Activation, bool]] = set()
    norms: list[nn.Module] = []
    try:
        for block in links[at:]:
            if not _offers(block, "dual_path_modules") or block.engine_policy is None:
                break
            _check_link(block)
            modules, read, activation = recall_dual_path_block(block).value
            kind, own = (activation, modules.side_by_side), [norm for norm, *_ in modules.units]
            if blocks and (read.projection is not None or kind not in kinds or not set(norms).isdisjoint(own)):
                break
            blocks.append(block)
            described.append(read)
            kinds.add(kind)
            norms += [*own, *(modules.projection or ())]
    except Unsupported:
        pass  # called by itself, the block says why
    if not blocks:
        return None, 1
    return (lambda x: _run_dual_path_blocks(blocks, described, *kinds.pop(), x)), len(blocks)


def _run_dual_path_blocks(
    blocks: Sequence[DualPath],
    described: Sequence[DualPathBlock],
    activation: Activation,
    side_by_side: bool,
    x: Tensor | Halves,
) -> Optional[Halves]:
    try:
        check_plain(x)
    except Unsupported:
        return None
    with running(blocks[0], x):
        y = call_dual_path_stage(x, described, activation, [block.engine_policy for block in blocks], side_by_side)
    for block in blocks[1:]:
        with running(block, y):
            pass
    return y


def _match_joined(links: Sequence[_Link], at: int, halves: Halves) -> tuple[Optional[Run], int]:
    """A norm and an activation that read both halves of a dual path, and the pool behind them."""
    joined, *behind = links[at : at + 2]
    modules, used = None, 1
    if isinstance(halves, SideBySide):
        modules, used = _pooled(links, at)
    elif _offers(joined, "joined_modules") and behind and pool_kind(behind[0]) is not None:
        with suppress(Unsupported):
            modules, used = PooledModules(*joined.joined_modules(), None, behind[0]), 2
    return (None, 1) if modules is None else ((lambda halves: _run_joined(modules, halves)), used)


def _run_joined(modules: PooledModules, halves: Halves) -> Optional[Tensor]:
    """All of it works channel by channel: each half is pooled by itself, and the results are small."""
    try:
        check_plain(halves)
        unit, activation = read_pooled_unit(modules)
    except Unsupported:
        return None
    if any(half.dim() != modules.dims for half in halves):
        return None
    norms = split_norm(unit.norm, [half.shape[1] for half in halves])
    pooled = torch.cat([call_pooled_unit(half, unit._replace(norm=norm), activation) for half, norm in zip(halves, norms)], 1)
    return widened(pooled, modules.norm)


def _block(link: _Link) -> Optional[Block]:
    """The dense block whose layers the link is, and nothing else."""
    if isinstance(link, _Layers):
        return link.block
    return link if _offers(link, "layer_modules") and getattr(link, "front", None) is None else None


def _pooled(links: Sequence[_Link], at: int) -> tuple[Optional[PooledModules], int]:
    """A norm, an activation and a pool in a row, and how many links these are: a norm may hold its activation."""
    norm = links[at]
    if not is_norm(norm):
        return None, 1
    held = own_activation(norm)
    behind = links[at + 1 : at + 3] if held is None else [held, *links[at + 1 : at + 2]]
    if len(behind) < 2 or pool_kind(behind[1]) is None:
        return None, 1
    activation, pool = behind
    return PooledModules(norm, activation, None, pool), 3 if held is None else 2


def _run_pooled(modules: PooledModules, x: Tensor) -> Optional[Tensor]:
    try:
        check_plain(x)
        unit, activation = read_pooled_unit(modules)
    except Unsupported:
        return None
    return widened(call_pooled_unit(x, unit, activation), *last_norm(modules)) if x.dim() == modules.dims else None


def _run_stage(
    block: Block, transition: Optional[Transition], behind: Optional[PooledModules], x: Tensor
) -> Optional[Tensor]:
    try:
        check_plain(x)
        _check_link(block)
        if transition is not None:
            _check_link(transition)
            if transition.engine_policy is None:
                return None
            pooled = recall_transition(transition)
        else:
            pooled = Reading(ReadPooledUnit(behind, *read_pooled_unit(behind)))
        reading = recall_layers(block)
        _, layers, activation = reading.value
        behind, unit, unit_activation = pooled.value
        check_one_group([unit.norm, *(of_layer.norm for layer in layers for of_layer in layer.units)])
    except Unsupported:
        return None
    if not layers or unit_activation != activation or unit.pool.kind == "maximum" or x.dim() != behind.dims:
        return None
    if any(size < 1 for size in unit.pool.outputs(x.shape[2:])):
        return None
    with running(block, x):
        return widened(call_dense_block(x, reading, block.engine_policy, pooled), *last_norm(behind))
