"""The residual block: raw outputs of convolutions, each normalised and activated by whoever reads it, and one pass at the end.

The maps of a block of n convolutions are its input ``map_0 = x``, the raw outputs ``map_1 .. map_n`` of the convolutions, and
that of its projection, ``map_{n+1}``. Norm i reads map i::

    map_{i+1} = conv_{i+1}(act(norm_i(map_i)))       of map_i as it is where there is no such norm
    out       = last(norm_n(map_n) + shortcut)       the shortcut is x, or norm_{n+1}(map_{n+1})

Backward begins with ``g = grad * last'``, which is the identity's gradient, and in which the gradient of x is added up; it goes
through the convolutions from the last to the first. Kept are x, the output where it tells ``last'``, and the maps that backward
reads ("fast") or none of them ("min"): then they are computed again, with the statistics that are known.

Source: He et al., Deep Residual Learning for Image Recognition, and Identity Mappings in Deep Residual Networks (2016).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from resdense_ext import reference
from resdense_ext.ops import backend as backends
from resdense_ext.ops._library import LIBRARY
from resdense_ext.ops.backend import ConvGrads, Fold, Pending, ReferenceBackend, Stats
from resdense_ext.ops.layout import dense_map, empty_map, memory_format_of
from resdense_ext.ops.units import GRADS, UNIT, conv_of, geometry_of, new_stats
from resdense_ext.reference import Activation, BatchNorm, Conv, ResidualBlock, Shortcut, Unit

__all__ = ["ResidualBlockConfig", "cost_of", "counts_of", "needed_maps", "norms_of", "reads_out", "units_of"]

SCHEMA = (
    "Tensor?[] tensors, bool[] normed, float[] eps, bool[] batch_stats, int[] geometry, bool activated, "
    "str activation, float slope, str last, float last_slope, bool[] keep, bool again, str backend"
)


class ResidualBlockConfig(NamedTuple):
    """All of a block that is no tensor, in the operators' types.

    The norms' lists have a value for every unit, for the end and for the shortcut; ``geometry`` has the numbers of every
    convolution. ``activated`` is the shortcut's. ``keep`` says which of the maps 1 to n + 1 are kept for backward; the others
    are computed ``again`` in it, or it has no need of them.
    """

    normed: list[bool]
    eps: list[float]
    batch_stats: list[bool]
    geometry: list[int]
    activated: bool
    activation: str
    slope: float
    last: str
    last_slope: float
    keep: list[bool]
    again: bool
    backend: str

    @staticmethod
    def of(
        block: ResidualBlock, activation: Activation, last: Activation, keep: list[bool], again: bool, backend: str
    ) -> ResidualBlockConfig:
        norms = norms_of(block)
        return ResidualBlockConfig(
            [norm is not None for norm in norms],
            [0.0 if norm is None else norm.eps for norm in norms],
            [_takes_stats(norm) for norm in norms],
            [n for _, conv in units_of(block) if conv is not None for n in geometry_of(conv)],
            block.shortcut is not None and block.shortcut.activated,
            *activation,
            *last,
            keep,
            again,
            backend,
        )

    def block(self, tensors: Sequence[Optional[Tensor]]) -> ResidualBlock:
        """The block as it was given, around other tensors."""
        *units, (end, _), (norm, conv) = (self._unit(i, tensors[UNIT * i : UNIT * (i + 1)]) for i in range(len(self.eps)))
        return ResidualBlock(tuple(units), end, None if conv is None else Shortcut(conv, norm, self.activated))

    def _unit(self, i: int, tensors: Sequence[Optional[Tensor]]) -> Unit:
        norm, conv = None, None
        if self.normed[i]:
            norm = BatchNorm(*tensors[:4], self.batch_stats[i], None, self.eps[i])
        if tensors[4] is not None:
            numbers = 3 * (tensors[4].dim() - 2) + 1
            # The end has no convolution: the shortcut's comes right behind the units'.
            conv = conv_of(*tensors[4:], self.geometry[min(i, len(self.eps) - 2) * numbers :])
        return Unit(norm, conv)

    @property
    def activations(self) -> tuple[Activation, Activation]:
        """That between the convolutions, and that behind the addition."""
        return Activation(self.activation, self.slope), Activation(self.last, self.last_slope)


def units_of(block: ResidualBlock) -> list[tuple[Optional[BatchNorm], Optional[Conv]]]:
    """The norm and the convolution of every unit, of the end and of the shortcut."""
    shortcut = (None, None) if block.shortcut is None else (block.shortcut.norm, block.shortcut.conv)
    return [*block.units, (block.norm, None), shortcut]


def norms_of(block: ResidualBlock) -> list[Optional[BatchNorm]]:
    """Norm i reads map i."""
    return [norm for norm, _ in units_of(block)]


def _sizes_of(x: Tensor, block: ResidualBlock) -> list[Sequence[int]]:
    """The spatial sizes of every map; of that of a projection whether there is one or not."""
    sizes: list[Sequence[int]] = [x.shape[2:]]
    for unit in block.units:
        sizes.append(unit.conv.outputs(sizes[-1]))
    return [*sizes, sizes[-1]]


def counts_of(x: Tensor, block: ResidualBlock) -> list[int]:
    """The number of positions of every map."""
    return [x.shape[0] * torch.Size(sizes).numel() for sizes in _sizes_of(x, block)]


def cost_of(x: Tensor, block: ResidualBlock, dtype: torch.dtype) -> tuple[int, int]:
    """The bytes of the maps that backward reads beside x and the output, in this dtype, and the FLOPs to compute them again."""
    counts, nbytes, flops = counts_of(x, block), 0, 0
    for conv, count, needed in zip(_convs(block), counts[1:], needed_maps(block)):
        if conv is not None:
            nbytes += needed * count * conv.weight.shape[0] * dtype.itemsize
            flops += 2 * count * conv.weight.numel()
    return nbytes, flops


def _convs(block: ResidualBlock) -> list[Optional[Conv]]:
    """Convolution i writes map i + 1."""
    return [*(unit.conv for unit in block.units), None if block.shortcut is None else block.shortcut.conv]


def needed_maps(block: ResidualBlock) -> list[bool]:
    """Which of the maps behind convolutions backward reads: not those that feed nothing but a norm that is frozen altogether."""

    def trains(norm: Optional[BatchNorm]) -> bool:
        return norm is not None and (norm.batch_stats or (norm.weight is not None and norm.weight.requires_grad))

    shortcut = block.shortcut
    return [True] * (len(block.units) - 1) + [trains(block.norm), shortcut is not None and trains(shortcut.norm)]


def reads_out(last: Activation) -> bool:
    """Whether backward reads the block's output."""
    return last.name != "identity" and reference.determined(last)


