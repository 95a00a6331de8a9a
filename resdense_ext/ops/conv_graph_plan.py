"""Which maps of a graph of convolutions are kept for backward, and which it computes again.

See `resdense_ext.ops.conv_graph` for what the maps are. The policy "fast" keeps all that backward reads. Under either what pools
and resizes have made of a map that is kept is not, as it takes no product to be made again. Under "min" the graph is
cut into stretches: what is read across a cut is kept, and backward computes the maps of a stretch again when it comes to it. The
cuts are where what is kept and the largest stretch take the least together. Between the two a budget chooses: a bool a step says
which maps of those that "fast" keeps are kept beside those of "min". As backward reads every one of them, each that is not kept
takes the product that makes it once more, whatever else is kept.

Source: Chen et al., Training Deep Nets with Sublinear Memory Cost (2016).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Container, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from resdense_ext.ops.units import GRADS, Gradients
from resdense_ext.reference import Conv, ConvGraph, Piece, Resampling, TransposedConv

__all__ = [
    "Offer",
    "Step",
    "Wanted",
    "is_plain",
    "kept_maps",
    "made_for",
    "map_of_norm",
    "offer_of",
    "pieces_of",
    "positions_of",
    "widths_of",
]

Step = Conv | TransposedConv | Resampling


def pieces_of(graph: ConvGraph) -> Iterator[Piece]:
    """All that are read."""
    return (piece for pieces in (*graph.reads, *graph.outputs) for piece in pieces)


def is_plain(piece: Piece) -> bool:
    """Whether it is the map as it is."""
    return piece.norm is None and piece.activation.name == "identity"


def map_of_norm(graph: ConvGraph) -> dict[int, int]:
    """The map that every norm reads."""
    return {piece.norm: piece.map for piece in pieces_of(graph) if piece.norm is not None}


def widths_of(sources: Sequence[int], convs: Sequence[Step], reads: Iterable[Sequence[Any]]) -> list[int]:
    """Every map's number of channels, from those of the sources and the maps of what the steps read."""
    widths = list(sources)
    for conv, pieces in zip(convs, reads):
        widths.append(widths[pieces[0].map] if isinstance(conv, Resampling) else conv.channels)
    return widths


def positions_of(sources: Sequence[Tensor], graph: ConvGraph) -> list[int]:
    """Every map's number of positions, of all samples."""
    sizes = [x.shape[2:] for x in sources]
    for conv, pieces in zip(graph.convs, graph.reads):
        sizes.append(conv.outputs(sizes[pieces[0].map]))
    return [len(sources[0]) * math.prod(of_map) for of_map in sizes]


class Wanted:
    """Of which ``maps``, and of which pieces, anything asks for the gradient; and the maps that backward reads for it: what
    convolutions ``read``, and what outputs read through a norm or an activation."""

    def __init__(self, graph: ConvGraph, sources: int, asked: Gradients) -> None:
        self._needs, self._norms = asked.needs, sources + len(GRADS) * len(graph.convs)
        self._slopes = self._norms + len(GRADS) * len(graph.norms)
        self.maps = list(asked.needs[:sources])
        for i, pieces in enumerate(graph.reads):
            self.maps.append(asked.wants_weight(i) or any(map(self.piece, pieces)))
        given = (piece for pieces in graph.outputs for piece in pieces if not is_plain(piece))
        self.read = {piece.map for piece in given if self.piece(piece)}
        self.read.update(piece.map for i, pieces in enumerate(graph.reads) for piece in pieces if self.maps[sources + i])

    def piece(self, piece: Piece) -> bool:
        name, slope = piece.activation
        learns = (piece.norm is not None and self._norm(piece.norm)) or (name == "prelu" and self._slope(slope))
        return self.maps[piece.map] or learns

    def _slope(self, slope: int) -> bool:
        return self._needs[self._slopes + len(GRADS) * slope]

    def _norm(self, norm: int) -> bool:
        first = self._norms + len(GRADS) * norm
        return any(self._needs[first : first + 2])


def made_for(reads: Sequence[Sequence[Piece]], sources: int, wanted: Container[int], there: Container[int]) -> set[int]:
    """The maps that are made to have those that are ``wanted``, where some are ``there``; the sources among them are read."""
    made: set[int] = set()
    for of in reversed(range(sources, sources + len(reads))):
        if of not in there and (of in wanted or of in made):
            made |= {of, *(piece.map for piece in reads[of - sources])}
    return made


def kept_maps(sources: Sequence[Tensor], graph: ConvGraph, needs: Sequence[bool], policy: str | Sequence[bool]) -> set[int]:
    """Those that are kept for the gradients that ``needs`` asks for."""
    count = len(sources)
    wanted = Wanted(graph, count, Gradients(needs, count))
    read = wanted.read
    if policy == "fast":
        return _without_resampled(read, graph, count)
    # What comes out of a frozen front is kept: it takes no more than what it is made of.
    given = frozenset(of for of in read if of < count or not wanted.maps[of])
    values = tuple(_values(sources, graph)[count:])
    kept = given | _read_across_cuts(graph.reads, graph.outputs, count, frozenset(read), given, values)
    kept |= {of for of in made_for(graph.reads, count, read, kept) if of < count}
    if policy != "min":
        kept |= read.intersection(of for of, keep in enumerate(policy, count) if keep)
    return _without_resampled(kept, graph, count)


def _without_resampled(maps: set[int], graph: ConvGraph, sources: int) -> set[int]:
    """These but for what pools and resizes have made of others of them."""
    return {of for of in maps if not maps.intersection(_resampled(graph, sources, of))}


