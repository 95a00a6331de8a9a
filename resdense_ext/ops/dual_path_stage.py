"""The dual path stage: residual halves that are new a block, dense halves in one buffer, and units that read both side by side.

Forward, for a block of n units on the residual half r, of R channels, and the first C channels of the buffer::

    z_1 = conv_1(act(bn_1([r, buffer[:, :C]])))          bn_1 uses the statistics that came with either
    z_i = conv_i(act(bn_i(z_{i-1})))                     1 < i <= n, and z_n is written to where it belongs:
    r   = r + z_n[:, :R]                                 a new tensor, whose statistics are taken
    buffer[:, C:C+k] = z_n[:, R:]                        and of the new channels, once

The first block may read one or two other maps and make both halves of them by a projection, a unit as well. Nothing is
concatenated, see `resdense_ext.ops.split_unit`.

Backward, from the last block to the first: the buffer's gradient is that of a dense block, of which the corrections of all
readers of a channel are applied once (`resdense_ext.ops.dense_block`). The gradient G of r goes on to the r before, and the
block's first unit adds to it, with a correction of its own; it is finished where the next unit reads it.

Kept are the residual halves between the blocks and the buffer ("min"), and z_1 to z_{n-1} ("fast").

Source: Chen et al., Dual Path Networks (2017).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from resdense_ext.ops import backend as backends
from resdense_ext.ops.dense_block import BufferGradient
from resdense_ext.ops.layout import empty_map, map_beside
from resdense_ext.ops.operands import Pending, Stats
from resdense_ext.ops.operator import EngineOperator
from resdense_ext.ops.split_unit import Source, SplitUnit
from resdense_ext.ops.units import Gradients, geometry_of, parameters_of, units_from, wanted_gradients
from resdense_ext.reference import Activation, DualPathBlock, Unit, accumulation_dtype

__all__ = ["DualPathStageConfig", "cost_of", "saved_inputs", "statistics_of", "units_of"]

_SCHEMA = (
    "Tensor?[] tensors, int[] units, bool projected, int residual_channels, float[] eps, bool[] batch_stats, int[] geometry, "
    "str activation, float slope, str[] plan, str backend"
)


class DualPathStageConfig(NamedTuple):
    """All of a stage that is no tensor, in the operators' types.

    ``units`` counts a block's, ``geometry`` has every unit's numbers, those of a projection first. ``plan`` says what of a block
    is kept for backward: "none", "min" or "fast".
    """

    units: list[int]
    projected: bool
    residual_channels: int
    eps: list[float]
    batch_stats: list[bool]
    geometry: list[int]
    activation: str
    slope: float
    plan: list[str]
    backend: str

    @staticmethod
    def of(blocks: Sequence[DualPathBlock], activation: Activation, plan: list[str], backend: str) -> DualPathStageConfig:
        units = units_of(blocks)
        return DualPathStageConfig(
            [len(block.units) for block in blocks],
            blocks[0].projection is not None,
            blocks[0].residual_channels,
            [unit.norm.eps for unit in units],
            [unit.norm.batch_stats for unit in units],
            [n for unit in units for n in geometry_of(unit.conv)],
            *activation,
            plan,
            backend,
        )

    def blocks(self, tensors: Sequence[Optional[Tensor]]) -> list[DualPathBlock]:
        """The blocks as they were given, around other tensors."""
        units = units_from(tensors, self.eps, self.batch_stats, self.geometry)
        projection = units.pop(0) if self.projected else None
        blocks = []
        for count in self.units:
            blocks.append(DualPathBlock(tuple(units[:count]), self.residual_channels, None if blocks else projection))
            units = units[count:]
        return blocks


def units_of(blocks: Sequence[DualPathBlock]) -> list[Unit]:
    """In the order of the operators: the projection's first."""
    first = [] if blocks[0].projection is None else [blocks[0].projection]
    return first + [unit for block in blocks for unit in block.units]


def saved_inputs(xs: Sequence[Tensor], projected: bool) -> list[Tensor]:
    """Those that backward reads; without a projection the second one is in the buffer."""
    return list(xs) if projected else list(xs[:1])


def cost_of(x: Tensor, block: DualPathBlock, dtype: torch.dtype) -> tuple[int, int]:
    """The bytes of the inner maps of a block that reads maps of the sizes of ``x``, which "fast" keeps, and the FLOPs by which
    "min" computes them again."""
    nbytes = flops = 0
    sizes: Sequence[int] = x.shape[2:]
    for unit in block.units[:-1]:
        sizes = unit.conv.outputs(sizes)
        count = x.shape[0] * torch.Size(sizes).numel()
        nbytes += count * unit.conv.weight.shape[0] * dtype.itemsize
        flops += 2 * count * unit.conv.weight.numel()
    return nbytes, flops