def _takes_stats(norm: Optional[BatchNorm]) -> bool:
    return norm is not None and norm.batch_stats


def _sampling(conv: Conv) -> Optional[tuple[slice, ...]]:
    """The positions that a strided convolution of kernel size 1 reads: of these alone it has stride 1. None for any other."""
    if any(size != 1 for size in conv.weight.shape[2:]) or any(conv.padding) or all(step == 1 for step in conv.steps):
        return None
    return (slice(None), slice(None), *(slice(None, None, step) for step in conv.steps))


def _convolve(
    backend: ReferenceBackend, x: Tensor, fold: Optional[Fold], conv: Conv, reader: Optional[BatchNorm]
) -> tuple[Tensor, Stats]:
    """A new map, and its statistics where its reader normalises by them."""
    at = _sampling(conv)
    if at is not None:
        x, conv = dense_map(x[at]), conv._replace(stride=())
    z = empty_map(x, conv.weight.shape[0], conv.weight.dtype, conv.outputs(x.shape[2:]))
    stats = new_stats(z, reader)
    backend.bn_act_conv(
        x, None if fold is None else fold.affine, conv, z, None, 1.0, stats if _takes_stats(reader) else None
    )
    return z, stats


def _convolve_backward(
    backend: ReferenceBackend,
    x: Tensor,
    fold: Optional[Fold],
    conv: Conv,
    grad: Pending,
    into: Optional[Pending],
    need_weight: bool,
) -> ConvGrads:
    """See `ReferenceBackend.bn_act_conv_backward`; of a sampled input, the gradient goes ``into`` one or is not wanted."""
    at = _sampling(conv)
    if at is None:
        return backend.bn_act_conv_backward(x, fold, conv, grad, into, need_weight)
    sampled, conv = dense_map(x[at]), conv._replace(stride=())
    if into is None:
        return backend.bn_act_conv_backward(sampled, fold, conv, grad, None, need_weight)
    part = into._replace(dy=dense_map(into.dy[at]), z=sampled)
    grads = backend.bn_act_conv_backward(sampled, fold, conv, grad, part, need_weight)
    into.dy[at].copy_(part.dy)
    return grads._replace(input=into)


