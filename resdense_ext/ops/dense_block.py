"""The dense block: one buffer, statistics once a feature map, batch norm as a prologue and its backward deferred.

Forward, for layer l on the first C channels of the buffer and its k new ones::

    z      = conv1(act(bn1(buffer[:, :C])))              bn1 uses the statistics that came with the channels
    buffer[:, C:C+k] = conv2(act(bn2(z)))                and the new channels' statistics are taken, once

Backward, from the last layer to the first. Batch-norm backward is linear in the incoming gradient, so its correction for
all consumers l of a channel is applied once, when the channel's own layer reads its gradient::

    D  = dOut + sum_l s_l * dy_l                         accumulated in place; s_l = gamma_l * r_l
    P  = sum_l s_l * dbeta_l        Q = sum_l s_l * r_l * dgamma_l
    dx = D - (P + (x - mean) * Q) / M

Source: Huang et al., 2017 (the block) and Pleiss et al., 2017 (shared storage); the deferral is this library's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from resdense_ext.ops import backend as backends
from resdense_ext.ops.layout import empty_map
from resdense_ext.ops.operands import ConvGrads, Pending, Prefix, Stats
from resdense_ext.ops.operator import EngineOperator
from resdense_ext.ops.ranks import Ranks
from resdense_ext.ops.units import GRADS, UNIT, geometry_of, gradient_like, parameters_of, units_from
from resdense_ext.reference import Activation, DenseLayer, accumulation_dtype

__all__ = [
    "SCHEMA",
    "BufferGradient",
    "DenseBlockConfig",
    "backward",
    "backward_fake",
    "forward",
    "forward_fake",
]

SCHEMA = (
    "Tensor?[] tensors, Tensor[] masks, int[] units, float[] eps, bool[] batch_stats, int[] geometry, "
    "float[] mask_scales, str activation, float slope, bool[] keep, str backend, str group"
)


class DenseBlockConfig(NamedTuple):
    """All of a block that is no tensor, in the operators' types.

    ``units`` counts a layer's, ``geometry`` has every unit's numbers, ``mask_scales`` is 0 for a layer without a dropout mask,
    ``keep`` says whose bottleneck is kept for backward, ``group`` which ranks share the batch's statistics.
    """

    units: list[int]
    eps: list[float]
    batch_stats: list[bool]
    geometry: list[int]
    mask_scales: list[float]
    activation: str
    slope: float
    keep: list[bool]
    backend: str
    group: str = ""

    @staticmethod
    def of(
        layers: Sequence[DenseLayer], activation: Activation, keep: list[bool], backend: str, group: str = ""
    ) -> DenseBlockConfig:
        units = [unit for layer in layers for unit in layer.units]
        return DenseBlockConfig(
            [len(layer.units) for layer in layers],
            [unit.norm.eps for unit in units],
            [unit.norm.batch_stats for unit in units],
            [n for unit in units for n in geometry_of(unit.conv)],
            [0.0 if layer.mask is None else layer.mask_scale for layer in layers],
            *activation,
            keep,
            backend,
            group,
        )

    def layers(self, tensors: Sequence[Optional[Tensor]], masks: Sequence[Tensor]) -> list[DenseLayer]:
        """The layers as they were given, around other tensors."""
        units = iter(units_from(tensors, self.eps, self.batch_stats, self.geometry))
        mask = iter(masks)
        return [
            DenseLayer(tuple(islice(units, count)), next(mask) if scale else None, scale)
            for count, scale in zip(self.units, self.mask_scales)
        ]


class _Walk(NamedTuple):
    """One layer's place in the buffer."""

    index: int
    layer: DenseLayer
    channels: int
    end: int


def _walk(layers: Sequence[DenseLayer], channels: int) -> Iterator[_Walk]:
    for index, layer in enumerate(layers):
        end = channels + layer.units[-1].conv.weight.shape[0]
        yield _Walk(index, layer, channels, end)
        channels = end


