"""Modules on the engine: dense, residual and dual path blocks, pooled units, and sequences in which these are neighbours."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import NamedTuple, Optional, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from resdense_ext import checks, functional
from resdense_ext.nn.read import (
    DualPathModules,
    EndModules,
    GraphModules,
    LayerModules,
    PooledModules,
    ResidualModules,
    UnitModules,
    Unsupported,
    check_one_group,
    check_untouched,
    is_frozen_norm,
    is_wrapper,
    own_activation,
    pool_kind,
    read_conv_graph,
    read_dual_path_block,
    read_end,
    read_layers,
    read_pooled_unit,
    read_residual_block,
    read_unit,
)
from resdense_ext.ops.cast import cast_conv_graph
from resdense_ext.ops.conv_graph_function import conv_graph
from resdense_ext.ops.residual_maps import sizes_of
from resdense_ext.ops.split_unit import split_norm
from resdense_ext.reference import Activation, ConvGraph, DenseLayer, DualPathBlock, PooledUnit, ResidualBlock

__all__ = [
    "BNActConv",
    "Block",
    "DualPath",
    "End",
    "Graph",
    "Halves",
    "OnEngine",
    "Policy",
    "READ_FROM_MODULES",
    "Residual",
    "SideBySide",
    "Transition",
    "is_transformed",
    "run_bn_act_conv",
    "run_chain",
    "run_conv_graph",
    "run_dense_block",
    "run_dual_path_block",
    "run_end",
    "run_features",
    "run_residual_block",
    "run_transition",
    "say",
    "stock_path",
    "watching",
    "whole",
    "why_stock",
]

Policy = str | tuple[bool, ...]
"""What a dense block keeps: a name, or a bool a layer."""

Halves = tuple[Tensor, Tensor]
"""The residual half, ``[N, R, *spatial]``, and the dense half, ``[N, D, *spatial]``, of a dual path."""


class SideBySide(NamedTuple):
    """The halves of what its network has as one tensor, which is made of them where a module is to be called with it."""

    residual: Tensor
    dense: Tensor


Watch = Callable[[Optional[nn.Module], "Tensor | Halves | None"], None]

_LIBRARIES = ("resdense_ext", "torch", "torchvision", "timm", "monai", "pytorchcv")


class OnEngine:
    """A module of this library that runs on the engine; where its ``policy`` is None, it is plain PyTorch."""

    policy: Optional[Policy]

    @property
    def engine_policy(self) -> Optional[Policy]:
        return self.policy


class Block(Protocol):
    """What a dense block offers to run on the engine; ``engine_policy`` is None where it is not to.

    ``front`` is the module that its forward calls before it comes to the layers; a block that has none may lack it.
    """

    engine_policy: Optional[Policy]
    front: Optional[nn.Module]

    def layer_modules(self) -> list[LayerModules]:
        """Raises Unsupported where a layer is not what the block's stock forward would find."""

    def stock_forward(self, x: Tensor) -> Tensor:
        """The forward that the engine stands in for."""


class Residual(Protocol):
    """What a residual block offers."""

    engine_policy: Optional[Policy]

    def residual_modules(self) -> ResidualModules:
        """Raises Unsupported where the modules are not what the block's stock forward would find."""

    def stock_forward(self, x: Tensor) -> Tensor:
        """The forward that the engine stands in for."""


class DualPath(Protocol):
    """What a dual path block offers. One whose modules are ``side_by_side`` takes and gives one tensor."""

    engine_policy: Optional[Policy]

    def dual_path_modules(self) -> DualPathModules:
        """Raises Unsupported where the modules are not what the block's stock forward would find."""

    def stock_forward(self, x: Tensor | Halves) -> Halves:
        """The forward that the engine stands in for."""


