"""Where a traced graph convolves concatenations, of all maps before, of some, in any order, behind norms and activations or not;
and its chains of convolutions with norms and activations in between.

What takes part belongs together by its home. That is the innermost container in which concatenations are made and read; in it,
every convolution joins, with the norms and activations behind it, until something else reads what they have made. Outside of
those a convolution joins the one whose map it reads, through a norm or an activation for which stock keeps that map, too: then no
more is kept than in stock, whatever else reads what the chain has made.

The home of a concatenation is also around what its pieces are made by, as in a U-Net, where that leads to a graph that holds all of
them. Pools and resizes join where a graph makes what they read and reads what they make.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from typing import Any, NamedTuple, Optional, Protocol

import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from resdense_ext.nn.leaves import Unsupported, pool_kind, resampling_of
from resdense_ext.nn.protocols import GraphModules, PieceModules, ReadModules

__all__ = ["Gather", "GraphMatch", "PieceMatch", "find_conv_graphs", "graph_modules"]


class PieceMatch(NamedTuple):
    """``activation(norm(map))``; the map is what a convolution makes, or a value from elsewhere."""

    map: Node
    norm: Optional[Node] = None
    activation: Optional[Node] = None


class Gather(NamedTuple):
    """``activation(norm(cat(pieces)))``: what a convolution reads. In front of a norm pieces are maps as they are."""

    pieces: tuple[PieceMatch, ...]
    norm: Optional[Node] = None
    activation: Optional[Node] = None
    cats: frozenset[Node] = frozenset()

    @property
    def nodes(self) -> set[Node]:
        found = {node for piece in self.pieces for node in piece[1:]} | {self.norm, self.activation} | self.cats
        return found - {None}


class GraphMatch(NamedTuple):
    """``outputs`` are in the order of the match's."""

    sources: tuple[Node, ...]
    convs: dict[Node, Gather]
    outputs: tuple[Gather, ...]


class Reader(Protocol):
    """What a traced graph's reader tells of its nodes."""

    nodes: list[Node]
    modules: dict[str, nn.Module]

    def is_a(self, node: object, *kinds: str) -> bool: ...

    def layer(self, node: Node) -> Optional[nn.Module]: ...

    def operands(self, cat: Node) -> tuple[Node, ...]: ...

    def keeps_input(self, node: Node) -> bool: ...

    def reads(self, match: GraphMatch, nodes: Container[Node]) -> bool: ...


def graph_modules(match: GraphMatch, layer: Callable[[Optional[Node]], Optional[nn.Module]]) -> GraphModules:
    """Its modules, of which ``layer`` has each node's."""
    numbers = {node: i for i, node in enumerate((*match.sources, *match.convs))}

    def pair(of: Gather | PieceMatch) -> tuple[Optional[nn.Module], Optional[nn.Module]]:
        return layer(of.norm), layer(of.activation)

    def read(gather: Gather) -> ReadModules:
        return ReadModules(tuple(PieceModules(numbers[of.map], *pair(of)) for of in gather.pieces), *pair(gather))

    convs = tuple((layer(conv), read(gather)) for conv, gather in match.convs.items())
    return GraphModules(convs, tuple(map(read, match.outputs)))


def find_conv_graphs(reader: Reader, taken: Container[Node]) -> Iterator[tuple[GraphMatch, set[Node], list[Node]]]:
    """The graphs that keep less than stock, the nodes that each stands for, and those of its outputs.

    Args:
        taken: nodes that something else stands for.
    """
    apart: set[Node] = set()
    while True:
        finder = _Finder(reader, taken, apart)
        groups, matches = list(finder.groups()), []
        read = {source for group in groups for source in group.sources}
        failed = {node for group in groups for node in group.loose()}
        for group in groups:
            nodes = group.nodes()
            # What another graph reads may be a piece of a concatenation inside of this one; a norm that nobody reads changes, too.
            outputs = [n for n in reader.nodes if n in nodes and (n in read or not n.users or set(n.users) - nodes)]
            match = GraphMatch(tuple(group.sources), group.convs, tuple(map(group.gather, outputs)))
            saves, more = group.saves(outputs), finder.more & group.convs.keys()
            if saves and (not more or reader.reads(match, nodes)):
                matches.append((match, nodes, outputs))
            else:
                failed |= more
        if not failed:
            yield from matches
            return
        apart |= failed