class _Maps:
    """The maps of a block, computed forward or again, and their statistics, taken or known."""

    def __init__(self, x: Tensor, block: ResidualBlock, config: ResidualBlockConfig, stats: Optional[list[Stats]] = None):
        self.block, self.backend, self.norms = block, backends.get(config.backend), norms_of(block)
        self.activation, self.last = config.activations
        self.counts = counts_of(x, block)
        self.units = len(block.units)
        self.maps: list[Optional[Tensor]] = [x] + [None] * (self.units + 1)
        self.known = stats is not None
        self.stats = stats or [new_stats(x, None) for _ in self.maps]

    def fold(self, i: int) -> Optional[Fold]:
        norm = self.norms[i]
        return None if norm is None else self.backend.fold(norm, self.stats[i], self.counts[i], self.activation)

    def compute(self, keep_all: bool) -> None:
        """All maps; without ``keep_all`` those that are read no more are let go."""
        x = self.maps[0]
        if _takes_stats(self.norms[0]) and not self.known:
            self.stats[0] = Stats(*self.backend.channel_stats(x))
        first = self.fold(0)
        for i, unit in enumerate(self.block.units):
            self._write(i + 1, self.maps[i], self.fold(i) if i else first, unit.conv)
            if i and not keep_all:
                self.maps[i] = None
        if self.block.shortcut is not None:
            conv, _, activated = self.block.shortcut
            self._write(self.units + 1, x, first if activated else None, conv)

    def _write(self, i: int, source: Tensor, fold: Optional[Fold], conv: Conv) -> None:
        self.maps[i], stats = _convolve(self.backend, source, fold, conv, None if self.known else self.norms[i])
        if not self.known:
            self.stats[i] = stats

    def added(self) -> list[int]:
        """The two maps that are added up; those with norms come first."""
        pair = (self.units, 0 if self.block.shortcut is None else self.units + 1)
        return sorted(pair, key=lambda i: not self.has_end(i))

    def has_end(self, i: int) -> bool:
        """Whether map i goes into the addition through a norm."""
        return i >= self.units and self.norms[i] is not None

    def sum(self, activation: Activation) -> Tensor:
        """``act(norm_n(map_n) + shortcut)``."""
        i, j = self.added()
        if not self.has_end(i):
            return reference.add_act(self.maps[i], self.maps[j], activation)
        affine = self.fold(j).affine if self.has_end(j) else None
        return self.backend.bn_add_act(self.maps[i], self.fold(i).affine, self.maps[j], affine, activation)


def _forward(x: Tensor, tensors, config: ResidualBlockConfig) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The output; the statistics of all maps; the maps that are kept, and the activation's input where nothing else tells it."""
    x = dense_map(x)
    maps = _Maps(x, config.block(tensors), config)
    maps.compute(keep_all=any(config.keep))
    kept = [z for z, keep in zip(maps.maps[1:], config.keep) if keep]
    if reference.determined(maps.last):
        out = maps.sum(maps.last)
    else:
        before = maps.sum(Activation("identity"))
        out = reference.activate(before, maps.last)
        if kept:
            kept.append(before)
    return out, [t for stats in maps.stats for t in stats], kept


def _backward(
    grad: Tensor, out: Optional[Tensor], x: Tensor, tensors, config: ResidualBlockConfig, stats, kept, needs
) -> list[Tensor]:
    """The gradients that ``needs`` asks for, of x and of `GRADS` of every unit, of the end and of the shortcut; empty tensors for
    the rest."""
    x = dense_map(x)
    grad = grad.contiguous(memory_format=memory_format_of(x))
    block = config.block(tensors)
    walk = _Maps(x, block, config, [Stats(*stats[i : i + 2]) for i in range(0, len(stats), 2)])
    backend, maps, units = walk.backend, walk.maps, walk.units
    kept = iter(kept)
    if config.again:
        walk.compute(keep_all=True)
    else:
        maps[1:] = [next(kept) if keep else None for keep in config.keep]
    results: list[Optional[Tensor]] = [None] * len(needs)

    def record(unit: int, *values: Optional[Tensor]) -> None:
        for i, value in enumerate(values):
            at = 1 + len(GRADS) * unit + i
            if value is not None and needs[at]:
                results[at] = value if results[at] is None else results[at] + value

    def wants_weight(unit: int) -> bool:
        return any(needs[3 + 4 * unit : 5 + 4 * unit])

    g = grad
    i, j = walk.added()
    if out is not None or walk.last.name == "identity":
        mark = grad if out is None else out
    else:
        mark = walk.sum(Activation("identity")) if config.again else next(kept)
    upstream = {}
    if walk.has_end(i):
        # Of a map that backward does not need, any other serves.
        values = [(mark if maps[k] is None else maps[k], walk.fold(k)) for k in (i, j) if walk.has_end(k)]
        operands = [(z, fold.mean) for z, fold in values] + [(None, None)]
        g, sum_g, *sums = backend.bn_add_act_backward(grad, mark, *operands[0], *operands[1], walk.last)
        for k, (z, fold), sum_g_zc in zip((i, j), values, sums):
            ended = backend.norm_backward(g, z, fold, sum_g.clone() if upstream else sum_g, sum_g_zc)
            record(k, ended.norm_weight, ended.norm_bias)
            upstream[k] = ended.input
    elif walk.last.name != "identity":
        g = grad * reference.marked_slope(mark, walk.last)
    for k in (i, j):
        upstream.setdefault(k, Pending.of(g, g))

    first, shortcut = block.units[0], block.shortcut
    into = None
    if needs[0] and shortcut is None:
        # A single convolution still reads g while it adds to the gradient of x.
        ours = g is not grad and units > 1
        into = Pending.of(g.to(x.dtype) if ours else g.to(x.dtype, copy=True), x)
    elif needs[0] and (first.norm is not None or _sampling(first.conv) is not None):
        into = Pending.of(torch.zeros_like(x), x)
    pending = upstream.pop(units)
    for k in reversed(range(units)):
        if not any(needs[: 1 + len(GRADS) * (k + 1)]):
            break  # nothing before this point wants a gradient
        grads = _convolve_backward(
            backend, maps[k], walk.fold(k), block.units[k].conv, pending, None if k else into, wants_weight(k)
        )
        record(k, grads.norm_weight, grads.norm_bias, grads.weight, grads.bias)
        pending = grads.input
        if k:
            maps[k] = None
        else:
            into = pending
    if shortcut is not None:
        fold = walk.fold(0) if shortcut.activated else None
        grads = _convolve_backward(
            backend, x, fold, shortcut.conv, upstream.pop(units + 1), into if needs[0] else None, wants_weight(units + 1)
        )
        record(0, grads.norm_weight, grads.norm_bias)
        record(units + 1, None, None, grads.weight, grads.bias)
    if needs[0]:
        results[0] = backend.pending_grad_(into) if _takes_stats(walk.norms[0]) else into.dy
    return _wanted(results, x, tensors)