class Graph(Protocol):
    """What a graph of convolutions offers."""

    engine_policy: Optional[Policy]

    def graph_modules(self) -> GraphModules:
        """Raises Unsupported where the modules are not what the stock forward would find."""

    def stock_forward(self, sources: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The forward that the engine stands in for."""


class BNActConv(Protocol):
    """What a norm, an activation and a convolution in a row offer."""

    engine_policy: Optional[Policy]

    def unit_modules(self) -> UnitModules:
        """Raises Unsupported where the modules are not what the stock forward would find."""

    def stock_forward(self, x: Tensor) -> Tensor:
        """The forward that the engine stands in for."""


class End(Protocol):
    """What the end of a residual block offers, of two maps."""

    engine_policy: Optional[Policy]

    def end_modules(self) -> EndModules:
        """Raises Unsupported where the modules are not what the stock forward would find."""

    def stock_forward(self, maps: tuple[Tensor, Tensor]) -> Tensor:
        """The forward that the engine stands in for."""


class Transition(Protocol):
    """What a transition offers."""

    engine_policy: Optional[Policy]

    def pooled_modules(self) -> PooledModules:
        """Raises Unsupported where the modules are not what the transition's stock forward would find."""

    def stock_forward(self, x: Tensor) -> Tensor:
        """The forward that the engine stands in for."""


READ_FROM_MODULES = ("layer_modules", "residual_modules", "dual_path_modules", "pooled_modules", "unit_modules", "end_modules")
"""By what a module shows that an engine reads the modules in it."""

_AnyBlock = Block | Transition | Residual | DualPath | Graph | BNActConv | End

_stock: ContextVar[bool] = ContextVar("resdense_stock", default=False)
_watch: ContextVar[Optional[Watch]] = ContextVar("resdense_watch", default=None)
_said: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
"""The reasons that a block has given. Not on the block: it would be copied, pickled and left behind by `revert`."""


@contextmanager
def stock_path() -> Iterator[None]:
    """Inside, every module runs its stock path."""
    token = _stock.set(True)
    try:
        yield
    finally:
        _stock.reset(token)


@contextmanager
def watching(tell: Watch) -> Iterator[None]:
    """Inside, ``tell`` hears which module is about to run, on the engine or by its stock path, and on what; None when it has.

    Of dual path blocks in one node it hears the first so, and of each of the others behind it, with what came out, which has the
    sizes of what that block has read.
    """
    token = _watch.set(tell)
    try:
        yield
    finally:
        _watch.reset(token)


@contextmanager
def _running(module: nn.Module, x: Tensor | Halves) -> Iterator[None]:
    # Context variables cannot be traced.
    tell = None if torch.compiler.is_compiling() else _watch.get()
    if tell is not None:
        tell(module, x)
    yield
    if tell is not None:
        tell(None, None)


_Run = Callable[[Tensor], Optional[Tensor]]


def _run(module: _AnyBlock, x: Tensor, read: Callable[[], _Run]) -> Tensor:
    """The module's forward on the engine, or on its stock path where the engine cannot; the latter is said once a module.

    ``read`` looks at the modules inside and gives what runs them, which answers None for an input that it does not take.
    """
    if is_transformed(x):
        return module.stock_forward(x)
    if hasattr(module, "end_modules"):
        for name, part in zip(("x", "identity"), x):
            _check_is_tensor(part, name=name)
    elif not hasattr(module, "graph_modules"):
        _check_is_tensor(x, hasattr(module, "dual_path_modules"))
    with _running(module, x):
        run = None
        if module.engine_policy is not None and _takes(x):
            try:
                _check_plain(x)
                run = read()
            except Unsupported as unsupported:
                say(module, unsupported)
        # Outside of the handler, so that an error of either path carries no Unsupported along.
        y = run(x) if run is not None else None
        return module.stock_forward(x) if y is None else y


def run_dense_block(block: Block, x: Tensor) -> Tensor:
    """The block's forward, see `_run`."""

    def read() -> _Run:
        modules = block.layer_modules()
        layers, activation = read_layers(modules)
        return lambda x: _dense_block(x, modules, layers, activation, block.engine_policy)

    return _run(block, x, read)


def run_transition(transition: Transition, x: Tensor) -> Tensor:
    """The transition's forward, see `_run`."""

    def read() -> _Run:
        modules = transition.pooled_modules()
        unit, activation = read_pooled_unit(modules)
        return lambda x: _pooled_unit(x, unit, activation) if x.dim() == modules.dims else None

    return _run(transition, x, read)


def run_residual_block(block: Residual, x: Tensor) -> Tensor:
    """The block's forward, see `_run`."""

    def read() -> _Run:
        modules = block.residual_modules()
        described, activation, last = read_residual_block(modules)
        shortcut = described.shortcut

        def run(x: Tensor) -> Optional[Tensor]:
            made, added = sizes_of(x, described)[-1], x.shape[2:] if shortcut is None else shortcut.outputs(x.shape[2:])
            fits = len(made) == len(added) and all(m == a or 1 in (m, a) for m, a in zip(made, added))
            if fits and tuple(made) != tuple(added):
                return None  # of one side a single position is left, which stock broadcasts
            y = _residual_block(x, described, activation, last, block.engine_policy)
            return _widened(y, modules.units[-1][1]) if modules.form == "post" else y

        return run

    return _run(block, x, read)


def run_dual_path_block(block: DualPath, x: Tensor | Halves) -> Halves:
    """The block's forward, see `_run`."""

    def read() -> _Run:
        modules = block.dual_path_modules()
        described, activation = read_dual_path_block(modules)
        return lambda x: whole(_dual_path_stage(x, [described], activation, [block.engine_policy], modules.side_by_side))

    return _run(block, x, read)


def run_bn_act_conv(unit: BNActConv, x: Tensor) -> Tensor:
    """The unit's forward, see `_run`."""

    def read() -> _Run:
        (norm, conv), activation = read_unit(unit.unit_modules())
        return lambda x: functional.bn_act_conv(x, norm, conv, **_options(activation))

    return _run(unit, x, read)


def run_end(end: End, maps: tuple[Tensor, Tensor]) -> Tensor:
    """The forward of a residual block's end, see `_run`; maps that are not alike are left to the stock path."""

    def read() -> _Run:
        (norm, identity_norm), activation = read_end(end.end_modules())

        def run(maps: tuple[Tensor, Tensor]) -> Optional[Tensor]:
            x, identity = maps
            if (x.shape, x.dtype, x.device) != (identity.shape, identity.dtype, identity.device):
                return None
            if norm is None:
                return functional.add_act(x, identity, **_options(activation))
            return functional.bn_add_act(x, norm, identity, identity_norm, **_options(activation))

        return run

    return _run(end, maps, read)


def run_conv_graph(graph: Graph, sources: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The graph's forward, see `_run`; what does not fit together is left to the stock path, and to its errors."""

    def read() -> _Run:
        make = read_conv_graph(graph.graph_modules())

        def run(sources: tuple[Tensor, ...]) -> Optional[tuple[Tensor, ...]]:
            try:
                described = make([x.shape[1] for x in sources])
                checks.check_conv_graph(sources, described)
            except (ValueError, TypeError):
                return None
            return _conv_graph(sources, described)

        return run

    return _run(graph, sources, read)


class _Layers(NamedTuple):
    """The layers of a block whose front is a link of its own."""

    block: Block

    def __call__(self, x: Tensor) -> Tensor:
        return run_dense_block(self.block, x)


_Link = nn.Module | _Layers


def run_chain(modules: Sequence[nn.Module], x: Tensor | Halves) -> Tensor | Halves:
    """Calls modules one after another; in one node run a dense block and the transition or head behind it, a norm, an activation
    and a pool in a row, and dual path blocks up to the next that has a projection, where none of them carries hooks. Chains and
    plain sequences among the modules are a part of this one."""
    links = [link for module in modules for link in _links(module)] if _takes(x) else modules
    at = 0
    while at < len(links):
        run, used = _match(links, at, x) if _takes(x) else (None, 1)
        y = run(x) if run is not None else None
        x, at = (links[at](whole(x)), at + 1) if y is None else (y, at + used)
    return whole(x)


def whole(x: Tensor | Halves | SideBySide) -> Tensor | Halves:
    """What modules are called with and give: of halves that lie side by side one tensor."""
    return torch.cat(x, 1) if isinstance(x, SideBySide) else x


def _links(module: nn.Module) -> list[_Link]:
    """What a call of the module comes to: the links of a chain, a block's front and its layers, or the module itself."""
    front = getattr(module, "front", None) if hasattr(module, "layer_modules") else None
    plain = type(module) is nn.Sequential
    if front is None and not plain and not hasattr(module, "chain_modules"):
        return [module]
    try:
        check_untouched(module)
        chain = [] if front is not None else list(module) if plain else module.chain_modules()
    except Unsupported:
        return [module]
    if _has_any_global_hook():
        return [module]
    if front is not None:
        return [*_links(front), _Layers(module)]
    return [link for inner in chain for link in _links(inner)]


_HEAD = {4: nn.AdaptiveAvgPool2d(1), 3: nn.AdaptiveAvgPool1d(1), 5: nn.AdaptiveAvgPool3d(1)}
_RELU = nn.ReLU(inplace=True)


def run_features(features: nn.Sequential, x: Tensor) -> Tensor:
    """``global_average_pool(relu(features(x)))``, flat: how a DenseNet goes on behind its features, as a chain with them."""
    return run_chain([features, _RELU, _HEAD[x.dim()]], x).flatten(1)


def _match(links: Sequence[_Link], at: int, x: Tensor | Halves) -> tuple[Optional[_Run], int]:
    """What runs the links from ``at`` on, with ``x`` to begin with, in one node, and how many these are. It answers None where it
    turns out that it cannot: each link by itself then says why."""
    if hasattr(links[at], "dual_path_modules"):
        return _match_dual_path(links, at)
    if isinstance(x, tuple):
        return _match_joined(links, at, x)
    block = _block(links[at])
    if block is None:
        unit, used = _pooled(links, at)
        return (None, 1) if unit is None else (lambda x: _run_pooled(unit, x), used)
    if block.engine_policy is not None and at + 1 < len(links):
        transition = links[at + 1]
        if hasattr(transition, "pooled_modules"):
            return (lambda x: _run_stage(block, transition, None, x)), 2
        unit, used = _pooled(links, at + 1)
        if unit is not None:
            return (lambda x: _run_stage(block, None, unit, x)), 1 + used
    return None, 1


def _match_dual_path(links: Sequence[_Link], at: int) -> tuple[Optional[_Run], int]:
    """The dual path blocks from ``at`` on of which only the first has a projection, as far as the engine takes them."""
    blocks: list[DualPath] = []
    described: list[DualPathBlock] = []
    kinds: set[tuple[Activation, bool]] = set()
    try:
        for block in links[at:]:
            if not hasattr(block, "dual_path_modules") or block.engine_policy is None:
                break
            check_untouched(block)
            modules = block.dual_path_modules()
            read, activation = read_dual_path_block(modules)
            kind = activation, modules.side_by_side
            if blocks and (read.projection is not None or kind not in kinds):
                break
            blocks.append(block)
            described.append(read)
            kinds.add(kind)
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
        _check_plain(x)
    except Unsupported:
        return None
    with _running(blocks[0], x):
        y = _dual_path_stage(x, described, activation, [block.engine_policy for block in blocks], side_by_side)
    for block in blocks[1:]:
        with _running(block, y):
            pass
    return y


def _match_joined(links: Sequence[_Link], at: int, halves: Halves) -> tuple[Optional[_Run], int]:
    """A norm and an activation that read both halves of a dual path, and the pool behind them."""
    joined, *behind = links[at : at + 2]
    modules, used = None, 1
    if isinstance(halves, SideBySide):
        modules, used = _pooled(links, at)
    elif hasattr(joined, "joined_modules") and behind and pool_kind(behind[0]) is not None:
        with suppress(Unsupported):
            modules, used = PooledModules(*joined.joined_modules(), None, behind[0]), 2
    return (None, 1) if modules is None else ((lambda halves: _run_joined(modules, halves)), used)


def _run_joined(modules: PooledModules, halves: Halves) -> Optional[Tensor]:
    """All of it works channel by channel: each half is pooled by itself, and the results are small."""
    try:
        _check_plain(halves)
        unit, activation = read_pooled_unit(modules)
    except Unsupported:
        return None
    if any(half.dim() != modules.dims for half in halves):
        return None
    norms = split_norm(unit.norm, [half.shape[1] for half in halves])
    return torch.cat([_pooled_unit(half, unit._replace(norm=norm), activation) for half, norm in zip(halves, norms)], 1)


def _block(link: _Link) -> Optional[Block]:
    """The dense block whose layers the link is, and nothing else."""
    if isinstance(link, _Layers):
        return link.block
    return link if hasattr(link, "layer_modules") and getattr(link, "front", None) is None else None


def _pooled(links: Sequence[_Link], at: int) -> tuple[Optional[PooledModules], int]:
    """A norm, an activation and a pool in a row, and how many links these are: a norm may hold its activation."""
    norm = links[at]
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) and not is_frozen_norm(norm):
        return None, 1
    held = own_activation(norm)
    behind = links[at + 1 : at + 3] if held is None else [held, *links[at + 1 : at + 2]]
    if len(behind) < 2 or pool_kind(behind[1]) is None:
        return None, 1
    activation, pool = behind
    return PooledModules(norm, activation, None, pool), 3 if held is None else 2


def _run_pooled(modules: PooledModules, x: Tensor) -> Optional[Tensor]:
    try:
        _check_plain(x)
        unit, activation = read_pooled_unit(modules)
    except Unsupported:
        return None
    return _widened(_pooled_unit(x, unit, activation), modules.norm) if x.dim() == modules.dims else None


def _run_stage(
    block: Block, transition: Optional[Transition], behind: Optional[PooledModules], x: Tensor
) -> Optional[Tensor]:
    try:
        _check_plain(x)
        check_untouched(block)
        if transition is not None:
            check_untouched(transition)
            if transition.engine_policy is None:
                return None
            behind = transition.pooled_modules()
        modules = block.layer_modules()
        layers, activation = read_layers(modules)
        unit, unit_activation = read_pooled_unit(behind)
        check_one_group([unit.norm, *(of_layer.norm for layer in layers for of_layer in layer.units)])
    except Unsupported:
        return None
    if not layers or unit_activation != activation or unit.pool.kind == "maximum" or x.dim() != behind.dims:
        return None
    if any(size < 1 for size in unit.pool.outputs(x.shape[2:])):
        return None
    with _running(block, x):
        return _dense_block(x, modules, layers, activation, block.engine_policy, unit)


def _dense_block(
    x: Tensor,
    modules: Sequence[LayerModules],
    layers: Sequence[DenseLayer],
    activation: Activation,
    policy: Policy,
    behind: Optional[PooledUnit] = None,
) -> Tensor:
    if any(layer.drop_rate > 0 for layer in modules):
        # Checked before masks are drawn: an error leaves the random state as it was.
        checks.check_dense_block(x, layers)
        for of in modules:
            checks.check_probability("drop_rate", max(of.drop_rate, 0.0))
        layers = [_with_mask(layer, of, x) for layer, of in zip(layers, modules)]
    return functional.dense_block(x, layers, **_options(activation), policy=policy, behind=behind)


def _options(activation: Activation) -> dict[str, str | float]:
    """An activation as the functional calls take it."""
    return {"activation": activation.name, "negative_slope": activation.slope}


def _pooled_unit(x: Tensor, unit: PooledUnit, activation: Activation) -> Tensor:
    options = _options(activation)
    if unit.conv is not None:
        return functional.transition(x, functional.Unit(unit.norm, unit.conv), *unit.pool[1:3], **options)
    return functional.bn_act_pool(x, unit.norm, unit.pool.kind, *unit.pool.windows, **options)


def _residual_block(
    x: Tensor, block: ResidualBlock, activation: Activation, last: Activation, policy: Policy
) -> Tensor:
    names = {"activation": activation.name, "final_activation": last.name}
    # Of two leaky_relus the slope is the same.
    slope = last.slope if last.name == "leaky_relu" else activation.slope
    return functional.residual_block(x, block, **names, negative_slope=slope, policy=policy)


def _dual_path_stage(
    x: Tensor | Halves,
    blocks: Sequence[DualPathBlock],
    activation: Activation,
    policies: Sequence[Policy],
    side_by_side: bool,
) -> Halves:
    keep = [keep for policy in policies for keep in checks.kept_layers(policy, 1)]
    name, slope = activation
    if side_by_side and blocks[0].projection is None and isinstance(x, Tensor):
        x = tuple(x.tensor_split([blocks[0].residual_channels], 1))
    y = functional.dual_path_stage(x, blocks, activation=name, negative_slope=slope, policy=keep)
    return SideBySide(*y) if side_by_side else y


def _conv_graph(sources: Sequence[Tensor], graph: ConvGraph) -> tuple[Tensor, ...]:
    device = sources[0].device.type
    if checks.autocasts(device):
        graph = cast_conv_graph(graph, torch.get_autocast_dtype(device))
    return conv_graph(sources, graph)


def _widened(y: Tensor, norm: nn.Module) -> Tensor:
    """In the dtype that stock has: torchvision's frozen norm is plain arithmetic, which widens what autocast has narrowed."""
    return y.to(torch.promote_types(y.dtype, norm.weight.dtype)) if is_frozen_norm(norm) else y


def why_stock(module: _AnyBlock) -> Optional[str]:
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


def _parts(x: Tensor | Halves) -> tuple:
    return x if isinstance(x, tuple) else (x,)


def _takes(x: Tensor | Halves) -> bool:
    """Whether x is something for the engine at all; what is not takes the stock path without a word."""
    return not is_transformed(x) and not _wants_stock() and all(isinstance(t, Tensor) and t.numel() > 0 for t in _parts(x))


def _wants_stock() -> bool:
    return not torch.compiler.is_compiling() and _stock.get()


def _check_is_tensor(x: Tensor | Halves, may_be_halves: bool = False, name: str = "x") -> None:
    halves = may_be_halves and isinstance(x, tuple) and len(x) == 2 and all(isinstance(half, Tensor) for half in x)
    if not halves and not isinstance(x, Tensor):
        expected = "a Tensor or (residual, dense)" if may_be_halves else "a Tensor"
        raise TypeError(f"{name}: expected {expected}, got {type(x).__name__}")


def _check_plain(x: Tensor | Halves) -> None:
    for part in _parts(x):
        if is_wrapper(part):
            raise Unsupported(f"the input is {type(part).__name__}")


def is_transformed(x: Tensor | Halves) -> bool:
    """Whether x passes through something that rewrites programs and needs a rule for each operation.

    Of these the engine has none but ``torch.compile``'s; the stock path is right under all of them, and is taken without a word.
    """
    return (
        torch.compiler._is_exporting_flag  # `is_exporting()` reads it, but is True in all that torch.compile of torch 2.11 traces
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or any(isinstance(part, torch.fx.Proxy) for part in _parts(x))
    )


def say(module: nn.Module, unsupported: Unsupported) -> None:
    """Warns, once for every reason, that a module runs its stock path."""
    if torch.compiler.is_compiling():
        return  # a warning cannot be traced
    said = _said.setdefault(module, set())
    if unsupported.reason not in said:
        said.add(unsupported.reason)
        message = f"resdense_ext: a {type(module).__name__} runs its stock path: {unsupported.within(module)}"
        warnings.warn(message, stacklevel=_users_level())


def _users_level() -> int:
    """The ``stacklevel`` of a warning in the calling function that points at the nearest line of the user's."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
        frame, level = frame.f_back, level + 1
    return level


def _with_mask(layer: DenseLayer, modules: LayerModules, x: Tensor) -> DenseLayer:
    if modules.drop_rate <= 0 or not modules.module.training:
        return layer
    width = layer.units[-1].conv.weight.shape[0]
    mask, scale = functional.dropout_mask(x, width, modules.drop_rate, per_channel=modules.drop_channels)
    return layer._replace(mask=mask, mask_scale=scale)
