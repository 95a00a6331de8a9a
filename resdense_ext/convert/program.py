"""A traced forward that runs on the engines: the graph's nodes one after another, and one engine call for every match."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves, tree_unflatten

from resdense_ext.checks import autocasts
from resdense_ext.convert.gathers import GraphMatch, graph_modules
from resdense_ext.convert.patterns import (
    DenseMatch,
    Layer,
    Match,
    PooledMatch,
    ResidualMatch,
    changes_in_place,
    layer_of,
    makes_new_memory,
)
from resdense_ext.convert.trace import Traced, is_held, is_hooked, is_indexed, was_asked
from resdense_ext.nn.chain import run_chain
from resdense_ext.nn.engine import run_conv_graph, run_dense_block, run_pool, run_residual_block, run_transition, why_stock
from resdense_ext.nn.leaves import Unsupported, own_activation, pool_kind
from resdense_ext.nn.protocols import (
    GraphModules,
    LayerModules,
    Policy,
    PooledModules,
    ResidualModules,
)

__all__ = ["Part", "Program", "TracedConvGraph", "TracedDenseBlock", "TracedPooledUnit", "TracedResidualBlock"]


class Part(nn.Module):
    """What stands for a match, with the layers of the module that it was found in, which is its owner.

    The layers are the owner's children and not this one's: `modules` gives those that are ``read``, and `named_modules` the owner's, so
    that reasons name paths there.
    """

    is_constant = True

    def __init__(self, owner: nn.Module, name: str, read: tuple) -> None:
        super().__init__()
        self._owner, self.name, self._read = weakref.ref(owner), name, read

    @property
    def engine_policy(self) -> Policy:
        policy = self._owner().resdense_policy
        return policy.get(self.name, "min") if isinstance(policy, dict) else policy

    @property
    def resdense_policy(self) -> Policy:
        return self.engine_policy

    @resdense_policy.setter
    def resdense_policy(self, policy: Policy) -> None:
        """Of this part alone, as a budget chooses it; the owner's others then have their own, or "min"."""
        policies = self._owner().resdense_policy
        self._owner().resdense_policy = {**(policies if isinstance(policies, dict) else {}), self.name: policy}

    def modules(self, *args, **options) -> Iterator[nn.Module]:
        layers = [leaf for leaf in tree_leaves(self._read) if isinstance(leaf, nn.Module)]
        return iter(dict.fromkeys((self, *(module for layer in layers for module in layer.modules()))))

    def named_modules(self, *args, **options) -> Iterator[tuple[str, nn.Module]]:
        return self._owner().named_modules(*args, **options)


def _run_modules(modules: Iterable[nn.Module | None], x: Tensor) -> Tensor:
    """One after another, where there is one; the activation that a norm holds, it has applied already."""
    held = None
    for module in modules:
        if module is not None and module is not held:
            x, held = module(x), own_activation(module)
    return x


class _TracedLayer(NamedTuple):
    units: tuple[tuple[nn.Module, ...], ...]
    dropout: nn.Module | None

    def read(self) -> LayerModules:
        if self.dropout is None:
            return LayerModules(_NOTHING, self.units)
        if type(self.dropout) not in _DROPOUTS:
            raise Unsupported(f"is {type(self.dropout).__name__}", self.dropout)
        return LayerModules(self.dropout, self.units, self.dropout.p, drop_channels=type(self.dropout) is not nn.Dropout)

    def stock_forward(self, x: Tensor) -> Tensor:
        return _run_modules([*(module for unit in self.units for module in unit), self.dropout], x)


_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_NOTHING = nn.Identity()
"""Stands for the module of a layer, of which only the dropout and the hooks count: of these there are none."""


class TracedDenseBlock(Part):
    """Of layers: `_TracedLayer`."""

    def __len__(self) -> int:
        return len(self._read)

    def layer_modules(self) -> list[LayerModules]:
        return [layer.read() for layer in self._read]

    def forward(self, x: Tensor) -> Tensor:
        return run_dense_block(self, x)

    def stock_forward(self, x: Tensor) -> Tensor:
        for layer in self._read:
            x = torch.cat([x, layer.stock_forward(x)], 1)
        return x


