"""The maps of a residual block and the numbers that say all else of it: what its forward and its backward share.

See `resdense_ext.ops.residual_block` for what the maps are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from resdense_ext import reference
from resdense_ext.ops.conv1x1_bn_add_act import Pointwise, kept_for_backward
from resdense_ext.ops.convolve import convolved
from resdense_ext.ops.instances import are_instances, backend_of, shape_of_statistics
from resdense_ext.ops.operands import Fold, Pending, Stats
from resdense_ext.ops.ranks import Ranks
from resdense_ext.ops.units import UNIT, conv_of, geometry_of, group_of
from resdense_ext.reference import Activation, BatchNorm, Conv, Pool, ResidualBlock, Shortcut, Unit

__all__ = [
    "SCHEMA",
    "Maps",
    "ResidualBlockConfig",
    "cost_of",
    "counts_of",
    "norms_of",
    "plan_of",
    "reads_out",
    "shape_behind",
    "sizes_of",
    "takes_stats",
    "units_of",
]

SCHEMA = (
    "Tensor?[] tensors, bool[] normed, float[] eps, bool[] batch_stats, int[] norm_groups, bool instance, int[] geometry, "
    "bool activated, int[] pool, str activation, float slope, str last, float last_slope, str[] plan, str backend, str group"
)


class ResidualBlockConfig(NamedTuple):
    """All of a block that is no tensor, in the operators' types.

    The norms' lists have a value for every unit, for the end and for the shortcut; ``instance`` says whether they take statistics of
    every sample by itself; ``geometry`` has the numbers of every convolution. ``activated`` and ``pool`` are the shortcut's, the
    latter its windows and its ``ceil_mode`` or nothing. ``plan`` says how backward comes by the maps 1 to n + 1, see `plan_of`, and
    ``group`` which ranks share the batch's statistics.
    """

    normed: list[bool]
    eps: list[float]
    batch_stats: list[bool]
    norm_groups: list[int]
    instance: bool
    geometry: list[int]
    activated: bool
    pool: list[int]
    activation: str
    slope: float
    last: str
    last_slope: float
    plan: list[str]
    backend: str
    group: str

    @staticmethod
    def of(
        block: ResidualBlock, activation: Activation, last: Activation, plan: list[str], backend: str
    ) -> ResidualBlockConfig:
        norms, pool = norms_of(block), None if block.shortcut is None else block.shortcut.pool
        return ResidualBlockConfig(
            [norm is not None for norm in norms],
            [0.0 if norm is None else norm.eps for norm in norms],
            [takes_stats(norm) for norm in norms],
            [0 if norm is None else norm.groups for norm in norms],
            are_instances(norms),
            [n for _, conv in units_of(block) if conv is not None for n in geometry_of(conv)],
            block.shortcut is not None and block.shortcut.activated,
            [] if pool is None else [*(n for sizes in pool.windows for n in sizes), int(pool.ceil_mode)],
            *activation,
            *last,
            plan,
            backend,
            group_of(norms),
        )

    def block(self, tensors: Sequence[Optional[Tensor]]) -> ResidualBlock:
        """The block as it was given, around other tensors."""
        *units, (end, _), (norm, conv) = (self._unit(i, tensors[UNIT * i : UNIT * (i + 1)]) for i in range(len(self.eps)))
        shortcut = None if conv is None else Shortcut(conv, norm, self.activated, self._pool())
        return ResidualBlock(tuple(units), end, shortcut)

    def _pool(self) -> Optional[Pool]:
        if not self.pool:
            return None
        *windows, ceil_mode = self.pool
        rank = len(windows) // 3
        return Pool("average", *(tuple(windows[i * rank : (i + 1) * rank]) for i in range(3)), bool(ceil_mode))

    def _unit(self, i: int, tensors: Sequence[Optional[Tensor]]) -> Unit:
        norm, conv = None, None
        if self.normed[i]:
            norm = BatchNorm(*tensors[:4], self.batch_stats[i], None, self.eps[i], groups=self.norm_groups[i])
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


def sizes_of(shape: Sequence[int], block: ResidualBlock) -> list[Sequence[int]]:
    """The spatial sizes of every map, of an input of this shape; of that of a projection whether there is one or not."""
    sizes: list[Sequence[int]] = [shape[2:]]
    for unit in block.units:
        sizes.append(unit.conv.outputs(sizes[-1]))
    return [*sizes, sizes[-1]]


def shape_behind(shape: Sequence[int], block: ResidualBlock) -> tuple[int, ...]:
    """The shape of the output, for an input of this shape."""
    return (shape[0], block.units[-1].conv.weight.shape[0], *sizes_of(shape, block)[-1])


def counts_of(shape: Sequence[int], block: ResidualBlock) -> list[int]:
    """The number of positions of every map."""
    return [shape[0] * torch.Size(sizes).numel() for sizes in sizes_of(shape, block)]


def convs_of(block: ResidualBlock) -> list[Optional[Conv]]:
    """Convolution i writes map i + 1."""
    return [*(unit.conv for unit in block.units), None if block.shortcut is None else block.shortcut.conv]


def plan_of(shape: Sequence[int], block: ResidualBlock, last: Activation, policy: str) -> list[str]:
    """How backward comes by the maps 1 to n + 1, of an input of this shape.

    - "kept": it was kept;
    - "again": it is computed again;
    - "moments": it does without, as the moments of what its convolution reads tell all of it that its norm asks for; see
      `resdense_ext.ops.conv1x1_bn_add_act`;
    - "weight": likewise, as the gradient of its convolution's weight tells it where the norm has running statistics;
    - "none": there is no such map, or it feeds nothing but a norm that is frozen altogether.
    """
    plan, norms = [], norms_of(block)
    # To know the derivative of the last activation, "min" has to add up again.
    whole = policy == "min" and not reference.determined(last)
    for i, conv in enumerate(convs_of(block), 1):
        inside = i < len(block.units) or whole
        if conv is None or not (inside or _trains(norms[i])):
            plan.append("none")
        elif not inside and _has_moments(conv, norms[i], counts_of(shape, block)[i]):
            plan.append("moments")
        elif not inside and not norms[i].batch_stats and conv.weight.requires_grad and not are_instances(norms):
            plan.append("weight")
        else:
            plan.append("kept" if policy == "fast" else "again")
    return plan


def _has_moments(conv: Conv, norm: BatchNorm, count: int) -> bool:
    """Whether the moments are worth their arithmetic. They are of this rank's positions alone."""
    outputs, inputs, *kernel = conv.weight.shape
    size = (count, inputs * conv.groups, outputs, conv.groups)
    return norm.centers and not norm.group and all(n == 1 for n in kernel) and kept_for_backward(*size) == "gram"