class _Walk(NamedTuple):
    """One block's place in the stage: the number of its first unit, and the channels of the buffer that it reads and writes."""

    index: int
    block: DualPathBlock
    unit: int
    channels: int
    end: int


def _walk(blocks: Sequence[DualPathBlock], channels: int) -> Iterator[_Walk]:
    unit = 0 if blocks[0].projection is None else 1
    for index, block in enumerate(blocks):
        end = channels + block.units[-1].conv.weight.shape[0] - block.residual_channels
        yield _Walk(index, block, unit, channels, end)
        channels, unit = end, unit + len(block.units)


class _Stage:
    """What forward and backward share: the blocks, their places, and the shape of the halves."""

    def __init__(self, xs: Sequence[Tensor], tensors, config: DualPathStageConfig) -> None:
        # All maps are walked together.
        self.inputs = [map_beside(xs[0], x) for x in saved_inputs(xs, config.projected)]
        self.blocks = config.blocks(tensors)
        self.backend, self.activation = backends.get(config.backend), Activation(config.activation, config.slope)
        self.projection, self.residual_channels = self.blocks[0].projection, config.residual_channels
        x, self.compute = self.inputs[0], self.blocks[0].units[0].conv.weight.dtype
        if self.projection is None:
            self.begin, self.dtype, self.sizes = xs[1].shape[1], torch.promote_types(x.dtype, self.compute), x.shape[2:]
        else:
            conv = self.projection.conv
            self.begin, self.dtype = conv.weight.shape[0] - self.residual_channels, self.compute
            self.sizes = conv.outputs(x.shape[2:])
        self.walk = list(_walk(self.blocks, self.begin))
        self.readers = [block.units[0].norm.batch_stats for block in self.blocks]
        """Whether a block's first norm normalises by the statistics of the two halves."""

    def new_map(self, channels: int, dtype: torch.dtype) -> Tensor:
        return empty_map(self.inputs[0], channels, dtype, self.sizes)

    def unit(self, unit: Unit, sources: Sequence[Source]) -> SplitUnit:
        return SplitUnit(self.backend, unit, sources, self.activation)

    def source(self, x: Tensor, wanted: bool) -> Source:
        """The map with its statistics, taken if they are wanted."""
        return Source(x, Stats(*self.backend.channel_stats(x)) if wanted else Stats.room(x, None))

    def read_inputs(self) -> bool:
        """Whether any norm normalises by the statistics of the inputs."""
        return self.readers[0] or (self.projection is not None and self.projection.norm.batch_stats)


def _channels(stats: Stats, begin: int, end: int) -> Stats:
    return Stats(stats.mean[begin:end], stats.m2[begin:end])


def _forward(xs: Sequence[Tensor], tensors, config: DualPathStageConfig) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """The two halves; the statistics of all maps, see `_statistics`; the maps that are kept, in the order of the blocks."""
    stage = _Stage(xs, tensors, config)
    R, begin, readers = stage.residual_channels, stage.begin, stage.readers
    buffer = stage.new_map(stage.walk[-1].end, stage.dtype)
    dense = Stats(*(torch.zeros(buffer.shape[1], dtype=accumulation_dtype(buffer.dtype), device=buffer.device) for _ in range(2)))
    first = buffer[:, :begin]
    if stage.projection is None:
        residual = stage.inputs[0]
        first.copy_(xs[1])
        if any(readers):
            for to, found in zip(_channels(dense, 0, begin), stage.backend.channel_stats(first)):
                to.copy_(found)
        sources = [stage.source(residual, readers[0])]
        stats = [*dense, *sources[0].stats]
        sources.append(Source(first, _channels(dense, 0, begin)))
    else:
        residual = stage.new_map(R, stage.dtype)
        sources = [stage.source(x, stage.read_inputs()) for x in stage.inputs]
        stats = [*dense, *(t for source in sources for t in source.stats)]
        new = _channels(dense, 0, begin) if any(readers[1:]) else None
        stage.unit(stage.projection, sources).write([residual, first], [None, new])
    kept = []
    for index, block, _, C, end in stage.walk:
        unit = stage.unit(block.units[0], sources)
        for following in block.units[1:]:
            z = unit.empty_output()
            z_stats = Stats.room(z, following.norm)
            unit.write([z], [z_stats if following.norm.batch_stats else None])
            stats += z_stats
            if config.plan[index] == "fast":
                kept.append(z)
            unit = stage.unit(following, [Source(z, z_stats)])
        added = stage.new_map(R, stage.compute)
        later = readers[index + 1 :]
        unit.write([added, buffer[:, C:end]], [None, _channels(dense, C, end) if any(later) else None])
        residual = added.add_(residual) if added.dtype == residual.dtype else added + residual
        if later:
            sources = [stage.source(residual, later[0]), Source(buffer[:, :end], _channels(dense, 0, end))]
            stats += sources[0].stats
            if config.plan[index + 1] != "none":
                kept.append(residual)
    return residual, buffer, stats, kept