class TracedResidualBlock(Part):
    """Of `ResidualModules`."""

    def adds_like_to_like(self) -> bool:
        """Whether both sides of the addition have as many channels, as far as the modules say."""
        form, units, shortcut, _ = self._read
        convs = [unit[0] if form == "post" else unit[2] for unit in units]
        added = next((m.out_channels for m in shortcut if hasattr(m, "out_channels")), convs[0].in_channels)
        return added == convs[-1].out_channels

    def residual_modules(self) -> ResidualModules:
        return self._read

    def forward(self, x: Tensor) -> Tensor:
        return run_residual_block(self, x)

    def stock_forward(self, x: Tensor) -> Tensor:
        form, units, shortcut, last = self._read
        added, modules = x, [module for unit in units for module in unit]
        if form == "pre" and shortcut:
            added = x = _run_modules(modules[:2], x)
            modules = modules[2:]
        y = _run_modules(modules, x) + _run_modules(shortcut, added)
        return y if last is None else last(y)


class TracedPooledUnit(Part):
    """Of `PooledModules`."""

    def pooled_modules(self) -> PooledModules:
        return self._read

    def forward(self, x: Tensor) -> Tensor:
        return run_transition(self, x)

    def stock_forward(self, x: Tensor) -> Tensor:
        return _run_modules(self._read, x)


class _Call(NamedTuple):
    """A step that runs one node."""

    node: Node
    function: Callable[..., Any]

    @property
    def reads(self) -> list[Node]:
        return self.node.all_input_nodes

    @property
    def outputs(self) -> list[Node]:
        return [self.node]

    def run(self, values: dict[Node, Any]) -> None:
        args, kwargs = map_arg((self.node.args, self.node.kwargs), values.__getitem__)
        values[self.node] = self.function(*args, **kwargs)