def forward(
    x: Tensor, tensors, masks, config: DenseBlockConfig, read_behind: bool = False
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The buffer of all maps; its statistics, those of the bottlenecks, and where ranks share them the number of positions of
    all ranks; the bottlenecks that are kept.

    ``read_behind`` says that a norm behind the block reads the buffer with the batch's statistics.
    """
    layers = config.layers(tensors, masks)
    backend = backends.get(config.backend)
    activation = Activation(config.activation, config.slope)
    walk = list(_walk(layers, x.shape[1]))
    compute = layers[0].units[0].conv.weight.dtype
    buffer = empty_map(x, walk[-1].end, torch.promote_types(x.dtype, compute))
    count = buffer.numel() // buffer.shape[1]
    ranks = Ranks(config.group, count)
    stats = Stats(*(torch.zeros(walk[-1].end, dtype=accumulation_dtype(buffer.dtype), device=x.device) for _ in range(2)))
    # The statistics of a channel are needed where a later layer normalises by them.
    readers = [*(layer.units[0].norm.batch_stats for layer in layers), read_behind]
    bottleneck_stats, kept = [], []
    spare: Optional[Tensor] = None  # the memory of a bottleneck that nobody reads any more

    buffer[:, : x.shape[1]].copy_(x)
    # Norms none of which waits for statistics may be folded at once.
    norms = [unit.norm for layer in layers for unit in layer.units]
    waits = not backend.folds_at_once or any(norm.batch_stats for norm in norms)
    folds = iter(() if waits else backend.folds(norms, [stats] * len(norms), [count] * len(norms), activation))
    before, ticket = _channels(stats, 0, x.shape[1]), backend.ticket(buffer)
    if any(readers):
        for to, found in zip(before, backend.channel_stats(buffer[:, : x.shape[1]])):
            to.copy_(found)
        ranks.merge_(before)
    fold = next(folds, None) or backend.fold(norms[0], before, count, activation)
    for index, layer, C, end in walk:
        source, target = buffer.narrow(1, 0, C), buffer.narrow(1, C, end - C)
        conv = layer.units[0].conv
        if len(layer.units) == 2:
            width = conv.weight.shape[0]
            z = empty_map(x, width, compute) if spare is None or spare.shape[1] != width else spare
            spare = None if config.keep[index] else z
            norm, last = layer.units[1]
            z_stats = Stats.room(z, norm)
            operands = source, fold.affine, conv, z, None, 1.0, z_stats if norm.batch_stats else None
            fold = backend.bn_act_conv(*operands, norm if waits else None) or next(folds)
            if config.group and norm.batch_stats:
                ranks.merge_(z_stats)
                fold = backend.fold(norm, z_stats, count, activation)
            bottleneck_stats += z_stats
            if config.keep[index]:
                kept.append(z)
            source, conv = z, last
        new = _channels(stats, C, end) if any(readers[index + 1 :]) else None
        whole = _channels(stats, 0, end)
        reader = layers[index + 1].units[0].norm if waits and index + 1 < len(layers) else None
        operands, prefix = (source, fold.affine, conv, target, layer.mask, layer.mask_scale, new), Prefix(before, whole, ticket)
        fold = backend.bn_act_conv(*operands, None if config.group else reader, prefix) or next(folds, None)
        if config.group and new is not None:
            ranks.merge_(new)
        if config.group and reader is not None:
            fold = backend.fold(reader, whole, count, activation)
        before = whole
    total = [ranks.total] if config.group else []
    return buffer, [*stats, *bottleneck_stats, *total], kept


def _channels(stats: Stats, begin: int, end: int) -> Stats:
    return Stats(stats.mean.narrow(0, begin, end - begin), stats.m2.narrow(0, begin, end - begin))


class BufferGradient(NamedTuple):
    """The gradient of a block's buffer: ``D``, and the correction of it that all consumers of a channel have asked for so far,
    ``beta * x + delta``; ``deferred`` says whether any has."""

    D: Tensor
    ones: Tensor
    beta: Tensor
    delta: Tensor
    deferred: bool

    @staticmethod
    def of(D: Tensor) -> BufferGradient:
        dtype = accumulation_dtype(D.dtype)
        beta, delta = D.new_zeros((2, D.shape[1]), dtype=dtype).unbind()
        return BufferGradient(D, D.new_ones(D.shape[1], dtype=dtype), beta, delta, False)

    def pending(self, buffer: Tensor, begin: int, end: int) -> Pending:
        """That of a slice of the channels; once all its consumers have added to it, its reader may finish it."""
        size = end - begin
        D, z = self.D.narrow(1, begin, size), buffer.narrow(1, begin, size)
        ones, beta, delta = self.ones.narrow(0, begin, size), self.beta.narrow(0, begin, size), self.delta.narrow(0, begin, size)
        return Pending(D, z, ones, beta, delta)


def backward(
    gradient: BufferGradient, buffer: Tensor, tensors, masks, config: DenseBlockConfig, stats, kept, needs
) -> list[Tensor]:
    """The gradients that ``needs`` asks for, of x and of every unit's `GRADS`; empty tensors for the rest."""
    layers = config.layers(tensors, masks)
    backend = backends.get(config.backend)
    activation = Activation(config.activation, config.slope)
    mean, m2, *bottleneck_stats = stats
    stats = Stats(mean, m2)
    count = buffer.numel() // buffer.shape[1]
    ranks = Ranks(config.group, count, bottleneck_stats.pop() if config.group else None)
    kept = list(kept)

    growth = sum(layer.units[-1].conv.weight.shape[0] for layer in layers)
    C0 = buffer.shape[1] - growth
    walk = list(_walk(layers, C0))
    D, *_, deferred = gradient
    results: list[Optional[Tensor]] = [None] * len(needs)

    def record(unit: int, grads: ConvGrads) -> None:
        values = (grads.norm_weight, grads.norm_bias, grads.weight, grads.bias)
        for i, (value, position) in enumerate(zip(values, GRADS)):
            if needs[1 + 4 * unit + i]:
                results[1 + 4 * unit + i] = gradient_like(value, tensors[UNIT * unit + position])

    def wants_weight(unit: int) -> bool:
        return any(needs[3 + 4 * unit : 5 + 4 * unit])

    of_bottlenecks = iter(zip(bottleneck_stats[::2], bottleneck_stats[1::2]))
    unit_stats = [
        of
        for _, layer, C, _ in walk
        for of in (_channels(stats, 0, C), *(Stats(*next(of_bottlenecks)) for _ in layer.units[1:]))
    ]
    norms = [unit.norm for layer in layers for unit in layer.units]
    folds = backend.folds(norms, unit_stats, [count] * len(norms), activation)
    unit = len(norms)
    for index, layer, C, end in reversed(walk):
        unit -= len(layer.units)
        if not any(needs[: 1 + 4 * (unit + len(layer.units))]):
            break  # nothing before this point wants a gradient
        upstream: Tensor | Pending = ranks.share_(gradient.pending(buffer, C, end)) if deferred else D[:, C:end]
        if layer.mask is not None:
            upstream = backend.pending_grad_(upstream) if deferred else upstream
            upstream.mul_(layer.mask).mul_(layer.mask_scale)
        norm, conv = layer.units[0]
        source = buffer.narrow(1, 0, C)
        fold = folds[unit]
        if len(layer.units) == 2:
            second = layer.units[1]
            if config.keep[index]:
                z = kept.pop()
            else:
                z = empty_map(buffer, conv.weight.shape[0], conv.weight.dtype)
                backend.bn_act_conv(source, fold.affine, conv, z, None, 1.0, None)
            shared = bool(config.group) and second.norm.batch_stats
            needed = wants_weight(unit + 1)
            grads = backend.bn_act_conv_backward(z, folds[unit + 1], second.conv, upstream, None, needed, not shared)
            record(unit + 1, grads)
            upstream = ranks.share_(grads.input) if shared else grads.input
            del z, grads
        into, own = gradient.pending(buffer, 0, C), len(layer.units) == 2
        record(unit, backend.bn_act_conv_backward(source, fold, conv, upstream, into, wants_weight(unit), False, own))
        del upstream
        deferred = deferred or norm.batch_stats
    if needs[0]:
        dx = backend.pending_grad_(ranks.share_(gradient.pending(buffer, 0, C0))) if deferred else D[:, :C0]
        # A copy: a slice would keep all of D alive while what stands before the block runs.
        results[0] = empty_map(buffer, C0, dx.dtype).copy_(dx)
    return [torch.empty(0, dtype=buffer.dtype, device=buffer.device) if r is None else r for r in results]


def forward_fake(x: Tensor, tensors, masks, config: DenseBlockConfig) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    layers = config.layers(tensors, masks)
    compute = layers[0].units[0].conv.weight.dtype
    *_, last = _walk(layers, x.shape[1])
    buffer = empty_map(x, last.end, torch.promote_types(x.dtype, compute))
    stats = [buffer.new_empty(last.end, dtype=accumulation_dtype(buffer.dtype)) for _ in range(2)]
    kept = []
    for layer, keep in zip(layers, config.keep):
        if len(layer.units) == 2:
            width = layer.units[0].conv.weight.shape[0]
            size = width if layer.units[1].norm.batch_stats else 0
            stats += [buffer.new_empty(size, dtype=accumulation_dtype(compute)) for _ in range(2)]
            if keep:
                kept.append(empty_map(x, width, compute))
    if config.group:
        stats.append(buffer.new_empty(1, dtype=torch.float64))
    return buffer, stats, kept


def backward_fake(buffer: Tensor, tensors, masks, config: DenseBlockConfig, needs) -> list[Tensor]:
    growth = sum(layer.units[-1].conv.weight.shape[0] for layer in config.layers(tensors, masks))
    wanted = [empty_map(buffer, buffer.shape[1] - growth, buffer.dtype), *parameters_of(tensors)]
    return [
        (value if i == 0 else torch.empty_like(value)) if need else buffer.new_empty(0)
        for i, (need, value) in enumerate(zip(needs, wanted))
    ]


def _dense_block(x: Tensor, tensors, masks, *numbers):
    return forward(x, tensors, masks, DenseBlockConfig(*numbers))


def _dense_block_backward(grad: Tensor, out: Tensor, tensors, masks, *rest) -> list[Tensor]:
    *numbers, stats, kept, needs = rest
    gradient = BufferGradient.of(torch.empty_like(out).copy_(grad))
    return backward(gradient, out, tensors, masks, DenseBlockConfig(*numbers), stats, kept, needs)


def _dense_block_fake(x: Tensor, tensors, masks, *numbers):
    return forward_fake(x, tensors, masks, DenseBlockConfig(*numbers))


def _dense_block_backward_fake(grad: Tensor, out: Tensor, tensors, masks, *rest) -> list[Tensor]:
    *numbers, _, _, needs = rest
    return backward_fake(out, tensors, masks, DenseBlockConfig(*numbers), needs)


run = EngineOperator(f"dense_block(Tensor x, {SCHEMA}) -> (Tensor out, Tensor[] stats, Tensor[] kept)", _dense_block, _dense_block_fake)
run_backward = EngineOperator(
    f"dense_block_backward(Tensor grad, Tensor out, {SCHEMA}, Tensor[] stats, Tensor[] kept, bool[] needs) -> Tensor[]",
    _dense_block_backward,
    _dense_block_backward_fake,
)
