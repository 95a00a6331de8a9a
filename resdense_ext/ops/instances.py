"""Instance and group norms: batch norms of every sample by itself.

No sample has to do with another then, whatever stands between the norms. So the engines are given some samples at a time and, of
more than one, a backend whose vectors have a value for every channel of every sample: a map whose samples
lie one behind another in memory is to the kernels of norms one sample with the channels of all, and convolutions read what
is activated, of as many samples as the backend has in memory at once. What is found for the parts is put together here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from resdense_ext.ops import backend as backends
from resdense_ext.ops import conv1x1_bn_add_act
from resdense_ext.ops.conv1x1_bn_add_act import Branch, Pointwise
from resdense_ext.ops.convolve import through_memory
from resdense_ext.ops.layout import empty_map
from resdense_ext.ops.operands import Affine, ConvGrads, Fold, Pending, Stats
from resdense_ext.ops.reference_backend import ReferenceBackend
from resdense_ext.reference import Activation, BatchNorm, Conv, Pool, accumulation_dtype

__all__ = [
    "are_instances",
    "backend_of",
    "gathered_gradients",
    "joined",
    "moments_backward",
    "parts_of",
    "shape_of_statistics",
    "sizes_of_parts",
]

_TOGETHER = {"cpu": 2**24, "cuda": 2**28}
"""Bytes of the largest map of the samples that an engine is given at once: the more they are, the more stands beside the maps that
are kept, and the fewer, the less work is in the small maps of a network's end."""


def are_instances(norms: Iterable[Optional[BatchNorm]]) -> bool:
    """Whether statistics are taken of every sample by itself."""
    return any(norm is not None and norm.instance for norm in norms)