class _Group:
    """Convolutions that have joined so far, what they read from elsewhere, and all values of theirs."""

    def __init__(self, finder: _Finder) -> None:
        self.finder = finder
        self.convs: dict[Node, Gather] = {}
        self.sources: dict[Node, None] = {}
        self.values: set[Node] = set()

    def add(self, conv: Node) -> None:
        gather = self.finder.before(conv, self.convs)
        self.sources.update(dict.fromkeys(piece.map for piece in gather.pieces if piece.map not in self.convs))
        self.convs[conv] = gather
        self.values |= {conv, *gather.nodes}

    def loose(self) -> set[Node]:
        """Of its pools and resizes those that read nothing of the group's, or of which it reads nothing; and the convolutions for
        which it reaches out to maps that are not in it."""
        read = {piece.map for gather in self.convs.values() for piece in gather.pieces}
        resamplings = self.finder.resamplings & self.convs.keys()
        found = {node for node in resamplings if node not in read or self.convs[node].pieces[0].map not in self.convs}
        reaching = self.finder.reaching.keys() & self.convs.keys()
        outside = self.finder.candidates - self.convs.keys()
        return found | {conv for conv in reaching if any(piece.map in outside for piece in self.convs[conv].pieces)}

    def gather(self, node: Node) -> Gather:
        """What a value of the group is made of."""
        pieces, cats = self.finder.pieces(node, self.convs)
        return Gather(pieces, cats=cats)

    def holds(self, node: Node) -> bool:
        """Whether a value is nothing but maps of the group side by side."""
        return all(piece.map in self.convs or piece.map in self.sources for piece in self.gather(node).pieces)

    def saves(self, outputs: Container[Node]) -> bool:
        """Whether less is kept than in stock, whatever else is read: a concatenation, or what is made of a map that stock keeps
        besides, by a norm or an activation; and no map that an output is made of, where stock keeps that output alone, nor a value
        that in stock ends in a concatenation, unless these are smaller than the concatenations."""
        given = [(node, piece) for node in outputs for piece in self.gather(node).pieces if piece != PieceMatch(piece.map)]
        alone = [(node, piece.map) for node, piece in given if not self.finder.keeps_map(piece)]
        gathered = {conv: gather for conv, gather in self.convs.items() if len(gather.pieces) > 1}
        if gathered:
            inside = {node for gather in gathered.values() for node in gather.nodes}
            ends = {source for source in self.sources if set(source.users) <= inside and not self.finder.keeps_output(source)}
            more = {of for node, of in alone if not all(map(self.finder.keeps_nothing, node.users))}
            spared = sum(self.finder.reader.modules[conv.target].in_channels for conv in gathered)
            return spared > sum(map(self.finder.width, more | ends))
        read = [of for gather in self.convs.values() for of in (*gather.pieces, gather)]
        spares = [of for of in read if (of.activation or of.norm) not in outputs]
        # What an activation keeps besides, where nothing that reads it keeps it anyhow.
        spares += [of for node, of in given if of.norm and of.activation and all(map(self.finder.keeps_nothing, node.users))]
        return not alone and any(map(self.finder.keeps_map, spares))

    def nodes(self) -> set[Node]:
        nodes = {node for gather in self.convs.values() for node in gather.nodes} | set(self.convs)
        for node in self.values - nodes:
            gather = self.gather(node)
            if node not in self.finder.read_by and not (gather.cats and not self.holds(node)):
                nodes |= gather.nodes
        return nodes


_ACTIVATIONS = "activation", "activation apart"

_Within = tuple[str, ...]

_Home = _Within | Node
"""A container, or the first convolution of a chain."""


