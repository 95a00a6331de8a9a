"""Convolutions of concatenations that nobody keeps: every map is kept once, as its convolution wrote it.

A convolution reads *pieces* side by side, ``piece = act(norm(map))`` of any maps before it::

    map_i = conv_i([piece, piece, ...])         output = [piece, piece, ...]

Stock PyTorch keeps every concatenation, and of every normalised and activated map its input and its output. Here the pieces are
gathered into a passing tensor when a convolution reads them, forward and, unless they are two, again in backward; so is a
single one whose activation none of our kernels has, that a transposed convolution reads, or that is of several samples with
instance norms. The statistics of a map are taken once, by the convolution that writes it. Backward goes through the
convolutions from the last to the first; what a piece's reader asks of it is added to the one gradient of its map, with the
norm's correction deferred as in a dense block. A chain of convolutions, norms and activations is a graph in which each
convolution reads one piece. Pools and resizes may stand among the convolutions; what they have made can be made again without a product.

Maps that were not kept backward computes again, with the statistics that are known: see `resdense_ext.ops.conv_graph_plan`.

Sources of the architectures: Zhang et al., Residual Dense Network for Image Super-Resolution (2018); Chao et al., HarDNet (2019);
Lee et al., VoVNet (2019).
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import Optional

import torch
from torch import Tensor

from resdense_ext import reference
from resdense_ext.ops.activation import LINEAR, apart_backward, is_apart
from resdense_ext.ops.conv_graph_plan import Step, Wanted, is_plain, made_for, map_of_norm, pieces_of, widths_of
from resdense_ext.ops.convolve import convolve_backward, convolved, finished, sampling
from resdense_ext.ops.layout import empty_map, map_beside, memory_format_of
from resdense_ext.ops.operands import ConvGrads, Fold, Pending, Stats
from resdense_ext.ops.reference_backend import ReferenceBackend
from resdense_ext.ops.resample import resample, resample_backward
from resdense_ext.ops.split_unit import split_conv
from resdense_ext.ops.units import Gradients
from resdense_ext.reference import Conv, ConvGraph, Piece, Resampling, TransposedConv

__all__ = ["backward", "forward"]


def forward(
    sources: Sequence[Tensor], graph: ConvGraph, backend: ReferenceBackend, keep: Container[int]
) -> tuple[list[Tensor], list[Optional[Tensor]], list[Stats]]:
    """The outputs; the maps, perhaps without some that were not to ``keep``; every map's statistics, empty where no norm asks for
    them."""
    norms = {of: graph.norms[norm] for norm, of in map_of_norm(graph).items() if graph.norms[norm].batch_stats}
    stats = [Stats.room(x, None) for x in sources]
    for of, x in enumerate(sources):
        if of in norms:
            stats[of] = Stats(*backend.channel_stats(x))
    walk = _Maps(graph, backend, list(sources), stats)
    last_reader = {piece.map: i for i, pieces in enumerate((*graph.reads, *graph.outputs)) for piece in pieces}
    for i, (conv, pieces) in enumerate(zip(graph.convs, graph.reads)):
        x, fold = walk.read(pieces, conv)
        reader = norms.get(len(walk.maps))
        if isinstance(conv, Resampling):
            z, _ = resample(backend, x, fold, conv)
            of_z = backend.stats_for(reader, z)
        else:
            z, of_z = convolved(backend, x, fold, conv, reader)
        stats.append(of_z)
        walk.maps.append(z)
        del x, z
        for piece in pieces:
            if last_reader[piece.map] == i and piece.map not in keep:
                walk.maps[piece.map] = None
    return [walk.gather(pieces) for pieces in graph.outputs], walk.maps, stats


def backward(
    upstream: Sequence[Optional[Tensor]],
    maps: list[Optional[Tensor]],
    graph: ConvGraph,
    backend: ReferenceBackend,
    stats: Sequence[Stats],
    needs: Sequence[bool],
) -> list[Optional[Tensor]]:
    """The gradients that ``needs`` asks for, of the sources and of `GRADS` of every convolution and, behind these, every norm.

    Those of the ``maps`` that it reads and that were not kept are computed again; no map outlives its convolution's turn.
    """
    walk = _Backward(graph, backend, maps, stats, needs)
    for pieces, grad in zip(graph.outputs, upstream):
        if grad is not None:
            walk.complete(piece.map for piece in pieces)
            walk.spread(pieces, grad)
    for i in reversed(range(len(graph.convs))):
        walk.through(i)
    return walk.finish()


class _Maps:
    def __init__(
        self, graph: ConvGraph, backend: ReferenceBackend, maps: list[Optional[Tensor]], stats: Sequence[Stats]
    ) -> None:
        self.graph, self.backend, self.maps, self.stats = graph, backend, maps, stats
        self._folds: dict[Piece, Optional[Fold]] = {}

    def fold(self, piece: Piece) -> Optional[Fold]:
        """What makes the piece of its map, but for an activation that stands apart; None where that is the map."""
        if is_apart(piece.activation):
            piece = piece._replace(activation=LINEAR)
        if piece not in self._folds:
            self._folds[piece] = None if is_plain(piece) else self._fold(piece)
        return self._folds[piece]

    def _folded(self, piece: Piece) -> Tensor:
        fold = self.fold(piece)
        return self.maps[piece.map] if fold is None else self.backend.bn_act(self.maps[piece.map], fold.affine)

    def _made(self, piece: Piece) -> Tensor:
        """In memory of its own, unless it is the map."""
        y = self._folded(piece)
        return reference.activate(y, self.graph.activation(piece)) if is_apart(piece.activation) else y

    def _fold(self, piece: Piece) -> Fold:
        x = self.maps[piece.map]
        if piece.norm is None:
            linear = self.backend.linear(x)
            return linear._replace(affine=linear.affine._replace(activation=piece.activation))
        count = self.backend.positions(x)
        return self.backend.fold(self.graph.norms[piece.norm], self.stats[piece.map], count, piece.activation)

    def gather(self, pieces: Sequence[Piece], dtype: Optional[torch.dtype] = None) -> Tensor:
        """The pieces side by side: a tensor of its own, or the map itself where it is one map as it is."""
        maps = [self.maps[piece.map] for piece in pieces]
        if len(pieces) == 1 and dtype in (None, maps[0].dtype):
            return self._made(pieces[0])
        if dtype is None:
            dtype = _widest([x.dtype for x in maps])
        # As a concatenation's: channels-last where all of them are.
        like = next((x for x in maps if memory_format_of(x) == torch.contiguous_format), maps[0])
        out = empty_map(like, sum(x.shape[1] for x in maps), dtype)
        for piece, x, part in zip(pieces, maps, out.split([x.shape[1] for x in maps], 1)):
            fold = self.fold(piece)
            if fold is None or x.dtype != dtype or is_apart(piece.activation):
                part.copy_(self._made(piece))
            else:
                self.backend.bn_act(map_beside(part, x), fold.affine, part)
        return out

    def reads_maps(self, pieces: Sequence[Piece], conv: Step) -> bool:
        """Whether the convolution can read the maps themselves, and apply norms and activations to them."""
        dtype = _dtype_of(conv)
        return all(dtype in (None, self.maps[piece.map].dtype) and not is_apart(piece.activation) for piece in pieces)

    def read(self, pieces: Sequence[Piece], conv: Step) -> tuple[Tensor, Optional[Fold]]:
        if len(pieces) == 1 and self.reads_maps(pieces, conv):
            return self.maps[pieces[0].map], self.fold(pieces[0])
        return self.gather(pieces, _dtype_of(conv)), None


class _Backward(_Maps):
    """``grads`` are those of the maps, pending; of a map with several readers it is added up. ``centered`` says of which the mean
    makes no difference, see `convolve_backward`; ``taps`` are the places of maxima that were computed again, see `resample`."""

    def __init__(self, graph, backend, maps, stats, needs: Sequence[bool]) -> None:
        super().__init__(graph, backend, maps, stats)
        self.sources = len(maps) - len(graph.convs)
        self.found = Gradients(needs, self.sources)
        self.grads: list[Optional[Pending]] = [None] * len(maps)
        self.taps: dict[int, Optional[Tensor]] = {}
        self.widths = widths_of([0 if x is None else x.shape[1] for x in maps[: self.sources]], graph.convs, graph.reads)
        self.normed = set(map_of_norm(graph).values())
        self.readers, self.centered = [0] * len(maps), [True] * len(maps)
        for piece in pieces_of(graph):
            self.readers[piece.map] += 1
            self.centered[piece.map] &= piece.norm is not None and graph.norms[piece.norm].centers
        self.wanted = Wanted(graph, self.sources, self.found)

    def complete(self, wanted: Iterable[int]) -> None:
        """Computes again those of the maps that are wanted, and not there, where backward reads them; and what these are made of."""
        missing = {of for of in self.wanted.read.intersection(wanted) if self.maps[of] is None}
        if not missing:
            return
        there = {of for of, x in enumerate(self.maps) if of < self.sources or x is not None}
        for of in sorted(made_for(self.graph.reads, self.sources, missing, there) - there):
            conv = self.graph.convs[of - self.sources]
            x, fold = self.read(self.graph.reads[of - self.sources], conv)
            if isinstance(conv, Resampling):
                self.maps[of], self.taps[of] = resample(self.backend, x, fold, conv)
            else:
                self.maps[of], _ = convolved(self.backend, x, fold, conv, None)

    def spread(self, pieces: Sequence[Piece], grad: Tensor) -> None:
        """Takes the gradient of what was gathered to the maps; it is only read."""
        for piece, part in zip(pieces, grad.split([self.widths[piece.map] for piece in pieces], 1)):
            if self.wanted.piece(piece):
                self._add(piece, part)

    def _add(self, piece: Piece, grad: Tensor) -> None:
        fold, into = self.fold(piece), self._into(piece.map)
        x = grad if self.maps[piece.map] is None else self.maps[piece.map]
        # What a source that nothing else reads is given is handed on as it is.
        ours = fold is None and piece.map < self.sources and self.readers[piece.map] == 1
        if is_apart(piece.activation):
            grad, ours = map_beside(x, self._through_apart(piece, grad)), True
        if into is None:
            grad = grad if ours else torch.empty_like(x).copy_(grad)
            into = self.backend.pending(grad, x) if fold is None else self._through(piece, grad, x, fold, None)
        elif fold is None:
            into.dy.add_(grad)
        else:
            self._through(piece, map_beside(x, grad.to(x.dtype)), x, fold, into)
        self.grads[piece.map] = into

    def _through_apart(self, piece: Piece, grad: Tensor) -> Tensor:
        """Through an activation that stands apart; the result has the dtype of the map."""
        y = self._folded(piece)
        dy, of_slope = apart_backward(grad.to(y.dtype), y, self.graph.activation(piece))
        if of_slope is not None:
            self.found.record(len(self.graph.convs) + len(self.graph.norms) + piece.activation.slope, of_slope)
        return dy

    def _through(self, piece: Piece, grad: Tensor, x: Tensor, fold: Fold, into: Optional[Pending]) -> Pending:
        found = self.backend.norm_act_backward(grad, x, fold, into)
        self._record_norm(piece, found.norm_weight, found.norm_bias)
        return found.input

    def _record_norm(self, piece: Piece, weight: Optional[Tensor], bias: Optional[Tensor]) -> None:
        if piece.norm is not None:
            self.found.record(len(self.graph.convs) + piece.norm, weight, bias)

    def _into(self, of: int, always: bool = False) -> Optional[Pending]:
        """What a map's readers add to; None for one that has a single reader, unless ``always``."""
        x = self.maps[of]
        if self.grads[of] is None and x is not None and (always or self.readers[of] > 1):
            self.grads[of] = self.backend.pending(torch.zeros_like(x), x)
        return self.grads[of]

    def through(self, i: int) -> None:
        """Takes the gradient of what convolution i wrote to its weight and to the maps that it read."""
        pending, conv, pieces = self._taken(self.sources + i), self.graph.convs[i], self.graph.reads[i]
        if pending is None or not self.wanted.maps[self.sources + i]:
            return
        self.complete(piece.map for piece in pieces)
        if isinstance(conv, Resampling):
            grad = self.backend.pending_grad_(pending) if isinstance(pending, Pending) else pending
            self._resample(pieces, conv, grad, self.taps.pop(self.sources + i, None))
        else:
            self._convolve(i, pieces, conv, pending)
        self.maps[self.sources + i] = None  # the gradient went past it

    def _resample(self, pieces: Sequence[Piece], by: Resampling, grad: Tensor, taps: Optional[Tensor]) -> None:
        (piece,) = pieces
        if self.reads_maps(pieces, by):
            x, fold, into = self.maps[piece.map], self.fold(piece), self._into(piece.map)
            found = resample_backward(self.backend, x, fold, by, grad, taps, into)
            self._record_norm(piece, found.norm_weight, found.norm_bias)
            self.grads[piece.map] = found.input
        else:
            found = resample_backward(self.backend, self._made(piece), None, by, grad, taps, None)
            self._add(piece, found.input.dy)

    def _convolve(self, i: int, pieces: Sequence[Piece], conv: Conv | TransposedConv, pending: Tensor | Pending) -> None:
        need_weight, centered = self.found.wants_weight(i), self.centered[self.sources + i]
        grad = finished(self.backend, self.maps[pieces[0].map], conv, pending, need_weight)
        parts = self._parts(pieces, conv, grad)
        if parts:
            found = [self._through_map(*each, grad, need_weight, centered) for each in zip(pieces, parts)]
            weights = [of_map.weight for of_map in found]
            weight = torch.cat(weights, 1) if need_weight and len(weights) > 1 else weights[0]
            self.found.record(i, None, None, weight, found[0].bias)
        else:
            x = self.gather(pieces, conv.weight.dtype)
            into = self.backend.pending(torch.zeros_like(x), x) if sampling(conv) is not None else None
            found = convolve_backward(self.backend, x, None, conv, grad, into, need_weight, centered=centered)
            self.found.record(i, None, None, found.weight, found.bias)
            of_gathered = found.input.dy
            del x, into, found  # what was gathered is not beside the maps' gradients
            self.spread(pieces, of_gathered)

    def _parts(
        self, pieces: Sequence[Piece], conv: Conv | TransposedConv, grad: Tensor | Pending
    ) -> list[Conv | TransposedConv]:
        """A convolution of every piece, of two whose sum is ``conv``: nothing is gathered then, and no gradient taken apart. None
        where kernels finish the gradient, or of more pieces, of which the products would be small."""
        if not self.reads_maps(pieces, conv):
            return []
        if len(pieces) == 1:
            return [conv]
        two = len(pieces) == 2 and isinstance(conv, Conv) and conv.groups == 1 and isinstance(grad, Tensor)
        return split_conv(conv, [self.widths[piece.map] for piece in pieces]) if two else []

    def _through_map(
        self, piece: Piece, conv: Conv | TransposedConv, grad: Tensor | Pending, need_weight: bool, centered: bool
    ) -> ConvGrads:
        """Through a convolution that reads one piece."""
        into = self._into(piece.map, sampling(conv) is not None)
        x, fold = self.maps[piece.map], self.fold(piece)
        found = convolve_backward(self.backend, x, fold, conv, grad, into, need_weight, centered=centered)
        self._record_norm(piece, found.norm_weight, found.norm_bias)
        if self.wanted.piece(piece):
            self.grads[piece.map] = found.input
        return found

    def _taken(self, of: int) -> Pending | Tensor | None:
        """The gradient of a map, which nobody adds to any more; finished already where no norm reads the map."""
        pending, self.grads[of] = self.grads[of], None
        return pending if pending is None or of in self.normed else pending.dy

    def finish(self) -> list[Optional[Tensor]]:
        for of in range(self.sources):
            grad = self._taken(of) if self.wanted.maps[of] else None
            self.found.found[of] = self.backend.pending_grad_(grad) if isinstance(grad, Pending) else grad
        return self.found.found


def _dtype_of(conv: Step) -> Optional[torch.dtype]:
    """That in which a convolution wants what it reads; whatever there is takes a pool or a resize."""
    return None if isinstance(conv, Resampling) else conv.weight.dtype


def _widest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    return widest