def _statistics(stats: Sequence[Tensor], walk: Sequence[_Walk], inputs: int) -> list[list[list[Stats]]]:
    """Of every block, of every unit, the statistics of what it reads; a projection reads what its block's first unit reads.

    ``inputs`` counts those of `saved_inputs`.
    """
    dense, *others = map(Stats, stats[::2], stats[1::2])
    new = iter(others)
    reads = [next(new) for _ in range(inputs)]
    if walk[0].block.projection is None:
        reads.append(_channels(dense, 0, walk[0].channels))
    found = []
    for index, block, _, _, end in walk:
        found.append([reads, *([next(new)] for _ in block.units[1:])])
        if index + 1 < len(walk):
            reads = [next(new), _channels(dense, 0, end)]
    return found


def statistics_of(
    xs: Sequence[Tensor], blocks: Sequence[DualPathBlock], stats: Sequence[Tensor]
) -> tuple[list[tuple[Tensor, Tensor]], list[int]]:
    """Of every one of `units_of`, mean and sum of squared deviations of what it reads, and the number of positions."""
    projection = blocks[0].projection
    channels = xs[-1].shape[1]
    if projection is not None:
        channels = projection.conv.weight.shape[0] - blocks[0].residual_channels
    taken = _statistics(stats, list(_walk(blocks, channels)), len(saved_inputs(xs, projection is not None)))
    found, counts, sizes = [], [], xs[0].shape[2:]
    for block, of_units in zip(blocks, taken):
        for unit, reads in zip(block.units, of_units):
            mean, m2 = (torch.cat(vectors) for vectors in zip(*reads))
            found.append((mean, m2))
            counts.append(xs[0].shape[0] * torch.Size(sizes).numel())
            sizes = unit.conv.outputs(sizes)
    first = 0 if projection is None else 1
    return found[:first] + found, counts[:first] + counts


def _backward(
    grad_residual: Optional[Tensor], grad_dense: Optional[Tensor], buffer: Tensor, xs, tensors, config, stats, kept, needs
) -> list[Tensor]:
    """The gradients that ``needs`` asks for, of the inputs and of every unit's `GRADS`; empty tensors for the rest."""
    stage = _Stage(xs, tensors, config)
    backend, kept, taken = stage.backend, list(kept), _statistics(stats, stage.walk, len(stage.inputs))
    grads = Gradients(needs, len(xs))
    gradient = BufferGradient.of(_copied(grad_dense, torch.empty_like(buffer)))
    G = _copied(grad_residual, stage.new_map(stage.residual_channels, stage.dtype))
    intos: list[Optional[Pending]] = []
    sources: list[Source] = []
    for index, block, unit, C, end in reversed(stage.walk):
        if not grads.wants_up_to(unit + len(block.units) - 1):
            break  # nothing before this point wants a gradient
        outer = config.projected and not index
        inner = [kept.pop() for _ in block.units[1:]][::-1] if config.plan[index] == "fast" else []
        if outer:
            maps = stage.inputs
            intos = [Pending.of(torch.zeros_like(x), x) if need else None for x, need in zip(maps, needs)]
        else:
            residual = kept.pop() if index else stage.inputs[0]
            maps = [residual, buffer[:, :C]]
            intos = [Pending.of(G, residual), gradient.pending(buffer, 0, C)]
        sources = [Source(*of) for of in zip(maps, taken[index][0])]
        units = _opened(stage, block, sources, inner, taken[index])
        upstream = [Pending.of(G, G), gradient.pending(buffer, C, end)]
        for i in reversed(range(len(units))):
            opened = units.pop()
            upstream, values = opened.backward(upstream, [None] if i else intos, grads.wants_weight(unit + i))
            grads.record(unit + i, *values)
        if not outer and stage.readers[index]:
            G = backend.pending_grad_(intos[0])
    if config.projected and grads.wants_up_to(0):
        upstream = [Pending.of(G, G), gradient.pending(buffer, 0, stage.begin)]
        _, values = stage.unit(stage.projection, sources).backward(upstream, intos, grads.wants_weight(0))
        grads.record(0, *values)
    _record_inputs(grads, stage, gradient, G, buffer, intos)
    return wanted_gradients(grads.found, xs, tensors)