class _Finder:
    """``apart`` are pools and resizes that join no graph, and convolutions for which no home reaches out, and that join none."""

    def __init__(self, reader: Reader, taken: Container[Node], apart: Container[Node]) -> None:
        self.reader, self.taken, self.apart = reader, taken, apart
        self.candidates = {node for node in reader.nodes if self._is_candidate(node)}
        self.resamplings: set[Node] = set()
        for node in reader.nodes:
            if node not in apart and self._resamples(node):
                self.resamplings.add(node)
                self.candidates.add(node)
        self.reaching: dict[Node, _Within] = {}
        """The convolutions whose home is around more than them and their concatenations, and that home."""
        self.joining: set[Node] = set()
        """Those behind a home's, and no part of it."""
        self.fronts = {conv: self._front(conv) for conv in self.candidates}
        self.homes = self._homes()
        self.read_by: dict[Node, Node] = {}
        """The last of the convolutions in whose reading a concatenation, or a norm or activation behind one, stands."""
        for conv in self.homes:
            gather = self.before(conv, self.candidates)
            self.read_by |= dict.fromkeys({gather.norm, gather.activation, *gather.cats} - {None}, conv)

    def is_a(self, node: object, *kinds: str) -> bool:
        return self.reader.is_a(node, *kinds) and node not in self.taken

    def _is_candidate(self, node: Node) -> bool:
        return self.is_a(node, "conv", "transposed conv") and self.reader.modules[node.target].padding_mode == "zeros"

    def _resamples(self, node: Node) -> bool:
        """Whether it is a pool or a resize, as graphs take them, of what a candidate makes."""
        if not self.is_a(node, "pool", "resize"):
            return False
        before = self.piece(node.args[0], self.candidates).map
        while before in self.resamplings:
            before = self.piece(before.args[0], self.candidates).map
        if before not in self.candidates:
            return False
        try:
            resampling_of(self.reader.layer(node), len(self.reader.layer(before).kernel_size))
        except Unsupported:
            return False
        return True

    def _homes(self) -> dict[Node, _Home]:
        homes: dict[Node, Any] = {}  # containers at first
        for conv in self.candidates:
            pieces, _, _, cats = self.before(conv, self.candidates)
            if len(pieces) == 1:
                continue
            made = [piece.map for piece in pieces if piece.map in self.candidates]
            home, around = _common(conv, *cats), _common(conv, *cats, *made)
            if around != home and conv not in self.apart:
                home = around
                self.reaching[conv] = home
            for node in (conv, *made):
                if _lies_in(node, home):
                    homes[node] = min(homes.get(node, home), home, key=len)
        for conv, home in homes.items():  # what is reached is a part, whatever home it has
            homes[conv] = min([home, *(home for home in self.reaching.values() if _lies_in(conv, home))], key=len)
        inside = sorted(set(homes.values()), key=len)
        for conv in self.candidates - homes.keys():
            around = [home for home in inside if _lies_in(conv, home)]
            if around:
                homes[conv] = around[-1]
        for conv in self.reader.nodes:
            if conv in self.candidates and conv not in homes:
                (piece,), *_ = self.before(conv, self.candidates)
                homes[conv] = homes.get(piece.map, conv) if self._goes_on(conv, piece) else conv
                if not isinstance(homes[conv], Node) and conv in self.apart:
                    homes[conv] = conv
                elif not isinstance(homes[conv], Node):
                    self.joining.add(conv)
        return homes

    @property
    def more(self) -> set[Node]:
        """What makes graphs larger than containers and chains are."""
        return self.resamplings | self.reaching.keys() | self.joining

    def _goes_on(self, node: Node, piece: PieceMatch) -> bool:
        """Whether a chain keeps no more than stock when a convolution, a pool or a resize that reads this piece joins it. Stock keeps
        what a convolution reads behind a pool or a resize, and what a maximum is taken of; what is resized mostly grows."""
        kept = node in self.resamplings and pool_kind(self.reader.layer(node)) != "average"
        return self.keeps_map(piece) or kept or piece.map in self.resamplings

    def keeps_map(self, of: PieceMatch | Gather) -> bool:
        """Whether stock keeps, for a norm or an activation, what these read."""
        first = of.norm or of.activation
        return first is not None and self.reader.keeps_input(first)

    def keeps_output(self, node: Node) -> bool:
        """Whether it is an activation that stock keeps by its output."""
        return self.reader.is_a(node, "activation") and not self.reader.keeps_input(node)

    def keeps_nothing(self, node: Node) -> bool:
        """Whether it needs no values of what it reads for its backward."""
        return self.reader.is_a(node, "cat", "sum", "pool") or self._resizes(node)

    def _resizes(self, node: Node) -> bool:
        """Whether it resizes, be it to sizes that a graph knows nothing of."""
        return self.reader.is_a(node, "resize") or node.target is F.interpolate

    def _layer(self, node: Node) -> Optional[nn.Module]:
        return self.reader.modules[node.target] if node.op == "call_module" else None

    def width(self, node: object) -> int:
        """The channels of a value, as layers tell them; 0 where they do not."""
        if not isinstance(node, Node):
            return 0
        if self.reader.is_a(node, "cat"):
            return sum(map(self.width, self.reader.operands(node)))
        known = (getattr(self._layer(node), name, 0) for name in ("out_channels", "num_features", "num_channels"))
        channels = next((n for n in known if isinstance(n, int) and n), 0)
        same = self.reader.is_a(node, *_ACTIVATIONS, "pool", "dropout")
        return channels or (self.width(node.args[0]) if same or self._resizes(node) else 0)

    def piece(self, node: Node, convs: Container[Node]) -> PieceMatch:
        """A value by what one of these convolutions makes; itself where it is none."""
        before, norm, activation = node, None, None
        if self.is_a(before, *_ACTIVATIONS):
            before, activation = before.args[0], before
        if self.is_a(before, "norm"):
            before, norm = before.args[0], before
        return PieceMatch(before, norm, activation) if before in convs else PieceMatch(node)

    def pieces(self, node: Node, convs: Container[Node]) -> tuple[tuple[PieceMatch, ...], frozenset[Node]]:
        """Those of a concatenation, and the concatenations of which it is made."""
        if not self.is_a(node, "cat"):
            return (self.piece(node, convs),), frozenset()
        parts = [self.pieces(operand, convs) for operand in self.reader.operands(node)]
        cats = frozenset({node}).union(*(cats for _, cats in parts))
        return tuple(piece for pieces, _ in parts for piece in pieces), cats

    def before(self, conv: Node, convs: Container[Node]) -> Gather:
        """What a convolution reads, in terms of what these make."""
        begin, norm, activation = self.fronts[conv]
        pieces, cats = self.pieces(begin, convs)
        return Gather(pieces, norm, activation, cats)

    def _front(self, conv: Node) -> tuple[Node, Optional[Node], Optional[Node]]:
        """Where what a convolution reads begins, and the norm and the activation behind that which it alone reads; those behind
        a single convolution are of that one's piece, and such pieces have no other norm or activation behind them."""
        before, norm, activation = conv.args[0], None, None
        if self._alone(before, conv, *_ACTIVATIONS):
            before, activation = before.args[0], before
        if self._alone(before, activation or conv, "norm"):
            before, norm = before.args[0], before
        pieces, _ = self.pieces(before, self.candidates)
        plain = before not in self.candidates and all(piece.norm is piece.activation is None for piece in pieces)
        return (before, norm, activation) if plain else (conv.args[0], None, None)

    def _alone(self, node: object, reader: Node, *kinds: str) -> bool:
        return self.is_a(node, *kinds) and set(node.users) == {reader}

    def groups(self) -> Iterator[_Group]:
        opened: dict[_Home, _Group] = {}
        for node in self.reader.nodes:
            own = self.homes.get(self.read_by.get(node, node))
            if node in self.homes:
                opened.setdefault(own, _Group(self)).add(node)
            elif node not in self.read_by:
                own = next((home for home, group in opened.items() if self._goes_with(node, home, group)), None)
            for home, group in list(opened.items()):
                if home == own:
                    group.values.add(node)
                elif not group.values.isdisjoint(node.all_input_nodes):
                    yield opened.pop(home)
        yield from opened.values()

    def _goes_with(self, node: Node, home: _Home, group: _Group) -> bool:
        """Whether it is a norm or an activation behind a convolution of a group, or concatenates nothing but what is the group's."""
        if self.is_a(node, "cat"):
            return not group.values.isdisjoint(node.all_input_nodes) and group.holds(node)
        piece = self.piece(node, group.convs)
        behind = node not in group.convs and piece.map in group.convs
        return behind and (not isinstance(home, Node) or self.keeps_map(piece))


def _common(*nodes: Node) -> _Within:
    """The containers that all of them lie in, from the outermost on."""
    first, *others = (node.meta["within"] for node in nodes)
    size = next((i for i in range(len(first)) if any(other[i : i + 1] != first[i : i + 1] for other in others)), len(first))
    return first[:size]


def _lies_in(node: Node, home: _Within) -> bool:
    return node.meta["within"][: len(home)] == home