class TracedConvGraph(Part):
    """Its stock path runs the nodes of its match as they stand in the trace; see `GraphMatch` for ``sources`` and ``outputs``."""

    def __init__(
        self, owner: nn.Module, name: str, read: GraphModules, sources: tuple[Node, ...], steps: list, outputs: list[Node]
    ) -> None:
        super().__init__(owner, name, read)
        self._sources, self._steps, self._outputs = sources, steps, tuple(outputs)

    def graph_modules(self) -> GraphModules:
        return self._read

    def forward(self, sources: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return run_conv_graph(self, sources)

    def stock_forward(self, sources: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(_run_steps(self._steps, dict(zip(self._sources, sources)), self._outputs))


class _GraphCall(NamedTuple):
    """A step that runs a graph of convolutions."""

    part: TracedConvGraph
    reads: tuple[Node, ...]
    outputs: list[Node]

    def run(self, values: dict[Node, Any]) -> None:
        values.update(zip(self.outputs, self.part(tuple(map(values.__getitem__, self.reads)))))


class _EngineCall(NamedTuple):
    """A step that runs another match, or a dense block and the pooled unit behind it; ``outputs`` as in `Match`."""

    parts: list[Part]
    source: Node
    outputs: dict[Node, tuple[int, int] | None]

    @property
    def reads(self) -> list[Node]:
        return [self.source]

    def run(self, values: dict[Node, Any]) -> None:
        x = values[self.source]
        y = run_chain(self.parts, x)
        for node, part in self.outputs.items():
            values[node] = y if part is None else self._slice(x, y, *part)

    def _slice(self, x: Tensor, y: Tensor, first: int, last: int) -> Tensor:
        """As stock's would be: a tensor of its own, and without the source in the dtype of convolutions."""
        weights = [layer.units[-1][2].weight for layer in self.parts[0].layer_modules()]
        widths = [x.shape[1], *(weight.shape[0] for weight in weights)]
        part = torch.cat([y[:, sum(widths[:first]) : sum(widths[:last])]], 1)
        casts = first > 0 and autocasts(y.device.type) and weights[0].dtype != torch.float64
        return part.to(torch.get_autocast_dtype(y.device.type)) if casts else part


_Step = _Call | _EngineCall | _GraphCall


class Program:
    """Runs a traced forward. It holds the modules inside, but not their owner, so that it may be kept beside that.

    ``matches`` and their ``parts`` are those that the engines take; ``left`` are the others, with reasons.
    ``makes_new_memory`` says of what it returns what it says of a `Converted` module's.
    """

    def __init__(self, owner: nn.Module, traced: Traced, matches: list[Match]) -> None:
        found = [(match, _part(owner, traced.modules, match)) for match in matches]
        reasons = {part: _why_left(match, part, traced.modules) for match, part in found}
        self.matches = [match for match, part in found if reasons[part] is None]
        self.parts = [part for _, part in found if reasons[part] is None]
        self.left = [(part, reason) for part, reason in reasons.items() if reason is not None]
        self._inputs = [node for node in traced.graph.nodes if node.op == "placeholder"]
        self._returned, self._spec = traced.returned, traced.spec
        self.makes_new_memory = makes_new_memory(traced)
        parts = {match.last: part for match, part in zip(self.matches, self.parts)}
        self._steps = _with_ends(_steps(owner, traced, self.matches, parts), self._returned)

    def bind(self, inputs: dict[str, Any]) -> tuple | None:
        """The inputs of a call in the order of the graph's; None where one is of a kind for which it does not stand."""
        bound = tuple(inputs[node.target] for node in self._inputs)
        return bound if all(map(_stands_for, self._inputs, bound)) else None

    def run(self, args: tuple) -> Any:
        values: dict[Node, Any] = dict(zip(self._inputs, args))
        del args
        return tree_unflatten(_run_steps(self._steps, values, self._returned), self._spec)


def _stands_for(node: Node, x: Any) -> bool:
    """Whether an input may be this. The trace took it for a tensor where the forward asked; where it is but indexed, it may hold
    tensors, and where it decided nothing, be a number."""
    if isinstance(x, Tensor):
        return True
    if was_asked(node):
        return False
    leaves = tree_leaves(x)
    return isinstance(x, (int, float)) or (is_indexed(node) and bool(leaves) and all(isinstance(leaf, Tensor) for leaf in leaves))


def _run_steps(steps: list[tuple[_Step, list[Node]]], values: dict[Node, Any], outputs: Sequence[Any]) -> list[Any]:
    for step, ends in steps:
        step.run(values)
        for node in ends:
            values.pop(node, None)
    return [values[output] if isinstance(output, Node) else output for output in outputs]


def _why_left(match: Match, part: Part, modules: dict[str, nn.Module]) -> str | None:
    # Hooks come and go: with them it is decided at every run.
    if any(node.op == "call_module" and is_hooked(modules[node.target]) for node in match.nodes):
        return None
    if isinstance(part, TracedResidualBlock) and not part.adds_like_to_like():
        return "its addition broadcasts"
    return why_stock(part)


def _steps(owner: nn.Module, traced: Traced, matches: list[Match], parts: dict[Node, Part]) -> Iterator[_Step]:
    inside = {node: match for match in matches for node in match.nodes}
    behind = {match.sources[0]: match for match in matches if isinstance(match.parts, PooledMatch)}
    joined = set()
    for node in traced.graph.nodes:
        match = inside.get(node)
        if match is None:
            # A layer that nobody reads may change its running statistics, and a call what others read.
            counts = node.users or node.op == "call_module" or changes_in_place(node, traced.modules)
            if counts and node.op not in ("placeholder", "output"):
                yield _Call(node, _function(weakref.ref(owner), traced.modules, node))
        elif node is match.last and node not in joined:
            pooled = _only_reader(match, behind)
            if isinstance(match.parts, GraphMatch):
                yield _GraphCall(parts[node], match.sources, list(match.outputs))
            elif pooled is None:
                yield _EngineCall([parts[node]], match.sources[0], match.outputs)
            else:
                joined.add(pooled.last)
                yield _EngineCall([parts[node], parts[pooled.last]], match.sources[0], pooled.outputs)


def _only_reader(match: Match, behind: dict[Node, Match]) -> Match | None:
    """The pooled unit that alone reads the whole output of a dense block, which then share a node of autograd's."""
    if not isinstance(match.parts, DenseMatch) or list(match.outputs.values()) != [None]:
        return None
    (output,) = match.outputs
    pooled = behind.get(output)
    return pooled if pooled is not None and set(output.users) - match.nodes == {pooled.parts.norm} else None


def _own(value: Any) -> Any:
    """With lists and dicts that a module may change, which a graph's are not."""
    if isinstance(value, (list, tuple)):
        own = [_own(v) for v in value]
        return own if isinstance(value, list) else type(value)(*own) if hasattr(value, "_fields") else tuple(own)
    return {name: _own(v) for name, v in value.items()} if isinstance(value, dict) else value


def _with_ends(steps: Iterable[_Step], outputs: Iterable[Any]) -> list[tuple[_Step, list[Node]]]:
    """Every step with the values that nothing reads behind it."""
    steps, needed, result = list(steps), {output for output in outputs if isinstance(output, Node)}, []
    for step in reversed(steps):
        result.append((step, list({*step.reads, *step.outputs} - needed)))
        needed |= set(step.reads)
    return result[::-1]


def _function(owner: weakref.ref, modules: dict[str, nn.Module], node: Node) -> Callable[..., Any]:
    if is_held(node):
        return lambda x: x
    layer = layer_of(node, modules)
    if pool_kind(layer) in ("average", "maximum"):
        return lambda x, *options, **more: run_pool(layer, x)
    if node.op == "call_module":
        module = modules[node.target]
        plain = not any(isinstance(value, (list, tuple, dict)) for value in (*node.args, *node.kwargs.values()))
        return module if plain else lambda *args, **kwargs: module(*_own(args), **_own(kwargs))
    if node.op == "call_method":
        return lambda x, *args, **kwargs: getattr(x, node.target)(*args, **kwargs)
    if node.op == "get_attr":
        path, _, name = node.target.rpartition(".")
        holder = weakref.ref(modules[path]) if path else owner
        return lambda: getattr(holder(), name)
    return node.target


def _name(match: Match) -> str:
    """The path of the first layer of the match, which no other has."""
    if isinstance(match.parts, GraphMatch):
        return next(iter(match.parts.convs)).target
    layers = match.parts.layers[0].units[0] if isinstance(match.parts, DenseMatch) else match.parts
    if isinstance(match.parts, ResidualMatch):
        layers = match.parts.units[0]
    return layers.norm.target


def _layer(of: Layer, modules: dict[str, nn.Module]) -> _TracedLayer:
    units = tuple(tuple(layer_of(node, modules) for node in unit) for unit in of.units)
    return _TracedLayer(units, None if of.dropout is None else layer_of(of.dropout, modules))


def _graph(owner: nn.Module, name: str, modules: dict[str, nn.Module], match: Match) -> TracedConvGraph:
    found = graph_modules(match.parts, lambda node: None if node is None else layer_of(node, modules))
    inside = (node for node in match.last.graph.nodes if node in match.nodes)
    outputs = list(match.outputs)
    steps = _with_ends((_Call(node, _function(weakref.ref(owner), modules, node)) for node in inside), outputs)
    return TracedConvGraph(owner, name, found, match.sources, steps, outputs)


def _part(owner: nn.Module, modules: dict[str, nn.Module], match: Match) -> Part:
    def layer(node: Node | None) -> nn.Module | None:
        return None if node is None else layer_of(node, modules)

    parts, name = match.parts, _name(match)
    if isinstance(parts, GraphMatch):
        return _graph(owner, name, modules, match)
    if isinstance(parts, DenseMatch):
        return TracedDenseBlock(owner, name, tuple(_layer(of, modules) for of in parts.layers))
    if isinstance(parts, PooledMatch):
        return TracedPooledUnit(owner, name, PooledModules(*map(layer, parts)))
    post = parts.form == "post"
    units = tuple(
        tuple(map(layer, (unit.conv, unit.norm, unit.activation) if post else (unit.norm, unit.activation, unit.conv)))
        for unit in parts.units
    )
    block = ResidualModules(parts.form, units, tuple(map(layer, parts.shortcut)), layer(parts.activation))
    return TracedResidualBlock(owner, name, block)
