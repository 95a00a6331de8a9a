"""What of a traced graph the engines can stand in for: dense blocks, residual blocks, pools of batch norm and activation,
whatever else convolves concatenations, and chains of convolutions and batch norms.

A concatenation is flattened to its *pieces*, the values that are no concatenations themselves, so that ``x = cat([x, f(x)])``
and a list that is concatenated at every layer are the same: a layer reads some pieces, and the next one reads these and what
the first has made.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from resdense_ext.convert.gathers import GraphMatch, find_conv_graphs, graph_modules
from resdense_ext.convert.trace import Traced, is_hooked
from resdense_ext.nn.leaves import APART, Unsupported, is_frozen_norm, is_instance_norm, is_norm, pool_kind
from resdense_ext.nn.read import read_conv_graph

__all__ = [
    "DenseMatch",
    "GraphMatch",
    "Layer",
    "Match",
    "PooledMatch",
    "ResidualMatch",
    "Unit",
    "asks_for_sizes",
    "changes_in_place",
    "find",
    "layer_of",
    "makes_new_memory",
]


class Unit(NamedTuple):
    """A norm, an activation (None behind the last norm of a residual block) and a convolution, in whatever order they come."""

    norm: Node
    activation: Optional[Node]
    conv: Node


class Layer(NamedTuple):
    """A dense layer: what it reads, its units, and its dropout."""

    source: Node
    units: tuple[Unit, ...]
    dropout: Optional[Node]

    @property
    def out(self) -> Node:
        return self.dropout or self.units[-1].conv


class DenseMatch(NamedTuple):
    layers: list[Layer]


class ResidualMatch(NamedTuple):
    """As `resdense_ext.nn.protocols.ResidualModules`: ``shortcut`` is a convolution and, perhaps, a norm, or a pool and both."""

    form: str
    units: list[Unit]
    shortcut: tuple[Node, ...]
    activation: Optional[Node]


class PooledMatch(NamedTuple):
    norm: Node
    activation: Node
    conv: Optional[Node]
    pool: Node


class Match(NamedTuple):
    """``nodes`` that one engine call stands in for: it reads ``sources`` and runs where ``last`` stood.

    ``outputs`` are those of its values that are read elsewhere: a whole output (None) or, of a dense block, a slice of
    its buffer, ``(first, last)`` in the order in which it grew: 0 is the source, 1 the first layer's map, last not included.
    Only a graph of convolutions has more than one source.
    """

    parts: DenseMatch | ResidualMatch | PooledMatch | GraphMatch
    sources: tuple[Node, ...]
    last: Node
    nodes: set[Node]
    outputs: dict[Node, Optional[tuple[int, int]]]


_KINDS = {
    "conv": (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    "transposed conv": (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    "activation": (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU),
    "activation apart": APART,
    "dropout": nn.modules.dropout._DropoutNd,
    "resize": nn.Upsample,
}


def _resize(*options: Any, antialias: bool = False, **more: Any) -> nn.Upsample:
    """As `torch.nn.functional.interpolate` takes its arguments behind the first."""
    if antialias:
        raise ValueError("antialias: no layer has it")
    return nn.Upsample(*options, **more)


_FUNCTIONS = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_), nn.ReLU),
    **{F.relu6: nn.ReLU6, F.leaky_relu: nn.LeakyReLU, F.elu: nn.ELU, F.silu: nn.SiLU},
    **{F.hardswish: nn.Hardswish, F.mish: nn.Mish, F.gelu: nn.GELU},
    **{F.dropout: nn.Dropout, F.dropout1d: nn.Dropout1d, F.dropout2d: nn.Dropout2d, F.dropout3d: nn.Dropout3d},
    **{F.avg_pool1d: nn.AvgPool1d, F.avg_pool2d: nn.AvgPool2d, F.avg_pool3d: nn.AvgPool3d},
    **{F.max_pool1d: nn.MaxPool1d, F.max_pool2d: nn.MaxPool2d, F.max_pool3d: nn.MaxPool3d},
    F.adaptive_avg_pool1d: nn.AdaptiveAvgPool1d,
    F.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
    F.adaptive_avg_pool3d: nn.AdaptiveAvgPool3d,
    F.interpolate: _resize,
}
"""A layer is made of a function's arguments behind the first, which both name alike."""