def _trains(norm: Optional[BatchNorm]) -> bool:
    return norm is not None and (norm.batch_stats or (norm.weight is not None and norm.weight.requires_grad))


def cost_of(x: Tensor, block: ResidualBlock, last: Activation, dtype: torch.dtype) -> tuple[int, int]:
    """The bytes of the maps that "fast" keeps beside x and the output, and the FLOPs of those that "min" computes again."""
    shape = shape_of_statistics(x.shape, are_instances(norms_of(block)))
    plans = [plan_of(shape, block, last, policy) for policy in ("fast", "min")]
    nbytes = flops = 0
    for conv, count, fast, least in zip(convs_of(block), counts_of(x.shape, block)[1:], *plans):
        if fast == "kept":
            nbytes += count * conv.weight.shape[0] * dtype.itemsize
        if least == "again":
            flops += 2 * count * conv.weight.numel()
    if not reference.determined(last):
        outputs = block.units[-1].conv.weight.shape[0]
        nbytes += counts_of(x.shape, block)[len(block.units)] * outputs * dtype.itemsize
    return nbytes, flops


def reads_out(last: Activation) -> bool:
    """Whether backward reads the block's output."""
    return last.name != "identity" and reference.determined(last)


def takes_stats(norm: Optional[BatchNorm]) -> bool:
    return norm is not None and norm.batch_stats