def _targets(x: Tensor, tensors) -> list[Optional[Tensor]]:
    """What gradients are of: x, and `GRADS` of every unit."""
    return [x, *(tensors[at + position] for at in range(0, len(tensors), UNIT) for position in GRADS)]


def _wanted(results: Sequence[Optional[Tensor]], x: Tensor, tensors) -> list[Tensor]:
    """In the dtypes of what they are of; empty tensors for those that are not wanted."""
    return [
        x.new_empty(0) if value is None else value.to(target.dtype) for value, target in zip(results, _targets(x, tensors))
    ]


def _residual_block(x: Tensor, tensors, *numbers) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    return _forward(x, tensors, ResidualBlockConfig(*numbers))


def _residual_block_backward(grad: Tensor, out: Optional[Tensor], x: Tensor, tensors, *rest) -> list[Tensor]:
    *numbers, stats, kept, needs = rest
    return _backward(grad, out, x, tensors, ResidualBlockConfig(*numbers), stats, kept, needs)


def _residual_block_fake(x: Tensor, tensors, *numbers) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    config = ResidualBlockConfig(*numbers)
    block = config.block(tensors)
    maps = [x]
    for unit, sizes in zip(block.units, _sizes_of(x, block)[1:]):
        maps.append(empty_map(x, unit.conv.weight.shape[0], unit.conv.weight.dtype, sizes))
    identity = x if block.shortcut is None else torch.empty_like(maps[-1])
    dtype = torch.promote_types(maps[-1].dtype, identity.dtype) if block.norm is None else maps[-1].dtype
    out = torch.empty_like(maps[-1], dtype=dtype)
    stats = [t for z, norm in zip([*maps, identity], norms_of(block)) for t in new_stats(z, norm)]
    kept = [z for z, keep in zip([*maps[1:], identity], config.keep) if keep]
    if kept and not reference.determined(config.activations[1]):
        kept.append(torch.empty_like(out))
    return out, stats, kept


def _residual_block_backward_fake(grad: Tensor, out: Optional[Tensor], x: Tensor, tensors, *rest) -> list[Tensor]:
    return [
        torch.empty_like(target) if need else x.new_empty(0)
        for target, need in zip(_targets(dense_map(x), tensors), rest[-1])
    ]


LIBRARY.define(f"residual_block(Tensor x, {SCHEMA}) -> (Tensor out, Tensor[] stats, Tensor[] kept)")
LIBRARY.define(
    f"residual_block_backward(Tensor grad, Tensor? out, Tensor x, {SCHEMA}, Tensor[] stats, Tensor[] kept, bool[] needs) "
    "-> Tensor[]"
)
LIBRARY.impl("residual_block", _residual_block, "CompositeExplicitAutograd")
LIBRARY.impl("residual_block_backward", _residual_block_backward, "CompositeExplicitAutograd")
torch.library.register_fake("resdense::residual_block", _residual_block_fake, lib=LIBRARY)
torch.library.register_fake("resdense::residual_block_backward", _residual_block_backward_fake, lib=LIBRARY)