_CATS = (torch.cat, torch.concat, torch.concatenate)
_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
_FRESH = (
    *_CATS,
    *(operator.add, operator.sub, operator.mul, torch.add, torch.mul, torch.sub, torch.clone),
    *("add", "mul", "sub", "mean", "clone"),
)
_NEW = (
    *(f"new_{name}" for name in ("empty", "zeros", "ones", "full")),
    *(torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn),
    *(torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like, torch.rand_like, torch.randn_like, torch.bernoulli),
)
"""These make memory that has nothing of their operands'."""
_FRESH_KINDS = ("norm", "activation", "activation apart", "conv", "transposed conv", "pool", "resize")
_FRESH_LAYERS = (
    nn.Linear,
    nn.Bilinear,
    nn.Embedding,
    nn.LayerNorm,
    nn.GroupNorm,
)
"""Of torch's, these never return their input, nor a view of it."""
_DROPS_OF_PATHS = (
    *(("torchvision.ops.stochastic_depth", name) for name in ("StochasticDepth", "stochastic_depth")),
    ("timm.layers.drop", "DropPath"),
)
"""They give samples of their input as they are, or zeros for them."""
_VIEWS = (torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, "flatten", "reshape", "squeeze", "unsqueeze", "view")


def layer_of(node: Node, modules: dict[str, nn.Module]) -> Optional[nn.Module]:
    """The layer that a node runs, of a function one that is made to be like it; None where there is none."""
    if len(node.args) == 0 or not isinstance(node.args[0], Node):
        return None
    if node.op == "call_module":
        return modules[node.target] if len(node.args) == 1 and not node.kwargs else None
    if node.op == "call_method":
        return nn.ReLU() if node.target in ("relu", "relu_") and len(node.args) == 1 else None
    # Of a max_pool the fifth argument and those behind it come in another order.
    if node.op != "call_function" or node.target not in _FUNCTIONS or len(node.args) > 5:
        return None
    if node.all_input_nodes != [node.args[0]]:
        return None
    options = dict(node.kwargs)
    training = options.pop("training", True)
    try:
        return _FUNCTIONS[node.target](*node.args[1:], **options).train(training)
    except (TypeError, ValueError):
        return None