class Maps:
    """The maps of a block, computed forward or again, and their statistics, taken or known."""

    def __init__(self, x: Tensor, block: ResidualBlock, config: ResidualBlockConfig, stats: Sequence[Tensor] = ()):
        self.block, self.backend, self.norms = block, backend_of(config.backend, len(x), config.instance), norms_of(block)
        self.activation, self.last = config.activations
        self.counts = counts_of(shape_of_statistics(x.shape, config.instance), block)
        self.units = len(block.units)
        self.maps: list[Optional[Tensor]] = [x] + [None] * (self.units + 1)
        self.known = bool(stats)
        self.stats = [Stats(*stats[2 * i : 2 * i + 2]) if stats else Stats.room(x, None) for i in range(len(self.maps))]
        totals = stats[-1].split(1) if stats and config.group else [None] * len(self.maps)
        self.ranks = [Ranks(config.group, count, total) for count, total in zip(self.counts, totals)]

    def fold(self, i: int) -> Optional[Fold]:
        norm = self.norms[i]
        if norm is None:
            return None
        return self._folds[i] if self.known else self.backend.fold(norm, self.stats[i], self.counts[i], self.activation)

    @cached_property
    def _folds(self) -> dict[int, Fold]:
        """All norms', at once, where all statistics are known."""
        at = [i for i, norm in enumerate(self.norms) if norm is not None]
        norms, stats, counts = ([of[i] for i in at] for of in (self.norms, self.stats, self.counts))
        return dict(zip(at, self.backend.folds(norms, stats, counts, self.activation)))

    def compute(self, keep: Sequence[bool], skip: Sequence[bool] = ()) -> None:
        """All maps 1 to n + 1 but those to ``skip``; those inside that are not to ``keep`` are let go once read."""
        x, skip = self.maps[0], skip or [False] * len(keep)
        if takes_stats(self.norms[0]) and not self.known:
            self.stats[0] = Stats(*self.backend.channel_stats(x))
            self.ranks[0].merge_(self.stats[0])
        first = self.fold(0)
        for i, unit in enumerate(self.block.units):
            if not skip[i]:
                self._write(i + 1, self.maps[i], self.fold(i) if i else first, unit.conv)
            if i and not keep[i - 1]:
                self.maps[i] = None
        if self.block.shortcut is not None and not skip[self.units]:
            self._write(self.units + 1, *self.projected(first)[:3])

    def projected(self, first: Optional[Fold]) -> Pointwise:
        """The shortcut's convolution and what it reads; ``first`` is the fold of the first unit's norm.

        A pooled input is made wherever it is read: to keep it would take a quarter of x, which is kept anyhow.
        """
        conv, _, activated, pool = self.block.shortcut
        x = self.maps[0] if pool is None else self.backend.avg_pool(self.maps[0], pool)
        return Pointwise(x, first if activated else None, conv, self.backend)

    def _write(self, i: int, source: Tensor, fold: Optional[Fold], conv: Conv) -> None:
        self.maps[i], stats = convolved(self.backend, source, fold, conv, None if self.known else self.norms[i])
        if not self.known:
            self.stats[i] = stats
            if takes_stats(self.norms[i]):
                self.ranks[i].merge_(stats)

    @property
    def statistics(self) -> list[Tensor]:
        """Of all maps; behind them, where ranks share them, the numbers of positions on all ranks."""
        flat = [t for stats in self.stats for t in stats]
        if not self.ranks[0].name:
            return flat
        none = flat[0].new_zeros(1, dtype=torch.float64)
        return [*flat, torch.cat([none if ranks.total is None else ranks.total for ranks in self.ranks])]

    def shares(self, i: int) -> bool:
        """Whether ranks share the statistics of map i."""
        return bool(self.ranks[i].name) and takes_stats(self.norms[i])

    def share_(self, i: int, pending: Pending) -> Pending:
        """The gradient of map i with the correction that its norm owes it on all ranks."""
        return self.ranks[i].share_(pending) if self.shares(i) else pending

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