def _opened(
    stage: _Stage, block: DualPathBlock, sources: Sequence[Source], inner: Sequence[Tensor], taken: Sequence[Sequence[Stats]]
) -> list[SplitUnit]:
    """The block's units on what they read, which is computed again where it was not kept."""
    units = [stage.unit(block.units[0], sources)]
    for i, following in enumerate(block.units[1:]):
        if inner:
            z = inner[i]
        else:
            z = units[i].empty_output()
            units[i].write([z], [None])
        units.append(stage.unit(following, [Source(z, *taken[i + 1])]))
    return units


def _record_inputs(grads: Gradients, stage: _Stage, gradient: BufferGradient, G: Tensor, buffer: Tensor, intos) -> None:
    """Finishes the gradients of the stage's inputs."""
    finish = stage.backend.pending_grad_
    if stage.projection is not None:
        for i, need in enumerate(grads.needs[: len(stage.inputs)]):
            if need:
                grads.found[i] = finish(intos[i]) if stage.read_inputs() else intos[i].dy
        return
    if grads.needs[0]:
        grads.found[0] = G
    if grads.needs[1]:
        pending = gradient.pending(buffer, 0, stage.begin)
        dx = finish(pending) if any(stage.readers) else pending.dy
        # A copy: a slice would keep all of the buffer's gradient alive while what stands before the stage runs.
        grads.found[1] = empty_map(buffer, stage.begin, dx.dtype).copy_(dx)


def _copied(grad: Optional[Tensor], to: Tensor) -> Tensor:
    """The gradient in this memory; zeros where there is none."""
    return to.zero_() if grad is None else to.copy_(grad)


def _targets(xs: Sequence[Tensor], tensors) -> list[Optional[Tensor]]:
    """What gradients are of: the inputs, and `GRADS` of every unit."""
    return [*xs, *parameters_of(tensors)]


def _dual_path_stage(x: list[Tensor], tensors, *numbers) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    return _forward(x, tensors, DualPathStageConfig(*numbers))


def _dual_path_stage_backward(grad_residual, grad_dense, dense: Tensor, x: list[Tensor], tensors, *rest) -> list[Tensor]:
    *numbers, stats, kept, needs = rest
    config = DualPathStageConfig(*numbers)
    return _backward(grad_residual, grad_dense, dense, x, tensors, config, stats, kept, needs)


def _dual_path_stage_fake(x: list[Tensor], tensors, *numbers) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    config = DualPathStageConfig(*numbers)
    stage = _Stage(x, tensors, config)
    dense = stage.new_map(stage.walk[-1].end, stage.dtype)
    stats = [dense.new_empty(dense.shape[1], dtype=accumulation_dtype(dense.dtype)) for _ in range(2)]
    kept: list[Tensor] = []

    def taken(z: Tensor, wanted: bool) -> list[Tensor]:
        size = z.shape[1] if wanted else 0
        return [z.new_empty(size, dtype=accumulation_dtype(z.dtype)) for _ in range(2)]

    residual = stage.inputs[0]
    for source in stage.inputs:
        stats += taken(source, stage.read_inputs())
    for index, block, *_ in stage.walk:
        if index:
            residual = stage.new_map(stage.residual_channels, stage.dtype)
            stats += taken(residual, stage.readers[index])
            if config.plan[index] != "none":
                kept.append(residual)
        sizes = stage.sizes if index else x[0].shape[2:]
        for unit, following in zip(block.units, block.units[1:]):
            sizes = unit.conv.outputs(sizes)
            z = empty_map(residual, unit.conv.weight.shape[0], stage.compute, sizes)
            stats += taken(z, following.norm.batch_stats)
            if config.plan[index] == "fast":
                kept.append(z)
    return stage.new_map(stage.residual_channels, stage.dtype), dense, stats, kept


def _dual_path_stage_backward_fake(grad_residual, grad_dense, dense: Tensor, x: list[Tensor], tensors, *rest) -> list[Tensor]:
    targets = _targets(x, tensors)
    # The inputs' gradients are maps in the layout of the first.
    wanted = [empty_map(x[0], t.shape[1], t.dtype, t.shape[2:]) for t in x] + targets[len(x) :]
    return [
        torch.empty_like(value) if need and i >= len(x) else value if need else x[0].new_empty(0)
        for i, (value, need) in enumerate(zip(wanted, rest[-1]))
    ]


run = EngineOperator(
    f"dual_path_stage(Tensor[] x, {_SCHEMA}) -> (Tensor residual, Tensor dense, Tensor[] stats, Tensor[] kept)",
    _dual_path_stage,
    _dual_path_stage_fake,
)
run_backward = EngineOperator(
    f"dual_path_stage_backward(Tensor? grad_residual, Tensor? grad_dense, Tensor dense, Tensor[] x, {_SCHEMA}, "
    "Tensor[] stats, Tensor[] kept, bool[] needs) -> Tensor[]",
    _dual_path_stage_backward,
    _dual_path_stage_backward_fake,
)