def sizes_of_parts(x: Tensor, largest: int) -> list[int]:
    """How many samples an engine is given at a time, where the largest map of a sample has so many bytes."""
    most = max(1, _TOGETHER.get(x.device.type, _TOGETHER["cuda"]) // max(largest, 1))
    parts = max(1, -(-len(x) // most))
    return [len(x) // parts + (i < len(x) % parts) for i in range(parts)]


def shape_of_statistics(shape: Sequence[int], apart: bool) -> tuple[int, ...]:
    """Of a map that the statistics of a channel are taken of at once."""
    return (1 if apart else shape[0], *shape[1:])


def parts_of(x: Optional[Tensor], sizes: Sequence[int]) -> Sequence[Optional[Tensor]]:
    """So many samples at a time; of a single part the batch as it is."""
    if len(sizes) == 1:
        return (x,)
    return [None] * len(sizes) if x is None else x.split(sizes)


def joined(parts: list[Sequence[Optional[Tensor]]]) -> list[Optional[Tensor]]:
    """The batch's maps, from those of all parts, whose list is emptied: they are let go one by one."""
    if len(parts) == 1:
        return list(parts[0])
    of_maps, whole = list(zip(*parts)), []
    parts.clear()
    while of_maps:
        of_map = of_maps.pop(0)
        whole.append(None if of_map[0] is None else torch.cat(of_map))
        del of_map
    return whole


def gathered_gradients(parts: Iterable[Sequence[Optional[Tensor]]], maps: int) -> list[Optional[Tensor]]:
    """From the gradients of every part, first those of so many ``maps``, then those of what all parts read: the batch's."""
    of_maps, first, sums = [], None, None
    for grads in parts:
        of_maps.append(grads[:maps])
        first = first or grads[maps:]
        sums = first if sums is None else list(map(_added, sums, grads[maps:]))
        del grads
    if sums is not first:
        sums = [total if total is None else total.to(grad.dtype) for total, grad in zip(sums, first)]
    return [*joined(of_maps), *sums]


def _added(total: Optional[Tensor], more: Optional[Tensor]) -> Optional[Tensor]:
    return total if total is None else total.to(accumulation_dtype(total.dtype)).add_(more)


def backend_of(name: str, samples: int, apart: bool) -> ReferenceBackend:
    """The one that an engine asks for so many samples, which are perhaps normalised ``apart``."""
    backend = backends.get(name)
    return _Instances(backend, samples) if apart and samples > 1 else backend


class _Instances(ReferenceBackend):
    """A backend around another one. Vectors have the values of one sample's channels behind those of the one before; those of
    parameters' gradients are one sample's, added up."""

    def __init__(self, backend: ReferenceBackend, samples: int) -> None:
        self.name, self.calls_operators = backend.name, backend.calls_operators
        self._one, self._samples = backend, samples
        # What has nothing to do with vectors.
        self.chunks, self.end_number, self.activation_backward = backend.chunks, backend.end_number, backend.activation_backward
        self.avg_pool, self.avg_pool_backward_accumulate = backend.avg_pool, backend.avg_pool_backward_accumulate

    def positions(self, x: Tensor) -> int:
        return math.prod(x.shape[2:])

    def linear(self, x: Tensor) -> Fold:
        return Fold.linear(x, self._samples)

    def pending(self, dy: Tensor, x: Tensor) -> Pending:
        return Pending.of(dy, x, self._samples)

    def fold(self, norm: BatchNorm, stats: Stats, count: int, activation: Activation) -> Fold:
        (fold,) = self.folds([norm], [stats], [count], activation)
        return fold

    def folds(
        self, norms: Sequence[BatchNorm], stats: Sequence[Stats], counts: Sequence[int], activation: Activation
    ) -> list[Fold]:
        of_all = [self._of_all_samples(norm) if norm.batch_stats else norm for norm in norms]
        found = self._one.folds(of_all, stats, counts, activation)
        return [fold if norm.batch_stats else _fold_repeated(fold, self._samples) for norm, fold in zip(norms, found)]

    def _of_all_samples(self, norm: BatchNorm) -> BatchNorm:
        weight, bias = (v if v is None else _repeated(v, self._samples) for v in (norm.weight, norm.bias))
        return norm._replace(weight=weight, bias=bias, groups=norm.groups * self._samples)

    def channel_stats(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _behind_one_another([self._one.channel_stats(part) for _, part in _walk(x)])

    def bn_act(self, x: Tensor, affine: Affine, out: Optional[Tensor] = None) -> Tensor:
        out = empty_map(x, x.shape[1], x.dtype) if out is None else out
        for at, x, to in _walk(x, out):
            self._one.bn_act(x, _affine(affine, at), to)
        return out

    def bn_act_backward(self, grad: Tensor, x: Tensor, affine: Affine, center: Tensor) -> tuple[Tensor, Tensor]:
        walk = _walk(grad, x)
        return _behind_one_another([self._one.bn_act_backward(*maps, _affine(affine, at), center[at]) for at, *maps in walk])

    def bn_act_backward_accumulate(
        self, out: Tensor, grad: Tensor, x: Tensor, affine: Affine, center: Tensor
    ) -> tuple[Tensor, Tensor]:
        found = [
            self._one.bn_act_backward_accumulate(*maps, _affine(affine, at), center[at]) for at, *maps in _walk(out, grad, x)
        ]
        return _behind_one_another(found)

    def pending_grad_(self, pending: Pending) -> Tensor:
        dy, z, *vectors = pending
        for at, *maps in _walk(dy, z):
            self._one.pending_grad_(Pending(*maps, *(v[at] for v in vectors)))
        return dy

    def bn_add_act(
        self, z: Tensor, affine: Affine, identity: Tensor, identity_affine: Optional[Affine], activation: Activation
    ) -> Tensor:
        found = [
            self._one.bn_add_act(z, _affine(affine, at), identity, _affine(identity_affine, at), activation)
            for at, z, identity in _walk(z, identity)
        ]
        return _as_samples(found, z)

    def bn_add_act_backward(
        self,
        grad: Tensor,
        mark: Tensor,
        z: Tensor,
        center: Tensor,
        identity: Optional[Tensor],
        identity_center: Optional[Tensor],
        activation: Activation,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        found, sums = [], []
        for at, grad, mark, part, identity in _walk(grad, mark, z, identity):
            centers = center[at], None if identity_center is None else identity_center[at]
            g, *of_part = self._one.bn_add_act_backward(grad, mark, part, centers[0], identity, centers[1], activation)
            found.append(g), sums.append(of_part)
        return _as_samples(found, z), *_behind_one_another(sums)

    def convolved(
        self, x: Tensor, affine: Optional[Affine], conv: Conv, reader: Optional[BatchNorm]
    ) -> tuple[Tensor, Stats]:
        parts = self.chunks(x, conv)
        if affine is None or len(parts) == 1:
            z, _ = self._one.convolved(x if affine is None else self.bn_act(x, affine), None, conv, None)
            parts = []
        else:
            z = empty_map(x, conv.weight.shape[0], conv.weight.dtype, conv.outputs(x.shape[2:]))
        for part in parts:
            a, of_part = x[part], _affine(affine, _values(part, x))
            if len(a) > 1:
                a, of_part = self.bn_act(a, of_part), None
            self._one.bn_act_conv(a, of_part, conv, z[part], None, 1.0, None)
        return z, self.stats_for(reader, z)

    def bn_act_pool(self, x: Tensor, affine: Affine, pool: Pool) -> tuple[Tensor, Optional[Tensor]]:
        found, taps = zip(*[self._one.bn_act_pool(part, _affine(affine, at), pool) for at, part in _walk(x)])
        return _as_samples(found, x), None if taps[0] is None else _as_samples(taps, x)

    def bn_act_pool_backward(
        self, grad: Tensor, taps: Optional[Tensor], x: Tensor, fold: Fold, pool: Pool, into: Optional[Pending]
    ) -> ConvGrads:
        found, vectors = [], into and into[2:]
        for at, grad, taps, part, dy in _walk(grad, taps, x, into and into.dy):
            to = None if into is None else Pending(dy, part, *(v[at] for v in vectors))
            found.append(self._one.bn_act_pool_backward(grad, taps, part, _fold(fold, at), pool, to))
        if len(found) > 1:
            return _joined_grads(found, x, into)
        ((dy, _, *vectors), *of_parameters) = found[0]
        return ConvGrads(into or Pending(dy.view(x.shape), x, *vectors), *self._summed(of_parameters))

    def takes_pending(self, x: Tensor, conv: Conv, need_weight: bool) -> bool:
        return len(self.chunks(x, conv)) == len(x) and self._one.takes_pending(x[:1], conv, need_weight)

    def bn_act_conv_backward(
        self,
        x: Tensor,
        fold: Optional[Fold],
        conv: Conv,
        grad: Tensor | Pending,
        into: Optional[Pending],
        need_weight: bool,
        finish: bool = False,
    ) -> ConvGrads:
        """To ``finish`` there is nothing: what a convolution of several samples wants is finished by whoever calls it."""
        found = []
        for part in self.chunks(x, conv):
            of_part = x[part], _fold(fold, _values(part, x)), conv, _pending(grad, part), _pending(into, part), need_weight
            samples = len(x[part])
            if samples == 1:
                found.append(self._one.bn_act_conv_backward(*of_part))
            else:
                found.append(_Instances(self._one, samples)._together_backward(*of_part))
        return found[0] if len(found) == 1 else _joined_grads(found, x, into)

    def _together_backward(
        self, x: Tensor, fold: Optional[Fold], conv: Conv, grad: Tensor | Pending, into: Optional[Pending], need_weight: bool
    ) -> ConvGrads:
        """`bn_act_conv_backward` by the other backend's of what the convolution reads, which is in memory."""

        def through(a: Tensor, dz: Tensor) -> tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
            upstream = Pending.of(dz, dz) if self._one.takes_pending(a, conv, need_weight) else dz
            (dx, *_), weight, bias, *_ = self._one.bn_act_conv_backward(a, None, conv, upstream, None, need_weight)
            return dx, weight, bias

        return through_memory(self, x, fold, grad, into, through)

    def moments_backward(
        self, branch: Branch, g: Tensor, into: Optional[Pending], need_input: bool, need_weight: bool
    ) -> tuple[ConvGrads, Tensor, Tensor]:
        """`conv1x1_bn_add_act.backward`, sample by sample: each has moments of its own."""
        (x, fold, conv, _), of_norm = branch
        found, norms = [], []
        for n in range(len(x)):
            part = slice(n, n + 1)
            source = Pointwise(x[part], _fold(fold, _values(part, x)), conv, self._one)
            of_part = Branch(source, _fold(of_norm, _values(part, g))), None, g[part], _pending(into, part)
            of_conv, *of_sample = conv1x1_bn_add_act.backward(*of_part, need_input, need_weight)
            found.append(of_conv), norms.append(of_sample)
        return _joined_grads(found, x, into), *gathered_gradients(norms, 0)

    def _correct(
        self, fold: Fold, sum_dy: Tensor, sum_dy_xc: Tensor, into: Optional[Pending]
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._one._correct(fold, sum_dy, sum_dy_xc, into)

    def _grads(self, x: Tensor, fold: Optional[Fold], *rest: Any) -> ConvGrads:
        found = super()._grads(x, fold, *rest)
        return ConvGrads(*found[:3], *self._summed(found[3:]))

    def _summed(self, of_parameters: Iterable[Optional[Tensor]]) -> list[Optional[Tensor]]:
        return [None if v is None else v.view(self._samples, -1).sum(0) for v in of_parameters]


def moments_backward(
    branch: Branch, g: Tensor, into: Optional[Pending], need_input: bool, need_weight: bool
) -> tuple[ConvGrads, Tensor, Tensor]:
    """`conv1x1_bn_add_act.backward` on either kind of backend, of moments that nobody kept."""
    backend = branch.source.backend
    if isinstance(backend, _Instances):
        return backend.moments_backward(branch, g, into, need_input, need_weight)
    return conv1x1_bn_add_act.backward(branch, None, g, into, need_input, need_weight)


def _walk(*maps: Optional[Tensor]) -> Iterator[tuple[Any, ...]]:
    """The values of vectors that are read, and the maps, as one sample's: all at once, where every map's samples lie one behind
    another in memory, else one by one."""
    there = [x for x in maps if x is not None]
    if all(x.stride(0) == x.shape[1] * x.stride(1) for x in there):
        yield slice(None), *(None if x is None else x.flatten(0, 1).unsqueeze(0) for x in maps)
        return
    for n in range(len(there[0])):
        part = slice(n, n + 1)
        yield _values(part, there[0]), *(None if x is None else x[part] for x in maps)


def _as_samples(found: Sequence[Tensor], like: Tensor) -> Tensor:
    """The maps that were made of those of a `_walk`, as ``like`` is laid out."""
    samples, channels, sizes = *like.shape[:2], found[0].shape[2:]
    if len(found) == 1:
        return found[0].view(samples, channels, *sizes)
    return torch.cat(found, out=empty_map(like, channels, found[0].dtype, sizes))


def _behind_one_another(found: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    return tuple(found[0]) if len(found) == 1 else tuple(map(torch.cat, zip(*found)))


def _values(part: slice, x: Tensor) -> slice:
    """Where the values of some of a map's samples are in vectors."""
    begin, end, _ = part.indices(len(x))
    return slice(begin * x.shape[1], end * x.shape[1])


def _affine(affine: Optional[Affine], at: slice) -> Optional[Affine]:
    return affine if affine is None else Affine(affine.scale[at], affine.shift[at], affine.activation)


def _fold(fold: Optional[Fold], at: slice) -> Optional[Fold]:
    if fold is None:
        return None
    affine, mean, rstd, count, groups = fold
    if groups is not None:
        groups = groups._replace(number=groups.number * len(mean[at]) // len(mean))
    return Fold(_affine(affine, at), mean[at], rstd[at], count, groups)


def _pending(of: Tensor | Pending | None, part: slice) -> Tensor | Pending | None:
    """That of some samples."""
    if not isinstance(of, Pending):
        return of if of is None else of[part]
    dy, z, *vectors = of
    at = _values(part, dy)
    return Pending(dy[part], z[part], *(v[at] for v in vectors))


def _joined_grads(found: Sequence[ConvGrads], x: Tensor, into: Optional[Pending]) -> ConvGrads:
    """Of all samples, from those of some each, which were added to their parts of ``into`` where there is one."""
    if into is not None or found[0].input is None:
        return ConvGrads(into, *gathered_gradients([grads[1:] for grads in found], 0))
    maps = [(dy, *vectors) for (dy, _, *vectors), *_ in found]
    dy, *rest = gathered_gradients([(*of_part, *grads[1:]) for of_part, grads in zip(maps, found)], 4)
    return ConvGrads(Pending(dy, x, *rest[:3]), *rest[3:])


def _repeated(vector: Tensor, samples: int) -> Tensor:
    return vector.expand(samples, -1).flatten()


def _fold_repeated(fold: Fold, samples: int) -> Fold:
    """That of every sample, from that of any."""
    (scale, shift, activation), mean, rstd, *rest = fold
    scale, shift, mean, rstd = (_repeated(v, samples) for v in (scale, shift, mean, rstd))
    return Fold(Affine(scale, shift, activation), mean, rstd, *rest)