def _resampled(graph: ConvGraph, sources: int, of: int) -> Iterator[int]:
    """The maps that a map is made of by pools and resizes alone, from the last on."""
    while of >= sources and isinstance(graph.convs[of - sources], Resampling):
        of = graph.reads[of - sources][0].map
        yield of


def _values(sources: Sequence[Tensor], graph: ConvGraph) -> list[int]:
    """The number of values of every map."""
    widths = widths_of([x.shape[1] for x in sources], graph.convs, graph.reads)
    return list(map(operator.mul, positions_of(sources, graph), widths))


class Offer(NamedTuple):
    """What a budget may choose between "min" and "fast", and what it has to leave room for.

    ``maps`` has a pair a step of the graph: the bytes that keeping its map takes beside what "min" keeps, and the FLOPs that this
    spares; None where there is no choice. ``scratch`` are the most bytes that the backward of "min" has beside what is kept: maps
    that it has made again, and gradients of maps.
    """

    maps: list[Optional[tuple[int, int]]]
    scratch: int


def offer_of(sources: Sequence[Tensor], graph: ConvGraph, dtype: torch.dtype) -> Offer:
    """That of a graph whose maps have this dtype."""
    count, needs = len(sources), _asked(sources, graph)
    fast, least = (kept_maps(sources, graph, needs, policy) for policy in ("fast", "min"))
    positions, nbytes = positions_of(sources, graph), [dtype.itemsize * values for values in _values(sources, graph)]
    taken = {of: nbytes[of] for of in fast - least}
    for of in least - fast:  # that of what is made of a map goes where the map is kept
        for root in taken.keys() & set(_resampled(graph, count, of)):
            taken[root] -= nbytes[of]
    maps: list[Optional[tuple[int, int]]] = []
    for of, (conv, pieces) in enumerate(zip(graph.convs, graph.reads), count):
        multiplied = positions[pieces[0].map if isinstance(conv, TransposedConv) else of]
        maps.append((taken[of], 2 * multiplied * conv.weight.numel()) if of in taken else None)
    return Offer(maps, _scratch(graph, Wanted(graph, count, Gradients(needs, count)), least, nbytes))


def _asked(sources: Sequence[Tensor], graph: ConvGraph) -> list[bool]:
    """Of which a training step asks for the gradient, in the order of `Gradients`."""
    weights = [(None, None) if isinstance(conv, Resampling) else (conv.weight, conv.bias) for conv in graph.convs]
    parameters = [t for of in weights for t in (None, None, *of)]
    parameters += [t for norm in graph.norms for t in (norm.weight, norm.bias, None, None)]
    parameters += [t for slope in graph.slopes for t in (slope, None, None, None)]
    return [t is not None and t.requires_grad for t in (*sources, *parameters)]


def _scratch(graph: ConvGraph, wanted: Wanted, kept: set[int], nbytes: Sequence[int]) -> int:
    """As `Offer` says: backward goes from the last step to the first, and has what a step reads made before its turn."""
    count = len(nbytes) - len(graph.convs)
    most, grads = 0, {piece.map for pieces in graph.outputs for piece in pieces}
    made = made_for(graph.reads, count, grads & wanted.read, kept) - kept
    for i in reversed(range(len(graph.convs))):
        reads = {piece.map for piece in graph.reads[i]}
        made |= made_for(graph.reads, count, reads & wanted.read, kept | made) - kept
        grads |= {of for of in reads if wanted.maps[of]}
        most = max(most, sum(nbytes[of] for of in made) + sum(nbytes[of] for of in grads))
        made.discard(count + i)
        grads.discard(count + i)
    return most


@lru_cache(256)
def _read_across_cuts(
    reads: Sequence[Sequence[Piece]],
    outputs: Sequence[Sequence[Piece]],
    sources: int,
    read: frozenset[int],
    given: frozenset[int],
    values: Sequence[int],
) -> set[int]:
    """The maps that are kept beside those that are ``given``; ``values`` are the numbers of values of all that are no sources."""
    count = len(reads)
    needed = (read | made_for(reads, sources, read, given)) - given
    last = {piece.map - sources: i for i, pieces in enumerate(reads) for piece in pieces}
    last |= {piece.map - sources: count for pieces in outputs for piece in pieces}
    sizes = [size if sources + i in needed else 0 for i, size in enumerate(values)]
    before = [0, *accumulate(sizes)]
    # In front of convolution j: the maps that are there and are read from it on.
    across = [{i for i in range(j) if sizes[i] and last.get(i, -1) >= j} for j in range(count + 1)]
    across[count] = set()  # backward begins there: it is no cut
    taken = [sum(sizes[i] for i in maps) for maps in across]

    def cut(limit: float) -> tuple[set[int], float]:
        """What is kept where no stretch takes more than ``limit``, unless it is a single convolution; and what that takes together
        with the largest stretch."""
        least, begin = [0.0] + [math.inf] * count, [0] * (count + 1)
        for j in range(1, count + 1):
            for i in range(j):
                if (i == j - 1 or before[j] - before[i] <= limit) and least[i] + taken[j] < least[j]:
                    least[j], begin[j] = least[i] + taken[j], i
        ends = [count]
        while ends[-1]:
            ends.append(begin[ends[-1]])
        kept = set().union(*(across[end] for end in ends))
        stretches = [sum(sizes[i] for i in range(first, end) if i not in kept) for end, first in zip(ends, ends[1:])]
        return kept, sum(sizes[i] for i in kept) + max(stretches, default=0)

    kept, _ = min((cut(before[count] / 2 ** (step / 2)) for step in range(24)), key=lambda plan: plan[1])
    return {sources + i for i in kept}