def changes_in_place(node: Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node changes a value that it reads."""
    if node.op == "call_module":
        return bool(getattr(modules[node.target], "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place_operator = getattr(operator, name, None) is node.target and name in _IN_PLACE_OPERATORS
    return in_place_operator or (name[-1:] == "_" != name[-2:-1]) or bool(node.kwargs.get("inplace")) or "out" in node.kwargs


def find(traced: Traced) -> tuple[list[Match], dict[Node, str]]:
    """The matches, which have no node in common, and what looks like one and is none: its last node, and why not."""
    reader = _Reader(traced)
    for node in traced.graph.nodes:
        if reader.changes_in_place(node) and not reader.is_fresh(node):
            return [], {node: "changes a value in place that may be read elsewhere"}
    matches: list[Match] = []
    taken: set[Node] = set()
    finders = (
        reader.dense_blocks,
        reader.residual_blocks,
        lambda: reader.pooled_units(taken),
        lambda: reader.conv_graphs(taken),
        reader.pooled_units,  # between convolutions, where no graph has taken them
    )
    for match in (match for finder in finders for match in finder()):
        if taken.isdisjoint(match.nodes):
            reason = reader.why_not(match)
            if reason is not None:
                reader.reasons[match.last] = reason
                continue
            matches.append(match)
            taken |= match.nodes
    blocks = {node for match in matches if not isinstance(match.parts, GraphMatch) for node in match.nodes}
    for node in traced.graph.nodes:
        if node not in taken and node not in reader.reasons:
            reason = reader.near_miss(node, taken, blocks)
            if reason is not None:
                reader.reasons[node] = reason
    return matches, {node: reason for node, reason in reader.reasons.items() if node not in taken}


def asks_for_sizes(traced: Traced) -> bool:
    """Whether a forward asks for the size of a value, or something inside of it was not traced: where sizes are known it may be
    another graph."""
    return bool(traced.left) or any(node.op in ("call_function", "call_method") and _is_number(node) for node in traced.graph.nodes)


def makes_new_memory(traced: Traced) -> bool:
    """Whether no other value shares the memory of anything that a traced forward returns."""
    reader = _Reader(traced)
    return all(reader.is_fresh(node) and not reader.changed_later(node) for node in traced.returned if isinstance(node, Node))


def _calls_one_of(node: Node, functions: tuple) -> bool:
    return node.op in ("call_function", "call_method") and node.target in functions


def _is_number(node: object) -> bool:
    """Whether it is a size, or reckoned from sizes: to change such a number is to make another."""
    if not isinstance(node, Node):
        return True
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim")
    reckons = node.op == "call_function" and getattr(node.target, "__module__", "") == "_operator"
    return reckons and all(map(_is_number, node.args[:1] if node.target is operator.getitem else node.args))


class _Reader:
    def __init__(self, traced: Traced) -> None:
        self.modules = traced.modules
        self.nodes = list(traced.graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.reasons: dict[Node, str] = {}
        self._layers = {node: layer_of(node, traced.modules) for node in self.nodes}
        self._kinds = {node: self._kind(node) for node in self.nodes}
        self._calls = Counter(self.modules[node.target] for node in self.nodes if node.op == "call_module")
        self._attributes = {node.target.rpartition(".")[0] for node in self.nodes if node.op == "get_attr" and node.users}
        self._pieces: dict[Node, tuple[Node, ...]] = {}
        self._dense = self._dense_layers()

    def _kind(self, node: Node) -> Optional[str]:
        layer = self._layers[node]
        if layer is None:
            is_cat = _calls_one_of(node, _CATS) and self.operands(node)
            return "cat" if is_cat else "sum" if self._is_sum(node) else None
        if pool_kind(layer) is not None:
            return "pool"
        if is_norm(layer):
            return "norm"
        return next((kind for kind, classes in _KINDS.items() if isinstance(layer, classes)), None)

    def _is_sum(self, node: Node) -> bool:
        of_two = len(node.args) == 2 and all(isinstance(operand, Node) for operand in node.args)
        return _calls_one_of(node, _SUMS) and of_two and not node.kwargs

    def operands(self, cat: Node) -> tuple[Node, ...]:
        """What a concatenation of channels puts side by side; nothing where it is another."""
        options = {**dict(zip(("tensors", "dim"), cat.args)), **cat.kwargs}
        operands = options.pop("tensors", None)
        if options != {"dim": 1} or not isinstance(operands, (list, tuple)):
            return ()
        return tuple(operands) if all(isinstance(operand, Node) for operand in operands) else ()

    def layer(self, node: Node) -> Optional[nn.Module]:
        """See `layer_of`."""
        return self._layers[node]

    def is_a(self, node: object, *kinds: str) -> bool:
        return isinstance(node, Node) and self._kinds[node] in kinds

    def inner(self, node: object, kind: str, *users: Node) -> bool:
        """Whether it is one of this kind that nothing but these reads."""
        return self.is_a(node, kind) and set(node.users) == set(users)

    def pieces(self, node: Node) -> tuple[Node, ...]:
        if node not in self._pieces:
            parts = [self.pieces(operand) for operand in self.operands(node)] if self.is_a(node, "cat") else [(node,)]
            self._pieces[node] = tuple(piece for part in parts for piece in part)
        return self._pieces[node]

    def changes_in_place(self, node: Node) -> bool:
        return changes_in_place(node, self.modules) and not _is_number(node)

    def is_fresh(self, node: Node) -> bool:
        """Whether no other value shares the memory of this one."""
        if not self.changes_in_place(node) and not self._passes_on(node):
            made = self._kinds[node] in _FRESH_KINDS or self._runs_one_of(node, _FRESH_LAYERS) or self._runs_converted(node)
            return made or _calls_one_of(node, (*_FRESH, *_NEW))
        operand = self._first(node)
        if operand is None:
            return False
        return self._is_new(operand, node) or (set(operand.users) == {node} and self.is_fresh(operand))

    def _is_new(self, node: Node, change: Node) -> bool:
        """Whether it is new memory, perhaps changed itself, that nothing reads before this change: a mask as it is drawn."""
        if any(self.order[user] < self.order[change] for user in node.users):
            return False
        if not self.changes_in_place(node):
            return _calls_one_of(node, _NEW)
        operand = self._first(node)
        return operand is not None and self._is_new(operand, node)

    @staticmethod
    def _first(node: Node) -> Optional[Node]:
        """The value that a node changes or passes on, if it is its first operand."""
        operand = node.args[0] if node.args and "out" not in node.kwargs else None
        return operand if isinstance(operand, Node) else None

    def changed_later(self, node: Node) -> bool:
        """Whether a value, or what may share its memory, is changed in place."""
        return any(
            (self.changes_in_place(user) and user.args[:1] == (node,))
            or (self._may_share(user) and self.changed_later(user))
            for user in node.users
        )

    def _may_share(self, user: Node) -> bool:
        method = user.op == "call_method" and not _calls_one_of(user, (*_FRESH, *_NEW))
        return method or self._passes_on(user)

    def _passes_on(self, node: Node) -> bool:
        """Whether it may return its first operand, or a view of that, and of nothing else."""
        same = self._kinds[node] == "dropout" or self._runs_one_of(node, (nn.Flatten,)) or self._drops_paths(node)
        return same or _calls_one_of(node, _VIEWS) or node.target is operator.getitem

    def _drops_paths(self, node: Node) -> bool:
        called = type(self.modules[node.target]) if node.op == "call_module" else node.target
        return (getattr(called, "__module__", None), getattr(called, "__name__", None)) in _DROPS_OF_PATHS

    def _runs_converted(self, node: Node) -> bool:
        return node.op == "call_module" and getattr(self.modules[node.target], "makes_new_memory", False)

    def _runs_one_of(self, node: Node, layers: tuple) -> bool:
        return node.op == "call_module" and type(self.modules[node.target]) in layers

    def keeps_input(self, node: Node) -> bool:
        """Whether a norm or an activation keeps what it reads for its backward, in stock, and not its output alone."""
        layer = self._layers[node]
        if self._kinds[node] == "norm":
            return not is_frozen_norm(layer)
        # In place these keep a copy.
        return isinstance(layer, (nn.SiLU, *APART)) or not (isinstance(layer, nn.ReLU) or self.changes_in_place(node))

    def unit(self, conv: Node, *readers: Node) -> Optional[Unit]:
        """Norm, activation, convolution, where the activation has other ``readers`` than the convolution, or none."""
        activation = conv.args[0]
        if not self.inner(activation, "activation", conv, *readers):
            return None
        norm = activation.args[0]
        return Unit(norm, activation, conv) if self.inner(norm, "norm", activation) else None

    def _dense_layers(self) -> dict[Node, Layer]:
        """By what they make, in the order of the graph."""
        found = {}
        for conv in self.nodes:
            unit = self.unit(conv) if self.is_a(conv, "conv") else None
            if unit is None:
                continue
            units, source = (unit,), unit.norm.args[0]
            if self.inner(source, "conv", unit.norm):
                first = self.unit(source)
                if first is not None:
                    units, source = (first, unit), first.norm.args[0]
            if any(is_instance_norm(self._layers[each.norm]) for each in units):
                continue  # a dense block has batch norms
            users = list(conv.users)
            dropout = users[0] if len(users) == 1 and self.is_a(users[0], "dropout") else None
            layer = Layer(source, units, dropout)
            if any(self.is_a(user, "cat") for user in layer.out.users):
                found[layer.out] = layer
        return found

    def dense_blocks(self) -> Iterator[Match]:
        behind: dict[tuple[Node, ...], Layer] = {}
        for layer in self._dense.values():
            # Of several that read the same pieces the first is taken.
            behind.setdefault(self.pieces(layer.source), layer)
        for layer in behind.values():
            pieces = self.pieces(layer.source)
            before = behind.get(pieces[:-1])
            if before is not None and before.out is pieces[-1]:
                continue
            layers = []
            while layer is not None:
                layers.append(layer)
                pieces = (*pieces, layer.out)
                layer = behind.get(pieces)
            match = self._dense_match(layers, pieces)
            if match is not None:
                yield match

    def _dense_match(self, layers: list[Layer], pieces: tuple[Node, ...]) -> Optional[Match]:
        maps = [layer.out for layer in layers]
        base = len(pieces) - len(maps)
        slices = {map_: (i, i + 1) for i, map_ in enumerate(maps, 1)}
        for cat in self.nodes:
            run = self.pieces(cat) if self.is_a(cat, "cat") else ()
            if len(run) > base and run == pieces[: len(run)]:
                slices[cat] = (0, len(run) - base + 1)
            elif len(run) > 1 and run[0] in maps:
                first = 1 + maps.index(run[0])
                if run == tuple(maps[first - 1 : first - 1 + len(run)]):
                    slices[cat] = (first, first + len(run))
        nodes = {node for layer in layers for unit in layer.units for node in unit} | set(slices)
        outputs = {node: part for node, part in slices.items() if set(node.users) - nodes}
        whole = (0, 1 + len(maps))
        if not any(part in (whole, (1, 1 + len(maps))) and self.is_a(node, "cat") for node, part in outputs.items()):
            return None
        outputs = {node: None if part == whole else part for node, part in outputs.items()}
        return Match(DenseMatch(layers), (layers[0].source,), layers[-1].out, nodes, outputs)

    def residual_blocks(self) -> Iterator[Match]:
        for add in self.nodes:
            if not self.is_a(add, "sum"):
                continue
            a, b = add.args
            for main, shortcut in ((a, b), (b, a)):
                match = self._post_activation(add, main, shortcut) or self._pre_activation(add, main, shortcut)
                if match is not None:
                    yield match
                    break

    def _shortcuts(self, add: Node, shortcut: Node) -> Iterator[tuple[Node, tuple[Node, ...]]]:
        """What it may start from, with the projection."""
        yield shortcut, ()
        if self.inner(shortcut, "conv", add):
            yield shortcut.args[0], (shortcut,)
        if self.inner(shortcut, "norm", add) and self.inner(shortcut.args[0], "conv", shortcut):
            conv = shortcut.args[0]
            yield conv.args[0], (conv, shortcut)
            if self.inner(conv.args[0], "pool", conv):
                yield conv.args[0].args[0], (conv.args[0], conv, shortcut)

    def _post_activation(self, add: Node, main: Node, shortcut: Node) -> Optional[Match]:
        for start, projection in self._shortcuts(add, shortcut):
            units: list[Unit] = []
            norm, activation, end = main, None, add
            while self.inner(norm, "norm", end) and self.inner(norm.args[0], "conv", norm):
                conv = norm.args[0]
                units.insert(0, Unit(norm, activation, conv))
                if conv.args[0] is start:
                    if len(projection) == 1:
                        break
                    users = list(add.users)
                    last = users[0] if len(users) == 1 and self.is_a(users[0], "activation") else None
                    parts = ResidualMatch("post", units, projection, last)
                    return self._residual(parts, start, add if last is None else last, add)
                activation = end = conv.args[0]
                if not self.inner(activation, "activation", conv):
                    break
                norm = activation.args[0]
        return None

    def _pre_activation(self, add: Node, main: Node, shortcut: Node) -> Optional[Match]:
        for start, projection in self._shortcuts(add, shortcut):
            if len(projection) > 1:
                continue
            units: list[Unit] = []
            conv, end = main, add
            while self.inner(conv, "conv", end):
                if projection and conv.args[0] is start:
                    unit = self.unit(conv, *projection)
                    if unit is None:
                        break
                    parts = ResidualMatch("pre", [unit, *units], projection, None)
                    return self._residual(parts, unit.norm.args[0], add, add)
                unit = self.unit(conv)
                if unit is None:
                    break
                units.insert(0, unit)
                if unit.norm.args[0] is start and not projection:
                    return self._residual(ResidualMatch("pre", units, (), None), start, add, add)
                conv, end = unit.norm.args[0], unit.norm
        return None

    def _residual(self, parts: ResidualMatch, source: Node, output: Node, add: Node) -> Match:
        nodes = {node for unit in parts.units for node in unit if node is not None}
        nodes |= {add, output, *parts.shortcut}
        return Match(parts, (source,), output, nodes, {output: None})

    def pooled_units(self, taken: Optional[Container[Node]] = None) -> Iterator[Match]:
        """All of them, or those that do not stand between convolutions of which nothing is ``taken``."""
        for pool in self.nodes:
            # Of windows that reach beyond the map the engine knows nothing, and a chain may have what stands before them.
            if not self.is_a(pool, "pool") or getattr(self._layers[pool], "ceil_mode", False):
                continue
            before, end, conv = pool.args[0], pool, None
            if self.inner(before, "conv", pool):
                before, end, conv = before.args[0], before, before
            if self.inner(before, "activation", end) and self.inner(before.args[0], "norm", before):
                norm = before.args[0]
                parts = PooledMatch(norm, before, conv, pool)
                if taken is not None and conv is None and self._between_convs(norm, pool, taken):
                    continue
                yield Match(parts, (norm.args[0],), pool, set(parts) - {None}, {pool: None})

    def _between_convs(self, norm: Node, pool: Node, taken: Container[Node]) -> bool:
        behind = (user for user in pool.users if user not in taken)
        makes = self.is_a(norm.args[0], "conv", "transposed conv") and norm.args[0] not in taken
        return makes and any(self.is_a(user, "conv", "transposed conv", "cat", "pool", "resize") for user in behind)

    def conv_graphs(self, taken: set[Node]) -> Iterator[Match]:
        for parts, nodes, outputs in find_conv_graphs(self, taken):
            yield Match(parts, parts.sources, list(parts.convs)[-1], nodes, dict.fromkeys(outputs))

    def reads(self, match: GraphMatch, nodes: Container[Node]) -> bool:
        """Whether the engine takes the modules of a graph; hooks, which come and go, do not count."""
        if any(node.op == "call_module" and is_hooked(self.modules[node.target]) for node in nodes):
            return True
        try:
            read_conv_graph(graph_modules(match, self._layers.get))
        except Unsupported:
            return False
        return True

    def why_not(self, match: Match) -> Optional[str]:
        """Why the engine must not stand in for a match, whatever its modules are."""
        for node in match.nodes:
            if self._kinds[node] == "norm":
                if self._calls[self.modules[node.target]] > 1:
                    return f"{node.target} serves twice, so its running statistics change in between"
                if node.target in self._attributes:
                    return f"{node.target} is used in another way, too"
        at = self.order[match.last]
        if any(self.order[user] < at for node in match.outputs for user in set(node.users) - match.nodes):
            return "what it makes is read before it has ended"
        kept = isinstance(match.parts, DenseMatch) or (isinstance(match.parts, ResidualMatch) and match.parts.activation is not None)
        if kept and any(map(self.changed_later, match.outputs)):
            return "its output is changed in place"
        if any(self._kinds[node] == "dropout" for node in match.nodes):
            first = min(self.order[node] for node in match.nodes)
            between = set(self.nodes[first:at]) - match.nodes
            if any(self._kinds[node] in (None, "dropout") and node.op != "get_attr" for node in between):
                return "other random numbers may be drawn between those of its dropouts"
        return None

    def near_miss(self, node: Node, taken: set[Node], blocks: set[Node]) -> Optional[str]:
        """What a concatenation or an addition of layers' outputs lacks; ``blocks`` are the nodes of dense and residual ones."""
        makes = ("conv", "norm", "activation", "dropout")
        if self.is_a(node, "cat") and self._has_one(self.pieces(node), makes) and not self._gathered(node, taken):
            return (
                "concatenates what is not made of all before it by batch norm, activation and convolution, "
                "and no convolution reads it"
            )
        # In front of it may stand a chain's norm.
        added = [n for n in node.all_input_nodes if n not in (blocks if self.is_a(n, "norm") else taken)]
        if self.is_a(node, "sum") and self._has_one(added, ("conv", "norm", "dropout")):
            return "adds what is not made by convolutions, batch norms and activations of the other operand alone"
        return None

    def _gathered(self, cat: Node, taken: set[Node]) -> bool:
        """Whether all that reads it is matched, also by way of other concatenations: nobody makes it any more."""
        cats = [cat]
        for each in cats:
            users = [user for user in each.users if user not in taken and user not in cats]
            if not all(self.is_a(user, "cat") for user in users):
                return False
            cats += users
        return True

    def _has_one(self, nodes: Iterable[Node], kinds: tuple[str, ...]) -> bool:
        return any(self._kinds[node] in kinds for node in nodes)


_IN_PLACE_OPERATORS = {name for name in dir(operator) if name[0] == "i" and hasattr(operator, f"__{name}__")} - {
    "inv", "invert", "is_", "is_not", "index", "itemgetter", "indexOf"
} | {"setitem", "delitem"}
